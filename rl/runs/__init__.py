"""A run's folder, and how one finds and reads it.

Read first: `run_folder` (what a run writes, who owns it), then `checkpoint` (what a run is resumed from). `transcript`
puts an episode into words, `notes` keeps what a person says about a run, `usage` finds a run by name or number.
"""
