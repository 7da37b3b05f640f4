"""python -m rl.train env=calculator seed=2        is the same as        shoal train env=calculator seed=2

From a config to a run: `rl.training`.
"""

import sys
from collections.abc import Sequence

from rl.cli.main import main as cli


def main(argv: Sequence[str] | None = None) -> int:
    """`shoal train` with these words, or those of the command line. Returns the exit code."""
    return cli(["train", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
