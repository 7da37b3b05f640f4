"""ChartQA-v0: a question about a chart that is drawn from the seed, such as "value of bag" or "largest".

The chart is drawn at 448x320 pixels and shown at half of that. Levels: 0-2 numbers and names are large enough to read
at once; from 3 on they are small, and `zoom` shows a part in full size. The number of marks (4 to 13), the dots of
noise and the kinds grow: bars, lines from 2 on, pies from 5 on, two series from 7 on. From 4 on two marks are added or
subtracted. Values are 10 to 99 and all differ, names are drawn from 2,205.
"""

import math
import random
from typing import ClassVar

from envs.base import AgentEnv, Oracle, call, say
from envs.library.parts.picture import CHAR_HEIGHT, CHAR_WIDTH, GREY, PALE, Colour, Picture
from envs.library.shop_db import draw_name
from envs.message import ImagePart
from envs.task import Problem
from envs.tool import tool

WIDTH, HEIGHT = 448, 320
SHOWN = (224, 160)
LEFT, BOTTOM, TOP = 30, 286, 24
SERIES: dict[str, Colour] = {"red": (205, 60, 50), "blue": (60, 90, 200)}
SLICES: tuple[Colour, ...] = ((240, 190, 190), (190, 225, 190), (190, 200, 240), (240, 230, 170))


class ChartQA(AgentEnv):
    """Answer a question about a chart with a number or a name. Reward 1 iff the answer is exact."""

    images: ClassVar[bool] = True
    max_turns = 6
    picture: Picture

    def task(self, rng: random.Random, level: int) -> Problem:
        self.names: list[str] = []
        while len(self.names) < 4 + level:
            if (name := draw_name(rng)) not in self.names:
                self.names.append(name)
        kinds = ("bar", "line", "pie")[: 1 + (level >= 2) + (level >= 5)]
        self.kind = rng.choice(kinds)
        colours = rng.sample(list(SERIES), 2 if level >= 7 and self.kind != "pie" else 1)
        numbers = rng.sample(range(10, 100), len(colours) * len(self.names))
        self.values = {c: numbers[i * len(self.names) :][: len(self.names)] for i, c in enumerate(colours)}
        self.needs_zoom = level >= 3
        self.picture = self._draw(rng, num_dots=60 * level)
        question = self._draw_question(rng, level)
        shown = self.picture.png(size=SHOWN)
        return Problem(prompt=question, images=(shown,), meta={"needs_tool": self.needs_zoom})

    def _draw_question(self, rng: random.Random, level: int) -> str:
        """Sets `self.gold`, what a careless reader answers, and the mark to look at."""
        colour = rng.choice(list(self.values))
        values = dict(zip(self.names, self.values[colour], strict=True))
        suffix = f" in {colour}" if len(self.values) > 1 else ""
        (a, x), (b, y) = sorted(rng.sample(list(values.items()), 2), key=lambda item: -item[1])
        word = rng.choice(("value", "largest", "smallest") if level < 4 else ("largest", "smallest", "sum", "minus"))
        self.target, self.wrong = self.names.index(a), str(y)
        if word == "value":
            self.gold = str(x)
            return f"value of {a}"
        if word in ("sum", "minus"):
            self.gold, self.wrong = str(x + y if word == "sum" else x - y), str(x)
            return f"{a} {'+' if word == 'sum' else '-'} {b}{suffix}"
        ranked = sorted(values, key=values.__getitem__, reverse=word == "largest")
        self.gold, self.wrong, self.target = ranked[0], ranked[1], self.names.index(ranked[0])
        return f"which is {word}{suffix}?"

    @tool
    def zoom(self, x: int, y: int) -> ImagePart:
        """Show the part of the chart around a pixel (x to the right, y down) of the first image in full size."""
        width, height = SHOWN
        left = min(max(2 * x - width // 2, 0), WIDTH - width)
        top = min(max(2 * y - height // 2, 0), HEIGHT - height)
        return self.picture.png((left, top, left + width - 1, top + height - 1))

    def reward(self, answer: str) -> dict[str, float]:
        return {"exact": float(answer.strip() == self.gold)}

    def hidden_state(self) -> str:
        return repr((self.kind, self.names, self.values))

    def oracle(self) -> Oracle:
        return self._look_and_say(self.gold)

    def noisy_oracle(self, rng: random.Random) -> Oracle:
        """60% right; else it reads another mark, or takes one number for the result."""
        return self._look_and_say(self.gold if rng.random() < 0.6 else self.wrong)

    def _look_and_say(self, answer: str) -> Oracle:
        if self.needs_zoom:
            x, y = self._place(self.target)
            yield call("zoom", x=x // 2, y=y // 2)
        yield say(answer)

    # --- drawing, in pixels of the large picture ---

    def _draw(self, rng: random.Random, num_dots: int) -> Picture:
        picture = Picture(WIDTH, HEIGHT)
        picture.dots([(rng.randrange(WIDTH), rng.randrange(HEIGHT)) for _ in range(num_dots)], GREY)
        if self.kind == "pie":
            self._draw_pie(picture)
        else:
            self._draw_axes(picture)
            for row, colour in enumerate(self.values):
                if self.kind == "bar":
                    self._draw_bars(picture, row, colour)
                else:
                    self._draw_line(picture, colour)
        return picture

    def _draw_axes(self, picture: Picture) -> None:
        for tick in range(0, 101, 20):
            picture.line([(LEFT, _height(tick)), (WIDTH - 1, _height(tick))], PALE)
        picture.line([(LEFT, TOP), (LEFT, BOTTOM), (WIDTH - 1, BOTTOM)])
        for index, name in enumerate(self.names):
            self._label(picture, self._place(index)[0], BOTTOM + 4, name)

    def _draw_bars(self, picture: Picture, row: int, colour: str) -> None:
        width = int(0.8 * self._step() / len(self.values))
        for index, value in enumerate(self.values[colour]):
            left = self._place(index)[0] + (row - 1) * width + (width // 2 if len(self.values) == 1 else 0)
            picture.box((left, _height(value), left + width - 1, BOTTOM), SERIES[colour])
            self._label(picture, left + width // 2, _height(value) - self._line_height(), str(value))

    def _draw_line(self, picture: Picture, colour: str) -> None:
        points = [(self._place(i)[0], _height(value)) for i, value in enumerate(self.values[colour])]
        picture.line(points, SERIES[colour], 2)
        for index, (x, y) in enumerate(points):
            value = self.values[colour][index]
            is_upper = value == max(values[index] for values in self.values.values())
            picture.disc(x, y, 3, SERIES[colour])
            self._label(picture, x, y - 3 - self._line_height() if is_upper else y + 5, str(value))

    def _draw_pie(self, picture: Picture) -> None:
        (values,) = self.values.values()
        start = 0.0
        for index, (name, value) in enumerate(zip(self.names, values, strict=True)):
            end = start + 360 * value / sum(values)
            picture.slice(WIDTH // 2, HEIGHT // 2, 100, start, end, SLICES[index % 3 if index < len(values) - 1 else 3])
            x, y = self._place(index)
            self._label(picture, x, y - self._line_height() // 2, f"{name} {value}")
            start = end

    def _place(self, index: int) -> tuple[int, int]:
        """Where a mark stands: its place on the axis, or its label beside the pie."""
        if self.kind != "pie":
            return LEFT + int((index + 0.5) * self._step()), _height(next(iter(self.values.values()))[index])
        (values,) = self.values.values()
        middle = math.radians(360 * (sum(values[:index]) + values[index] / 2) / sum(values))
        return WIDTH // 2 + round(150 * math.cos(middle)), HEIGHT // 2 + round(118 * math.sin(middle))

    def _step(self) -> float:
        return (WIDTH - LEFT) / len(self.names)

    def _line_height(self) -> int:
        return CHAR_HEIGHT if self.needs_zoom else 2 * CHAR_HEIGHT

    def _label(self, picture: Picture, x: int, y: int, text: str) -> None:
        """Text centred at x with its top at y, within the picture."""
        scale = 1 if self.needs_zoom else 2
        width = scale * CHAR_WIDTH * len(text)
        left = min(max(x - width // 2, 0), WIDTH - width)
        top = min(max(y, 0), HEIGHT - scale * CHAR_HEIGHT)
        picture.text(left, top, text, scale=scale)


def _height(value: int) -> int:
    """y of a value on the axis."""
    return BOTTOM - round((BOTTOM - TOP) * value / 100)
