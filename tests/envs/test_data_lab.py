"""DataLab-v0: query, save, compute, and use the result in the next query."""

import random
from collections.abc import Iterator

import pytest

from envs.base import call
from envs.check.demonstration import demonstrate
from envs.library.data_lab import LIMITS, MAX_FILES, STATISTICS, DataLab, statistic
from envs.registry import make_env
from envs.sandbox import confinement

pytestmark = [
    pytest.mark.skipif(bool(confinement.missing_features()), reason="this kernel cannot confine"),
    pytest.mark.slow,
    pytest.mark.sandbox,
]


@pytest.fixture(scope="module")
def env() -> Iterator[DataLab]:
    made = make_env("DataLab-v0")
    assert isinstance(made, DataLab)
    yield made
    made.close()


def text_of(env: DataLab, tool_name: str, **arguments: object) -> str:
    return env.step(call(tool_name, **arguments))[0][0].text


@pytest.mark.parametrize("level", range(10))
def test_the_oracle_scores_one(env: DataLab, level: int) -> None:
    done = [demonstrate(env, seed, level) for seed in range(4)]
    assert {d.reward for d in done} == {1.0}
    assert {d.meta["num_tool_errors"] for d in done} == {0}
    assert all(len(d.messages) // 2 <= env.max_turns for d in done)


def test_level_0_fits_a_model_of_bytes(env: DataLab) -> None:
    for seed in range(30):
        d = demonstrate(env, seed, 0)
        words = [m.text for m in d.messages] + [
            str(v) for m in d.messages for c in m.tool_calls for v in c.arguments.values()
        ]
        assert len(d.messages[0].text) <= 20
        assert sum(map(len, words)) + 3 * len(words) <= 200


@pytest.mark.parametrize("level", [0, 5, 9])
def test_guesses_and_needless_calls_score_nothing(env: DataLab, level: int) -> None:
    for answer in ("", "nan", "0", "1", "50", "99", "2 rows", "\x00\ud800"):
        rewards = []
        for seed in range(40):
            env.reset(seed=seed, options={"level": level})
            rewards.append(env.step(answer)[1])
        assert sum(rewards) / 40 < 0.2
    rewards = []
    for seed in range(15):
        env.reset(seed=seed, options={"level": level})
        for _ in range(env.max_turns - 1):
            last = text_of(env, "sql", query="select max(amount) from sales")
        rewards.append(env.step(last)[1])
    assert sum(rewards) / 15 < 0.2


def test_rows_are_saved_and_what_python_writes_is_kept(env: DataLab) -> None:
    env.reset(seed=0)
    rows = text_of(env, "sql", query="select who, bin from sales where bin < 2")
    assert (
        text_of(env, "sql", query="select who, bin from sales where bin < 2", save="a") == f"{len(rows.split())} rows"
    )
    assert text_of(env, "python", code="load('a')[0]") == str([rows.split(",")[0], int(rows.split()[0].split(",")[1])])
    text_of(env, "python", code="open('b', 'w').write('\\n'.join(w for w, _ in load('a')))")
    assert text_of(env, "python", code="load('b') == [w for w, _ in load('a')]") == "True"
    assert text_of(env, "sql", query="select amount from sales where bin = 9", save="c") == "0 rows"
    assert text_of(env, "python", code="load('c')") == "[]"


@pytest.mark.parametrize("name", ["../x", "a/b", "", " ", "x" * 40, "a.b", "\0"])
def test_files_have_plain_names(env: DataLab, name: str) -> None:
    env.reset(seed=0)
    text = text_of(env, "sql", query="select 1 from sales", save=name)
    assert text.startswith("error: save" if name else "1\n")
    assert env.files == {}


def test_files_are_few_and_small(env: DataLab) -> None:
    env.reset(seed=0)
    text_of(env, "python", code="for i in range(50): open(f'f{i}', 'w').write('x')")
    assert len(env.files) == MAX_FILES
    assert text_of(env, "sql", query="select 1", save="one_more") == "error: too many files"
    text_of(env, "python", code="open('f0', 'w').write('x' * 300_000)")
    assert sum(map(len, env.files.values())) <= LIMITS.disk_bytes


def test_neither_tool_shows_anything_of_the_other_episodes(env: DataLab) -> None:
    other = make_env("DataLab-v0")
    assert isinstance(other, DataLab)
    env.reset(seed=0)
    other.reset(seed=1)
    text_of(other, "sql", query="select * from sales", save="mine")
    assert text_of(env, "python", code="import os; os.listdir('.')") == "[]"
    assert "No such file" in text_of(env, "python", code="load('mine')")
    assert "not authorized" in text_of(env, "sql", query="delete from sales")
    other.close()


def test_the_problem_depends_on_seed_and_level_alone(env: DataLab) -> None:
    digests = [env.reset(seed=seed, options={"level": 4})[1]["problem_digest"] for seed in (1, 2, 1)]
    assert digests[0] == digests[2] != digests[1]


def test_python_and_we_agree_on_the_statistics() -> None:
    rng = random.Random(0)
    space: dict[str, object] = {}
    exec("from functools import reduce\nfrom math import *\nfrom operator import xor\nfrom statistics import *", space)
    for _ in range(50):
        values = [rng.randint(10, 99) for _ in range(rng.randint(5, 30))]
        for word, code in STATISTICS.items():
            assert eval(code.format("values"), space, {"values": values}) == statistic(word, values)


def test_the_noisy_oracle_is_right_in_about_four_of_ten(env: DataLab) -> None:
    wins = sum(demonstrate(env, seed, 0, random.Random(seed)).reward for seed in range(100))
    assert 28 <= wins <= 55
