"""An environment under check: episodes of it, each on a fresh instance, and what they took and paid."""

import asyncio
import hashlib
import json
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from envs.base import AgentEnv, Observation, Oracle
from envs.errors import BadReward
from envs.message import ImagePart, Message, TextPart, ToolSpec
from envs.registry import construct, find_class
from envs.worker_thread import WorkerThread

Result = TypeVar("Result")

MIN_PATIENCE_S = 5.0
"""A reset, step or reward that takes longer than twice its own deadline, and than this, counts as hung."""
SAMPLED = 5
"""Seeds of each level where a probe costs more than one episode a task."""


class Hung(Exception):
    """The environment did not come back. Nothing more can be asked of it in this process."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """What a probe saw, and the shortest way to see it again."""

    seen: str
    seed: int | None = None
    """None where it takes no task to see it."""
    level: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """What a policy may read before its first message."""

    messages: Observation
    tools: tuple[ToolSpec, ...]
    meta: dict[str, Any]

    @property
    def prompt(self) -> str:
        return "\n".join(message.text for message in self.messages if message.role == "user")

    @property
    def system(self) -> str:
        return "\n".join(message.text for message in self.messages if message.role == "system")


Policy = Callable[[Start, random.Random], Oracle]
"""Makes the messages of one episode; it must never run out of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Episode:
    """One episode, to its end or to where something raised."""

    seed: int
    level: int
    start: Start | None = None
    """None where reset raised."""
    digest: str = ""
    turns: tuple[tuple[Message, Observation], ...] = ()
    """Each assistant message with what the environment replied."""
    reward: float | None = None
    """None where something raised before."""
    reward_parts: Mapping[str, float] = field(default_factory=dict)
    error: str = ""
    """What raised, or ""."""

    @property
    def actions(self) -> tuple[Message, ...]:
        return tuple(action for action, _ in self.turns)

    @property
    def messages(self) -> tuple[Message, ...]:
        opening = self.start.messages if self.start else ()
        return (*opening, *(message for action, replies in self.turns for message in (action, *replies)))

    @property
    def answer(self) -> str:
        """The last message's text."""
        return self.turns[-1][0].text if self.turns else ""

    def lines(self) -> list[str]:
        """The transcript, comparable: everything a policy saw, and the reward."""
        end = f"reward {self.reward} {json.dumps(dict(self.reward_parts), sort_keys=True)} {self.error}"
        return [*map(message_line, self.messages), end, f"problem {self.digest}"]


def message_line(message: Message) -> str:
    """A message as one line of text; images by their digest."""
    parts = [_part_text(part) for part in message.content]
    calls = [f"{c.name}({json.dumps(c.arguments, sort_keys=True, default=str)})" for c in message.tool_calls]
    error = message.tool_result.error if message.tool_result else None
    return f"{message.role}: {' '.join([*parts, *calls])}" + (f" [{error}]" if error else "")


def _part_text(part: TextPart | ImagePart) -> str:
    return part.text if isinstance(part, TextPart) else f"<image {hashlib.sha256(part.data).hexdigest()[:12]}>"


class Subject:
    """Plays episodes of one environment.

    Example: episode = await Subject("Calculator-v0", levels=(0, 5), num_seeds=3).oracle_episode(seed=1, level=0)
    """

    def __init__(
        self, env_id: str, *, levels: tuple[int, ...], num_seeds: int, kwargs: Mapping[str, Any] | None = None
    ) -> None:
        """Raises what `envs.registry.find_class` raises."""
        self.env_id = env_id
        self.owner = find_class(env_id)
        self.kwargs = dict(kwargs or {})
        self.levels = levels
        self.seeds = range(num_seeds)
        self.fresh_seeds = range(1_000_000, 1_000_100)
        """For a second look at what the first seeds suggest."""
        self.seconds: dict[str, list[tuple[float, int, int]]] = {"reset": [], "step": [], "reward": []}
        """(seconds, seed, level) of everything that was timed."""
        self.bad_rewards: list[Failure] = []
        """Rewards that were not finite numbers within `reward_range`."""
        self._oracle_episodes: dict[tuple[int, int], Episode] = {}
        self._shared: dict[Callable[..., Any], asyncio.Task[Any]] = {}

    async def once(self, make: "Callable[[Subject], Coroutine[Any, Any, Result]]") -> Result:
        """What `make(self)` returns; made once, however many probes ask."""
        if make not in self._shared:
            self._shared[make] = asyncio.create_task(make(self))
        return await self._shared[make]

    @contextmanager
    def untimed(self) -> Iterator[None]:
        """Whatever happens meanwhile is not counted into `seconds`: many at once are slower than one."""
        counted = self.seconds
        self.seconds = {kind: [] for kind in counted}
        try:
            yield
        finally:
            self.seconds = counted

    @property
    def tasks(self) -> list[tuple[int, int]]:
        """(seed, level) of every task under check."""
        return [(seed, level) for level in self.levels for seed in self.seeds]

    @property
    def sampled_tasks(self) -> list[tuple[int, int]]:
        """The first few seeds of every level."""
        return [(seed, level) for level in self.levels for seed in self.seeds[:SAMPLED]]

    async def oracle_episode(self, seed: int, level: int) -> Episode:
        """The oracle's episode of a task; played once."""
        key = (seed, level)
        if key not in self._oracle_episodes:
            self._oracle_episodes[key] = await self.play(None, seed, level)
        return self._oracle_episodes[key]

    async def play(self, policy: Policy | None, seed: int, level: int) -> Episode:
        """An episode on a fresh instance; with the oracle where `policy` is None."""
        env = await self.open()
        try:
            return await self.play_on(env, policy, seed, level)
        finally:
            await self.close(env)

    async def play_on(self, env: AgentEnv, policy: Policy | None, seed: int, level: int) -> Episode:
        """As `play`, on an instance that may have been used before."""
        start, digest, reward, parts, error = None, "", None, {}, ""
        turns: list[tuple[Message, Observation]] = []
        try:
            start, digest = await self.reset(env, seed, level)
            rng = random.Random(f"policy/{seed}/{level}")
            script = env.oracle() if policy is None else policy(start, rng)
            action = next(script)
            while True:
                await asyncio.sleep(0)  # episodes that are played at once take turns here
                replies, ended = await self.step(env, action)
                turns.append((action, replies))
                if ended:
                    break
                action = script.send(replies)
            parts = await self.score(env)
            reward = sum(parts.values())
        except Hung:
            raise
        except StopIteration:
            error = "the oracle stopped before it answered"
        except (Exception, SystemExit) as raised:  # the author's code may raise anything: the probes judge it
            error = f"{type(raised).__name__}: {raised}"
        return Episode(
            seed=seed,
            level=level,
            start=start,
            digest=digest,
            turns=tuple(turns),
            reward=reward,
            reward_parts=parts,
            error=error,
        )

    # --- one move, timed ---

    async def reset(self, env: AgentEnv, seed: int, level: int) -> tuple[Start, str]:
        """Start an episode; returns what a policy may read, and the problem's digest."""
        work = env.areset(seed=seed, options={"level": level})
        opening, info = await self._timed("reset", work, env.reset_timeout_s, seed, level)
        return Start(messages=opening, tools=info["tools"], meta=info["meta"]), info["problem_digest"]

    async def step(self, env: AgentEnv, action: Message) -> tuple[Observation, bool]:
        """(new messages, whether the episode ended)."""
        work = env.respond(action)
        replies, terminated, truncated = await self._timed("step", work, env.step_timeout_s, env.seed, env.level)
        return replies, terminated or truncated

    async def score(self, env: AgentEnv) -> dict[str, float]:
        """The parts of the reward. Raises BadReward, which is noted in `bad_rewards`."""
        try:
            return await self._timed("reward", env.score(), env.reward_timeout_s, env.seed, env.level)
        except BadReward as error:
            self.bad_rewards.append(Failure(seed=env.seed, level=env.level, seen=str(error)))
            raise

    async def open(self) -> AgentEnv:
        """A fresh instance, made on the thread it keeps, as in a pool."""
        if self.owner.inline:
            return construct(self.env_id, self.owner, self.kwargs)
        thread = WorkerThread()
        try:
            env = await thread.run(construct, self.env_id, self.owner, self.kwargs)
        except BaseException:  # cancelled too: nobody else would end its thread
            thread.stop()
            raise
        env.adopt_thread(thread)
        return env

    async def close(self, env: AgentEnv) -> None:
        await self.patiently("close", env.run_author(env.close), env.reset_timeout_s)

    async def patiently(self, what: str, work: Awaitable[Result], deadline_s: float) -> Result:
        """Wait for an author's code, longer than its deadline allows. Raises Hung where that is not enough."""
        patience_s = max(MIN_PATIENCE_S, 2 * deadline_s)
        limit = asyncio.timeout(patience_s)
        try:
            async with limit:
                return await work
        except TimeoutError:
            if limit.expired():
                raise Hung(f"{what} did not come back within {patience_s:g} s") from None
            raise

    async def _timed(
        self, what: str, work: Coroutine[Any, Any, Result], deadline_s: float, seed: int, level: int
    ) -> Result:
        started = time.perf_counter()
        try:
            return await self.patiently(f"{what} (seed {seed}, level {level})", work, deadline_s)
        finally:
            self.seconds[what].append((time.perf_counter() - started, seed, level))
