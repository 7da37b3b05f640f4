"""From trajectories to weights: advantage, loss, batch, gradient, optimizer, and the learner that joins them.

Read first: learner.py, then loss.py for the formulas.
"""
