"""The contract of an environment: messages in, messages out.

An author writes a problem, tools, a reward and an oracle; determinism, coercion, deadlines and the 5-tuple are here:

    class Doubling(AgentEnv):
        def task(self, rng, level):                    # pure in (seed, level)
            self.number = rng.randint(1, 10 ** (level + 1))
            return f"double {self.number}"
        @tool
        def add(self, a: int, b: int) -> int:
            "Add two integers."
            return a + b
        def reward(self, answer):                      # a float, or named parts; may be async
            return float(answer.strip() == str(2 * self.number))
        def oracle(self):                              # yields assistant messages, receives the replies
            replies = yield call("add", a=self.number, b=self.number)
            yield say(replies[0].text)

An assistant message with tool calls is answered by one tool message per call, in call order. One without calls ends
the episode with its text as the answer, unless `on_message` replies. What a policy does wrong is an observation; what
an author does wrong raises, and the pool turns that into a recorded failure. InfraFault, raised anywhere, is the fault
of neither. What an author raises that is no Exception (SystemExit, KeyboardInterrupt) comes out as AuthorExit.
"""

import asyncio
import functools
import hashlib
import inspect
import json
import logging
import math
import random
import time
import weakref
from collections import Counter
from collections.abc import Callable, Generator, Mapping
from typing import Any, ClassVar, cast

import gymnasium

from envs.errors import (
    AuthorExit,
    BadArguments,
    BadReward,
    HungThread,
    InfraFault,
    MalformedEnvironment,
    error_text,
)
from envs.forked_children import ForkedChildren
from envs.message import ImagePart, Message, ToolCall, ToolResult, ToolSpec
from envs.problem_text import SHOWN_CHARS, fingerprint, finite, opening_messages
from envs.redaction import redacted
from envs.space import ActionSpace, ObservationSpace
from envs.task import Problem
from envs.tool import DEFAULT_COST, Tool, ToolOptions, bind_tools, cut_middle, refuse_new_tools
from envs.tool_result import as_content
from envs.worker_thread import WorkerThread, as_exception, boxed, run_sync, within

logger = logging.getLogger(__name__)

Observation = tuple[Message, ...]
Oracle = Generator[Message, Observation, None]
"""Yields assistant messages; what the environment replied comes back from `yield`."""

_latency = random.Random()  # of its own: time is no part of a transcript, and tests seed the global one
MAX_CALLS = 16
"""Calls of one assistant message that are run where they may be parallel; the rest is refused."""
_REWARD_SLACK = 1e-6  # sums of parts round
_CLOSE_PATIENCE_S = 2.0
"""How long close() waits for a thread that a late call still holds."""


def call(name: str, /, **arguments: Any) -> Message:
    """An assistant message with one tool call."""
    return Message.assistant(calls=[ToolCall(name=name, arguments=arguments, call_id="0")])


def say(text: str) -> Message:
    """An assistant message without tool calls: the answer."""
    return Message.assistant(text)


class AgentEnv(gymnasium.Env[Observation, Message]):
    """One conversation with tools. Subclasses override `task`, `reward`, `oracle`, and add `@tool` methods."""

    version: ClassVar[int] = 0
    """Raise it when the same (seed, level) gives another problem."""
    levels: ClassVar[int] = 10
    """Levels of difficulty: 0 to levels - 1."""
    inline: ClassVar[bool] = False
    """task(), reward() and on_message() take well under a millisecond and never block: no thread is needed."""
    parallel_calls: ClassVar[bool] = False
    """Calls of one message may run at the same time: async tools do, blocking ones queue for the environment's thread.
    Where it is False the first call is run and every further one refused."""
    reward_range: ClassVar[tuple[float, float]] = (-1.0, 1.0)
    """Smallest and largest reward (sum of the parts); score() refuses what lies outside."""
    images: ClassVar[bool] = False
    """It shows images: a run whose policy reads text only refuses it before anything starts."""
    max_turns: int = 8
    """Assistant messages of an episode; after these it is truncated and scored as it stands."""
    max_result_chars: int = 4000
    """Longest tool result a policy is shown; of a longer one the middle is cut."""
    tool_timeout_s: float = 10.0
    """Deadline of one tool call; the policy reads that it timed out."""
    reset_timeout_s: float = 30.0
    """Deadlines of one reset, step (all its tool calls) and reward. A pool's own deadlines cap them."""
    step_timeout_s: float = 30.0
    reward_timeout_s: float = 60.0
    latency_median_s: float = 0.0
    """Simulated latency of each tool call, lognormal; 0 = none. For benchmarks. Calls wait independently of each other,
    as calls of real services do: members of a group meet the same problem, not the same delay."""
    latency_sigma: float = 1.0

    observation_space = ObservationSpace()
    action_space = ActionSpace()
    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}

    problem: Problem
    """The running problem, set by reset."""
    seed: int
    level: int

    _ended = True
    _thread: WorkerThread | None = None
    _children: ForkedChildren | None = None
    _tools: Mapping[str, Tool]
    _thread_turn: asyncio.Lock
    _calls: "Counter[str]"
    _tool_cost: float
    _num_tool_errors: int
    _num_turns: int
    _answer: str

    def __init__(
        self, *, max_turns: int | None = None, latency_median_s: float | None = None, latency_sigma: float | None = None
    ) -> None:
        """Arguments override the class's own values."""
        self.max_turns = self.max_turns if max_turns is None else max_turns
        self.latency_median_s = self.latency_median_s if latency_median_s is None else latency_median_s
        self.latency_sigma = self.latency_sigma if latency_sigma is None else latency_sigma

    # --- what authors override ---

    def task(self, rng: random.Random, level: int) -> Problem | str:
        """Make the problem. Use only `rng` for chance; keep the right answer on self."""
        raise NotImplementedError

    def reward(self, answer: str) -> Any:
        """Score the ended episode: a finite number, or {part name: number} whose sum is the reward. May be async.

        `answer` is the last message's text, or "" where the episode was cut; it can be anything a policy can write.
        """
        raise NotImplementedError

    def oracle(self) -> Oracle:
        """Solve the running problem with reward 1. Needed by `shoal sft` and `shoal env check`."""
        raise NotImplementedError(f"{type(self).__name__} has no oracle()")

    def noisy_oracle(self, rng: random.Random) -> Oracle:
        """A demonstrator with the right format and some wrong decisions, for warm starts."""
        return self.oracle()

    async def on_message(self, text: str) -> str | Message | None:
        """Reply to an assistant message without calls, e.g. as a scripted user; None ends the episode."""
        return None

    def hidden_state(self) -> str:
        """What of the problem the prompt does not show (a generated database), so that digests tell tasks apart."""
        return ""

    def tools(self) -> Mapping[str, Tool]:
        """Tools by name; by default the `@tool` methods."""
        return bind_tools(self)

    # --- gymnasium's interface, from anywhere ---

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Observation, dict]:
        """Start an episode; options: {"level": int}. Returns the opening messages and info."""
        return run_sync(self.areset(seed=seed, options=options), self.reset_timeout_s)

    def step(self, action: Message | str) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """As `astep`, from synchronous code."""
        return run_sync(self.astep(action), self.step_timeout_s + self.reward_timeout_s)

    def close(self) -> None:
        """Free what the environment holds; processes that its code forked end here. Idempotent; overriders call it
        last."""
        if self._thread is not None:
            self._thread.stop()
            self._thread = None
        if self._children is not None:
            self._children.end()

    # --- the core ---

    async def areset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode: make the problem of (seed, options["level"]), level 0 where none is given.

        Returns the opening messages (a system text where there is one, then the prompt) and info: "tools" (ToolSpecs
        in the order of `tools()`), "max_turns" (assistant messages until the episode is truncated), "problem_digest"
        (sha256, 64 hex digits: equal for equal problems) and "meta" (see `meta`). Without a seed gymnasium's generator
        draws one. Raises ValueError for a level that there is not, MalformedEnvironment where task() returns no
        problem, and what the author's code raises.
        """
        super().reset(seed=seed)
        self._ended = True  # until the new problem stands
        self.seed = int(self.np_random.integers(2**31)) if seed is None else int(seed)
        self.level = int((options or {}).get("level", 0))
        if not 0 <= self.level < self.levels:
            raise ValueError(f"level {self.level} of {type(self).__name__} is not in 0..{self.levels - 1}")
        problem = await self.run_author(self.task, random.Random(f"{self.seed}/{self.level}"), self.level)
        self.problem = Problem(prompt=problem) if isinstance(problem, str) else problem
        opening = opening_messages(type(self).__name__, self.problem)
        self._tools = self.tools()
        self._thread_turn = asyncio.Lock()
        self._calls: Counter[str] = Counter()
        self._tool_cost = 0.0
        self._num_tool_errors = 0
        self._num_turns = 0
        self._answer = ""
        self._ended = False
        return opening, {
            "tools": self.tool_specs(),
            "max_turns": self.max_turns,
            "problem_digest": self._digest(opening),
            "meta": self.meta(),
        }

    async def astep(self, action: Message | str) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Take an assistant message: (new messages, reward, terminated, truncated, info).

        terminated: the policy gave its answer and `on_message` had no reply. truncated: `max_turns` messages were
        used up without one; the episode is then scored with the answer "". The reward is 0.0 until one of them holds.
        info: "reward_parts" ({} until then; their sum is the reward) and "meta" (see `meta`). Raises RuntimeError where
        no episode runs, BadReward, HungThread, AuthorExit, and what else the author's code raises.
        """
        replies, terminated, truncated = await self.respond(say(action) if isinstance(action, str) else action)
        parts = await self.score() if terminated or truncated else {}
        return replies, sum(parts.values()), terminated, truncated, {"reward_parts": parts, "meta": self.meta()}

    async def respond(self, message: Message) -> tuple[Observation, bool, bool]:
        """The step without its reward: (new messages, terminated, truncated)."""
        if self._ended:
            raise RuntimeError(f"{type(self).__name__}: no episode is running, call reset() first")
        if not (isinstance(message, Message) and message.role == "assistant"):
            raise TypeError(f"an action is an assistant Message, not {message!r:.{SHOWN_CHARS}}")
        self._num_turns += 1
        if message.tool_calls:
            replies = await self._answer_calls(message.tool_calls)
        else:
            reply = await self.run_author(self.on_message, message.text)
            if reply is None:
                self._ended, self._answer = True, message.text
                return (), True, False
            reply = Message.user(reply) if isinstance(reply, str) else reply
            if not isinstance(reply, Message):
                raise MalformedEnvironment(f"{type(self).__name__}.on_message() returned {type(reply).__name__}")
            replies = (reply,)
        refuse_new_tools(type(self).__name__, self._tools, self.tools())
        self._ended = self._num_turns >= self.max_turns
        return replies, False, self._ended

    async def score(self) -> dict[str, float]:
        """End the episode and return the parts of its reward.

        Raises BadReward unless they are finite numbers whose sum is in `reward_range`.
        """
        self._ended = True
        value = await self.run_author(self.reward, self._answer)
        parts = value if isinstance(value, dict) else {"reward": value}
        if not parts:
            raise BadReward("reward() returned no parts")
        numbers = {str(name): finite(name, part) for name, part in parts.items()}
        total, (low, high) = finite("sum", sum(numbers.values())), self.reward_range
        if not low - _REWARD_SLACK <= total <= high + _REWARD_SLACK:
            raise BadReward(f"reward() returned {total:g} in sum, which is not in reward_range {low:g}..{high:g}")
        return numbers

    def tool_specs(self) -> tuple[ToolSpec, ...]:
        return tuple(t.spec for t in self._tools.values())

    def meta(self) -> dict[str, Any]:
        """Facts for metrics, cumulative over the episode."""
        counts = {
            "level": self.level,
            "num_tools": len(self._tools),
            "num_tool_calls": self._calls.total(),
            "num_tool_errors": self._num_tool_errors,
            "tool_cost": self._tool_cost,
            "tool_calls": dict(self._calls),
        }
        return {**self.problem.meta, **counts}

    async def aclose(self) -> None:
        """close(), on the environment's own thread. Where a late call still holds that thread, on another one: most of
        what an environment holds can be freed there, and nothing could be freed otherwise."""
        thread = self._thread
        if thread is not None and thread.late_call:
            try:
                async with asyncio.timeout(_CLOSE_PATIENCE_S):
                    await thread.wait_until_free()
            except TimeoutError:
                logger.warning("%s: %s still runs, close() gets another thread", type(self).__name__, thread.late_call)
                thread.stop()
                self._thread = None
        try:
            await self.run_author(self.close)
        finally:
            AgentEnv.close(self)  # an overrider may have forgotten it

    async def run_author(self, function: Callable[..., Any], *args: Any, inline: bool = False) -> Any:
        """Run an author's function: async ones here, synchronous ones on the environment's own thread or inline.

        Raises what it raises; AuthorExit for what is no Exception.
        """
        if self._children is None:
            self.adopt_children(ForkedChildren())
        assert self._children is not None
        with self._children.watched():
            try:
                if self._stays_here(function, inline):
                    result = function(*args)
                else:
                    result = await self._own_thread().run(function, *args)
                return await result if inspect.isawaitable(result) else result
            except BaseException as error:
                raise as_exception(error)  # noqa: B904  # most often it is the same error

    @property
    def late_call(self) -> str:
        """Name of the blocking call that outlived its deadline and still holds the environment's thread; "" = none."""
        return self._thread.late_call if self._thread is not None else ""

    def adopt_thread(self, thread: WorkerThread) -> None:
        """Run blocking code on the thread that constructed this environment (sqlite insists on it)."""
        self._thread = thread
        weakref.finalize(self, thread.stop)

    def adopt_children(self, children: ForkedChildren) -> None:
        """End with this environment what its constructor forked, and what its code will."""
        self._children = children
        weakref.finalize(self, children.end)

    # --- parts ---

    def _stays_here(self, function: Callable[..., Any], inline: bool) -> bool:
        return self.inline or inline or inspect.iscoroutinefunction(function)

    def _own_thread(self) -> WorkerThread:
        if self._thread is None:
            self.adopt_thread(WorkerThread())
        assert self._thread is not None
        return self._thread

    async def _wait_for_thread(self) -> None:
        """Wait until the call before, which is late, has left the thread. Raises HungThread where it does not."""
        thread = self._own_thread()
        if not thread.late_call:
            return
        try:
            async with asyncio.timeout(self.tool_timeout_s):
                await thread.wait_until_free()
        except TimeoutError:
            raise HungThread(
                f"{thread.late_call}() outlived its deadline and still runs {self.tool_timeout_s:g} s later: blocking "
                "code must come back by itself (give its own calls a time-out), or be async"
            ) from None

    async def _answer_calls(self, tool_calls: tuple[ToolCall, ...]) -> Observation:
        if len(tool_calls) == 1 or not self.parallel_calls:
            return tuple([await self._answer_call(i, c) for i, c in enumerate(tool_calls)])
        # Boxed: an error of one call waits until all have ended, so nothing runs on behind a failed step.
        outcomes = await asyncio.gather(*(boxed(self._answer_call(i, c)) for i, c in enumerate(tool_calls)))
        for _, error in outcomes:
            if error is not None:
                raise error
        return tuple(cast(Message, reply) for reply, _ in outcomes)

    async def _answer_call(self, index: int, tool_call: ToolCall) -> Message:
        started = time.monotonic()
        content, images, error = await self._run_call(index, tool_call)
        known = self._tools.get(tool_call.name)
        # Invented names are counted together: a policy can make up any number of them.
        self._calls[tool_call.name if known else "unknown"] += 1
        self._tool_cost += known.options.cost if known else DEFAULT_COST
        self._num_tool_errors += error is not None
        result = ToolResult(
            call_id=tool_call.call_id or str(index),
            name=tool_call.name,
            content=cut_middle(redacted(content), self.max_result_chars),
            error=error,
            seconds=time.monotonic() - started,
        )
        return Message.tool(result, images)

    async def _run_call(self, index: int, tool_call: ToolCall) -> tuple[str, tuple[ImagePart, ...], str | None]:
        """Text, images and kind of error of one call. Error texts are short and stable: policies learn from them."""
        if index > 0 and not self.parallel_calls:
            return "error: one call per message", (), "malformed"
        if index >= MAX_CALLS:
            return "error: too many calls", (), "malformed"
        if tool_call.error is not None:
            return f"error: {tool_call.error[:SHOWN_CHARS]}", (), "malformed"
        found = self._tools.get(tool_call.name)
        if found is None:
            return "error: unknown tool", (), "unknown_tool"
        try:
            arguments = found.parse(tool_call.arguments)
        except BadArguments as error:
            return f"error: {error}", (), "bad_arguments"
        await self._wait_latency()
        bound = functools.partial(found.function, **arguments)
        if self._stays_here(bound, found.options.inline):
            return await self._run_bound(bound, found.options)
        # A call that waits for the thread is not late yet: its deadline starts when its turn has come.
        async with self._thread_turn:
            await self._wait_for_thread()
            return await self._run_bound(bound, found.options)

    async def _run_bound(
        self, bound: Callable[[], Any], options: ToolOptions
    ) -> tuple[str, tuple[ImagePart, ...], str | None]:
        work = boxed(self.run_author(bound, inline=options.inline))
        try:
            value, error = await within(options.timeout_s or self.tool_timeout_s, work)
        except TimeoutError:  # ours: the call's own comes as data
            return "error: timed out", (), "timeout"
        try:
            if error is not None:
                raise error
        except (InfraFault, AuthorExit, MalformedEnvironment):
            raise
        except Exception as raised:  # a tool may refuse by raising, as sqlite3 does: the policy reads why
            logger.debug("a tool raised", exc_info=True)
            text = redacted(error_text(raised))[:SHOWN_CHARS] or type(raised).__name__
            return f"error: {text}", (), "tool_error"
        return *as_content(value), None

    async def _wait_latency(self) -> None:
        if self.latency_median_s > 0:
            await asyncio.sleep(_latency.lognormvariate(math.log(self.latency_median_s), self.latency_sigma))

    def _digest(self, opening: Observation) -> str:
        content = [[m.role, *(fingerprint(part) for part in m.content)] for m in opening]
        # Not the level: a prompt that two levels share is one problem, or training at one would leak held-out ones.
        identity = [f"{type(self).__module__}:{type(self).__qualname__}", self.version, self.hidden_state(), content]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()
