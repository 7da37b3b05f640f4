"""What was sampled, for ever: trajectories, their store, and the account of every group.

Read first: `trajectory`, then `ledger` (every group is admitted, trained or dropped once) and `recorder`.
"""
