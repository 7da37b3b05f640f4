"""Places where a test may make a worker kill itself, to prove that nothing is lost or counted twice."""

import os
import signal

PHASES = ("reset", "sample", "tool", "commit", "swap")


class Failpoint:
    """Kills its own process with SIGKILL at the n-th time a phase is entered.

    Example: Failpoint("sample:3").hit("sample") kills on the third call. Failpoint("") never does.
    Failpoint("sample:3,tool:1", life=1) is for a worker that was restarted once: it waits for the first tool call.
    """

    def __init__(self, plan: str = "", *, life: int = 0) -> None:
        spec = dict(enumerate(plan.split(","))).get(life, "")
        self.phase, _, count = spec.partition(":")
        if spec and (self.phase not in PHASES or not count.isdigit() or int(count) < 1):
            raise ValueError(f"bad failpoint {spec!r}: expected '<phase>:<count >= 1>', phase one of {PHASES}")
        self._left = int(count) if spec else 0

    def hit(self, phase: str) -> None:
        if phase != self.phase or not self._left:
            return
        self._left -= 1
        if not self._left:
            os.kill(os.getpid(), signal.SIGKILL)
