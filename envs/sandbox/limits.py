"""What every kind of isolation shares: the limits of a run, how it ended, and how it can fail to start."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from envs.errors import InfraFault

ExitKind = Literal["ok", "error", "timeout", "cpu", "memory", "output", "disk", "signal"]
CONTAINER_BYTES = 1 << 30
"""Memory of a whole container: the largest limit of a run that fits, and the interpreter beside it."""


class SandboxUnavailable(RuntimeError):
    """No isolation that was asked for works here; the text says why for each, and what to do."""


class SandboxFault(InfraFault):
    """The sandbox itself broke (its process died). The machine's fault, not that of the code or of the policy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What one run may use. Past one it is ended, and `Execution.exit` names which."""

    wall_s: float = 5.0
    """Seconds on the clock, the start included."""
    cpu_s: int = 1
    """Seconds of processor time, whole ones. Unlike the clock it does not depend on the machine's load."""
    memory_bytes: int = 256 << 20
    """Address space beyond that of an idle interpreter."""
    output_bytes: int = 64 << 10
    """Of standard output, and again of standard error."""
    disk_bytes: int = 8 << 20
    """Of all files in the run's folder, and of each."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.wall_s) and self.wall_s > 0 and self.cpu_s >= 1):
            raise ValueError(f"wall_s must be > 0 and cpu_s >= 1, not {self.wall_s} and {self.cpu_s}")
        if min(self.memory_bytes, self.output_bytes, self.disk_bytes) <= 0:
            raise ValueError(f"limits must be > 0: {self}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Execution:
    """How a run ended."""

    exit: ExitKind
    """"ok" | "error" (an exception or a status other than 0) | the limit it went past | "signal"."""
    stdout: str
    stderr: str
    value: Any = None
    """JSON data of the last line, where that is an expression; None where it is none or no such data."""
    shown: str = ""
    """repr of the same; empty = no value."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """The folder's plain files afterwards, where `collect` was asked for."""
    seconds: float = 0.0
    """From the fork to the end."""

    @property
    def text(self) -> str:
        """What an interactive session would show: output, value, and of an error its last line. Without addresses."""
        parts = [self.stdout.rstrip("\n"), re.sub(r" at 0x[0-9a-f]+", "", self.shown)]
        if self.exit == "error":
            parts.append(next(reversed(self.stderr.strip().splitlines()), "error")[:200])
        elif self.exit != "ok":
            parts.append(f"stopped: {self.exit}")
        return "\n".join(part for part in parts if part)
