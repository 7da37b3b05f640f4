"""`shoal env ...`: list, make, play and check environments. Read first: env_commands.py."""
