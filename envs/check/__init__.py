"""Is this environment sound? The probes behind `shoal env check`.

Read first: `checker` (which probes run, and what they report), then `contract_probes` (the rules of an episode),
`pay_probes` (can the reward be had for nothing?) and `repeat_probes` (does a seed tell the same story twice?).
"""
