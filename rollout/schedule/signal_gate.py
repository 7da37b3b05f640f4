"""Keeps groups that teach nothing from the learner, within bounds: pure counting.

A refused group is dropped and its slot filled again, so a step still trains on P groups. Where nearly every group is
without a signal that could go on for ever, so a step refuses only so many; then groups pass until the step is done.
"""

from collections.abc import Callable

from rollout.record.trajectory import TrajectoryGroup


class SignalGate:
    """Example: gate = SignalGate(has_signal, limit=24); gate.refuses(group) -> True up to 24 times a learner step."""

    def __init__(self, has_signal: Callable[[TrajectoryGroup], bool], *, limit: int) -> None:
        """`has_signal`: of a finished group. `limit`: most refusals of one learner step."""
        self.limit = limit
        self.exhausted_steps = 0
        """Steps in which a group passed only because the limit was reached."""
        self._has_signal = has_signal
        self._refused = 0
        self._passed_over_limit = False

    def refuses(self, group: TrajectoryGroup) -> bool:
        """Whether the group shall be dropped; counts it if so."""
        if self._has_signal(group):
            return False
        if self._refused < self.limit:
            self._refused += 1
            return True
        self.exhausted_steps += not self._passed_over_limit
        self._passed_over_limit = True
        return False

    def step_done(self) -> None:
        """The learner took a step's groups: refusals are counted anew."""
        self._refused = 0
        self._passed_over_limit = False
