"""Settings of Shoal: typed dataclasses (`schema`), YAML groups, and their loader (`loading`)."""
