"""Probes of the contract: the oracle solves, schemas are schemas, whatever a policy writes is answered, limits hold."""

import math
import re
from collections.abc import Iterator

from envs.base import say
from envs.check.scripted_policies import misuse
from envs.check.subject import Failure, Hung, Subject
from envs.errors import BadReward
from envs.message import Message, ToolCall, ToolSpec

SOLVED = 1.0 - 1e-9
ODD_ANSWERS = ("", "nan", "1e999", "-0", "\x00", "\ud800", "{", "9" * 5000, "[" * 3000, "None", "٣", "a\nb")
ODD_VALUES = ("", "\ud800\x00", None, [], {"a": {}}, -1, 2**70, 1e308, "9" * 5000, "'; drop table x; --", "../../etc")
_TASKS = 3
"""Tasks in which every odd message is tried."""
_TOOL_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}")
_SHOWN_CHARS = 160


async def oracle(subject: Subject) -> Failure | None:
    for seed, level in subject.tasks:
        episode = await subject.oracle_episode(seed, level)
        if episode.reward is None or not SOLVED <= episode.reward <= 2 - SOLVED:
            seen = episode.error or f"reward {episode.reward:g} {dict(episode.reward_parts)}"
            return Failure(seed=seed, level=level, seen=f"{seen}; last words {episode.answer[:60]!r}")
    return None


async def schemas(subject: Subject) -> Failure | None:
    for level in subject.levels:
        start = (await subject.oracle_episode(subject.seeds[0], level)).start
        tools = start.tools if start else ()
        names = [spec.name for spec in tools]
        wrong = [f"two tools are called {name}" for name in {n for n in names if names.count(n) > 1}]
        wrong += [f"{spec.name}: {fault}" for spec in tools if (fault := _schema_fault(spec))]
        if wrong:
            return Failure(seed=subject.seeds[0], level=level, seen=wrong[0])
    return None


def _schema_fault(spec: ToolSpec) -> str:
    from jsonschema import Draft202012Validator, SchemaError

    if not _TOOL_NAME.fullmatch(spec.name):
        return "models are trained on names of letters, digits, _ . and -, at most 64"
    if spec.description.strip() in ("", spec.name):
        return "it has no description: write a docstring"
    if spec.parameters.get("type") != "object":
        return f"its parameters are of type {spec.parameters.get('type')!r}, not 'object'"
    try:
        Draft202012Validator.check_schema(spec.parameters)
    except SchemaError as error:
        return f"its schema is invalid: {error.message[:_SHOWN_CHARS]}"
    return ""


async def malformed(subject: Subject) -> Failure | None:
    sampled = subject.sampled_tasks
    for seed, level in sampled[:: math.ceil(len(sampled) / _TASKS)]:
        start = (await subject.oracle_episode(seed, level)).start
        tools = start.tools if start else ()
        calls = list(_odd_calls(tools))
        together = [misuse(tools), Message.assistant(calls=calls[:20]), Message.assistant()]
        messages = [*together, *(Message.assistant(calls=[c]) for c in calls), *map(say, ODD_ANSWERS)]
        for message in messages:
            wrong = await _answered_wrongly(subject, message, seed, level)
            if wrong:
                return Failure(seed=seed, level=level, seen=f"{wrong}, after {_shown(message)}")
    return None


def _odd_calls(tools: tuple[ToolSpec, ...]) -> Iterator[ToolCall]:
    yield ToolCall(name="")
    yield ToolCall(name="no_such_tool\n", arguments={"a": 1})
    yield ToolCall(name="x", error="not JSON")
    for spec in tools:
        yield ToolCall(name=spec.name)
        for value in ODD_VALUES:
            yield ToolCall(name=spec.name, arguments=dict.fromkeys(spec.parameters.get("properties", {}), value))


async def _answered_wrongly(subject: Subject, message: Message, seed: int, level: int) -> str:
    """What is wrong with the reply to one odd message, or ""; the episode is then ended and scored."""
    env = await subject.open()
    try:
        try:
            await subject.reset(env, seed, level)
        except Exception:  # the author's code: `oracle` tells of it
            return ""
        replies, _ = await subject.step(env, message)
        results = [reply.tool_result.name for reply in replies if reply.tool_result is not None]
        if message.tool_calls and results != [tool_call.name for tool_call in message.tool_calls]:
            return f"{len(message.tool_calls)} calls got {len(results)} results"
        await subject.score(env)
        return ""
    except Hung:
        raise
    except BadReward:  # `reward_bounds` tells of it
        return ""
    except (Exception, SystemExit) as raised:  # whatever the author's code raises is what is looked for
        return f"it raised {type(raised).__name__}: {str(raised)[:_SHOWN_CHARS]}"
    finally:
        await subject.close(env)


def _shown(message: Message) -> str:
    calls = [f"{c.name!r}({str(c.arguments)[:60]})" for c in message.tool_calls]
    return f"the call {', '.join(calls)[:_SHOWN_CHARS]}" if calls else f"the answer {message.text[:40]!r}"


async def reward_bounds(subject: Subject) -> Failure | None:
    """Of everything the probes before were paid."""
    return subject.bad_rewards[0] if subject.bad_rewards else None


async def deadlines(subject: Subject) -> Failure | None:
    """Of everything the probes before timed."""
    limits = {kind: getattr(subject.owner, f"{kind}_timeout_s") for kind in subject.seconds}
    for kind, seconds in subject.seconds.items():
        ordered = sorted(seconds)
        if ordered and ordered[int(0.95 * (len(ordered) - 1))][0] >= limits[kind]:
            slow, seed, level = ordered[-1]
            seen = (
                f"95% of all {kind}s should end within {kind}_timeout_s = {limits[kind]:g}; this one took {slow:.3g} s"
            )
            return Failure(seed=seed, level=level, seen=seen)
    for seed, level in subject.tasks:
        for message in (await subject.oracle_episode(seed, level)).messages:
            if message.tool_result is not None and message.tool_result.error == "timeout":
                return Failure(
                    seed=seed, level=level, seen=f"the oracle's call of {message.tool_result.name} timed out"
                )
    return None
