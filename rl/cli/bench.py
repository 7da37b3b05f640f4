"""Benchmarks are scripts of the checkout, outside the wheel; this finds and runs them."""

from collections.abc import Sequence
from pathlib import Path

from conf.keys import nearest
from rl.cli.child_process import run_python
from rl.runs.usage import UsageError

SHARED = ("machine", "stored_result")
"""Modules in the same folder that are no benchmark."""


def run_benchmark(name: str | None, arguments: Sequence[str], *, checkout: Path | None = None) -> int:
    """Run benchmarks/<name>.py of the checkout with `arguments`; without a name, print what there is."""
    folder = (checkout or Path(__file__).resolve().parents[2]) / "benchmarks"
    if not folder.is_dir():
        raise UsageError(
            f"there is no {folder}: benchmarks are part of the source checkout, not of the installed package; "
            "clone the repository and run `pip install -e .` there"
        )
    names = sorted(path.stem for path in folder.glob("*.py") if path.stem not in SHARED)
    if name is None:
        print("\n".join(names))
        return 0
    if name not in names:
        raise UsageError(f"unknown benchmark {name!r}.{nearest(name, names, 0.5)} Available: {', '.join(names)}")
    return run_python([str(folder / f"{name}.py"), *arguments])
