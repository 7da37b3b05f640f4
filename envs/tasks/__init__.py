"""Which task comes next: seeds, splits, levels, and the curriculum that moves them.

Read first: `task_source`, then `curriculum`.
"""
