"""Curves of a run as pictures: `shoal plot RUN` writes one PNG, `shoal report RUN` puts them on its page.

matplotlib draws them (extra `report`), without a screen and without its global state.
"""

import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.keys import nearest
from rl.monitor.json_lines import read_json_lines
from rl.runs.run_folder import RunFolder
from rl.runs.usage import UsageError, resolve_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, Any]
SUCCESS = "eval/success"
WIDTH_IN, HEIGHT_IN, DPI = 4.6, 2.6, 110
"""Of one panel."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """One picture."""

    title: str
    metrics: tuple[str, ...]
    low: float | None = 0.0
    """Lower end of the y-axis; None: as the values are."""
    high: float | None = None


PANELS = (
    Panel(title="held-out success, 95% interval", metrics=(SUCCESS,), high=1.0),
    Panel(title="reward", metrics=("reward/mean",), low=None),
    Panel(title="staleness (versions)", metrics=("off_policy/lag/mean", "off_policy/lag/max")),
    Panel(title="throughput (tokens/s)", metrics=("trainer/tok_s",)),
    Panel(title="share of the step that the learner waits", metrics=("time/trainer_idle_ratio",), high=1.0),
    Panel(title="entropy (nats)", metrics=("policy/entropy",)),
)


def plot(
    run: str, names: Sequence[str] = (), *, root: str = "runs", output: str | None = None, as_json: bool = False
) -> int:
    """Write a PNG of the named metrics, or of `PANELS`. Raises `UsageError` for an unknown metric or an empty run."""
    folder = resolve_run(root, run)
    rows = list(read_json_lines(folder.metrics))
    panels = _chosen(folder, rows, names) if names else with_values(rows)
    if not panels:
        raise UsageError(f"{folder.name} has no metrics yet: its first step is still to come")
    path = Path(output or f"{folder.name}.png")
    path.write_bytes(draw(rows, panels))
    told = {"path": str(path), "bytes": path.stat().st_size, "metrics": [m for panel in panels for m in panel.metrics]}
    print(json.dumps(told) if as_json else f"wrote {path}, {told['bytes'] / 1000:.0f} kB")
    return 0


def with_values(rows: Sequence[Row]) -> list[Panel]:
    """Those of `PANELS` that have something to show."""
    return [panel for panel in PANELS if any(_series(rows, metric)[0] for metric in panel.metrics)]


def draw(rows: Sequence[Row], panels: Sequence[Panel]) -> bytes:
    """A PNG of the panels, two in a row. `rows` are those of metrics.jsonl. Raises `UsageError` without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("pictures need matplotlib: pip install 'shoal[report]'") from None
    columns = min(2, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(WIDTH_IN * columns, HEIGHT_IN * lines), dpi=DPI, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for number, panel in enumerate(panels, start=1):
        _draw_panel(figure.add_subplot(lines, columns, number), rows, panel)
    picture = io.BytesIO()
    canvas.print_png(picture)
    return picture.getvalue()


def _draw_panel(axes: "Axes", rows: Sequence[Row], panel: Panel) -> None:
    for metric, line in zip(panel.metrics, ("-", "--", ":"), strict=False):  # equal curves both stay visible
        steps, values = _series(rows, metric)
        axes.plot(steps, values, line, marker="o" if len(steps) < 25 else "", markersize=3, linewidth=1.2)
        if metric == SUCCESS:
            low, high = (_series(rows, f"eval/ci95_{end}")[1] for end in ("low", "high"))
            if len(low) == len(high) == len(steps):
                axes.fill_between(steps, low, high, alpha=0.2, linewidth=0)
    axes.set_title(panel.title, fontsize=9, parse_math=False)  # a metric's name may hold an environment's own "$"
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.set_ylim(bottom=panel.low, top=panel.high)
    if len(panel.metrics) > 1:
        axes.legend([metric.rsplit("/", 1)[-1] for metric in panel.metrics], fontsize=7, frameon=False)


def _series(rows: Iterable[Row], metric: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric; what was not finite is nan, a gap in the curve."""
    found = [(row["step"], row[metric]) for row in rows if metric in row]
    return [step for step, _ in found], [math.nan if value is None else float(value) for _, value in found]


def _chosen(folder: RunFolder, rows: Sequence[Row], names: Sequence[str]) -> list[Panel]:
    known = sorted({name for row in rows for name in row if "/" in name})
    for name in names:
        if name not in known:
            raise UsageError(f"{folder.name} has no metric {name!r}.{nearest(name, known, 0.3)}")
    return [Panel(title=name, metrics=(name,), low=None) for name in names]
