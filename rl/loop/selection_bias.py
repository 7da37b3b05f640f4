"""Is what is trained on a biased choice of what was sampled? Watched in every run, whatever the staleness rule."""

from collections.abc import Sequence
from dataclasses import dataclass

from rollout.record.trajectory import Trajectory
from rollout.schedule.scheduler import RolloutCounters


@dataclass(kw_only=True, slots=True)
class SelectionBias:
    """Sums over all trajectories trained on so far in this process."""

    n: int = 0
    length: float = 0.0
    """Sampled tokens."""
    reward: float = 0.0
    seconds: float = 0.0

    def add(self, trajectories: Sequence[Trajectory]) -> None:
        """Trajectories of one more step."""
        for t in trajectories:
            self.n += 1
            self.length += t.num_sampled_tokens
            self.reward += t.reward or 0.0
            self.seconds += t.seconds

    def metrics(self, counters: RolloutCounters) -> dict[str, float]:
        """Mean over all trained / mean over all dispatched: 1 unless the choice is biased. Without a mean: absent."""
        if not counters.dispatched or not self.n:
            return {}
        dispatched = {
            "length": (self.length, counters.dispatched_length),
            "reward": (self.reward, counters.dispatched_reward),
            "seconds": (self.seconds, counters.dispatched_seconds),
        }
        return {
            f"selection_bias/{name}": (trained / self.n) / (total / counters.dispatched)
            for name, (trained, total) in dispatched.items()
            if total
        }
