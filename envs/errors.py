"""What can be wrong with an environment, and the author's own traceback of it."""

import asyncio
import traceback
from pathlib import Path

from envs.redaction import redacted

TRACEBACK_CHARS = 8000
"""Longest traceback that is kept; of a longer one the end is, where the cause stands."""

_OUR_FOLDERS = [Path(__file__).parent / wing for wing in ("", "pool", "tasks", "check", "sandbox")]
_OUR_FILES = frozenset(str(path) for folder in _OUR_FOLDERS for path in folder.glob("*.py"))
_ASYNCIO = str(Path(asyncio.__file__).parent)


class EnvError(Exception):
    """An environment cannot be used, or broke its contract."""


class UnknownEnvironment(EnvError, ValueError):
    """No environment has this id."""


class MalformedEnvironment(EnvError, TypeError):
    """A class is no usable environment, or its task() returned no problem."""


class BadReward(EnvError, ValueError):
    """reward() returned something other than finite numbers."""


class InfraFault(EnvError, ConnectionError):
    """Something an environment depends on is down (a server, a service): no fault of the policy or the environment.

    Raise it in a tool, task() or reward(): the episode then has no reward and may be tried again.
    """


class AuthorExit(EnvError):
    """An author's code raised what is no Exception: SystemExit, KeyboardInterrupt, a Rust panic, pytest's `fail`.

    Such an error would end a task, a thread or the whole program on its way up, so it travels in here, as `__cause__`.
    """


class HungThread(EnvError):
    """A blocking call outlived its deadline and still holds the environment's thread: no other call can be made."""


class BadArguments(ValueError):
    """A policy's arguments do not fit a tool's types. The text is short and stable: the policy reads it."""


class HostLost(ConnectionError):
    """The process that hosts environments died, restarted or did not answer in time."""


def error_text(error: BaseException) -> str:
    """`str(error)`; "" where the author's own `__str__` raises."""
    try:
        return str(error)
    except BaseException:  # it is an author's code, too
        return ""


def described(error: BaseException) -> str:
    """Example: described(KeyError("shelf")) -> "KeyError: 'shelf'"."""
    return f"{type(error).__name__}: {error_text(error)}"


def author_traceback(error: BaseException) -> str:
    """Format `error` without the frames of the machinery that called the author's code.

    Environments in envs/library count as authors' code. All frames are kept where none is left. Secrets are redacted,
    before anything is cut.
    """
    if isinstance(error, AuthorExit) and error.__cause__ is not None:
        error = error.__cause__
    formatted = traceback.TracebackException.from_exception(error)
    _drop_our_frames(formatted)
    return redacted("".join(formatted.format()))[-TRACEBACK_CHARS:]


def _drop_our_frames(formatted: traceback.TracebackException) -> None:
    theirs = [frame for frame in formatted.stack if not _is_ours(frame.filename)]
    if theirs:
        formatted.stack = traceback.StackSummary.from_list(theirs)
    if formatted.__cause__ is not None:
        _drop_our_frames(formatted.__cause__)


def _is_ours(filename: str) -> bool:
    return filename in _OUR_FILES or filename.startswith(_ASYNCIO)
