"""How old trained tokens may be, and the admission rule that keeps them younger. Pure arithmetic: no clock, no asyncio.

Symbols: S max staleness, P groups per learner step, k steps between publications, L version the learner trains now,
w newest version that every worker serves. Versions count learner steps (pass steps where a step makes several updates).

Why slots bound staleness. A group keeps its slot until a version made after its training is served, so at any time the
(S + 1) * P slots hold the (L - w) * P groups trained at versions w .. L - 1 and everything untrained. A group that is
admitted now therefore has at most (S + 1 - L + w) * P - 1 untrained groups before it; at P groups a step it is trained
at version L + (S - L + w) = w + S or before, and nothing in it was sampled before w: staleness <= S, for every k.
Giving the slot back at consumption already would let (L - w) * P more groups in: staleness S + k - 1.

Two conditions carry the proof: every step consumes exactly P groups (one without a learning signal counts), and no
group is overtaken until it cannot be trained in time (`rollout.schedule.buffer` sees to it).
"""

from dataclasses import dataclass


def staleness(*, learner_version: int, sampled_version: int) -> int:
    """In policy versions: how many the learner was ahead when it took what `sampled_version` sampled.

    The one formula of it: bound, metrics, samples for trackers and the dashboard ask here.
    """
    return learner_version - sampled_version


def version_before(step: int, *, updates_per_step: int) -> int:
    """Version of the learner at the start of learner step `step` (the first is 1): what staleness counts from.

    Example: version_before(10, updates_per_step=2) -> 18
    """
    return (step - 1) * updates_per_step


class StalenessViolation(RuntimeError):
    """Raised where data older than the bound would be trained on. Admission makes that impossible: it is a bug."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StalenessBound:
    """The bound and what follows from it.

    Example: StalenessBound(max_staleness=2, groups_per_step=4).slots -> 12; its
    check(learner_version=7, sampled_version=5) passes, and with sampled_version=4 it raises, for 7 - 4 > 2.
    """

    max_staleness: int
    """S, in learner steps. 0 = synchronous: nothing is sampled while the learner trains."""
    groups_per_step: int
    """P, groups that one learner step consumes."""

    def __post_init__(self) -> None:
        if self.max_staleness < 0:
            raise ValueError(f"max_staleness must be >= 0, got {self.max_staleness}")
        if self.groups_per_step < 1:
            raise ValueError(f"groups_per_step must be >= 1, got {self.groups_per_step}")

    @property
    def slots(self) -> int:
        """Most groups alive at once."""
        return (self.max_staleness + 1) * self.groups_per_step

    def check(self, *, learner_version: int, sampled_version: int) -> None:
        """Raise `StalenessViolation` if tokens of `sampled_version` are too old for this learner."""
        found = staleness(learner_version=learner_version, sampled_version=sampled_version)
        if found > self.max_staleness:
            raise StalenessViolation(
                f"staleness {found} is over max_staleness {self.max_staleness}: "
                f"sampled at version {sampled_version}, trained at version {learner_version}"
            )

    def check_publish_every(self, publish_every: int) -> None:
        """Raise ValueError unless 1 <= publish_every <= S + 1.

        With a larger k the learner consumes all S + 1 steps' worth of slots before it publishes; no slot comes back,
        no group is admitted, and the step that would publish never has data: a deadlock.
        """
        if not 1 <= publish_every <= self.max_staleness + 1:
            raise ValueError(
                f"publish_every must be 1 to max_staleness + 1 = {self.max_staleness + 1}, got {publish_every}: with "
                f"more, all {self.slots} slots wait for a version that the learner cannot make without new groups"
            )


class SlotGate:
    """Counts the slots: who may start a group, and when a slot comes back.

    A slot is held from `acquire` until the group is dropped, or until a version newer than the one that trained on it
    is served.

    Example: gate = SlotGate(StalenessBound(max_staleness=0, groups_per_step=1)); gate.acquire() -> True, then False;
    gate.consumed("a", at_version=0) frees nothing yet; gate.published(1) -> 1; gate.acquire() -> True.
    """

    def __init__(self, bound: StalenessBound, *, publish_every: int = 1, version: int = 0) -> None:
        """`version`: the one that workers serve at the start."""
        bound.check_publish_every(publish_every)
        self.bound = bound
        self._version = version
        self._untrained = 0
        self._consumed: dict[str, int] = {}

    @property
    def version(self) -> int:
        """Oldest version a group admitted now can be sampled with."""
        return self._version

    @property
    def held(self) -> int:
        return self._untrained + len(self._consumed)

    @property
    def free(self) -> int:
        return max(0, self.bound.slots - self.held)

    def acquire(self) -> bool:
        """Take a slot for a new group; False if none is free."""
        if not self.free:
            return False
        self._untrained += 1
        return True

    def restore(self, num_groups: int) -> None:
        """Hold a slot for each group that a resumed run found committed, over the limit if need be.

        Groups of steps that are trained again come back beside those that were alive; nothing new is admitted until
        the learner has worked them off.
        """
        self._untrained += num_groups

    def consumed(self, group_id: str, at_version: int) -> None:
        """The learner at `at_version` trains on the group; the slot waits for a newer version."""
        if group_id in self._consumed or not self._untrained:
            raise ValueError(f"group {group_id!r} holds no slot that could be consumed")
        if at_version < self._version:
            raise ValueError(f"group {group_id!r} trained at version {at_version}, but {self._version} is served")
        self._untrained -= 1
        self._consumed[group_id] = at_version

    def published(self, version: int) -> int:
        """Every worker that can be given a group now serves `version` or newer. Returns the slots that came back."""
        if version < self._version:
            raise ValueError(f"version {version} published after version {self._version}")
        self._version = version
        before = len(self._consumed)
        self._consumed = {group_id: v for group_id, v in self._consumed.items() if v >= version}
        return before - len(self._consumed)

    def dropped(self, group_id: str) -> None:
        """The group will never be trained on: its slot is free at once (the proof above does not count on it)."""
        if group_id in self._consumed or not self._untrained:
            raise ValueError(f"group {group_id!r} holds no slot that could be dropped")
        self._untrained -= 1
