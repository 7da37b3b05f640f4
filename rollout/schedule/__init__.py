"""Who works on what, and how old it may be.

Read first: `staleness` (pure arithmetic of the bound), then `scheduler` (leases), `buffer` (what the learner waits
for) and `fleet` (workers that come and go).
"""
