"""Append-only files of one JSON object a line: readable by any process while they grow, whole after a kill."""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any


class JsonLines:
    """Writer of one file. Numbers that JSON cannot hold (nan, inf) become null and are counted.

    Example: JsonLines(path).append({"loss": nan}) writes {"loss": null} and `num_non_finite` is 1.
    """

    def __init__(self, path: Path) -> None:
        _drop_broken_end(path)
        self.num_non_finite = 0
        self._file = path.open("a", encoding="utf-8", buffering=1)  # a line reaches the kernel when it is written

    def append(self, row: Mapping[str, Any]) -> None:
        """Raises OSError, naming the file, where it cannot be written."""
        try:
            self._file.write(json.dumps(self.plain(row), ensure_ascii=False, allow_nan=False) + "\n")
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._file.name) from error

    def close(self) -> None:
        self._file.close()

    def plain(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row in JSON's own types. Raises TypeError for what is no number, text, list or mapping."""
        return {str(key): self._plain(item) for key, item in row.items()}

    def _plain(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return self.plain(value)
        if isinstance(value, list | tuple):
            return [self._plain(item) for item in value]
        if value is None or isinstance(value, str | bool):
            return value
        if isinstance(value, Integral):  # numpy's scalars too
            return int(value)
        if isinstance(value, Real):
            if math.isfinite(value):
                return float(value)
            self.num_non_finite += 1
            return None
        raise TypeError(f"{value!r} ({type(value).__name__}) cannot be written as JSON")


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Rows so far; none where the file is missing. A last line that is still being written is left out."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


def keep_json_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrite the file with the rows that `keep` accepts; whole or not at all."""
    if not path.exists():
        return
    kept = [row for row in read_json_lines(path) if keep(row)]
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept), encoding="utf-8")
    os.replace(partial, path)


def _drop_broken_end(path: Path) -> None:
    """Cut off a line that a killed writer left unfinished, or the next line would be glued to it."""
    if not path.exists():
        return
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)
