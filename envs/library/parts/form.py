"""A form on a small screen: what stands where, and how it looks. Lengths are pixels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from envs.library.parts.picture import CHAR_HEIGHT, CHAR_WIDTH, GREY, PALE, Box, Picture
from envs.message import ImagePart

WIDTH, HEIGHT = 224, 160
ROW_HEIGHT, TOP, BOTTOM = 20, 20, 140
"""Rows of widgets stand between TOP, under the tabs, and BOTTOM, above the buttons."""
NUM_ROWS = (BOTTOM - TOP) // ROW_HEIGHT
LIST_ROWS, LINES_SHOWN, LINE_HEIGHT = 3, 4, 14
INPUT = 72
"""Where what can be changed begins; left of it stands the name."""
BUTTON_AREAS: tuple[Box, Box] = ((8, BOTTOM + 2, 64, HEIGHT - 3), (WIDTH - 72, BOTTOM + 2, WIDTH - 16, HEIGHT - 3))
BLUE, YELLOW = (180, 205, 250), (255, 245, 190)


@dataclass(kw_only=True, slots=True)
class Widget:
    """One thing of a page."""

    kind: str
    """"box" | "field" | "list"."""
    name: str
    page: int
    row: int
    state: str
    """"yes" or "no", the text, or the chosen option."""
    options: list[str] = field(default_factory=list)
    first_shown: int = 0

    @property
    def area(self) -> Box:
        top = TOP + self.row * ROW_HEIGHT + 2
        if self.kind == "box":
            return INPUT, top, INPUT + 15, top + 15
        height = LINES_SHOWN * LINE_HEIGHT if self.kind == "list" else 16
        return INPUT, top, WIDTH - 12, top + height


def draw_screen(
    widgets: Sequence[Widget],
    focus: Widget | None,
    page: int,
    num_pages: int,
    buttons: Mapping[str, Box],
    *,
    saved: bool,
) -> ImagePart:
    """Page `page` (from 0) of the form. `saved`: what is shown is what was saved."""
    picture = Picture(WIDTH, HEIGHT)
    for tab in range(num_pages):
        left, right = tab * WIDTH // num_pages, (tab + 1) * WIDTH // num_pages - 1
        picture.box((left, 0, right, TOP - 4), PALE if tab == page else GREY)
        picture.text(left + 6, 3, f"page {tab + 1}")
    for widget in widgets:
        picture.text(6, widget.area[1] + 3, widget.name)
        _draw_widget(picture, widget, has_focus=widget is focus)
    for label, area in buttons.items():
        picture.box(area, PALE)
        _centre(picture, middle(area)[0], area[1] + 2, label)
    if saved:
        _centre(picture, WIDTH // 2 - 3, BOTTOM + 4, "saved")
    return picture.png()


def _draw_widget(picture: Picture, widget: Widget, *, has_focus: bool) -> None:
    left, top, right, _ = widget.area
    picture.box(widget.area, YELLOW if has_focus else None)
    if widget.kind == "box" and widget.state == "yes":
        picture.line([(left + 3, top + 8), (left + 6, top + 12), (right - 3, top + 3)], width=2)
    if widget.kind == "field":
        picture.text(left + 4, top + 3, widget.state)
    if widget.kind == "list":
        _draw_list(picture, widget)


def _draw_list(picture: Picture, widget: Widget) -> None:
    left, top, right, bottom = widget.area
    shown = widget.options[widget.first_shown :][:LINES_SHOWN]
    for line, option in enumerate(shown):
        y = top + line * LINE_HEIGHT
        if option == widget.state:
            picture.box((left + 1, y + 1, right - 9, y + LINE_HEIGHT), BLUE, None)
        picture.text(left + 4, y + (LINE_HEIGHT - CHAR_HEIGHT) // 2 + 1, option)
    scale = (bottom - top) / len(widget.options)  # of the scroll bar
    first, last = widget.first_shown, widget.first_shown + len(shown)
    picture.box((right - 6, top + int(first * scale), right, top + int(last * scale)), GREY)


def _centre(picture: Picture, x: int, y: int, text: str) -> None:
    picture.text(x - CHAR_WIDTH * len(text) // 2, y, text)


def inside(x: int, y: int, area: Box) -> bool:
    return area[0] <= x <= area[2] and area[1] <= y <= area[3]


def middle(area: Box) -> tuple[int, int]:
    return (area[0] + area[2]) // 2, (area[1] + area[3]) // 2
