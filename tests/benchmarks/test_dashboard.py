"""What the benchmark of the dashboard writes down."""

import json

from benchmarks.dashboard import FOLDER, joined


def test_a_part_that_is_not_measured_again_keeps_its_figures_its_machine_and_its_time() -> None:
    quiet, loaded = {"load": 0.1}, {"load": 2.9}
    cost = {"utc": "2026-01-01T00:00+00:00", "machine": quiet, "figures": {"slowdown": 1.01, "pairs": 4}}
    scale = {"utc": "2026-01-02T00:00+00:00", "machine": loaded, "figures": {"first_chart_s": 0.5}}
    first = joined({}, {"cost": cost})
    assert first["machine"] == quiet and first["paired"]
    both = joined(first, {"scale": scale})
    assert both["figures"] == {"slowdown": 1.01, "pairs": 4, "first_chart_s": 0.5} and both["machine"] == loaded
    assert both["parts"]["cost"] == {"utc": cost["utc"], "machine": quiet}
    assert both["parts"]["scale"]["machine"] == loaded and both["ratios"] == {"slowdown": 1.01}


def test_the_committed_figures_say_where_each_part_comes_from() -> None:
    parts = json.loads((FOLDER / "results" / "dashboard.json").read_text())["parts"]
    assert set(parts) == {"scale", "cost"} and all("load" in part["machine"] for part in parts.values())
