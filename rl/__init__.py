"""The learner's side of Shoal: from trajectories to weights, and everything around a run.

Wings, from the lowest: `algorithm` (trajectories to weights), `monitor` (what a run says), `runs` (its folder),
`cluster` (where parts live), `loop` (the asynchronous loop), `dashboard` (the page), `cli` (commands).
Read first: the picture in loop/controller.py.
"""
