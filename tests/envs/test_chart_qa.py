"""ChartQA: pictures that depend on the seed alone, answers that stand in the picture alone."""

import io
import random
import re
import subprocess
import sys
import time
from typing import Any

import pytest

from envs.base import call, say
from envs.check.demonstration import demonstrate
from envs.library.chart_qa import SHOWN, ChartQA
from envs.message import ImagePart, Message
from envs.registry import make_env

BYTES_IN_A_NEW_PROCESS = """
import hashlib
from envs.registry import make_env
from envs.base import call
for env_id, tool in (("ChartQA-v0", "zoom"), ("ClickUI-v0", "click")):
    env = make_env(env_id)
    for level in (0, 5, 9):
        opening, _ = env.reset(seed=3, options={"level": level})
        replies = env.step(call(tool, x=80, y=30))[0]
        for part in (opening[0].content[0], replies[0].content[-1]):
            print(hashlib.sha256(part.data).hexdigest())
"""


def image(message: Message) -> ImagePart:
    (found,) = [part for part in message.content if isinstance(part, ImagePart)]
    return found


def pixels(part: ImagePart) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(part.data))


def test_the_oracle_scores_one_at_every_level_and_zooms_where_text_is_small() -> None:
    env = make_env("ChartQA-v0")
    for level in range(10):
        played = [demonstrate(env, seed, level) for seed in range(10)]
        assert {d.reward for d in played} == {1.0}
        assert {d.meta["num_tool_calls"] for d in played} == {int(level >= 3)}
        assert {d.meta["needs_tool"] for d in played} == {level >= 3}


def test_noisy_demonstrations_are_right_in_six_of_ten() -> None:
    env, rng = make_env("ChartQA-v0"), random.Random(7)
    rewards = [demonstrate(env, seed, 0, rng).reward for seed in range(200)]
    assert 0.5 < sum(rewards) / 200 < 0.7


@pytest.mark.parametrize("level", [0, 5, 9])
def test_no_text_says_what_the_picture_says(level: int) -> None:
    env = make_env("ChartQA-v0")
    assert isinstance(env, ChartQA)
    for seed in range(20):
        opening, info = env.reset(seed=seed, options={"level": level})
        assert env.gold not in opening[0].text
        replies, *_ = env.step(call("zoom", x=100, y=80))
        assert replies[0].text == ""
        assert env.gold not in " ".join(f"{tool.name} {tool.description}" for tool in info["tools"]).split()
        assert env.wrong != env.gold


@pytest.mark.parametrize("level", [0, 5, 9])
def test_answers_without_looking_earn_nothing(level: int) -> None:
    env = make_env("ChartQA-v0")
    for answer in ("", "nan", "10", "50", "bag", None):
        rewards = []
        for seed in range(12):
            opening, _ = env.reset(seed=seed, options={"level": level})
            rewards.append(env.step(say(opening[0].text if answer is None else answer))[1])
        assert sum(rewards) / 12 < 0.2, answer


def test_pictures_are_small_pngs_that_a_new_process_draws_to_the_byte() -> None:
    outputs = [
        subprocess.run(
            [sys.executable, "-c", BYTES_IN_A_NEW_PROCESS],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(path for path in sys.path if path)},
            cwd=".",
            capture_output=True,
            text=True,
            timeout=100,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert len(set(outputs[0].split())) == 12
    assert outputs[0] == outputs[1]
    env = make_env("ChartQA-v0")
    opening, _ = env.reset(seed=3)
    shown = image(opening[0])
    assert (shown.media_type, pixels(shown).format, pixels(shown).size) == ("image/png", "PNG", SHOWN)
    assert len(shown.data) < 20_000


def test_zoom_shows_a_part_in_full_size_wherever_it_is_asked_for() -> None:
    env = make_env("ChartQA-v0")
    assert isinstance(env, ChartQA)
    env.reset(seed=1, options={"level": 9})
    whole = pixels(env.picture.png())
    assert whole.size == (448, 320)
    zoomed = pixels(env.zoom(x=0, y=0))
    assert zoomed.tobytes() == whole.crop((0, 0, *SHOWN)).tobytes()
    middle = pixels(env.zoom(x=112, y=80))
    assert middle.tobytes() == whole.crop((112, 80, 112 + SHOWN[0], 80 + SHOWN[1])).tobytes()
    for x, y in ((-(10**9), 5), (10**9, 10**9)):
        assert pixels(env.zoom(x=x, y=y)).size == SHOWN


def test_bars_stand_as_high_as_their_values() -> None:
    env = ChartQA()
    env.reset(seed=0)
    assert env.kind == "bar"
    ((colour, values),) = env.values.items()
    drawn = pixels(env.picture.png())
    fill = {"red": (205, 60, 50), "blue": (60, 90, 200)}[colour]
    for index, value in enumerate(values):
        x = env._place(index)[0]
        height = sum(drawn.getpixel((x, y)) == fill for y in range(320))
        assert abs(height - 262 * value / 100) <= 2


def test_problems_differ_by_the_thousand() -> None:
    env = make_env("ChartQA-v0")
    digests = {env.reset(seed=seed, options={"level": 0})[1]["problem_digest"] for seed in range(100)}
    assert len(digests) == 100
    asked = {re.sub(r"of \w+", "of ?", env.reset(seed=seed)[0][0].text) for seed in range(40)}
    assert asked == {"value of ?", "which is largest?", "which is smallest?"}


def test_a_picture_takes_a_few_milliseconds() -> None:
    env = ChartQA()
    taken = []
    for seed in range(40):
        started = time.process_time()
        env.task(random.Random(seed), 9)
        taken.append(time.process_time() - started)
    assert sorted(taken)[20] < 0.02  # 3 ms on a quiet machine
