"""Where the parts of a run live: in one process, or as Ray actors. The rest of `rl` sees the same clients.

Read first: protocol.py; start.py chooses.
"""
