"""The asynchronous loop: takes groups, steps the learner, pushes weights, evaluates, writes checkpoints.

Read first: the picture in controller.py.
"""
