"""Commands that read runs and change nothing in them. Read first: show.py."""
