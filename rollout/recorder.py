"""trajectories.db: every token row of a run and what became of it, written beside the loop and read by everything else.

`Recorder` is the one writer. Its methods hand work to one thread through a bounded queue and return at once; what went
wrong on the disk is raised by the next call. `TrajectoryReader` reads while the run goes on, in any process.

A process kill loses nothing that `flush` returned for; a power cut may lose the last transactions (synchronous=NORMAL).
So flush before `Ledger.commit`, and on resume queue again what the ledger has as committed and this file has not:
the ledger decides, this file holds the content.
"""

import hashlib
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from rollout import trajectory_table as table
from rollout.codec import to_json
from rollout.trajectory import TrajectoryGroup

Split = Literal["train", "eval"]

MAX_BATCH = 64
"""Most queued items of one transaction: bounds how long readers wait and what a failed transaction takes with it."""


class RecorderError(RuntimeError):
    """Raised when trajectories cannot be written; the message names the file and the cause."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedRow:
    """What a learner step did with one trajectory."""

    trajectory_id: str
    advantage: float | None = None
    """None where the trajectory had none (failed, or a group without signal)."""
    learner_logprobs: np.ndarray | None = None
    """(L,) float32, recomputed before the update; None where not computed."""
    status: Literal["consumed", "dropped"] = "consumed"
    cause: str = ""
    """Why it was not trained on, e.g. "no_reward" or "degenerate"; "" if it was."""


Job = Callable[[sqlite3.Connection], None]


class Recorder:
    """Writes trajectories and their fate.

    Example: recorder.write([group]); recorder.flush(10.0); ledger.commit(...); later
    recorder.mark_consumed(7, [TrainedRow(trajectory_id="train/calculator/0/3", advantage=0.5)]).
    """

    def __init__(
        self,
        path: Path | str,
        *,
        max_queued: int = 256,
        put_timeout_s: float = 30.0,
        connect: Callable[[Path], sqlite3.Connection] = table.open_for_writing,
    ) -> None:
        """`max_queued`: calls that may wait for the disk. One more blocks for `put_timeout_s`, then raises."""
        self._path = Path(path)
        self._connect = connect
        self._put_timeout_s = put_timeout_s
        self._jobs: queue.Queue[Job | threading.Event | None] = queue.Queue(max_queued)
        self._error: Exception | None = None
        self._closed = False
        opened = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(opened,), name="recorder", daemon=True)
        self._thread.start()
        if not opened.wait(put_timeout_s):
            raise RecorderError(f"cannot open {self._path} within {put_timeout_s:g} s")
        self._raise_error()

    def write(self, groups: Sequence[TrajectoryGroup], *, split: Split = "train", eval_step: int | None = None) -> None:
        """Add the trajectories of groups; rows of earlier attempts that still stand become dropped ("superseded").

        Groups of split "train" start as "committed", those of an evaluation (at learner step `eval_step`) as "eval".
        """
        self._put(lambda db: table.insert_groups(db, groups, split, eval_step))

    def mark_consumed(self, step: int, rows: Sequence[TrainedRow]) -> None:
        """Note what learner step `step` did with each trajectory of its groups."""
        values = [(r.status, r.cause, step, r.advantage, r.learner_logprobs, r.trajectory_id) for r in rows]
        self._put(lambda db: table.mark_trained(db, values))

    def mark_dropped(self, group_id: str, cause: str) -> None:
        """Note that a group that was written will not be trained on."""
        self._put(lambda db: table.mark_groups_dropped(db, [group_id], cause))

    def rewind(self, step: int) -> None:
        """Go back to the checkpoint of `step`: rows of later steps are committed again, later evaluations go."""
        self._put(lambda db: table.rewind(db, step))

    def flush(self, deadline_s: float) -> None:
        """Return when all calls so far are on disk. RecorderError past the deadline or where writing failed."""
        done = threading.Event()
        until = time.monotonic() + deadline_s
        self._put(done, timeout_s=deadline_s)
        if not done.wait(max(0.0, until - time.monotonic())):
            raise RecorderError(f"{self._path} took longer than {deadline_s:g} s to write")
        self._raise_error()

    def close(self, deadline_s: float = 30.0) -> None:
        """Write what is queued and end the thread. Safe to call twice; raises what went wrong, once."""
        if self._closed:
            return
        self._closed = True
        try:
            self._jobs.put(None, timeout=deadline_s)
        except queue.Full:
            raise RecorderError(f"{self._path} took longer than {deadline_s:g} s to write") from None
        self._thread.join(deadline_s)
        if self._thread.is_alive():
            raise RecorderError(f"{self._path} took longer than {deadline_s:g} s to close")
        self._raise_error()

    def _put(self, item: Job | threading.Event, timeout_s: float | None = None) -> None:
        self._raise_error()
        if self._closed:
            raise RecorderError(f"the recorder of {self._path} is closed")
        timeout_s = self._put_timeout_s if timeout_s is None else timeout_s
        try:
            self._jobs.put(item, timeout=timeout_s)
        except queue.Full:
            raise RecorderError(
                f"{self._path}: the disk is slower than the run, {self._jobs.maxsize} writes wait for {timeout_s:g} s"
            ) from None

    def _raise_error(self) -> None:
        if self._error is not None:
            raise RecorderError(_explain(self._path, self._error)) from self._error

    def _run(self, opened: threading.Event) -> None:
        """The thread. After an error it goes on emptying the queue, so that nobody waits for it in vain."""
        db: sqlite3.Connection | None = None
        try:
            db = self._connect(self._path)
        except Exception as error:  # crosses to the caller's thread, which raises it
            self._error = error
        opened.set()
        while True:
            items = [self._jobs.get()]
            while len(items) < MAX_BATCH and not self._jobs.empty():
                items.append(self._jobs.get())
            jobs = [item for item in items if item is not None and not isinstance(item, threading.Event)]
            if db is not None and self._error is None:
                try:
                    with db:
                        for job in jobs:
                            job(db)
                except Exception as error:  # crosses to the caller's thread, which raises it
                    self._error = error
            for item in items:
                if isinstance(item, threading.Event):
                    item.set()
            if None in items:
                break
        if db is not None:
            db.close()


def group_digest(group: TrajectoryGroup) -> str:
    """sha256 over what is learned from: tokens, masks, logprobs, versions, routes and rewards of all members."""
    digest = hashlib.sha256()
    for t in group.trajectories:
        header = [t.trajectory_id, len(t.token_ids), t.reward, t.stop_reason.value, t.temperature]
        digest.update(to_json(header).encode())
        for array in (t.token_ids, t.loss_mask, t.rollout_logprobs, t.policy_versions, t.routed_experts):
            digest.update(b"" if array is None else array.tobytes())
    return digest.hexdigest()


def _explain(path: Path, error: Exception) -> str:
    if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
        return f"no space for the run folder: cannot write {path}"
    return f"cannot write {path}: {type(error).__name__}: {error}"
