"""The command `shoal`. Each command imports what it needs when it runs.

`readers` look at runs, `environments` try and check environments, `doctor` looks at this machine.
Read first: main.py.
"""
