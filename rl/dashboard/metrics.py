"""metrics.jsonl in columns, read once and then only what is new; series thinned to what a screen can show."""

import itertools
import json
import math
import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

MAX_LINE_BYTES = 4 * 2**20
"""A longer line is passed over and counted."""
CHUNK_BYTES = 2**20
AXES = ("step", "time_s", "tokens", "trajectories")
MAX_KEYS = 5_000
"""Names that are kept of one file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cursor:
    """How far a file was read.

    Example: Cursor.parse(str(Cursor(inode=7, offset=90))) -> Cursor(inode=7, offset=90).
    """

    inode: int = 0
    """Of the file: a resumed run replaces metrics.jsonl, and an offset into the old one means nothing."""
    offset: int = 0
    """Bytes, always at the beginning of a line."""

    def __str__(self) -> str:
        return f"{self.inode}.{self.offset}"

    @staticmethod
    def parse(text: str) -> "Cursor":
        inode, _, offset = text.partition(".")
        if not (inode.isdecimal() and offset.isdecimal() and len(text) < 50):
            return Cursor()
        return Cursor(inode=int(inode), offset=int(offset))


@dataclass(frozen=True, kw_only=True, slots=True)
class NewLines:
    """What a file has gained."""

    rows: tuple[dict[str, Any], ...]
    cursor: Cursor
    restarted: bool = False
    """The file was replaced or cut, and `rows` begin at its beginning."""
    num_bad: int = 0
    """Lines that were no JSON object, or too long."""
    more: bool = False
    """There is more than `max_bytes`: ask again."""


def read_new_lines(path: Path, cursor: Cursor, max_bytes: int = CHUNK_BYTES) -> NewLines:
    """Whole lines after `cursor`; one that is still being written waits for the next call."""
    try:
        file = path.open("rb")
    except OSError:
        return NewLines(rows=(), cursor=cursor)
    with file:
        stat = _stat(file)
        restarted = cursor.inode not in (0, stat.inode) or cursor.offset > stat.offset
        start = 0 if restarted else cursor.offset
        file.seek(start)
        data = file.read(max_bytes)
        end = data.rfind(b"\n") + 1
        num_bad = 0
        while not end and len(data) >= max_bytes:  # one line longer than a chunk: kept only if it is not absurd
            more = file.read(max_bytes)
            if not more:
                return NewLines(rows=(), cursor=Cursor(inode=stat.inode, offset=start), restarted=restarted)
            if len(data) > MAX_LINE_BYTES:
                start, data, num_bad = start + len(data), b"", 1
            data += more
            end = data.rfind(b"\n") + 1
    if num_bad:  # `data` begins amid the long line
        cut = data.find(b"\n") + 1
        start, data, end = start + cut, data[cut:], end - cut
    found = [_row(line) for line in data[:end].splitlines()]
    rows = [row for row in found if row is not None]
    num_bad += len(found) - len(rows)
    cursor = Cursor(inode=stat.inode, offset=start + end)
    more_left = end > 0 and cursor.offset < stat.offset and len(data) >= max_bytes
    return NewLines(rows=tuple(rows), cursor=cursor, restarted=restarted, num_bad=num_bad, more=more_left)


def _stat(file: Any) -> Cursor:
    import os

    stat = os.fstat(file.fileno())
    return Cursor(inode=stat.st_ino, offset=stat.st_size)


_decode = json.JSONDecoder(parse_constant=lambda _: None).decode


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = _decode(line.decode())
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


class MetricTable:
    """One metrics.jsonl by name. Any thread may ask.

    Example: table.refresh(); table.series(["reward/mean"], max_points=2000)["reward/mean"]["y"] -> [0.4, 0.5]
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._forget()

    def refresh(self) -> None:
        """Read what is new."""
        with self._lock:
            while True:
                new = read_new_lines(self._path, self.cursor)
                if new.restarted:
                    self._forget()
                self.cursor = new.cursor
                self.num_bad += new.num_bad
                for keys, rows in itertools.groupby(new.rows, key=tuple):
                    self._add(keys, list(rows))
                if not new.more:
                    return

    @property
    def last(self) -> dict[str, Any]:
        """Newest row of kind "step"; {} before the first."""
        return self._last

    def keys(self) -> list[dict[str, Any]]:
        """Name, points, newest value and its step of every series, in order of names."""
        with self._lock:
            return [
                {"key": key, "n": len(rows), "last": _null(values[-1]), "step": self._axes["step"][rows[-1]]}
                for key, (rows, values) in sorted(self._columns.items())
            ]

    def series(self, keys: Sequence[str], max_points: int, axes: Sequence[str] = AXES) -> dict[str, Any]:
        """Per name: `n` points in all; of at most `max_points` the value `y` (null: not finite) and these axes."""
        with self._lock:
            found = {}
            for key in keys:
                rows, values = self._columns.get(key, (array("q"), array("d")))
                picks = thin(values, max_points)
                shown = {axis: [self._axes[axis][rows[i]] for i in picks] for axis in axes}
                found[key] = {"n": len(values), "y": [_null(values[i]) for i in picks], **shown}
            return found

    def rows(self, keys: Sequence[str]) -> list[dict[str, Any]]:
        """Rows as they stood in the file, with "kind", "step" and these metrics alone."""
        with self._lock:
            step, evaluation = self._axes["step"], set(self._columns.get("eval/success", ((), ()))[0])
            found = [
                {"kind": "evaluation" if number in evaluation else "step", "step": int(at)}
                for number, at in enumerate(step)
            ]
            for key in keys:
                for number, value in zip(*self._columns.get(key, ((), ())), strict=True):
                    found[number][key] = _null(value)
        return found

    def csv_lines(self, keys: Sequence[str]) -> Iterator[str]:
        """Every point of the names, not thinned, one line a row of the file that has one of them."""
        with self._lock:
            columns = [dict(zip(*self._columns.get(key, ((), ())), strict=True)) for key in keys]
            axes = {axis: list(values) for axis, values in self._axes.items()}
        yield ",".join([*AXES, *(_csv(key) for key in keys)]) + "\n"
        for row in sorted(set().union(*columns)):
            cells = [repr(axes[axis][row]) for axis in AXES]
            values = [column.get(row) for column in columns]
            cells += ["" if value is None or math.isnan(value) else repr(value) for value in values]
            yield ",".join(cells) + "\n"

    def _forget(self) -> None:
        self.cursor = Cursor()
        self.num_bad = 0
        self._last: dict[str, Any] = {}
        self._columns: dict[str, tuple[array, array]] = {}
        self._counted: list[str] = []  # names that count trajectories
        self._axes = {axis: array("d") for axis in AXES}

    def _add(self, keys: tuple[str, ...], rows: list[dict[str, Any]]) -> None:
        """Rows that follow each other and name the same: a column at a time, for a large run has a million values."""
        first = len(self._axes["step"])
        numbers = array("q", range(first, first + len(rows)))
        self._last = next((row for row in reversed(rows) if row.get("kind") == "step"), self._last)
        for key, values in zip(keys, zip(*(row.values() for row in rows), strict=True), strict=True):
            column = self._columns.get(key) or self._new_column(key, values)
            if column is None:
                continue
            if _finite_floats(values):
                column[0].extend(numbers)
                column[1].extend(array("d", values))
                continue
            for number, value in zip(numbers, values, strict=True):
                found = _number(value)
                if found is not None or value is None:
                    column[0].append(number)
                    column[1].append(math.nan if found is None else found)
        self._add_axes(rows)

    def _add_axes(self, rows: list[dict[str, Any]]) -> None:
        for axis in ("step", "time_s"):
            self._axes[axis].extend(array("d", _cells(rows, axis)))
        for axis, names in (("tokens", ["trainer/tokens"]), ("trajectories", self._counted)):
            gained = [0.0] * len(rows)
            for name in names:
                gained = [a + b for a, b in zip(gained, _cells(rows, name), strict=True)]
            counted = (n if row.get("kind") == "step" else 0.0 for n, row in zip(gained, rows, strict=True))
            total = self._axes[axis][-1] if self._axes[axis] else 0.0
            self._axes[axis].extend(array("d", list(itertools.accumulate(counted, initial=total))[1:]))

    def _new_column(self, key: str, values: Sequence[Any]) -> tuple[array, array] | None:
        """None for what is no series, or one name too many."""
        if key in ("kind", "step", "time_s") or len(self._columns) >= MAX_KEYS:
            return None
        if not any(value is None or _number(value) is not None for value in values):
            return None
        if key.startswith("rows/"):
            self._counted.append(key)
        return self._columns.setdefault(key, (array("q"), array("d")))


class MetricTables:
    """Tables of the runs that were looked at last."""

    def __init__(self, max_tables: int = 12) -> None:
        self._max_tables = max_tables
        self._tables: OrderedDict[Path, MetricTable] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, path: Path) -> MetricTable:
        """Up to date."""
        with self._lock:
            table = self._tables.setdefault(path, MetricTable(path))
            self._tables.move_to_end(path)
            while len(self._tables) > self._max_tables:
                self._tables.popitem(last=False)
        table.refresh()
        return table


def thin(values: Sequence[float], max_points: int) -> list[int]:
    """Indices to show: all of them, or the first, the last, and of each stretch its lowest and its highest.

    So no spike is lost, as it would be with every n-th. Example: thin([0, 9, 0, 0, 0, 1, 0, 0], 6) -> [0, 1, 2, 5, 7]
    """
    if len(values) <= max_points:
        return list(range(len(values)))
    column = np.array(values, dtype=float)
    # a value that is not finite compares with nothing: it goes last either way
    low, high = np.where(np.isnan(column), np.inf, column), np.where(np.isnan(column), -np.inf, column)
    stretches = max(1, (max_points - 2) // 2)
    picks = {0, len(values) - 1}
    for stretch in range(stretches):
        start = stretch * len(values) // stretches
        end = (stretch + 1) * len(values) // stretches
        picks.add(start + int(low[start:end].argmin()))
        picks.add(start + int(high[start:end].argmax()))
    return sorted(picks)


def _cells(rows: Sequence[dict[str, Any]], key: str) -> Sequence[float]:
    """A number for each row; 0 where it has none."""
    values = [row.get(key) for row in rows]
    return values if _finite_floats(values) else [_number(value) or 0.0 for value in values]


def _finite_floats(values: Sequence[Any]) -> TypeGuard[Sequence[float]]:
    """Told by the sum: one value that is not finite makes it so."""
    return set(map(type, values)) == {float} and math.isfinite(sum(values))


def _number(value: Any) -> float | None:
    """The value as a finite float; None for what is none (a flag is none either)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _null(value: float) -> float | None:
    return None if math.isnan(value) else value


def _csv(text: str) -> str:
    """One cell. A spreadsheet must not take a name for a formula."""
    text = "'" + text if text[:1] in "=+-@\t\r" else text
    return '"' + text.replace('"', '""') + '"' if any(c in text for c in ',"\r\n') else text
