"""Does an environment keep its promises? One probe for each way in which environments have been seen to break them.

    report = check_environment("my_envs:Eggs", levels=(0, 5, 9), num_seeds=20)
    assert report.passed, report.failures

The probes play thousands of short episodes in this process and some in a new one. They judge what an environment does,
and run its code: check nothing that you would not import.
"""

import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from envs.check import contract_probes, pay_probes, repeat_probes
from envs.check.subject import Episode, Failure, Hung, Subject
from envs.registry import find_class
from envs.worker_thread import run_sync

DEADLINE_S = 900.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """One promise, and how to see it broken."""

    name: str
    promise: str
    """What holds, in one sentence."""
    run: Callable[[Subject], Awaitable[Failure | None]]


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeResult:
    """What one probe found."""

    probe: Probe
    failure: Failure | None
    """None where the promise was kept."""
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckReport:
    """What all probes found, in their order."""

    env_id: str
    kwargs: Mapping[str, Any]
    """What the constructor was given."""
    results: tuple[ProbeResult, ...]
    sample: Episode
    """One episode of the oracle."""

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def failures(self) -> dict[str, Failure]:
        """By the probe's name."""
        return {result.probe.name: result.failure for result in self.results if result.failure is not None}


PROBES: tuple[Probe, ...] = (
    Probe(name="oracle", promise="the oracle scores 1.0 at every level", run=contract_probes.oracle),
    Probe(name="schemas", promise="tools have names, descriptions and valid JSON schemas", run=contract_probes.schemas),
    Probe(name="null", promise="saying nothing scores below 0.2", run=pay_probes.null),
    Probe(name="garbage", promise="random text, numbers and 'nan' score below 0.2", run=pay_probes.garbage),
    Probe(name="repeat", promise="repeating the prompt scores below 0.2", run=pay_probes.repeat),
    Probe(name="always_call", promise="calling tools blindly scores below 0.2", run=pay_probes.always_call_probe),
    Probe(name="guess", promise="no one answer to all tasks scores 0.2 or more", run=pay_probes.guess),
    Probe(name="cheater", promise="answers read without a working tool call score below 0.2", run=pay_probes.cheater),
    Probe(name="gold_hidden", promise="prompt, tools and info do not show the answer", run=pay_probes.gold_hidden),
    Probe(name="malformed", promise="no message of a policy makes it raise", run=contract_probes.malformed),
    Probe(name="same_seed", promise="an instance gives the same task again", run=repeat_probes.same_seed),
    Probe(name="replay", promise="the same messages get the same replies", run=repeat_probes.replay_equals_live),
    Probe(name="other_seed", promise="other seeds give other problems", run=repeat_probes.other_seed),
    Probe(name="new_process", promise="another process gives the same task", run=repeat_probes.new_process),
    Probe(name="isolation", promise="100 instances at once do not disturb each other", run=repeat_probes.isolation),
    Probe(name="close", promise="close() leaves nothing running or open", run=repeat_probes.close_leaves_nothing),
    Probe(name="reward_bounds", promise="rewards stay within reward_range", run=contract_probes.reward_bounds),
    Probe(
        name="deadlines", promise="95% of resets, steps and rewards meet their deadlines", run=contract_probes.deadlines
    ),
)


def default_levels(env_id: str) -> tuple[int, ...]:
    """The lowest, the middle and the highest level. Example: of ten levels, (0, 5, 9)."""
    num_levels = find_class(env_id).levels
    return tuple(sorted({0, num_levels // 2, num_levels - 1}))


def check_environment(
    env_id: str,
    *,
    levels: tuple[int, ...] = (),
    num_seeds: int = 20,
    kwargs: Mapping[str, Any] | None = None,
    more_probes: tuple[Probe, ...] = (),
) -> CheckReport:
    """Run every probe. `levels` () stands for `default_levels`; `kwargs` go to the constructor, as JSON data.

    Raises UnknownEnvironment, MalformedEnvironment, ValueError for a level that there is not, and TimeoutError after
    15 minutes.
    """
    subject = Subject(env_id, levels=levels or default_levels(env_id), num_seeds=num_seeds, kwargs=kwargs)
    highest = subject.owner.levels - 1
    if num_seeds < 2 or not all(0 <= level <= highest for level in subject.levels):
        raise ValueError(
            f"levels {levels} and {num_seeds} seeds: {env_id} has levels 0 to {highest}; seeds are 2 or more"
        )
    return run_sync(_check(subject, (*PROBES, *more_probes)), DEADLINE_S)


async def _check(subject: Subject, probes: tuple[Probe, ...]) -> CheckReport:
    results: list[ProbeResult] = []
    hung: Hung | None = None
    for probe in probes:
        started = time.perf_counter()
        try:
            failure = Failure(seen=f"not run: {hung}") if hung else await probe.run(subject)
        except Hung as error:
            hung, failure = error, Failure(seen=str(error))
        results.append(ProbeResult(probe=probe, failure=failure, seconds=time.perf_counter() - started))
    sample = Episode(seed=0, level=subject.levels[0])
    if hung is None:
        sample = await subject.oracle_episode(subject.seeds[0], subject.levels[0])
    return CheckReport(env_id=subject.env_id, kwargs=subject.kwargs, results=tuple(results), sample=sample)
