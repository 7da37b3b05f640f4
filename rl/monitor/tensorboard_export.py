"""TensorBoard files, while a run goes on (`monitor.trackers=[tensorboard]`) or of one that lies there."""

from itertools import pairwise
from math import nan
from pathlib import Path
from typing import Any

from rl.monitor.json_lines import read_json_lines
from rl.monitor.sinks import Tracker


class TensorBoardTracker:
    """Scalars and histograms as a `Tracker`; null (it was not finite) is NaN."""

    def __init__(self, folder: Path) -> None:
        """Raises ImportError, naming the extra, without tensorboardX."""
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise ImportError("TensorBoard files need tensorboardX: pip install 'shoal[tensorboard]'") from None
        self._writer = SummaryWriter(str(folder))

    def log(self, data: dict[str, Any]) -> None:
        if data["kind"] in ("step", "evaluation"):
            for key, value in data.items():
                if key not in ("kind", "step") and not isinstance(value, str | list):
                    self._writer.add_scalar(key, nan if value is None else value, data["step"])
        elif data["kind"] == "detail":
            for name, found in data["histograms"].items():
                self._add_histogram(name, found, data["step"])

    def finish(self) -> None:
        self._writer.close()

    def _add_histogram(self, name: str, found: dict[str, list[float]], step: int) -> None:
        counts, edges = found["counts"], found["edges"]
        middles = [(a + b) / 2 for a, b in pairwise(edges)]
        self._writer.add_histogram_raw(
            name,
            min=edges[0],
            max=edges[-1],
            num=sum(counts),
            sum=sum(c * m for c, m in zip(counts, middles, strict=True)),
            sum_squares=sum(c * m * m for c, m in zip(counts, middles, strict=True)),
            bucket_limits=edges[1:],
            bucket_counts=counts,
            global_step=step,
        )


def start_tensorboard(folder: Path) -> Tracker:
    """Into `tensorboard/` of the run folder."""
    return TensorBoardTracker(folder / "tensorboard")


def export_tensorboard(metrics: Path, out: Path) -> int:
    """Write the rows of a metrics.jsonl as TensorBoard files into `out`; returns their number."""
    tracker = TensorBoardTracker(out)
    count = 0
    for row in read_json_lines(metrics):
        tracker.log(row)
        count += 1
    tracker.finish()
    return count
