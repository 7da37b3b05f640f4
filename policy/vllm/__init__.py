"""Token generation by vLLM, behind the same protocol as the local engine.

Read first: `engine`, then `core` (vLLM's engine and how it is started), `rank_extension` and `parameter_map` (how
weights get into its parameters). `packages` finds which build is installed.
"""
