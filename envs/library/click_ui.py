"""ClickUI-v0: bring a form on the screen into the state asked for, with clicks, typing and scrolling, then save it.

Every page has rows of check boxes, text fields and lists of which four lines show; tabs lead to the pages. Levels:
1 to 4 pages, 1 to 5 changes; check boxes only at 0 and 1, fields from 2 on, lists from 4 on. What counts is the state
at the last click on "save": each named widget as asked for, every other one as it was. "undo" brings back the start.
"""

import random
from typing import ClassVar

from envs.base import AgentEnv, Oracle, call, say
from envs.library.parts.form import (
    BUTTON_AREAS,
    LINE_HEIGHT,
    LINES_SHOWN,
    LIST_ROWS,
    NUM_ROWS,
    TOP,
    WIDTH,
    Widget,
    draw_screen,
    inside,
    middle,
)
from envs.library.parts.picture import Box
from envs.library.shop_db import draw_name
from envs.message import ImagePart
from envs.task import Problem
from envs.tool import tool

NUM_OPTIONS = 9
MAX_TEXT = 12


class ClickUI(AgentEnv):
    """Fill in a form by mouse and keyboard. Reward 1 iff the saved state is exactly the one asked for."""

    images: ClassVar[bool] = True
    max_turns = 24

    def task(self, rng: random.Random, level: int) -> Problem:
        self.num_pages, self.page = 1 + level // 3, 0
        self.widgets = self._draw_widgets(rng, level)
        self.first = self._states()
        self.changes = self._draw_changes(rng, 1 + level // 2)
        self.goal = self.first | self.changes
        self.focus: Widget | None = None
        self.saved: dict[str, str] = {}
        self.buttons: dict[str, Box] = dict(zip(("save", "undo"), rng.sample(BUTTON_AREAS, 2), strict=True))
        asked = [self._in_words(name) for name in self.changes]
        return Problem(prompt=f"{', '.join(asked)}, save", images=(self._screen(),), meta={"needs_tool": True})

    def _draw_widgets(self, rng: random.Random, level: int) -> dict[str, Widget]:
        """By name, page by page; a page is full."""
        widgets: dict[str, Widget] = {}
        for page in range(self.num_pages):
            kinds = [rng.choice(("box", "field") if level >= 2 else ("box",)) for _ in range(NUM_ROWS)]
            if level >= 4:
                kinds = [*kinds[LIST_ROWS:], "list"]
                rng.shuffle(kinds)
            row = 0
            for kind in kinds:
                name = _new_name(rng, widgets)
                options = sorted({draw_name(rng) for _ in range(NUM_OPTIONS)}) if kind == "list" else []
                state = {"box": rng.choice(("yes", "no")), "field": "", "list": options[0] if options else ""}[kind]
                widgets[name] = Widget(kind=kind, name=name, page=page, row=row, state=state, options=options)
                row += LIST_ROWS if kind == "list" else 1
        return widgets

    def _draw_changes(self, rng: random.Random, count: int) -> dict[str, str]:
        """New state by name of widget."""
        changes = {}
        for name in rng.sample(list(self.widgets), count):
            widget = self.widgets[name]
            if widget.kind == "box":
                changes[name] = "no" if widget.state == "yes" else "yes"
            else:
                changes[name] = rng.choice(widget.options[1:]) if widget.kind == "list" else draw_name(rng)
        return changes

    def _in_words(self, name: str) -> str:
        kind, state = self.widgets[name].kind, self.changes[name]
        if kind == "box":
            return f"{'tick' if state == 'yes' else 'untick'} {name}"
        return f"type {state} into {name}" if kind == "field" else f"choose {state} in {name}"

    # --- what a policy does ---

    @tool
    def click(self, x: int, y: int) -> ImagePart:
        """Click on a pixel of the screen, x to the right and y down from the top left corner."""
        self.focus = None
        if 0 <= y < TOP and 0 <= x < WIDTH:
            self.page = min(x * self.num_pages // WIDTH, self.num_pages - 1)
        for label, area in self.buttons.items():
            if inside(x, y, area):
                self._press(label)
        for widget in self._on_page():
            if inside(x, y, widget.area):
                self._click_widget(widget, y)
        return self._screen()

    @tool
    def type(self, text: str) -> ImagePart:
        """Replace the text of the field that was clicked last."""
        if self.focus is not None:
            self.focus.state = text[:MAX_TEXT]
        return self._screen()

    @tool
    def scroll(self, x: int, y: int, lines: int) -> ImagePart:
        """Scroll the list at a pixel by some lines, down where the number is positive."""
        for widget in self._on_page():
            if widget.kind == "list" and inside(x, y, widget.area):
                last = max(len(widget.options) - LINES_SHOWN, 0)
                widget.first_shown = min(max(widget.first_shown + lines, 0), last)
        return self._screen()

    def _press(self, label: str) -> None:
        if label == "save":
            self.saved = self._states()
            return
        for name, state in self.first.items():
            self.widgets[name].state = state

    def _click_widget(self, widget: Widget, y: int) -> None:
        if widget.kind == "field":
            self.focus = widget
        elif widget.kind == "box":
            widget.state = "no" if widget.state == "yes" else "yes"
        else:
            line = min((y - widget.area[1]) // LINE_HEIGHT, LINES_SHOWN - 1) + widget.first_shown
            if line < len(widget.options):
                widget.state = widget.options[line]

    def reward(self, answer: str) -> dict[str, float]:
        return {"saved_as_asked": float(self.saved == self.goal)}

    def hidden_state(self) -> str:
        return repr([(w.kind, w.name, w.state, w.options) for w in self.widgets.values()])

    # --- parts ---

    def _screen(self) -> ImagePart:
        saved = bool(self.saved) and self.saved == self._states()
        return draw_screen(self._on_page(), self.focus, self.page, self.num_pages, self.buttons, saved=saved)

    def _on_page(self) -> list[Widget]:
        return [widget for widget in self.widgets.values() if widget.page == self.page]

    def _states(self) -> dict[str, str]:
        return {name: widget.state for name, widget in self.widgets.items()}

    # --- demonstrators ---

    def oracle(self) -> Oracle:
        return self._fill_in(self.changes)

    def noisy_oracle(self, rng: random.Random) -> Oracle:
        """60% right; else it leaves out the last change, or changes a box that nobody named."""
        if rng.random() < 0.6:
            return self.oracle()
        if rng.random() < 0.5:
            return self._fill_in(dict(list(self.changes.items())[:-1]))
        others = [w for w in self.widgets.values() if w.kind == "box" and w.name not in self.changes]
        wrong = {w.name: "no" if w.state == "yes" else "yes" for w in others[:1]}
        return self._fill_in(dict(list(self.changes.items())[:-1]) | wrong)

    def _fill_in(self, changes: dict[str, str]) -> Oracle:
        for name in sorted(changes, key=lambda name: self.widgets[name].page):
            widget = self.widgets[name]
            if widget.page != self.page:
                yield call("click", x=(2 * widget.page + 1) * WIDTH // (2 * self.num_pages), y=TOP // 2)
            x, y = middle(widget.area)
            if widget.kind == "list":
                line = widget.options.index(changes[name])
                if line >= LINES_SHOWN:
                    yield call("scroll", x=x, y=y, lines=line)
                y = widget.area[1] + (line - widget.first_shown) * LINE_HEIGHT + LINE_HEIGHT // 2
            yield call("click", x=x, y=y)
            if widget.kind == "field":
                yield call("type", text=changes[name])
        x, y = middle(self.buttons["save"])
        yield call("click", x=x, y=y)
        yield say("finished")


def _new_name(rng: random.Random, taken: dict[str, Widget]) -> str:
    while (name := draw_name(rng)) in taken:
        pass
    return name
