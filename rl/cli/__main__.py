"""`python -m rl.cli`: the same as the command `shoal`."""

import sys

from rl.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
