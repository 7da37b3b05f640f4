"""trajectories.db: what is written comes back equal, marks land, and a bad disk is told."""

import dataclasses
import math
import sqlite3
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from envs.message import ImagePart, Message, TextPart, ToolCall, ToolResult
from envs.task import Task
from rl.dashboard.database import list_rows, reading
from rollout.record import trajectory_table
from rollout.record.recorder import Recorder, RecorderError, TrainedRow, TrajectoryReader, group_digest
from rollout.record.trajectory import EpisodeError, StopReason, Trajectory, TrajectoryGroup, Turn


def trajectory(group_id: str, member: int, **changes: Any) -> Trajectory:
    """A two-turn episode that uses every field."""
    rng = np.random.default_rng(member)
    call = ToolCall(name="add", arguments={"a": 2, "b": [1.5, None, {"deep": True}]}, call_id="0")
    result = ToolResult(call_id="0", name="add", content="5", error="timeout", seconds=0.25)
    values: dict[str, Any] = {
        "trajectory_id": f"{group_id}/{member}",
        "group_id": group_id,
        "task": Task(
            task_id=group_id, env_id="Calculator-v0", env_name="calculator", seed=2**65, level=3, kwargs={"x": [1]}
        ),
        "member": member,
        "token_ids": np.array([7, 8, 9, 2, 5, 6, 2], np.int32),
        "loss_mask": np.array([0, 0, 1, 1, 0, 1, 1], np.uint8),
        "rollout_logprobs": rng.normal(size=7).astype(np.float32),
        "policy_versions": np.array([-1, -1, 3, 3, -1, 4, 4], np.int32),
        "turns": (
            Turn(
                start=2,
                end=4,
                message=Message.assistant("thinking \ud800 \x00 é", calls=[call]),
                reply=(Message.tool(result),),
                parse_status="ok",
                sample_s=0.1,
                env_s=0.2,
            ),
            Turn(start=5, end=7, message=Message.assistant("5"), finish_reason="length"),
        ),
        "prompt": (
            Message.system("be brief"),
            Message(role="user", content=(TextPart(text="2 + 3?"), ImagePart(data=b"\x89\x00", media_type="image/x"))),
        ),
        "reward": 0.1 + 0.2,
        "reward_parts": {"correct": 0.1, "format": 0.2},
        "stop_reason": StopReason.TERMINATED,
        "temperature": 0.7,
        "routed_experts": rng.integers(-1, 32, size=(7, 3, 2)).astype(np.int16),
        "meta": {"needs_tool": True, "num_tool_calls": 1, "note": None},
        "problem_digest": "cd" * 32,
        "attempt": 2,
        "worker": "worker-1",
        "engine": "local",
        "seconds": 1.5,
        "env_seconds": 0.5,
    }
    return Trajectory(**values | changes)


def group(group_id: str, attempt: int = 2, size: int = 2, **changes: Any) -> TrajectoryGroup:
    members = tuple(trajectory(group_id, member, attempt=attempt, **changes) for member in range(size))
    return TrajectoryGroup(group_id=group_id, task=members[0].task, attempt=attempt, trajectories=members)


def same(left: Any, right: Any) -> bool:
    """Equal in every field, arrays in dtype, shape and bits."""
    if isinstance(left, np.ndarray):
        return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()
    if isinstance(left, TrajectoryGroup | Trajectory):
        fields = [field.name for field in dataclasses.fields(left)]
        return type(left) is type(right) and all(same(getattr(left, f), getattr(right, f)) for f in fields)
    if isinstance(left, tuple) and left and isinstance(left[0], Trajectory):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    return type(left) is type(right) and left == right


def written(path: Path, *groups: TrajectoryGroup) -> Recorder:
    recorder = Recorder(path)
    recorder.write(groups)
    recorder.flush(10.0)
    return recorder


def test_groups_come_back_equal_in_every_field(tmp_path: Path) -> None:
    failed = trajectory(
        "g1",
        1,
        reward=None,
        reward_parts={},
        stop_reason=StopReason.ENV_ERROR,
        error=EpisodeError(kind="env", where="step", message="KeyError: 'x'", traceback="Traceback ...\n  boom"),
        routed_experts=None,
        turns=(),
        prompt=(),
        token_ids=np.zeros(0, np.int32),
        loss_mask=np.zeros(0, np.uint8),
        rollout_logprobs=np.zeros(0, np.float32),
        policy_versions=np.zeros(0, np.int32),
    )
    mixed = dataclasses.replace(group("g1"), trajectories=(trajectory("g1", 0), failed))
    groups = [group("g0"), mixed, group("g2", attempt=1, size=3)]
    written(tmp_path / "t.db", *groups).close()
    with TrajectoryReader(tmp_path / "t.db") as reader:
        back = reader.groups("committed")
        assert len(back) == 3 and all(same(a, b) for a, b in zip(groups, back, strict=True))
        assert [g.group_id for g in reader.groups("committed", {"g0", "g2"})] == ["g0", "g2"]
        assert back[0].trajectories[0].token_ids.flags.writeable
        assert group_digest(back[0]) == group_digest(groups[0]) != group_digest(back[2])


def test_what_is_not_json_or_not_finite_is_stored_as_null_or_text(tmp_path: Path) -> None:
    cycle: dict[str, Any] = {}
    cycle["self"] = cycle
    odd = group(
        "g0",
        size=1,
        reward=math.nan,
        reward_parts={"a": math.inf, "b": 1.0},
        meta={"nan": math.nan, "np": np.float32(0.5), "array": np.arange(2), "path": Path("x"), "c": cycle, 3: b"z"},
        rollout_logprobs=np.full(7, -np.inf, np.float32),
        seconds=math.inf,
    )
    recorder = written(tmp_path / "t.db", odd)
    recorder.mark_consumed(1, [TrainedRow(trajectory_id="g0/0", advantage=math.nan)])
    recorder.close()
    with TrajectoryReader(tmp_path / "t.db") as reader:
        stored = reader.get("g0/0")
        back = stored.trajectory
        assert back.reward is None and stored.advantage is None
        assert math.isnan(back.reward_parts["a"]) and back.reward_parts["b"] == 1.0
        assert {k: back.meta[k] for k in ("nan", "np", "array", "path", "3")} == {
            "nan": None,
            "np": 0.5,
            "array": [0, 1],
            "path": "x",
            "3": "b'z'",
        }
        assert same(back.rollout_logprobs, odd.trajectories[0].rollout_logprobs)
        assert reader.list()[0]["seconds"] is None


def test_marks_say_what_became_of_each_trajectory(tmp_path: Path) -> None:
    recorder = written(tmp_path / "t.db", group("g0"), group("g1"), group("g2"))
    logprobs = np.linspace(-3, 0, 7, dtype=np.float32)
    rows = [
        TrainedRow(trajectory_id="g0/0", advantage=0.5, learner_logprobs=logprobs),
        TrainedRow(trajectory_id="g0/1", status="dropped", cause="no_reward"),
    ]
    recorder.mark_consumed(7, rows)
    recorder.mark_dropped(["g1"], "degenerate")
    recorder.close()
    with TrajectoryReader(tmp_path / "t.db") as reader:
        trained, left_out, dropped = reader.get("g0/0"), reader.get("g0/1"), reader.get("g1/0")
        assert (trained.status, trained.step, trained.advantage, trained.cause) == ("consumed", 7, 0.5, "")
        assert same(trained.learner_logprobs, logprobs)
        assert (left_out.status, left_out.cause, left_out.step) == ("dropped", "no_reward", 7)
        assert (dropped.status, dropped.cause, dropped.step) == ("dropped", "degenerate", None)
        assert reader.counts() == {"committed": 2, "consumed": 1, "dropped": 3}
        assert [g.group_id for g in reader.groups("committed")] == ["g2"]


def test_marking_a_row_that_is_not_committed_is_told(tmp_path: Path) -> None:
    recorder = written(tmp_path / "t.db", group("g0"))
    recorder.mark_consumed(1, [TrainedRow(trajectory_id="g0/0"), TrainedRow(trajectory_id="g0/9")])
    with pytest.raises(RecorderError, match="0 committed rows of trajectory 'g0/9', expected 1"):
        recorder.flush(10.0)
    with TrajectoryReader(tmp_path / "t.db") as reader:
        assert reader.counts() == {"committed": 2}  # the whole step or nothing


def test_a_new_attempt_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    recorder = written(tmp_path / "t.db", group("g0", attempt=1))
    recorder.write([group("g0", attempt=2)])
    recorder.mark_consumed(1, [TrainedRow(trajectory_id=f"g0/{member}") for member in range(2)])
    recorder.close()
    with TrajectoryReader(tmp_path / "t.db") as reader:
        fates = [(row["attempt"], row["status"], row["cause"]) for row in reader.list()]
        assert fates == [(1, "dropped", "superseded")] * 2 + [(2, "consumed", "")] * 2
        assert reader.get("g0/1").row == 4


def test_rewind_forgets_what_came_after_a_checkpoint(tmp_path: Path) -> None:
    recorder = written(tmp_path / "t.db", group("g0", size=1), group("g1", size=1))
    logprobs = np.zeros(7, np.float32)
    for step, group_id in [(1, "g0"), (2, "g1")]:
        recorder.mark_consumed(step, [TrainedRow(trajectory_id=f"{group_id}/0", learner_logprobs=logprobs)])
        recorder.write([group(f"eval{step}", size=1)], split="eval", eval_step=step)
    recorder.rewind(1)
    recorder.close()
    with TrajectoryReader(tmp_path / "t.db") as reader:
        assert [(row["id"], row["status"], row["step"]) for row in reader.list()] == [
            ("g0/0", "consumed", 1),
            ("g1/0", "committed", None),
            ("eval1/0", "eval", None),
        ]
        assert reader.get("g1/0").learner_logprobs is None


def test_an_evaluation_made_again_replaces_its_rows(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "t.db")
    for step in (0, 5, 5):
        recorder.write([group("eval/calculator/0")], split="eval", eval_step=step)
    recorder.close()
    with TrajectoryReader(tmp_path / "t.db") as reader:
        assert [row["eval_step"] for row in reader.list({"split": "eval"})] == [0, 0, 5, 5]
        assert len(reader.groups("eval")) == 2
        assert reader.counts({"eval_step": 5}) == {"eval": 2}


def test_lists_filter_page_and_name_a_wrong_column(tmp_path: Path) -> None:
    written(tmp_path / "t.db", *(group(f"g{i}", reward=float(i % 2)) for i in range(5))).close()
    with TrajectoryReader(tmp_path / "t.db") as reader:
        ones = reader.list({"reward": 1.0, "split": "train"})
        assert [row["id"] for row in ones] == ["g1/0", "g1/1", "g3/0", "g3/1"]
        assert [row["row"] for row in reader.list(limit=3, offset=4)] == [5, 6, 7]
        assert (ones[0]["meta"], ones[0]["reward_parts"]) == (
            {"needs_tool": True, "num_tool_calls": 1, "note": None},
            {"correct": 0.1, "format": 0.2},
        )
        assert (ones[0]["num_tokens"], ones[0]["num_sampled_tokens"]) == (7, 4)
        assert (ones[0]["min_version"], ones[0]["max_version"], ones[0]["num_turns"]) == (3, 4, 2)
        assert len(reader.list({"step": None, "seed": 2**65})) == 10
        with pytest.raises(ValueError, match="'rewards'; did you mean 'reward'"):
            reader.list({"rewards": 1.0})
        with pytest.raises(KeyError, match="no trajectory 99; there are 10"):
            reader.get(99)


def test_a_reader_sees_rows_while_the_writer_goes_on(tmp_path: Path) -> None:
    recorder = written(tmp_path / "t.db", group("g0"))
    with TrajectoryReader(tmp_path / "t.db") as reader:
        for number in range(1, 20):
            recorder.write([group(f"g{number}")])
            recorder.flush(10.0)
            assert reader.counts() == {"committed": 2 * number + 2}
    recorder.close()


def test_a_recorder_goes_on_with_an_existing_file(tmp_path: Path) -> None:
    for number in range(2):
        written(tmp_path / "t.db", group(f"g{number}", size=1)).close()
    with TrajectoryReader(tmp_path / "t.db") as reader:
        assert [row["id"] for row in reader.list()] == ["g0/0", "g1/0"]


def small_disk(path: Path) -> sqlite3.Connection:
    """A real connection whose file may not grow: SQLite answers as on a full disk."""
    db = trajectory_table.open_for_writing(path)
    pages = db.execute("PRAGMA page_count").fetchone()[0]
    db.execute(f"PRAGMA max_page_count = {pages + 2}")
    return db


def test_a_full_disk_is_told_at_the_next_call_and_never_hangs(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "t.db", connect=small_disk)
    recorder.write([group(f"g{i}") for i in range(50)])
    with pytest.raises(RecorderError, match=r"no space for the run folder: cannot write .*t\.db"):
        recorder.flush(10.0)
    with pytest.raises(RecorderError, match="no space"):
        recorder.write([group("g99")])
    with pytest.raises(RecorderError, match="no space"):
        recorder.close()
    recorder.close()
    with TrajectoryReader(tmp_path / "t.db") as reader:
        assert reader.counts() == {}  # nothing half written


def test_a_slow_disk_blocks_only_when_the_queue_is_full(tmp_path: Path) -> None:
    gate = threading.Event()

    class SlowConnection(sqlite3.Connection):
        def execute(self, *arguments: Any) -> sqlite3.Cursor:
            assert gate.wait(10.0)
            return super().execute(*arguments)

    def slow_disk(path: Path) -> sqlite3.Connection:
        trajectory_table.open_for_writing(path).close()
        return sqlite3.connect(path, factory=SlowConnection)

    recorder = Recorder(tmp_path / "t.db", max_queued=3, put_timeout_s=0.05, connect=slow_disk)
    with pytest.raises(RecorderError, match="the disk is slower than the run, 3 writes wait"):
        for number in range(10):
            recorder.write([group(f"g{number}")])
    with pytest.raises(RecorderError, match=r"longer than 0.01 s|slower than the run"):
        recorder.flush(0.01)
    gate.set()
    recorder.flush(10.0)
    recorder.close()
    with TrajectoryReader(tmp_path / "t.db") as reader:
        assert reader.counts()["committed"] >= 6


def test_a_path_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecorderError, match=r"cannot write .*t\.db"):
        Recorder(tmp_path / "missing" / "t.db")
    with pytest.raises(FileNotFoundError, match=r"no trajectories at .*t\.db"):
        TrajectoryReader(tmp_path / "t.db")


def test_a_file_of_another_layout_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "t.db", group("g0")).close()
    with sqlite3.connect(tmp_path / "t.db") as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(RecorderError, match="layout 99, this version of Shoal reads layouts up to 3"):
        Recorder(tmp_path / "t.db")
    with pytest.raises(ValueError, match="layout 99"):
        TrajectoryReader(tmp_path / "t.db")


def test_a_file_from_before_the_column_of_engines_is_read_and_continued(tmp_path: Path) -> None:
    written(tmp_path / "t.db", group("g0", size=1)).close()
    with sqlite3.connect(tmp_path / "t.db") as db:
        db.execute("ALTER TABLE trajectories DROP COLUMN engine")
        db.execute("PRAGMA user_version = 2")
    with TrajectoryReader(tmp_path / "t.db") as reader:
        assert [row["engine"] for row in reader.list()] == [""] and reader.get(1).trajectory.engine == ""
    with reading(tmp_path / "t.db") as db:
        assert list_rows(db, {"stop": "terminated"}, before=0, limit=1)["rows"][0]["engine"] == ""
    written(tmp_path / "t.db", group("g1", size=1, engine="vllm")).close()
    with TrajectoryReader(tmp_path / "t.db") as reader:
        assert [row["engine"] for row in reader.list()] == ["", "vllm"]


def test_a_closed_recorder_refuses_writes(tmp_path: Path) -> None:
    recorder = written(tmp_path / "t.db", group("g0"))
    recorder.close()
    recorder.close()
    with pytest.raises(RecorderError, match="closed"):
        recorder.write([group("g1")])


def test_the_digest_of_a_group_moves_with_everything_that_is_learned_from() -> None:
    base = group_digest(group("g0"))
    assert base == group_digest(group("g0", worker="elsewhere", seconds=9.0))
    changes: list[dict[str, Any]] = [
        {"reward": 1.0},
        {"temperature": 1.0},
        {"token_ids": np.array([7, 8, 9, 2, 5, 6, 3], np.int32)},
        {"loss_mask": np.array([0, 0, 1, 1, 0, 1, 0], np.uint8)},
        {"policy_versions": np.array([-1, -1, 3, 3, -1, 4, 5], np.int32)},
        {"routed_experts": None},
    ]
    assert len({base, *(group_digest(group("g0", **change)) for change in changes)}) == 1 + len(changes)
