"""Secrets, prints and retries: what a pool's texts may not hold, what reaches the episode, when a service is away."""

import asyncio
import io
import json
import os
import random
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.keys import ConfigError
from conf.loading import load_config, read_config, resolved_yaml
from envs.base import AgentEnv, call, say
from envs.errors import InfraFault
from envs.outcome import ResetOutcome, StepOutcome
from envs.pool.pool import EnvPool
from envs.pool.printed import MAX_CHARS, PrintedStream
from envs.redaction import expose, redacted
from envs.retry import retrying
from envs.task import Problem, Task
from envs.tool import tool
from rl.cli.main import main

VALUE = 'k7"\\ö/Zq+ 9'
MARK = "[secret JUDGE_KEY]"


@pytest.fixture
def secret(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("JUDGE_KEY", "")  # undone afterwards
    expose({"JUDGE_KEY": VALUE})
    yield VALUE
    expose({})


class Leaky(AgentEnv):
    """Shows its key wherever an environment can."""

    def task(self, rng: random.Random, level: int) -> Problem:
        key = os.environ["JUDGE_KEY"]
        print("task", level, key[:3], end="")
        print(key[3:])
        if level == 9:
            raise ValueError(key)
        return Problem(prompt=f"prompt {key}", system=key, meta={"note": {"key": [key]}})

    @tool
    def look(self, how: str) -> str | dict[str, str]:
        """Look."""
        key = os.environ["JUDGE_KEY"]
        print("look", how)
        if how == "raise":
            raise ValueError("x" * 195 + key)
        return {"key": key} if how == "json" else "." * 1996 + key + "." * 3000

    async def reward(self, answer: str) -> dict[str, float]:
        print("reward")
        if answer == "raise":
            raise RuntimeError("y" * 495 + os.environ["JUDGE_KEY"])
        return {os.environ["JUDGE_KEY"]: 1.0}


def leaky(level: int = 0) -> Task:
    return Task(task_id="t", env_id=f"{__name__}:Leaky", env_name="e", seed=1, level=level)


def pieces(text: str) -> list[str]:
    return [text[i : i + 5] for i in range(len(text) - 4)]


def test_no_text_that_leaves_the_pool_holds_a_value_or_a_cut_off_piece_of_it(secret: str) -> None:
    async def outcomes() -> list[ResetOutcome | StepOutcome]:
        pool = EnvPool()
        found: list[ResetOutcome | StepOutcome] = [await pool.open("a", leaky()), await pool.open("b", leaky(9))]
        found += [await pool.step("a", call("look", how=how)) for how in ("raise", "json", "long")]
        found += [await pool.step("a", say("1")), await pool.open("c", leaky()), await pool.step("c", say("raise"))]
        await pool.close_all()
        return found

    found = asyncio.run(asyncio.wait_for(outcomes(), 30))
    assert [outcome.failure is None for outcome in found] == [True, False, True, True, True, True, True, False]
    for outcome in found:
        text = repr(outcome)
        assert not [piece for spelled in (secret, repr(secret)[1:-1]) for piece in pieces(spelled) if piece in text]
    last = found[5]
    assert isinstance(last, StepOutcome) and last.reward_parts == {MARK: 1.0}
    assert found[3].messages[0].text == f'{{"key":"{MARK}"}}'
    assert found[0].meta["note"] == {"key": [MARK]}
    assert found[1].failure is not None and f"ValueError: {MARK}" in found[1].failure.traceback


@given(st.text(alphabet=st.characters(codec="utf-8"), min_size=6).filter(lambda text: len(text.strip()) >= 6))
def test_a_value_is_found_however_json_python_and_urls_spell_it(value: str) -> None:
    spellings = (value, json.dumps(value)[1:-1], json.dumps(json.dumps(value))[1:-1], repr(value)[1:-1])
    kept = dict(os.environ)
    if "\0" in value:
        return  # no environment variable can hold it
    expose({"KEY": value})
    try:
        for spelling in (*spellings, urllib.parse.quote_plus(value), urllib.parse.quote(value, safe="")):
            assert redacted(f"<{spelling}>") in ("<[secret KEY]>", '<\\"[secret KEY]\\">')
    finally:
        expose({})
        os.environ.clear()
        os.environ.update(kept)


def test_prints_go_to_the_file_and_each_to_its_own_episode(secret: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr("sys.stdout", PrintedStream(file))

    async def episodes() -> list[StepOutcome]:
        pool = EnvPool()

        async def play(key: str) -> StepOutcome:
            await pool.open(key, leaky(int(key)))
            await pool.step(key, call("look", how=f"by {key}"))
            return await pool.step(key, say("1"))

        outcomes = await asyncio.gather(*map(play, "0123"))
        outcomes.append(StepOutcome(meta=(await pool.open("9", leaky(9))).meta))
        await pool.close_all()
        return outcomes

    *played, failed = asyncio.run(asyncio.wait_for(episodes(), 30))
    assert [o.meta["printed"] for o in played] == [f"task {i} {MARK}\nlook by {i}\nreward\n" for i in range(4)]
    assert failed.meta == {"printed": f"task 9 {MARK}\n"}
    assert sorted(file.getvalue().split("\n")) == sorted(
        ("".join(o.meta["printed"] for o in (*played, failed))).split("\n")
    )


def test_of_long_prints_an_episode_keeps_the_end_and_the_file_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    from envs.pool.printed import Printed, printing

    file, episode = io.StringIO(), Printed()
    stream = PrintedStream(file)
    token = printing.set(episode)
    for number in range(2000):
        stream.write(f"{number:>9}\n")
    stream.write("z" * 20_000)
    stream.write("tail")
    printing.reset(token)
    assert episode.text.startswith(f"(truncated {40_004 - MAX_CHARS} chars) zzz")
    assert episode.text.endswith("tail")
    assert len(file.getvalue()) == 40_000  # "tail" waits for its line's end


@pytest.mark.parametrize(
    ("names", "value", "said"),
    [
        ("[NOT_SET_ANYWHERE]", "long enough", "no environment variable NOT_SET_ANYWHERE is set"),
        ("[JUDGE_KEY]", "short", "the value of JUDGE_KEY has fewer than 6 characters"),
        ("[sk-live-77]", "long enough", "entry 1 is no name of an environment variable"),
        ("JUDGE_KEY", "long enough", "env.secrets must be a list, such as [A, B]"),
    ],
)
def test_a_secret_that_cannot_be_used_stops_before_the_start(
    names: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JUDGE_KEY", value)
    assert main(["train", "dry_run=true", f"env.secrets={names}"]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "sk-live" not in error and value not in error


def test_the_config_holds_names_and_never_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", VALUE)
    config = load_config(["env.secrets=[JUDGE_KEY]"])
    text = resolved_yaml(config)
    assert config.env.secrets == ("JUDGE_KEY",)
    assert "- JUDGE_KEY" in text and VALUE not in text
    assert read_config(text) == config
    with pytest.raises(ConfigError, match="must be text"):
        load_config(["env.secrets=[1.5]"])


class Service:
    """Fails as told, one word a call."""

    def __init__(self, *words: str) -> None:
        self.words, self.pauses = list(words), list[float]()

    async def ask(self) -> str:
        word = self.words.pop(0)
        if word == "away":
            raise ConnectionRefusedError("away")
        if word == "wrong":
            raise KeyError(word)
        if word == "slow":
            await asyncio.sleep(30)
        return word

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)

    def retried(self) -> str:
        return asyncio.run(retrying(self.ask, attempts=3, timeout_s=0.05, pause_s=1.0, sleep=self.sleep))


def test_a_service_that_is_late_or_away_is_asked_again_after_growing_pauses() -> None:
    service = Service("slow", "away", "yes")
    assert service.retried() == "yes"
    assert [0.5 <= service.pauses[0] <= 1.0, 1.0 <= service.pauses[1] <= 2.0] == [True, True]


def test_after_the_last_attempt_it_is_the_fault_of_nobody() -> None:
    service = Service("away", "away", "slow", "yes")
    with pytest.raises(InfraFault, match=r"gave up after 3 attempts: no answer in 0\.05 s"):
        service.retried()
    assert len(service.pauses) == 2


def test_other_errors_are_not_retried() -> None:
    service = Service("wrong", "yes")
    with pytest.raises(KeyError):
        service.retried()


def test_log_files_are_redacted(secret: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import logging

    file = (tmp_path / "log").open("w")
    handler = logging.StreamHandler(PrintedStream(file))
    log = logging.Logger("of a library")
    log.addHandler(handler)
    log.info("Authorization: %s", secret)
    file.close()
    assert (tmp_path / "log").read_text() == f"Authorization: {MARK}\n"
