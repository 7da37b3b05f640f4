"""What a run shows while it goes on: one live line on a terminal, plain lines elsewhere."""

import time
import unicodedata
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], low: float = 0.0, high: float = 1.0) -> str:
    """Example: sparkline([0.0, 0.5, 1.0]) -> "▁▅█"; values outside low..high are drawn at the edge."""
    span = max(high - low, 1e-9)
    return "".join(BARS[round(min(max((v - low) / span, 0.0), 1.0) * (len(BARS) - 1))] for v in values)


def visible(text: str) -> str:
    """Control and direction-changing characters as escapes; line ends and tabs stay.

    Example: visible("a\\x1b[31m") -> "a\\\\x1b[31m"
    """
    return "".join(
        character if character in "\n\t" or not unicodedata.category(character).startswith("C") else _escape(character)
        for character in text
    )


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def plain_console() -> Console:
    """Standard output as it is given: no markup, no guessed colours, and no wrapping where nobody sees a width."""
    console = Console(markup=False, highlight=False, emoji=False)
    return console if console.is_terminal else Console(markup=False, highlight=False, emoji=False, width=240)


def duration(seconds: float) -> str:
    """Example: duration(75) -> "1m 15s"; duration(7300) -> "2h 01m" """
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60}h {minutes % 60:02d}m"
    return f"{minutes}m {rest:02d}s" if minutes else f"{rest}s"


class ProgressLine:
    """step 12/90  reward 0.21 ▁▂▃  lag 1.1/2  312 tok/s  trainer waits 41%  1 worker ok  eta 3m 02s

    Parts whose metric is missing are left out. On a terminal the line is redrawn at every step and texts from `say`
    scroll above it; elsewhere every `log_every`-th step is a line of its own.
    """

    def __init__(
        self,
        *,
        total_steps: int,
        max_staleness: int,
        log_every: int = 1,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total_steps = total_steps
        self._max_staleness = max_staleness
        self._log_every = log_every
        self._console = console or plain_console()
        self._clock = clock
        self._rewards: deque[float] = deque(maxlen=16)
        self._first: tuple[int, float] | None = None
        self._live: Live | None = None

    def step(self, step: int, metrics: Mapping[str, Any], alerts: Sequence[str] = ()) -> None:
        """`alerts`: names of rules in trouble."""
        self._first = self._first or (step, self._clock())
        reward = metrics.get("reward/mean")
        if reward is not None:
            self._rewards.append(reward)
        shown = [f"! {name}" for name in alerts]
        line = Text("  ".join([*self._parts(step, metrics), *shown]), no_wrap=True, overflow="ellipsis")
        if not self._console.is_terminal:
            if step % self._log_every == 0 or step == self._total_steps:
                self._console.print(line, soft_wrap=True)
            return
        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False)
            self._live.start()
        self._live.update(line, refresh=True)

    def say(self, text: str) -> None:
        """Text that stays, without markup and with control characters made visible: a model may have written it."""
        self._console.print(Text(visible(text)), soft_wrap=True)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _parts(self, step: int, metrics: Mapping[str, Any]) -> list[str]:
        parts = [f"step {step}/{self._total_steps}"]
        shown = {
            "reward/mean": lambda v: f"reward {v:.2f} {sparkline(self._rewards)}",
            "off_policy/lag/mean": lambda v: f"lag {v:.1f}/{self._max_staleness}",
            "trainer/tok_s": lambda v: f"{v:,.0f} tok/s",
            "time/trainer_idle_ratio": lambda v: f"trainer waits {v:.0%}",
            "workers/healthy": lambda v: f"{v:.0f} worker{'' if v == 1 else 's'} ok",
        }
        parts += [show(metrics[key]) for key, show in shown.items() if metrics.get(key) is not None]
        if self._first is not None and step > self._first[0]:
            seconds_per_step = (self._clock() - self._first[1]) / (step - self._first[0])
            parts.append(f"eta {duration(seconds_per_step * (self._total_steps - step))}")
        return parts
