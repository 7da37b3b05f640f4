"""One episode, and the group of episodes of one task.

Read first: `context` (what an episode is given), `episode` (the one loop that samples, records, scores and fails),
then `group` and `swap_lock` (when weights may change under it).
"""
