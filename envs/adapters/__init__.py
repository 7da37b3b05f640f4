"""Environments of other ecosystems, one file each. A package is imported when an environment of it is made."""
