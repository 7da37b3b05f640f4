"""The sweeps of `shoal ls`: which runs belong together, and in which settings they differ."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from rl.dashboard.sweeps import place_in_sweep
from rl.monitor.progress import visible
from rl.runs.run_folder import RunFolder, RunSummary

MAX_VALUES = 8
"""Of one setting, on one line of a terminal; JSON has all."""


def sweep_places(runs: Sequence[RunSummary]) -> dict[str, dict[str, Any]]:
    """Run -> {"id", "number", "of", "settings"}, of those that are one of a sweep."""
    places = {run.name: place_in_sweep(RunFolder(path=run.path)) for run in runs}
    return {name: place for name, place in places.items() if place}


def sweeps_of(places: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One for each sweep, in the order of `places`.

    Example: [{"id": "20261123-150207-ab12", "runs": ["calc-...-1", "calc-...-2"], "of": 2,
    "varied": {"seed": ["1", "2"]}}]
    """
    members: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    for name, place in places.items():
        members.setdefault(place["id"], []).append((name, place))
    found = []
    for sweep, runs in members.items():
        runs.sort(key=lambda member: member[1]["number"])
        varied: dict[str, dict[str, None]] = {}
        for _, place in runs:
            for key, value in place["settings"].items():
                varied.setdefault(key, {})[value] = None
        found.append(
            {
                "id": sweep,
                "runs": [name for name, _ in runs],
                "of": max(place["of"] for _, place in runs),
                "varied": {key: list(values) for key, values in varied.items()},
            }
        )
    return found


def sweep_table(sweeps: Sequence[Mapping[str, Any]]) -> Table:
    """For a terminal. Cells are texts: rich would read markup in what a manifest says."""
    table = Table("sweep", "runs", "varied", box=None)
    for sweep in sweeps:
        varied = " ".join(f"{key}={_values(values)}" for key, values in sweep["varied"].items())
        cells = (visible(sweep["id"]), f"{len(sweep['runs'])} of {sweep['of']}", visible(varied))
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _values(values: Sequence[str]) -> str:
    more = f",… ({len(values)})" if len(values) > MAX_VALUES else ""
    return ",".join(values[:MAX_VALUES]) + more
