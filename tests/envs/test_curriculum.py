"""The curriculum by hand, under any order of arrival, across kills, and in a simulated training."""

import asyncio
import dataclasses
import json
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.schema import CurriculumConfig
from envs.base import AgentEnv
from envs.pool.pool import EnvPool
from envs.tasks.curriculum import Curriculum, Outcome, TaskEntry
from envs.tasks.task_source import TaskSource, held_out_tasks, make_task

CALC = TaskEntry(name="calc", env_id="Calculator-v0", weight=1.0, level=0, kwargs={})
GATE = TaskEntry(name="gate", env_id="ToolGate-v0", weight=1.0, level=2, kwargs={})
LEVELS = CurriculumConfig(sampler="levels", window=8)


def make(config: CurriculumConfig = LEVELS, *entries: TaskEntry, seed: int = 1) -> Curriculum:
    return Curriculum(entries or (CALC,), config, seed=seed)


def dispatch(curriculum: Curriculum, level: int, *outcomes: float | None, name: str = "calc") -> list[int]:
    """Dispatch a group at `level` for each outcome and record those that are not None. Returns the counters."""
    counters = []
    for outcome in outcomes:
        counter = curriculum.next_counter
        curriculum.dispatched(counter, name, level)
        counters.append(counter)
        if outcome is not None:
            curriculum.record(counter, Outcome(success=outcome))
    return counters


def shares(curriculum: Curriculum, draws: int = 4000) -> dict[int, float]:
    count = Counter(curriculum.draw(i).level for i in range(draws))
    return {level: n / draws for level, n in sorted(count.items())}


# --- draws


def test_fixed_tasks_keep_the_ids_and_seeds_that_measured_runs_had() -> None:
    async def first_tasks() -> list[tuple[str, int, int]]:
        source = TaskSource((CALC, GATE), EnvPool(), seed=2, held_out=frozenset())
        return [(task.task_id, task.seed, task.level) for task in [await source.next() for _ in range(4)]]

    assert asyncio.run(first_tasks()) == [
        ("train/calc/0", 1022860091, 0),
        ("train/calc/1", 118498613, 0),
        ("train/calc/2", 781348372, 0),
        ("train/gate/3", 2142050624, 2),
    ]
    assert make_task((CALC,), split="eval", seed=0, counter=3).seed == 1907134437


def test_uniform_draws_all_levels_alike() -> None:
    found = shares(make(CurriculumConfig(sampler="uniform", min_level=2, max_level=5)))
    assert found.keys() == {2, 3, 4, 5}
    assert all(share == pytest.approx(0.25, abs=0.03) for share in found.values())


def test_levels_mix_frontier_next_and_those_below() -> None:
    curriculum = make(CurriculumConfig(sampler="levels", floor=0.0, max_level=4), TaskEntry(
        name="calc", env_id="Calculator-v0", weight=1.0, level=2, kwargs={}))  # fmt: skip
    found = shares(curriculum)
    assert found[2] == pytest.approx(0.6, abs=0.03)
    assert found[3] == pytest.approx(0.2, abs=0.03)
    assert found[0] == pytest.approx(0.1, abs=0.02)
    assert found[1] == pytest.approx(0.1, abs=0.02)
    assert 4 not in found


def test_the_floor_reaches_every_level() -> None:
    found = shares(make(CurriculumConfig(sampler="levels", floor=0.5)))
    assert found.keys() == set(range(10))
    assert found[9] == pytest.approx(0.05, abs=0.02)


def test_a_mix_climbs_in_each_environment_by_itself() -> None:
    curriculum = make(LEVELS, CALC, GATE)
    dispatch(curriculum, 2, *[1.0] * 8, name="gate")
    assert (curriculum.frontier("calc"), curriculum.frontier("gate")) == (0, 3)


def test_drawing_changes_nothing() -> None:
    curriculum = make()
    before = json.dumps(curriculum.state())
    assert [curriculum.draw(7) for _ in range(3)] == [curriculum.draw(7)] * 3
    assert json.dumps(curriculum.state()) == before


# --- decisions


def test_the_frontier_rises_at_the_threshold_and_not_below() -> None:
    curriculum = make()
    dispatch(curriculum, 0, *[0.69] * 8)
    assert curriculum.frontier("calc") == 0
    dispatch(curriculum, 0, 0.77)  # the window slides: 7 of 0.69 and this one are 0.7
    assert curriculum.frontier("calc") == 1


def test_the_frontier_falls_where_hardly_anything_succeeds_but_never_below_the_lowest() -> None:
    curriculum = make()
    dispatch(curriculum, 0, *[0.0] * 20)
    assert curriculum.frontier("calc") == 0
    dispatch(curriculum, 0, *[1.0] * 8)
    dispatch(curriculum, 1, *[0.1] * 8)
    assert curriculum.frontier("calc") == 0


def test_a_group_that_is_still_out_holds_up_those_dispatched_after_it() -> None:
    curriculum = make()
    (slow,) = dispatch(curriculum, 0, None)
    dispatch(curriculum, 0, *[1.0] * 20)
    assert curriculum.frontier("calc") == 0, "fast successes were counted before the slow group in front of them"
    curriculum.record(slow, Outcome())  # it timed out: counted as not solved, 7/8 of the window still succeed
    assert curriculum.frontier("calc") == 1


def test_dropped_groups_count_as_not_solved() -> None:
    curriculum = make()
    for counter in dispatch(curriculum, 0, *[None] * 8):
        curriculum.record(counter, Outcome(success=1.0) if counter % 2 else Outcome())
    assert curriculum.frontier("calc") == 0


def test_results_of_the_level_before_decide_nothing_after_a_promotion() -> None:
    curriculum = make()
    dispatch(curriculum, 0, *[1.0] * 7)
    late = dispatch(curriculum, 0, *[None] * 9)
    curriculum.record(late[0], Outcome(success=1.0))
    assert curriculum.frontier("calc") == 1
    for counter in late[1:]:
        curriculum.record(counter, Outcome(success=0.0))
    assert curriculum.frontier("calc") == 1
    dispatch(curriculum, 1, *[0.1] * 8)
    assert curriculum.frontier("calc") == 0  # and those late failures do not count for level 0 again
    dispatch(curriculum, 0, *[1.0] * 8)
    assert curriculum.frontier("calc") == 1


def test_other_levels_do_not_move_the_frontier() -> None:
    curriculum = make()
    dispatch(curriculum, 1, *[1.0] * 30)
    assert curriculum.frontier("calc") == 0


def test_a_level_above_in_which_nothing_succeeds_is_out_of_reach_until_something_does() -> None:
    curriculum = make(CurriculumConfig(sampler="levels", window=8, floor=0.0))
    dispatch(curriculum, 1, *[0.0] * 7)
    assert shares(curriculum)[1] == pytest.approx(0.2, abs=0.03)
    dispatch(curriculum, 1, 0.0)
    assert shares(curriculum)[1] == pytest.approx(0.05, abs=0.02)
    dispatch(curriculum, 0, *[1.0] * 20)
    assert curriculum.frontier("calc") == 0
    dispatch(curriculum, 1, 0.1)
    assert shares(curriculum)[1] == pytest.approx(0.2, abs=0.03)
    dispatch(curriculum, 0, 1.0)
    assert curriculum.frontier("calc") == 1


def test_a_level_that_the_frontier_fell_from_is_known_to_be_out_of_reach() -> None:
    curriculum = make()
    dispatch(curriculum, 0, *[1.0] * 8)
    dispatch(curriculum, 1, *[0.0] * 8)
    dispatch(curriculum, 0, *[1.0] * 8)
    assert curriculum.frontier("calc") == 0


# --- the probe


def test_a_probe_draws_all_levels_alike_and_begins_at_the_highest_that_is_not_hopeless() -> None:
    curriculum = make(CurriculumConfig(sampler="levels", window=4, probe=2, max_level=4))
    assert [curriculum.draw(i).level for i in range(7)] == [0, 1, 2, 3, 4, 0, 1]
    for level, success in enumerate([1.0, 0.9, 0.2, 0.05]):
        dispatch(curriculum, level, success, success)
    (first, second) = dispatch(curriculum, 4, None, None)
    assert curriculum.frontier("calc") == 0
    curriculum.record(second, Outcome(success=0.0))
    assert curriculum.draw(50).level == 50 % 5
    curriculum.record(first, Outcome(success=0.0))
    assert curriculum.frontier("calc") == 2  # groups dispatched before the probe's last one do not climb
    dispatch(curriculum, 2, *[1.0] * 4)
    assert curriculum.frontier("calc") == 3


def test_a_probe_that_finds_nothing_begins_at_the_lowest_level() -> None:
    curriculum = make(
        CurriculumConfig(sampler="levels", window=4, probe=1, max_level=2), dataclasses.replace(CALC, level=2)
    )
    assert curriculum.frontier("calc") == 2
    for level in range(3):
        dispatch(curriculum, level, 0.0)
    assert curriculum.frontier("calc") == 0
    assert shares(curriculum)[0] > 0.5


def test_a_state_from_before_there_were_probes_is_read() -> None:
    curriculum = make(CurriculumConfig(sampler="levels", window=4, probe=3))
    state = make().state() | {"format": 1}
    state["climbs"] = {"calc": [2, 40, [0.5]]}
    curriculum.load_state(state)
    assert curriculum.frontier("calc") == 2
    assert shares(curriculum)[2] > 0.5


SCRIPT = st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0.0, 0.5, 0.8, 1.0])), min_size=30, max_size=120)


@given(SCRIPT, st.integers(0, 2**32), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_the_order_of_arrival_does_not_matter(script: list[tuple[int, float]], seed: int, probe: int) -> None:
    config = CurriculumConfig(sampler="levels", window=4, probe=probe, max_level=4)
    in_order, shuffled = make(config), make(config)
    for counter, (level, _) in enumerate(script):
        for curriculum in (in_order, shuffled):
            curriculum.dispatched(counter, "calc", level)
    arrivals = list(enumerate(script))
    for counter, (_, success) in arrivals:
        in_order.record(counter, Outcome(success=success))
    random.Random(seed).shuffle(arrivals)
    for counter, (_, success) in arrivals:
        shuffled.record(counter, Outcome(success=success))
    assert in_order.state()["climbs"] == shuffled.state()["climbs"]
    assert [in_order.draw(i) for i in range(200, 230)] == [shuffled.draw(i) for i in range(200, 230)]


def run_events(curriculum: Curriculum, rng: random.Random, count: int, log: list[tuple]) -> None:
    """A random training: dispatch what is drawn, end what is out, in any order; write down what happened."""
    for _ in range(count):
        if not curriculum.awaited or rng.random() < 0.5:
            counter = curriculum.next_counter
            draw = curriculum.draw(counter)
            log.append(("dispatched", counter, draw.entry.name, draw.level, draw.problem))
            curriculum.dispatched(counter, draw.entry.name, draw.level, draw.problem)
        else:
            counter = rng.choice(sorted(curriculum.awaited))
            log.append(("record", counter, rng.choice([0.0, 0.6, 1.0, 1.0])))
            curriculum.record(counter, Outcome(success=log[-1][2]))


@pytest.mark.parametrize(
    ("sampler", "probe"), [("fixed", 0), ("uniform", 0), ("levels", 0), ("levels", 1), ("pool", 0)]
)
@given(seed=st.integers(0, 2**32), checkpoint=st.integers(0, 150), kill=st.integers(0, 150))
@settings(max_examples=25, deadline=None)
def test_a_run_killed_at_any_point_goes_on_with_the_same_draws(
    sampler: str, probe: int, seed: int, checkpoint: int, kill: int
) -> None:
    """The state of a checkpoint, told what the ledger knows since (dispatches first, then outcomes), is the state at
    the kill; telling it twice changes nothing."""
    config = CurriculumConfig(sampler=sampler, window=4, pool_size=20, probe=probe, max_level=5)
    rng, log = random.Random(seed), []
    first = make(config, CALC, GATE)
    run_events(first, rng, checkpoint, log)
    state = json.loads(json.dumps(first.state()))
    run_events(first, rng, kill, log)

    resumed = make(config, CALC, GATE)
    resumed.load_state(state)
    for _ in range(2):
        for event in (e for e in log if e[0] == "dispatched"):
            resumed.dispatched(*event[1:])
        for event in (e for e in log if e[0] == "record"):
            resumed.record(event[1], Outcome(success=event[2]))
    assert resumed.awaited == first.awaited
    counters = range(first.next_counter, first.next_counter + 40)
    assert resumed.next_counter == first.next_counter
    assert [resumed.draw(i) for i in counters] == [first.draw(i) for i in counters]
    later: list[list[tuple]] = [[], []]
    for curriculum, events in zip((first, resumed), later, strict=True):
        run_events(curriculum, random.Random(seed + 1), 60, events)
    assert later[0] == later[1]


def test_what_is_kept_does_not_grow_with_the_run() -> None:
    curriculum = make()
    for counter in range(5000):
        curriculum.dispatched(counter, "calc", curriculum.draw(counter).level)
        curriculum.record(counter, Outcome(success=0.5))
    assert len(json.dumps(curriculum.state())) < 12_000


# --- pool


def test_pools_draw_most_from_what_is_neither_solved_nor_hopeless() -> None:
    curriculum = make(CurriculumConfig(sampler="pool", pool_size=30))
    for problem in range(30):
        counter = curriculum.next_counter
        curriculum.dispatched(counter, "calc", 0, problem)
        curriculum.record(counter, Outcome(success=(0.0, 0.5, 1.0)[problem % 3]))
    drawn = Counter((curriculum.draw(i).problem or 0) % 3 for i in range(5000))
    assert drawn[1] / 5000 == pytest.approx(1 / 1.4, abs=0.03)
    assert drawn[0] / 5000 == pytest.approx(0.2 / 1.4, abs=0.03)


def test_the_class_of_a_problem_is_that_of_its_last_dispatched_group() -> None:
    curriculum = make(CurriculumConfig(sampler="pool", pool_size=1))
    curriculum.dispatched(0, "calc", 0, 0)
    curriculum.dispatched(1, "calc", 0, 0)
    curriculum.record(1, Outcome(success=1.0))
    curriculum.record(0, Outcome(success=0.5))  # older, although it came later
    assert curriculum.state()["problems"] == [["calc", 0, [[0, 1, 1.0]]]]


def test_a_resumed_pool_forgets_problems_that_are_not_in_it_any_more() -> None:
    old = make(CurriculumConfig(sampler="pool", pool_size=30))
    for problem in range(30):
        old.dispatched(problem, "calc", 0, problem)
        old.record(problem, Outcome(success=1.0))
    state = json.loads(json.dumps(old.state()))
    smaller = make(CurriculumConfig(sampler="pool", pool_size=5))
    smaller.load_state(state)
    assert {smaller.draw(i).problem for i in range(100)} == set(range(5))
    harder = make(CurriculumConfig(sampler="pool", pool_size=30), dataclasses.replace(CALC, level=3))
    harder.load_state(state)
    assert [harder.draw(i).problem for i in range(100)] == [
        make(CurriculumConfig(sampler="pool", pool_size=30)).draw(i).problem for i in range(100)
    ]  # of another level, so nobody has tried them


# --- tasks


def test_tasks_of_a_pool_repeat_and_are_found_again_by_an_older_state() -> None:
    config = CurriculumConfig(sampler="pool", pool_size=5)

    async def play() -> tuple[Curriculum, Curriculum]:
        source = TaskSource((CALC,), EnvPool(), seed=1, held_out=frozenset(), curriculum=make(config))
        tasks = [await source.next() for _ in range(40)]
        assert len({task.seed for task in tasks}) == 5
        assert len({task.task_id for task in tasks}) == 40
        other = TaskSource((CALC,), EnvPool(), seed=1, held_out=frozenset(), curriculum=make(config))
        for each in (source, other):
            for task in tasks:
                each.adopt(task)
                each.settled(task, Outcome(success=0.5))
        return source.curriculum, other.curriculum

    ours, other = asyncio.run(play())
    assert ours.state() == other.state()


def test_held_out_tasks_of_a_level_are_disjoint_from_training_at_all_levels() -> None:
    async def overlap() -> tuple[set[int], int]:
        host = EnvPool()
        held_out = await held_out_tasks((CALC,), host, count=40, seed=0, levels=(5,))
        config = CurriculumConfig(sampler="uniform", max_level=5)
        source = TaskSource((CALC,), host, seed=1, held_out=frozenset(held_out), curriculum=make(config))
        tasks = [await source.next() for _ in range(200)]
        digests = await host.digests(tasks)
        return {task.level for task in held_out.values()}, len(set(digests) & set(held_out))

    levels, shared = asyncio.run(overlap())
    assert levels == {5}
    assert shared == 0


class Sums(AgentEnv):
    """Forty problems, the same at every level."""

    def task(self, rng: random.Random, level: int) -> str:
        return f"{rng.randrange(40)}+1=?"

    def reward(self, answer: str) -> float:
        return 0.0


def test_a_held_out_problem_that_another_level_draws_too_is_not_trained_on() -> None:
    async def overlap() -> tuple[int, int]:
        host, entry = EnvPool(), TaskEntry(name="sums", env_id=f"{__name__}:Sums", weight=1.0, level=0, kwargs={})
        held_out = await held_out_tasks((entry,), host, count=20, seed=0)
        curriculum = make(CurriculumConfig(sampler="uniform", min_level=1, max_level=5), entry)
        source = TaskSource((entry,), host, seed=1, held_out=frozenset(held_out), curriculum=curriculum)
        trained = [await host.open(str(i), await source.next()) for i in range(60)]
        evaluated = [await host.open(f"e{i}", task) for i, task in enumerate(held_out.values())]
        prompts = [{outcome.messages[-1].text for outcome in outcomes} for outcomes in (trained, evaluated)]
        await host.close_all()
        return len(prompts[1]), len(prompts[0] & prompts[1])

    assert asyncio.run(overlap()) == (20, 0)


# --- a simulated training


class Learner:
    """A policy without a model. At `level` it succeeds with probability 1 / (1 + exp(level - skill)), and skill grows
    by what a trained group can teach: the variance of its rewards, most near the skill."""

    def __init__(self, seed: int) -> None:
        self.skill = 0.5
        self.rng = random.Random(seed)

    def success(self, level: int) -> float:
        return 1 / (1 + 2.718281828 ** (2 * (level - self.skill)))

    def play(self, level: int, members: int = 8) -> float:
        return sum(self.rng.random() < self.success(level) for _ in range(members)) / members

    def train(self, success: float) -> None:
        self.skill += 0.05 * success * (1 - success)


def groups_until(sampler: str, *, in_flight: int, seed: int, target: float = 8.5, most: int = 20_000) -> int:
    """Groups dispatched until the skill is `target`, each trained only after `in_flight` younger ones were played."""
    curriculum = make(CurriculumConfig(sampler=sampler), seed=seed)
    learner = Learner(seed)
    out: list[tuple[int, float]] = []
    for counter in range(most):
        draw = curriculum.draw(counter)
        curriculum.dispatched(counter, draw.entry.name, draw.level)
        out.append((counter, learner.play(draw.level)))
        while len(out) > in_flight:
            ended, success = out.pop(0)
            learner.train(success)
            curriculum.record(ended, Outcome(success=success, flat=success in (0.0, 1.0)))
        if learner.skill >= target:
            return counter
    return most


@pytest.mark.parametrize("in_flight", [0, 64, 256])
def test_levels_reach_the_target_with_far_fewer_groups_than_uniform(in_flight: int) -> None:
    for seed in (1, 2):
        levels, uniform = (groups_until(s, in_flight=in_flight, seed=seed) for s in ("levels", "uniform"))
        assert uniform < 20_000
        assert levels <= 0.6 * uniform, f"levels {levels}, uniform {uniform} with {in_flight} in flight"
