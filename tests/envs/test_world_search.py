"""WorldSearch-v0: solvable by reading, not by guessing; its searches and pages are what the question needs."""

import random

import pytest

from envs.base import call
from envs.check.demonstration import demonstrate
from envs.library.world_search import WorldSearch, titles
from envs.registry import make_env


@pytest.fixture
def env() -> WorldSearch:
    made = make_env("WorldSearch-v0")
    assert isinstance(made, WorldSearch)
    return made


def test_the_oracle_scores_one_at_every_level_without_an_error(env: WorldSearch) -> None:
    demonstrations = [demonstrate(env, seed, level) for level in range(10) for seed in range(20)]
    assert {d.reward for d in demonstrations} == {1.0}
    assert {d.meta["num_tool_errors"] for d in demonstrations} == {0}


def test_levels_add_hops_and_pages(env: WorldSearch) -> None:
    hops, pages = [], []
    for level in range(10):
        env.reset(seed=3, options={"level": level})
        hops.append(env.problem.meta["hops"])
        pages.append(len(env.pages))
    assert hops == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert (pages[0], pages[9]) == (15, 186)
    assert pages == sorted(set(pages))


@pytest.mark.slow
def test_noisy_demonstrations_are_right_in_two_fifths_and_short(env: WorldSearch) -> None:
    rng = random.Random(7)
    demonstrations = [demonstrate(env, seed, 0, rng) for seed in range(1000)]
    assert 0.38 < sum(d.reward for d in demonstrations) / 1000 < 0.48
    assert max(len(m.text) for d in demonstrations for m in d.messages) <= 30


@pytest.mark.parametrize("level", [0, 5, 9])
def test_cheaters_score_less_than_a_fifth(env: WorldSearch, level: int) -> None:
    scores: dict[str, float] = dict.fromkeys(["null", "prompt", "first hit", "first page"], 0.0)
    for seed in range(50):
        opening, info = env.reset(seed=seed, options={"level": level})
        prompt = opening[0].text
        assert env.gold not in prompt + repr(info)
        replies, *_ = env.step(call("search", query=prompt.split()[-1]))
        first = titles(replies[0].text)
        replies, *_ = env.step(call("open", page=next(iter(first.values()))))
        page = replies[0].text
        answers = ["", prompt, next(iter(first)), page]
        for name, answer in zip(scores, answers, strict=True):
            scores[name] += env.reward(answer)["answer"] / 50
    assert max(scores.values()) < 0.2


def test_a_search_needs_all_words_and_shows_titles_in_order_of_their_numbers(env: WorldSearch) -> None:
    env.reset(seed=1, options={"level": 5})
    hits = titles(env.search(f"boss {env.anchor}"))
    assert env.path[0] in hits
    assert list(hits.values()) == sorted(hits.values())
    assert all({"boss", env.anchor} <= set(env.open(number).replace(".", "").split()) for number in hits.values())
    assert env.search("boss zzzz") == "nothing found"


def test_a_page_is_read_whole_or_one_fact_of_it(env: WorldSearch) -> None:
    env.reset(seed=0)
    number = titles(env.search(env.path[0]))[env.path[0]]
    assert env.open(number).split()[::2] == ["boss", "firm", "town"]
    assert env.open(number, env.relations[0]) == env.gold
    assert env.step(call("open", page=number, fact="head"))[0][0].text == "error: no such fact"


def test_hostile_queries_are_answered_or_refused(env: WorldSearch) -> None:
    env.reset(seed=0)
    for query, text in [
        ("", "error: empty query"),
        ('"" OR *', "nothing found"),
        ("\x00\ud800", "error: empty query"),
        ("title : nim NEAR", "nothing found"),
        ("a" * 10_000, "nothing found"),
    ]:
        replies, *_ = env.step(call("search", query=query))
        assert replies[0].text == text
    for page in (0, -1, 10**30):
        replies, *_ = env.step(call("open", page=page))
        assert replies[0].text == "error: no such page"


@pytest.mark.slow
def test_level_zero_has_room_for_a_disjoint_held_out_set(env: WorldSearch) -> None:
    assert len({env.reset(seed=seed)[1]["problem_digest"] for seed in range(1000)}) == 1000


def test_close_drops_the_index_and_may_be_repeated(env: WorldSearch) -> None:
    env.reset(seed=0)
    env.close()
    env.close()
    assert env.index is None
    assert demonstrate(env, 0, 0).reward == 1.0
