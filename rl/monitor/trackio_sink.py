"""trackio, into the run's folder and nowhere else: the side of the run. trackio itself works in trackio_writer.py.

Every row is answered, so a writer that died, hangs or lost something is noticed at the row, in the sink's thread.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from conf.schema import TrainConfig
from rl.monitor.sinks import Tracker

WRITER = (sys.executable, "-m", "rl.monitor.trackio_writer")
NOT_PASSED_ON = ("TRACKIO_", "HF_", "HUGGING_FACE_", "HUGGINGFACE_", "SPACE_")
"""Beginnings of variables that name a Space, a bucket, a server, a webhook or a token."""
START_S = 180.0
"""Its first import takes half a minute on a busy machine with a cold disk; rows queue up meanwhile."""
ANSWER_S = 20.0
FINISH_S = 40.0
EXIT_S = 10.0


class TrackioTracker:
    """A writer process as a `Tracker`. It is killed where it does not answer in time."""

    def __init__(self, folder: Path, config: TrainConfig, *, command: Sequence[str] = WRITER) -> None:
        """Raises ImportError, naming the extra, without trackio."""
        if find_spec("trackio") is None:
            raise ImportError("trackio is not installed: pip install 'shoal[trackio]'")
        self._channel, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                command,
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment(folder),
                start_new_session=True,  # Ctrl-C is for the run, which still has something to tell
            )
        self._answers = self._channel.makefile("rb")
        try:
            self._exchange({"name": folder.name, "config": asdict(config)}, START_S)
        except RuntimeError:
            self._end()
            raise

    def log(self, data: dict[str, Any]) -> None:
        if data["kind"] != "checkpoint":
            self._exchange(data, ANSWER_S)

    def finish(self) -> None:
        try:
            self._exchange({"kind": "finish"}, FINISH_S)
        finally:
            self._end(EXIT_S)

    def _exchange(self, data: dict[str, Any], deadline_s: float) -> None:
        """Raises RuntimeError with what trackio says, ConnectionError where nothing answers."""
        try:
            self._channel.settimeout(deadline_s)
            self._channel.sendall(json.dumps(data).encode() + b"\n")
            line = self._answers.readline()
            if not line:
                raise ConnectionError("it has ended")
        except OSError as error:
            self._end()
            raise ConnectionError(f"trackio's process does not answer: {error}") from error
        if problem := json.loads(line)["problem"]:
            raise RuntimeError(problem)

    def _end(self, deadline_s: float = 0.0) -> None:
        """Safe to call twice. A process that has not ended by itself within `deadline_s` is killed."""
        self._answers.close()
        self._channel.close()
        try:
            self._process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(EXIT_S)


def environment(folder: Path) -> dict[str, str]:
    """Of the writer: one database in the run's folder, no Hub."""
    checkout = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(part for part in (checkout, os.environ.get("PYTHONPATH", "")) if part)
    passed_on = {name: value for name, value in os.environ.items() if not name.startswith(NOT_PASSED_ON)}
    return passed_on | {
        "PYTHONPATH": path,
        "TRACKIO_DIR": str((folder / "trackio").resolve()),
        "TRACKIO_STORAGE_MODE": "sqlite",  # its other mode, for several writers on network disks, cannot resume a run
        "SYSTEM": "",  # "spaces" inside a Space, from where trackio would upload
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
    }


def start_trackio(folder: Path, config: TrainConfig) -> Tracker:
    """Into `trackio/` of the run folder."""
    return TrackioTracker(folder, config)
