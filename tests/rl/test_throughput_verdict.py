"""What limits a run, and where a step's time goes: from rows and scripted clocks."""

import json

import pytest

from rl.loop.step_time import PARTS, StepTime
from rl.monitor.json_lines import read_json_lines
from rl.monitor.monitor import Monitor
from rl.monitor.throughput_verdict import MIN_STEPS, WINDOW_STEPS, judge_throughput
from tests.fakes import FakeClock
from tests.rl.training import small_config, train_in_process


def steps(count: int = 5, **seconds: float | None) -> list[dict]:
    """Rows of steps of 10 s; `seconds` by short name."""
    names = {
        "wait": "time/wait_for_batch", "evaluation": "time/wait_for_evaluation",
        "sync": "time/sync", "checkpoint": "time/checkpoint", "other": "time/other",
        "busy": "rollout/busy_s", "env": "rollout/env_s/mean", "episode": "rollout/episode_s/mean",
        "age": "queue/oldest_age_s", "lag": "off_policy/lag/mean",
    }  # fmt: skip
    row = {"kind": "step", "time/step": 10.0, **{names[name]: value for name, value in seconds.items()}}
    return [row | {"step": step} for step in range(1, count + 1)]


@pytest.mark.parametrize(
    ("seconds", "max_staleness", "limit", "sentence"),
    [
        ({"wait": 5.7, "busy": 9.0}, 2, "rollout",
         "rollout-bound: the learner waits 57% of the time; add workers or raise max_staleness"),
        ({"wait": 5.7}, 2, "rollout",
         "rollout-bound: the learner waits 57% of the time; add workers or raise max_staleness"),
        ({"wait": 6.0, "busy": 5.0}, 0, "staleness",
         "synchronous: the learner waits 60% of the time, for max_staleness=0 samples only while it waits; "
         "raise max_staleness"),
        ({"wait": 4.0, "busy": 2.0}, 1, "staleness",
         "slot-bound: the learner waits 40% of the time while engines idle 80% of it; raise max_staleness"),
        ({"wait": 8.0, "busy": 1.0, "env": 9.0, "episode": 10.0}, 2, "environment",
         "environment-bound: the learner waits 80% of the time and episodes wait 90% of theirs for tools; "
         "add rollout.env_pools, make tools faster or raise max_staleness"),
        ({"wait": 6.0, "evaluation": 5.0, "busy": 3.0}, 2, "evaluation",
         "evaluation-bound: the learner waits 50% of the time for evaluations; "
         "raise evaluation.every or lower evaluation.tasks"),
        ({"wait": 6.0, "evaluation": 2.0, "busy": 9.0}, 2, "rollout",
         "rollout-bound: the learner waits 40% of the time; add workers or raise max_staleness"),
        ({"wait": 0.2, "checkpoint": 4.0, "busy": 1.0}, 2, "checkpoint",
         "checkpoint-bound: checkpoints take 40% of the time; raise run.checkpoint_every"),
        ({"wait": 1.0, "sync": 2.0, "busy": 9.0}, 2, "sync",
         "sync-bound: snapshots of weights take 20% of the time; raise learner.publish_every"),
        ({"wait": 1.0, "other": 3.0, "busy": 9.0}, 2, "records",
         "record-bound: 30% of the time goes into moving groups and writing records; "
         "make steps larger or put run.root on a faster disk"),
        ({"wait": 0.3, "busy": 4.0, "age": 12.0, "lag": 1.9}, 2, "learner",
         "learner-bound: engines idle 60% of the time and finished groups wait 12.0 s; fewer workers would do, and a "
         "lower max_staleness would train on fresher data (staleness is 1.9 of 2), or give the learner more"),
        ({"wait": 0.3, "busy": 4.0, "age": 0.0, "lag": 0.4}, 2, "learner",
         "learner-bound: engines idle 60% of the time; fewer workers would do, or give the learner more"),
        ({"wait": 0.8, "busy": 9.5}, 2, "balanced", "balanced: the learner waits 8% of the time"),
        ({"wait": 0.8, "busy": 20.0}, 2, "balanced", "balanced: the learner waits 8% of the time"),
    ],
)  # fmt: skip
def test_the_sentence_follows_from_the_rows(seconds, max_staleness, limit, sentence):
    found = judge_throughput(steps(**seconds), max_staleness=max_staleness)
    assert (found.limit, found.sentence, found.num_steps) == (limit, sentence, 5)


def test_shares_are_of_time_and_not_means_of_ratios():
    rows = [*steps(2, wait=0.0), *steps(1, wait=0.9)]
    rows[-1]["time/step"] = 1.0
    assert judge_throughput(rows, max_staleness=2).learner_idle == pytest.approx(0.9 / 21.0)


def test_only_the_newest_steps_count_and_evaluations_and_lost_numbers_are_passed_over():
    old, new = steps(30, wait=9.0), steps(WINDOW_STEPS, wait=1.0)
    broken = {"kind": "step", "step": 99, "time/step": None, "time/wait_for_batch": None}
    found = judge_throughput(
        [*old, *new, {"kind": "evaluation", "step": 20, "eval/success": 1.0}, broken], max_staleness=2
    )
    assert (found.num_steps, found.learner_idle) == (WINDOW_STEPS, pytest.approx(0.1))


def test_engines_of_which_no_heartbeat_came_yet_are_not_called_idle():
    found = judge_throughput(steps(wait=5.7, busy=0.0), max_staleness=2)
    assert (found.rollout_idle, found.limit) == (None, "rollout")


def test_two_steps_are_no_verdict():
    found = judge_throughput(steps(MIN_STEPS - 1, wait=9.0), max_staleness=2)
    assert (found.limit, found.learner_idle) == ("unknown", None) and found.sentence.startswith("no verdict yet: 2 of")


def test_the_time_of_a_step_is_told_by_part_and_closes():
    clock, spans = FakeClock(), []
    time = StepTime(clock, lambda *span: spans.append(span))
    with time.part("wait_for_batch", "wait"):
        clock.advance(5.0)
    with time.part("train", "train"):
        clock.advance(3.0)
    clock.advance(0.5)  # the ledger's fsync
    with time.part("sync", "sync"):
        clock.advance(0.25)
    with pytest.raises(OSError), time.part("checkpoint", "checkpoint"):
        clock.advance(1.0)
        raise OSError("disk full")
    found = time.close(forward_backward_s=2.5)
    assert found == {
        "time/wait_for_batch": 5.0, "time/forward_backward": 2.5, "time/sync": 0.25, "time/checkpoint": 1.0,
        "time/other": 1.0, "time/step": 9.75, "time/train": 3.0, "time/trainer_idle_ratio": 5.0 / 9.75,
        "time/wait_for_evaluation": 0.0,
    }  # fmt: skip
    assert sum(found[f"time/{part}"] for part in PARTS) == found["time/step"]
    assert spans[:2] == [("learner", "wait", 0.0, 5.0), ("learner", "train", 5.0, 8.0)]
    clock.advance(2.0)
    assert time.close(forward_backward_s=0.0)["time/step"] == 2.0  # nothing of the first step is left


def test_only_what_is_waited_while_workers_evaluate_is_waited_for_an_evaluation():
    clock = FakeClock()
    time = StepTime(clock, lambda *span: None)

    def part(name: str, seconds: float) -> None:
        with time.part(name, name):
            clock.advance(seconds)

    part("wait_for_batch", 1.0)
    with time.evaluation():
        part("train", 2.0)
        part("wait_for_batch", 3.0)  # all of it
        assert time.close(forward_backward_s=2.0)["time/wait_for_evaluation"] == 3.0
        part("train", 1.0)
        waiting = time.part("wait_for_batch", "wait")
        waiting.__enter__()
        clock.advance(4.0)
    clock.advance(5.0)  # the evaluation has ended, and groups are made again
    waiting.__exit__(None, None, None)
    found = time.close(forward_backward_s=1.0)
    assert (found["time/wait_for_batch"], found["time/wait_for_evaluation"]) == (9.0, 4.0)


def test_a_real_run_s_steps_add_up_to_its_wall_time_and_every_process_has_its_spans(tmp_path):
    config = small_config(tmp_path, "steps=8", "run.checkpoint_every=3", "rollout.max_turn_tokens=8",
                          "learner.self_check_tolerance=1e9")  # fmt: skip
    run = train_in_process(config)
    read = lambda path: [json.loads(line) for line in path.read_text().splitlines()]  # noqa: E731
    rows = [row for row in read(run.folder.metrics) if row["kind"] == "step"]
    for row in rows:
        assert sum(row[f"time/{part}"] for part in PARTS) == pytest.approx(row["time/step"], rel=0.02)
    wall_s = rows[-1]["time_s"] - rows[0]["time_s"]
    assert sum(row["time/step"] for row in rows[1:]) == pytest.approx(wall_s, rel=0.02)
    spans = read(run.folder.spans)
    assert {(span["process"], span["activity"]) for span in spans} >= {
        ("learner", "wait"), ("learner", "train"), ("learner", "sync"), ("learner", "checkpoint"), ("push", "sync"),
        ("worker-0", "generate"), ("worker-0", "sync"), ("worker-0", "evaluate"),
    }  # fmt: skip
    waited = sum(s["end_s"] - s["start_s"] for s in spans if (s["process"], s["activity"]) == ("learner", "wait"))
    assert waited == pytest.approx(sum(row["time/wait_for_batch"] for row in rows), rel=0.02)


def test_the_monitor_s_verdict_is_that_of_the_rows_it_wrote(tmp_path):
    monitor = Monitor(tmp_path, small_config(tmp_path))
    for row in steps(4, wait=5.7):
        monitor.step(row["step"], row["step"], {key: value for key, value in row.items() if "/" in key})
    monitor.close()
    rows = list(read_json_lines(tmp_path / "metrics.jsonl"))
    (event,) = read_json_lines(tmp_path / "events.jsonl")
    assert (
        event["sentence"] == judge_throughput(rows, max_staleness=2).sentence == monitor.verdict().throughput.sentence
    )
    assert (event["kind"], event["limit"], event["learner_idle"]) == ("verdict", "rollout", pytest.approx(0.57))
