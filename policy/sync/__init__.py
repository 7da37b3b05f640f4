"""How weights travel from the learner to engines.

Read first: `snapshot` (one version's tensors, with a digest), then `transport` (which of the ways a run takes).
"""
