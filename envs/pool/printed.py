"""What environments print: to the log file of their process, and the end of it to the episode it belongs to.

Whose code runs is a context variable: each task of the event loop has its own, and an environment's thread takes over
that of the call. What a thread or a process of the author's own prints is in the log file, or nowhere.
"""

import io
import threading
from contextvars import ContextVar
from typing import TextIO

from envs.redaction import redacted

MAX_CHARS = 4096
"""Kept of what an episode prints: the end, where it was when it ended."""
_LINE_CHARS = 8192
"""A line without an end is taken as it stands from here on, e.g. a bar drawn with carriage returns."""


class Printed:
    """The printed text of one episode."""

    __slots__ = ("_line", "_num_dropped", "_text")

    def __init__(self) -> None:
        self._text = self._line = ""
        self._num_dropped = 0

    @property
    def text(self) -> str:
        """At most MAX_CHARS, and a mark where the beginning is missing."""
        text = self._text + redacted(self._line)
        num_dropped = self._num_dropped + max(0, len(text) - MAX_CHARS)
        mark = f"(truncated {num_dropped} chars) " if num_dropped else ""
        return mark + text[-MAX_CHARS:]

    def take(self, text: str, *, everything: bool = False) -> str:
        """Add `text`; returns the lines that it ends, redacted as a whole: a value may be written in pieces."""
        self._line += text
        end = len(self._line) if everything or len(self._line) > _LINE_CHARS else self._line.rfind("\n") + 1
        ended, self._line = redacted(self._line[:end]), self._line[end:]
        self._text += ended
        self._num_dropped += max(0, len(self._text) - MAX_CHARS)
        self._text = self._text[-MAX_CHARS:]
        return ended


printing: ContextVar[Printed] = ContextVar("printing")
"""The episode whose code runs."""


class PrintedStream(io.TextIOBase):
    """Standard output and error of a pool's process. Without a file number: what it writes passes through here."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._nobody = Printed()

    def writable(self) -> bool:
        return True

    def write(self, text: str, /) -> int:
        self._write(text)
        return len(text)

    def flush(self) -> None:
        self._write("", everything=True)
        self._file.flush()

    def _write(self, text: str, *, everything: bool = False) -> None:
        with self._lock:
            ended = printing.get(self._nobody).take(text, everything=everything)
            if ended:
                self._file.write(ended)
