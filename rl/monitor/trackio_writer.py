"""The process in which trackio runs: rows in and answers out, a JSON object a line, over the socket that is its stdin.

Apart from the run because trackio takes its folder from the environment once for a process, prints, asks the Hugging
Face Hub for the user's name, and warns where it loses something. Ends, with everything stored, when the socket does.
"""

import json
import socket
import sys
import warnings
from math import nan
from pathlib import Path
from typing import Any

PROJECT = "shoal"


class TrackioWriter:
    """A run of trackio. Example of a row: {"kind": "step", "step": 3, "reward/mean": 0.5, "loss/policy": None}."""

    def __init__(self, name: str, config: dict[str, Any]) -> None:
        """A process that resumes a run goes on in the run of that name."""
        import trackio

        self._run = trackio.init(
            project=PROJECT,
            name=name,
            config=config,
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, data: dict[str, Any]) -> None:
        kind = data["kind"]
        if kind in ("step", "evaluation"):
            self._run.log(scalars(data), step=data["step"])
        elif kind == "detail":
            self._log_detail(data)
        elif kind == "alert" and data["state"] == "raised":
            from trackio import AlertLevel

            self._run.alert(data["rule"], data["text"], level=AlertLevel(data["level"]), step=data["step"])

    def finish(self) -> None:
        """Waits until all is stored, as long as trackio does: 30 s."""
        self._run.finish()

    def _log_detail(self, data: dict[str, Any]) -> None:
        import trackio

        items: dict[str, Any] = {
            name: trackio.Histogram(np_histogram=(found["counts"], found["edges"]))
            for name, found in data["histograms"].items()
        }
        if data["samples"]:
            items["samples/trajectories"] = trackio.Table(data=data["samples"])
        if items:
            self._run.log(items, step=data["step"])


def scalars(row: dict[str, Any]) -> dict[str, float]:
    """Numbers of a row of metrics.jsonl under their own names; null (it was not finite) is NaN."""
    return {
        key: nan if value is None else value
        for key, value in row.items()
        if key != "step" and (value is None or isinstance(value, int | float))
    }


class Warned:
    """What trackio warned of since it was last asked: it never raises, and says so where it loses rows."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        warnings.simplefilter("always")
        warnings.showwarning = self._show

    def take(self) -> str:
        texts, self._texts = self._texts, []
        return "; ".join(texts)

    def _show(self, message: Warning | str, category: type, filename: str, *_: object) -> None:
        if "trackio" in Path(filename).parts:
            self._texts.append(str(message))


def serve(channel: socket.socket) -> None:
    """The first line is {"name": ..., "config": ...}, the others are rows; {"kind": "finish"} is answered when done."""
    warned = Warned()
    writer: TrackioWriter | None = None
    with channel.makefile("rb") as lines:
        for line in lines:
            data = json.loads(line)
            problem = ""
            try:
                if writer is None:
                    writer = TrackioWriter(data["name"], data["config"])  # warnings are told with the first row
                elif data["kind"] == "finish":
                    break
                else:
                    writer.log(data)
                    problem = warned.take()
            except Exception as error:  # the other side is told, and decides
                problem = f"{type(error).__name__}: {error}"
            if not _answer(channel, problem):
                break
        if writer is not None:
            writer.finish()
        _answer(channel, warned.take())


def _answer(channel: socket.socket, problem: str) -> bool:
    """False where nobody listens any more."""
    try:
        channel.sendall(json.dumps({"problem": problem}).encode() + b"\n")
    except OSError:
        return False
    return True


if __name__ == "__main__":
    with socket.socket(fileno=sys.stdin.fileno()) as stdin:
        serve(stdin)
