"""The curriculum and its gate inside whole trainings: what is dropped is replaced, nothing waits for ever, and a
resumed run stands where it stood."""

import asyncio
import dataclasses
import json
import random
import shlex
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from benchmarks.curriculum import compare, groups_to, is_settled
from conf.loading import load_config
from conf.schema import CurriculumConfig, TrainConfig
from envs.outcome import EnvHost
from envs.pool.pool import EnvPool
from envs.tasks.curriculum import Curriculum, Outcome
from envs.tasks.task_source import TaskSource, counter_of, make_task
from policy.model.tokenizer import ByteTokenizer
from rl.cli.main import main
from rl.loop.tasks import evaluation_levels, task_entries
from rl.runs.checkpoint import load_latest
from rl.training import catch_up
from rollout.dialects.dialect import make_dialect
from rollout.record.ledger import Ledger, read_audit
from rollout.record.trajectory import StopReason
from rollout.schedule.scheduler import outcome_of
from rollout.schedule.signal_gate import SignalGate
from rollout.worker import RolloutWorker
from tests.fakes import ScriptedEngine
from tests.rl.training import SMALL, Run, scripted_worker, small_config, train_in_process
from tests.rollout.trajectories import make_group, make_trajectory

LOOSE = "learner.self_check_tolerance=1e9"
GATE = "curriculum.gate=zero_variance"


def rows_of(run: Run, file: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (run.folder.path / file).read_text().splitlines()]


def steps_of(run: Run) -> list[dict]:
    return [row for row in rows_of(run) if row["kind"] == "step"]


def always_wrong(prompt_ids: np.ndarray, rng: np.random.Generator) -> list[int]:
    return [*ByteTokenizer().encode("-1"), ByteTokenizer().special_id("<end>")]


def wrong_worker(config: TrainConfig, name: str, host: EnvHost) -> RolloutWorker:
    return RolloutWorker(
        name,
        engine=ScriptedEngine(always_wrong),
        dialect=make_dialect(config.policy),
        host=host,
        config=config.rollout,
        seed=config.seed,
    )


# --- the gate


def test_the_gate_refuses_up_to_its_limit_in_each_step() -> None:
    gate = SignalGate(lambda group: not group.is_degenerate, limit=2)
    flat = make_group([make_trajectory(1.0), make_trajectory(1.0)])
    mixed = make_group([make_trajectory(1.0), make_trajectory(0.0)])
    assert [gate.refuses(group) for group in (flat, mixed, flat, flat, flat)] == [True, False, True, False, False]
    assert gate.exhausted_steps == 1
    gate.step_done()
    assert gate.refuses(flat)


@pytest.mark.parametrize("staleness", [0, 2])
def test_gated_groups_are_replaced_so_that_every_step_trains_on_groups_that_differ(
    tmp_path: Path, staleness: int
) -> None:
    words = (GATE, "curriculum.max_refill=20", "steps=10", f"rollout.max_staleness={staleness}", LOOSE)
    run = train_in_process(small_config(tmp_path, *words), build=scripted_worker)
    steps = steps_of(run)
    assert [row["group/frac_mixed"] for row in steps] == [1.0] * 10
    assert max(row["off_policy/lag/max"] for row in steps) <= staleness
    gated = run.audit["dropped"]["zero_variance"]  # type: ignore[index]
    assert gated == run.controller.scheduler.counters.gated > 0
    assert (run.audit["consumed"], run.audit["issued"], run.audit["balanced"]) == (20, 20 + gated, True)
    assert run.controller.scheduler.counters.dropped == 0
    assert not [row for row in rows_of(run, "events.jsonl") if row["kind"] == "dropped"]


def test_without_the_gate_groups_of_equal_rewards_are_consumed(tmp_path: Path) -> None:
    run = train_in_process(small_config(tmp_path, "steps=10", LOOSE), build=scripted_worker)
    assert run.audit["dropped"] == {}
    assert min(row["group/frac_mixed"] for row in steps_of(run)) < 1.0


@pytest.mark.parametrize("staleness", [0, 2])
def test_where_nothing_differs_refilling_ends_and_the_run_goes_on(tmp_path: Path, staleness: int) -> None:
    words = (GATE, "curriculum.max_refill=1.5", "steps=6", f"rollout.max_staleness={staleness}", LOOSE)
    run = train_in_process(small_config(tmp_path, *words), build=wrong_worker)
    assert run.controller.progress.step == 6
    assert run.audit["consumed"] == 12
    assert 0 < run.audit["dropped"]["zero_variance"] <= 3 * (6 + staleness)  # type: ignore[index]
    exhausted = [row for row in rows_of(run, "events.jsonl") if row["kind"] == "refill_exhausted"]
    assert 1 <= len(exhausted) <= 6 + staleness
    assert exhausted[0]["refused"] == 3


# --- levels


def test_the_frontier_rises_during_training_and_is_told_by_the_metrics(tmp_path: Path) -> None:
    words = ("curriculum=levels", "curriculum.probe=0", "curriculum.window=3", "curriculum.promote=0.3")
    words += ("curriculum.max_level=2", "steps=12", LOOSE)
    run = train_in_process(small_config(tmp_path, *words), build=scripted_worker)
    frontiers = [row["curriculum/calculator/frontier"] for row in steps_of(run)]
    assert frontiers == sorted(frontiers) and frontiers[-1] == 2
    last = steps_of(run)[-1]
    assert 0 < last["curriculum/calculator/success/0"] < 1
    assert 0 <= last["curriculum/calculator/zero_variance/0"] < 1
    assert load_latest(run.folder.checkpoints).state["run"]["curriculum"]["climbs"]["calculator"][0] == frontiers[-1]


def test_failed_members_and_lost_groups_count_as_not_solved() -> None:
    failed = make_trajectory(None, stop_reason=StopReason.ENV_ERROR)
    assert outcome_of(make_group([make_trajectory(1.0), failed, failed, failed])) == Outcome(success=0.25, flat=True)
    assert outcome_of(make_group([make_trajectory(1.0), make_trajectory(0.5)])) == Outcome(success=0.5)


def test_held_out_tasks_are_of_the_levels_that_training_draws_or_of_the_one_asked_for(tmp_path: Path) -> None:
    def levels(*words: str) -> list[int]:
        return list(evaluation_levels(small_config(tmp_path, *words)))

    assert levels() == []  # each environment's own
    assert levels("curriculum=uniform", "curriculum.max_level=5") == [0, 1, 2, 3, 4, 5]
    assert levels("curriculum=levels", "evaluation.level=5") == [5]


# --- the benchmark


def test_the_levels_that_were_measured_are_the_levels_that_are_shipped() -> None:
    result = json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / "curriculum.json").read_text())
    for figures in result["figures"].values():
        words = shlex.split(figures["command"])
        measured = words[words.index("--levels") + 1].split()
        shipped = load_config(["curriculum=levels"]).curriculum
        assert load_config(["curriculum=levels", *measured]).curriculum == shipped


def test_groups_are_counted_to_the_first_of_two_evaluations_at_the_target() -> None:
    groups = {0: 0, 5: 60, 10: 125, 15: 190, 20: 260}
    lucky = [[0, 0.1, 400], [5, 0.5, 150], [10, 0.3, 150], [15, 0.45, 150], [20, 0.6, 400]]
    assert groups_to(lucky, 0.4, groups) == 190
    assert groups_to(lucky, 0.55, groups) == 260  # the last stands alone
    assert groups_to(lucky, 0.7, groups) is None


def test_a_side_is_trained_until_two_evaluations_in_a_row_reach_the_target(tmp_path: Path) -> None:
    def settled_after(*successes: float) -> bool:
        rows = [
            {"kind": "evaluation", "step": i, "eval/success": success, "eval/n": 100}
            for i, success in enumerate(successes)
        ]
        half_a_row = '{"kind": "evaluation", "st'
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + half_a_row)
        return is_settled(tmp_path)

    assert not is_settled(tmp_path / "not-begun")
    assert not settled_after(0.1)
    assert not settled_after(0.1, 0.5)
    assert not settled_after(0.1, 0.5, 0.3)
    assert settled_after(0.1, 0.5, 0.3, 0.4, 0.4)


def test_a_side_that_never_arrives_cannot_win() -> None:
    def side(sampler: str, seed: int, groups: int, reached: bool = True) -> dict:
        return {"sampler": sampler, "seed": seed, "groups": groups, "reached": reached}

    pairs = [side("uniform", 1, 200), side("levels", 1, 100), side("uniform", 2, 200), side("levels", 2, 90, False)]
    assert compare(pairs[:2]) == 0.5
    assert compare([*pairs, side("uniform", 3, 100), side("levels", 3, 70)]) == 0.7


# --- resume


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_a_curriculum_catches_up_with_the_ledger_from_any_older_state(tmp_path: Path, seed: int) -> None:
    """A run of 60 random events is killed; its checkpoint is of event number 0, 7, 31 or 60."""
    config = dataclasses.replace(
        small_config(tmp_path), curriculum=CurriculumConfig(sampler="levels", window=3, promote=0.5)
    )
    entries, rng, host = task_entries(config), random.Random(seed), EnvPool()
    states, ended, open_tasks = {}, [], []

    def source_of(state: dict | None, counter: int) -> TaskSource:
        curriculum = Curriculum(entries, config.curriculum, seed=1)
        if state is not None:
            curriculum.load_state(state)
        return TaskSource(entries, host, seed=1, held_out=frozenset(), counter=counter, curriculum=curriculum)

    async def play() -> None:
        first = source_of(None, 0)
        with closing(Ledger(tmp_path / "ledger.sqlite")) as ledger:
            for event in range(61):
                states[event] = json.loads(json.dumps(first.curriculum.state()))
                if not open_tasks or rng.random() < 0.5:
                    open_tasks.append(task := await first.next())
                    ledger.issue([task])
                else:
                    task = open_tasks.pop(rng.randrange(len(open_tasks)))
                    attempt = ledger.lease(task.task_id, "w", 9.0)
                    members = [make_trajectory(float(rng.random() < 0.7), group_id=task.task_id) for _ in range(4)]
                    group = dataclasses.replace(make_group(members), task=task, group_id=task.task_id)
                    ledger.commit(task.task_id, attempt, "digest")
                    if rng.random() < 0.2:
                        ledger.drop(task.task_id, "attempts")  # nothing of it was stored
                        first.settled(task, Outcome())
                    else:
                        ended.append(group)
                        first.settled(task, outcome_of(group))
            expected = [first.curriculum.draw(first.counter + i) for i in range(30)]
            for at in (0, 7, 31, 60):
                resumed = source_of(states[at], first.counter)
                catch_up(resumed, ledger, ended)
                assert [resumed.curriculum.draw(first.counter + i) for i in range(30)] == expected
                assert resumed.curriculum.awaited == {counter_of(task) for task in open_tasks}

    asyncio.run(play())


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["levels", "pool"])
def test_a_finished_run_is_resumed_for_more_steps_where_its_curriculum_stood(
    tmp_path: Path, sampler: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "runs"
    words = [f"curriculum={sampler}", GATE, "rollout.max_turn_tokens=4", f"run.root={root}"]
    assert main(["train", *SMALL, *words, "steps=2"]) == 0
    before = load_latest(root / "latest" / "checkpoints").state["run"]["curriculum"]
    assert main(["resume", "latest", "--root", str(root), "steps=4"]) == 0
    after = load_latest(root / "latest" / "checkpoints").state["run"]["curriculum"]
    capsys.readouterr()
    assert after["next_counter"] > before["next_counter"]
    assert main(["eval", "latest", "--root", str(root), "evaluation.level=1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["n"] == 4


def test_what_was_dropped_before_a_resume_is_still_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "runs"
    words = [GATE, "rollout.max_turn_tokens=4", f"run.root={root}"]
    assert main(["train", *SMALL, *words, "steps=2"]) == 0
    assert main(["resume", "latest", "--root", str(root), "steps=3"]) == 0
    capsys.readouterr()
    rows = [json.loads(line) for line in (root / "latest" / "metrics.jsonl").read_text().splitlines()]
    gated = [row["curriculum/gated_groups"] for row in rows if row["kind"] == "step"]
    assert 0 < gated[1] < gated[2]  # the benchmark counts dispatched groups by it
    assert gated[2] == read_audit(root / "latest" / "ledger.sqlite")["dropped"]["zero_variance"]


def test_groups_consumed_before_a_checkpoint_without_a_curriculum_do_not_count_as_failed(tmp_path: Path) -> None:
    curriculum = CurriculumConfig(sampler="levels", window=3)
    config = dataclasses.replace(small_config(tmp_path, "env.level=2"), curriculum=curriculum)
    source = TaskSource(
        task_entries(config), EnvPool(), seed=1, held_out=frozenset(),
        curriculum=Curriculum(task_entries(config), curriculum, seed=1),
    )  # fmt: skip
    with closing(Ledger(tmp_path / "ledger.sqlite")) as ledger:
        for counter in range(9):
            task = make_task(task_entries(config), split="train", seed=1, counter=counter)
            ledger.issue([task])
            ledger.commit(task.task_id, ledger.lease(task.task_id, "w", 9.0), "digest")
            ledger.consume([task.task_id], 1)
        catch_up(source, ledger, [])
    assert source.curriculum.frontier("calculator") == 2


def test_demonstrations_have_no_rewards_to_climb_by(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["sft", "curriculum=levels", f"sft.output={tmp_path / 'x.safetensors'}"]) == 2
    assert "curriculum.sampler='levels' needs rewards" in capsys.readouterr().err
