"""Probes of what an environment pays for: nothing that is not a solution may earn `LIMIT` or more on average.

A mean over few seeds can reach the limit by chance, so what looks paid is looked at again on other seeds. Means are
per level: a level that pays guessers is a level that teaches guessing.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import pairwise

from envs.base import AgentEnv
from envs.check.scripted_policies import (
    GARBAGE,
    GUESSES,
    always_call,
    always_say,
    leaves,
    misuse,
    random_number,
    random_text,
    reader,
    readings,
    repeat_prompt,
    spec_text,
    words_of,
)
from envs.check.subject import SAMPLED, Episode, Failure, Hung, Policy, Start, Subject

LIMIT = 0.2
_CONFIRMING = 60
"""Fresh seeds for a second look."""
_SUSPECTS = 5
"""Ways to cheat that get a second look at each level, best paid first."""
_SHOWN_CHARS = 60


async def null(subject: Subject) -> Failure | None:
    return await _paid(subject, "saying nothing", always_say(""))


async def garbage(subject: Subject) -> Failure | None:
    named = {f"answering {text[:8]!r}": always_say(text) for text in GARBAGE}
    named |= {"answering random text": random_text, "answering random numbers": random_number}
    return await _first_paid(subject, named)


async def repeat(subject: Subject) -> Failure | None:
    return await _paid(subject, "repeating the prompt", repeat_prompt)


async def always_call_probe(subject: Subject) -> Failure | None:
    start = (await subject.oracle_episode(subject.seeds[0], subject.levels[0])).start
    names = [spec.name for spec in start.tools] if start else []
    named = {f"calling {name} again and again": always_call(name) for name in names}
    if names:
        named["calling every tool in turn"] = always_call(None)
    return await _first_paid(subject, named)


async def guess(subject: Subject) -> Failure | None:
    """The usual short answers, and at each level the oracle's most frequent one."""
    found = await _first_paid(subject, {f"always answering {text!r}": always_say(text) for text in GUESSES})
    if found is not None:
        return found
    for level in subject.levels:
        answers = Counter([(await subject.oracle_episode(seed, level)).answer for seed in subject.seeds])
        answer, times = answers.most_common(1)[0]
        if times > 1 and times / len(subject.seeds) >= LIMIT:
            policy = always_say(answer)
            found = await _confirmed(subject, f"always answering {answer[:_SHOWN_CHARS]!r}", policy, level)
            if found is not None:
                return found
    return None


async def cheater(subject: Subject) -> Failure | None:
    """Answers read from prompt, system text, tools, info and error texts, by position: screened, then played."""
    for level in subject.levels:
        paid: defaultdict[str, float] = defaultdict(float)
        seeds = subject.seeds[:SAMPLED]
        for seed in seeds:
            for where, reward in (await _rewards_of_readings(subject, seed, level)).items():
                paid[where] += reward
        suspects = [where for where in paid if paid[where] / len(seeds) >= LIMIT]
        for where in sorted(suspects, key=lambda where: -paid[where])[:_SUSPECTS]:
            found = await _confirmed(subject, f"answering {where}", reader(where), level)
            if found is not None:
                return found
    return None


async def gold_hidden(subject: Subject) -> Failure | None:
    """How likely a reader who knows no answer, but what answers look like, picks the right one from what is shown."""
    shown: defaultdict[str, float] = defaultdict(float)
    where_seen: dict[str, tuple[Episode, str]] = {}
    tasks = await _with_varying_answers(subject)
    for episode, start in tasks:
        gold = episode.answer.strip()
        chances = {source: _chance(gold, text) for source, text in _shown_texts(start)}
        for context in _words_before(gold, f"{start.system}\n{start.prompt}"):
            chances[f"the prompt, right after {context!r}"] = 1.0
        for source, chance in chances.items():
            shown[source] += chance
            if chance:
                where_seen.setdefault(source, (episode, gold))
    for source, total in shown.items():
        if total / len(tasks) >= LIMIT:
            episode, gold = where_seen[source]
            seen = (
                f"the right answer {gold[:_SHOWN_CHARS]!r} stands in {source} (so in {total / len(tasks):.0%} of tasks)"
            )
            return Failure(seed=episode.seed, level=episode.level, seen=seen)
    return None


# --- pay ------------------------------------------------------------------------------------------------------------


async def _first_paid(subject: Subject, named: dict[str, Policy]) -> Failure | None:
    for name, policy in named.items():
        found = await _paid(subject, name, policy)
        if found is not None:
            return found
    return None


async def _paid(subject: Subject, name: str, policy: Policy) -> Failure | None:
    for level in subject.levels:
        if _mean([await subject.play(policy, seed, level) for seed in subject.seeds]) >= LIMIT:
            found = await _confirmed(subject, name, policy, level)
            if found is not None:
                return found
    return None


async def _confirmed(subject: Subject, name: str, policy: Policy, level: int) -> Failure | None:
    episodes = [await subject.play(policy, seed, level) for seed in subject.fresh_seeds[:_CONFIRMING]]
    mean = _mean(episodes)
    if mean < LIMIT:
        return None
    paid = max(episodes, key=lambda episode: episode.reward or 0.0)
    seen = f"{name} scores {mean:.2f} on average over {len(episodes)} tasks, here {paid.reward:g}; last words "
    return Failure(seed=paid.seed, level=level, seen=f"{seen}{paid.answer[:_SHOWN_CHARS]!r}")


def _mean(episodes: list[Episode]) -> float:
    return sum(episode.reward or 0.0 for episode in episodes) / len(episodes)


# --- the cheater's reading ------------------------------------------------------------------------------------------


async def _rewards_of_readings(subject: Subject, seed: int, level: int) -> dict[str, float]:
    """What each reading of a task would be paid: {where it was read: reward}."""
    env = await subject.open()
    try:
        start, _ = await subject.reset(env, seed, level)
        errors, _ = await subject.step(env, misuse(start.tools))
        said = readings(start, errors)
        rewards = {text: await _pay_for(subject, env, text) for text in dict.fromkeys(said.values())}
    except Hung:
        raise
    except Exception:  # the author's code: other probes tell of it
        return {}
    finally:
        await subject.close(env)
    return {where: rewards[text] for where, text in said.items()}


async def _pay_for(subject: Subject, env: AgentEnv, answer: str) -> float:
    """The reward of an answer. One instance scores all answers to a task: an episode each would cost a reset each."""
    plain = all(getattr(type(env), name) is getattr(AgentEnv, name) for name in ("on_message", "respond", "score"))
    if not plain:
        return (await subject.play(always_say(answer), env.seed, env.level)).reward or 0.0
    try:
        value = await subject.patiently("reward", env.run_author(env.reward, answer), env.reward_timeout_s)
        return float(sum(value.values()) if isinstance(value, dict) else value)
    except Hung:
        raise
    except Exception:  # reward() may raise at such an answer: `malformed` tells of it
        return 0.0


# --- what can be read -----------------------------------------------------------------------------------------------


async def _with_varying_answers(subject: Subject) -> list[tuple[Episode, Start]]:
    """Solved tasks whose last words tell them apart; "done" after every task is no secret."""
    found: list[tuple[Episode, Start]] = []
    for level in subject.levels:
        episodes = [await subject.oracle_episode(seed, level) for seed in subject.seeds]
        times = Counter(episode.answer for episode in episodes)
        for episode in episodes:
            if episode.start and episode.answer.strip() and times[episode.answer] <= max(1, len(episodes) // 4):
                found.append((episode, episode.start))
    return found


def _shown_texts(start: Start) -> Iterator[tuple[str, str]]:
    yield "the prompt", start.prompt
    yield "the system text", start.system
    yield "the tool list", spec_text(start.tools)
    for path, text in leaves(start.meta):
        yield f"info[{path!r}]", text


def _chance(gold: str, text: str) -> float:
    """The chance that a random word of `text` that looks like the answer (a number, a word) is the answer.

    Example: _chance("5", "4 or 5?") -> 0.5. Longer answers are looked for among the lines and list items of the text.
    """
    if text.strip() == gold:
        return 1.0
    if words_of(gold) == [gold]:
        alike = {word for word in words_of(text) if word[-1].isdigit() == gold[-1].isdigit()}
        return 1 / len(alike) if gold in alike else 0.0
    return 1 / len(re.split(r"[\n,;|]", text)) if gold in text else 0.0


def _words_before(gold: str, text: str) -> set[str]:
    """Words that stand right before the answer wherever they stand."""
    words = words_of(text)
    followers: dict[str, set[str]] = {}
    for before, after in pairwise(words):
        followers.setdefault(before, set()).add(after)
    return {before for before, after in followers.items() if after == {gold}}
