"""ClickUI: the saved state alone is paid, and the screen shows the state."""

import io
import random
from collections.abc import Iterator

import pytest

from envs.base import call, say
from envs.check.demonstration import demonstrate
from envs.library.click_ui import ClickUI
from envs.library.parts.form import HEIGHT, WIDTH, middle
from envs.message import ImagePart, Message
from envs.registry import make_env


def started(seed: int, level: int) -> ClickUI:
    env = make_env("ClickUI-v0")
    assert isinstance(env, ClickUI)
    env.reset(seed=seed, options={"level": level})
    return env


def seed_with(kind: str, level: int) -> int:
    return next(s for s in range(500) if started(s, level).widgets[next(iter(started(s, level).changes))].kind == kind)


@pytest.mark.slow
def test_the_oracle_scores_one_at_every_level_within_the_turns() -> None:
    env = make_env("ClickUI-v0")
    for level in range(10):
        played = [demonstrate(env, seed, level) for seed in range(8)]
        assert {d.reward for d in played} == {1.0}
        assert max(d.meta["num_tool_calls"] for d in played) < env.max_turns - 1
        assert all(len(m.content) == 2 for d in played for m in d.messages if m.role == "tool")


@pytest.mark.slow
def test_noisy_demonstrations_are_right_in_six_of_ten() -> None:
    env, rng = make_env("ClickUI-v0"), random.Random(8)
    rewards = [demonstrate(env, seed, level, rng).reward for seed in range(150) for level in (0, 5)]
    assert 0.5 < sum(rewards) / len(rewards) < 0.7


@pytest.mark.slow
@pytest.mark.parametrize("level", [0, 5, 9])
def test_clicking_everywhere_does_not_pay(level: int) -> None:
    def everywhere(rng: random.Random, *, orderly: bool) -> Iterator[Message]:
        points = [(x, y) for y in range(10, HEIGHT, 20) for x in (30, 80, 190)]
        if not orderly:
            rng.shuffle(points)
        for x, y in points:
            yield call("click", x=x, y=y)
        yield say("finished")

    paid = []
    for seed in range(5):
        for orderly in (True, False):
            env = started(seed, level)
            env.max_turns = 40
            for action in everywhere(random.Random(seed), orderly=orderly):
                _, reward, *_ = env.step(action)
            paid.append(reward)
    assert sum(paid) / len(paid) < 0.2


@pytest.mark.parametrize("level", [0, 5, 9])
def test_saving_at_once_or_saying_so_does_not_pay(level: int) -> None:
    for seed in range(10):
        env = started(seed, level)
        x, y = middle(env.buttons["save"])
        env.step(call("click", x=x, y=y))
        assert env.step("finished")[1] == 0.0
        assert started(seed, level).step(str(env.problem.prompt))[1] == 0.0


def test_what_is_not_saved_is_not_paid_and_undo_brings_back_the_start() -> None:
    env = started(0, 5)
    changes = env.oracle()
    unsaved = [next(changes)]
    while True:
        replies, *_ = env.step(unsaved[-1])
        action = changes.send(replies)
        if not action.tool_calls:
            break
        unsaved.append(action)
    env.reset(seed=0, options={"level": 5})
    for action in unsaved[:-1]:
        env.step(action)
    assert env._states() == env.goal != env.first
    x, y = middle(env.buttons["undo"])
    env.step(call("click", x=x, y=y))
    assert env._states() == env.first
    assert env.step("finished")[1] == 0.0


def test_the_screen_changes_exactly_where_the_state_does() -> None:
    from PIL import Image, ImageChops

    def screen(part: ImagePart) -> Image.Image:
        return Image.open(io.BytesIO(part.data)).convert("RGB")

    env = started(0, 0)
    widget = env.widgets[next(iter(env.changes))]
    before = screen(env._screen())
    after = screen(env.click(*middle(widget.area)))
    box = ImageChops.difference(before, after).getbbox()
    assert before.size == (WIDTH, HEIGHT)
    assert box is not None
    assert widget.area[0] <= box[0] and widget.area[1] <= box[1]
    assert box[2] - 1 <= widget.area[2] and box[3] - 1 <= widget.area[3]
    assert screen(env.click(*middle(widget.area))).tobytes() == before.tobytes()


def test_a_list_scrolls_within_its_lines_and_a_click_chooses_what_is_under_it() -> None:
    env = started(seed_with("list", 5), 5)
    widget = next(w for w in env.widgets.values() if w.kind == "list")
    env.page = widget.page
    x, y = middle(widget.area)
    env.scroll(x, y, 10**9)
    assert widget.first_shown == len(widget.options) - 4
    env.click(x, widget.area[3])
    assert widget.state == widget.options[-1]
    env.scroll(x, y, -(10**9))
    env.click(x, widget.area[1])
    assert (widget.first_shown, widget.state) == (0, widget.options[0])


def test_typing_goes_to_the_field_that_was_clicked_last_or_nowhere() -> None:
    env = started(seed_with("field", 2), 2)
    widget = next(w for w in env.widgets.values() if w.kind == "field")
    env.page = widget.page
    before = env._states()
    env.type("lima")
    assert env._states() == before
    env.click(*middle(widget.area))
    for text, kept in (("lima", "lima"), ("x" * 99, "x" * 12), ("\x00\ud800é\n", "\x00\ud800é\n")):
        env.type(text)
        assert widget.state == kept
    env.click(0, HEIGHT - 1)
    env.type("rome")
    assert widget.state == kept


def test_problems_differ_by_the_thousand() -> None:
    env = make_env("ClickUI-v0")
    assert len({env.reset(seed=seed)[1]["problem_digest"] for seed in range(100)}) == 100
