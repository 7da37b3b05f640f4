"""Many environments in one process, each on a thread of its own, none able to take another down.

Read first: `pool` (open, step, score, close, with a limit on each), then `client` (the same over Ray) and
`call_batching` (many small calls as one).
"""
