"""Writes the tables of docs/configuration.md: options of each group, and every setting with its default and range.

    python -m scripts.config_table

What a setting means is its docstring in conf/schema.py, what it may be stands in conf/checks.py. Nothing is said twice.
"""

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from math import inf
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from conf import schema
from conf.checks import CHOICES, CHOICES_OF_LISTS, CHOICES_OR_IMPORT, FRACTIONS, POSITIVE, RANGES
from conf.loading import CONF_FOLDER, GROUPS, options_of

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"
KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def with_tables(page: str) -> str:
    """The page with everything between `<!-- begin NAME -->` and `<!-- end NAME -->` made again."""
    for name, lines in (("groups", group_table()), ("settings", setting_tables())):
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        before, _, rest = page.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            raise ValueError(f"the page has no {begin} ... {end}")
        page = before + "\n".join([begin, "", *lines, "", end]) + after
    return page


def group_table() -> Iterator[str]:
    yield from ("| group | options | default |", "|---|---|---|")
    chosen = dict(re.findall(r"^  - (\w+): (\w+)", (CONF_FOLDER / "train.yaml").read_text(), re.MULTILINE))
    for group in GROUPS:
        options = " ".join(f"`{option}`" for option in options_of(group))
        yield f"| `{group}` | {options} | `{chosen[group]}` |"


def setting_tables() -> Iterator[str]:
    """One table for the settings of a whole run, one for each section."""
    meanings = _docstrings()
    yield from _table(schema.TrainConfig, "", meanings)
    for item, kind in _items(schema.TrainConfig):
        if is_dataclass(kind):
            purpose = (inspect.getdoc(kind) or "").replace("\n", " ")
            yield from ("", f"### {item.name}", "", purpose, "", *_table(kind, f"{item.name}.", meanings))


def _table(section: Any, prefix: str, meanings: dict[tuple[str, str], str]) -> Iterator[str]:
    yield from ("| setting | default | allowed | meaning |", "|---|---|---|---|")
    yield from _rows(section, prefix, meanings)


def _rows(section: Any, prefix: str, meanings: dict[tuple[str, str], str]) -> Iterator[str]:
    """The settings of a section; sections inside it follow, but for those of a whole run, which have their tables."""
    for item, kind in _items(section):
        key = f"{prefix}{item.name}"
        if is_dataclass(kind):
            if prefix:
                yield from _rows(kind, f"{key}.", meanings)
            continue
        meaning = meanings[section.__name__, item.name]
        yield f"| `{key}` | {_default(item)} | {_cell(_allowed(key, kind))} | {_cell(meaning)} |"
        entry = get_args(kind)[-1] if get_origin(kind) is dict else None
        if is_dataclass(entry):
            yield from _rows(entry, f"{key}.NAME.", meanings)


def _items(section: Any) -> list[tuple[Field[Any], Any]]:
    hints = get_type_hints(section)
    return [(item, hints[item.name]) for item in fields(section)]


def _default(item: Field[Any]) -> str:
    if item.default_factory is not MISSING:
        return f"`{item.default_factory()}`"
    if item.default is MISSING:
        return "-"
    if isinstance(item.default, tuple):
        return f"`{list(item.default)}`"
    if isinstance(item.default, str):
        return f"`{item.default}`" if item.default else '`""`'
    return f"`{str(item.default).lower()}`"


def _allowed(key: str, kind: Any) -> str:
    if key in CHOICES:
        return ", ".join(CHOICES[key])
    if key in CHOICES_OF_LISTS:
        return "a list of " + ", ".join(CHOICES_OF_LISTS[key])
    if key in CHOICES_OR_IMPORT:
        return ", ".join((*CHOICES_OR_IMPORT[key], "module:function"))
    if key in POSITIVE:
        return "> 0"
    if key in FRACTIONS:
        return "0 to < 1"
    if key in RANGES:
        low, high = RANGES[key]
        return f">= {low}" if high == inf else f"{low} to {high}"
    return KINDS.get(kind, "a list" if get_origin(kind) is tuple else "a mapping")


def _cell(text: str) -> str:
    """Text that neither ends the cell nor passes for HTML."""
    return re.sub(r"([|<*])", r"\\\1", text)


def _docstrings() -> dict[tuple[str, str], str]:
    """(class, field) -> the text under the field. Raises ValueError for a setting without one."""
    found: dict[tuple[str, str], str] = {}
    for owner in ast.parse(Path(schema.__file__).read_text()).body:
        if not isinstance(owner, ast.ClassDef):
            continue
        for statement, below in zip(owner.body, [*owner.body[1:], None], strict=True):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                text = below.value if isinstance(below, ast.Expr) else None
                is_section = isinstance(statement.annotation, ast.Name) and statement.annotation.id.endswith("Config")
                if isinstance(text, ast.Constant):
                    found[owner.name, statement.target.id] = " ".join(str(text.value).split())
                elif not is_section:
                    raise ValueError(f"conf/schema.py: {owner.name}.{statement.target.id} has no docstring")
    return found


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text()))
