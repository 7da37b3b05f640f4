"""Ray at the edge of learning: a thin actor around `LearnerService` and its client."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from conf.schema import TrainConfig
from rollout.actors import answer, log_to_file
from rollout.record.trajectory import TrajectoryGroup

if TYPE_CHECKING:
    from policy.sync.snapshot import PolicySnapshot
    from rl.algorithm.step_report import LearnerReport


class LearnerActor:
    """A `LearnerService` in a process of its own. Made by `rl.cluster.protocol`."""

    def __init__(self, config: TrainConfig, log_folder: str) -> None:
        from rl.cluster.learner_service import LearnerService

        log_to_file(log_folder, "learner")
        self._service = LearnerService(config)
        self._publish = self._publisher(config, Path(log_folder).parent / "weights")
        self._keep = config.run.keep_checkpoints

    def _publisher(self, config: TrainConfig, folder: Path) -> "Callable[[PolicySnapshot], object]":
        """What makes of a snapshot what travels through Ray."""
        from policy.sync.weight_files import StoredSnapshot
        from policy.sync.weight_sender import WeightSender

        keep = config.rollout.max_staleness + 2  # while an evaluation holds a version, at most max_staleness + 1 follow
        if config.engine.vllm.transport == "files":
            return lambda snapshot: StoredSnapshot.write(snapshot, folder, keep=keep)
        if config.engine.vllm.transport == "broadcast":
            device = self._service.learner.model.device
            return WeightSender(ray.util.get_node_ip_address(), keep=keep, device=device).offer
        return lambda snapshot: snapshot

    def ready(self) -> bool:
        return True

    def step(self, groups: Sequence[TrajectoryGroup]) -> "LearnerReport":
        return self._service.step(groups)

    def snapshot(self) -> object:
        return self._publish(self._service.snapshot())

    def save(self, folder: str, step: int, state: dict[str, Any]) -> str:
        return self._service.save(folder, step, state, self._keep)

    def restore(self, path: str) -> int:
        return self._service.restore(path)


class RayLearner:
    """A `LearnerClient` over an actor. A snapshot is an object reference: weights never pass the driver."""

    def __init__(self, actor: Any, *, deadline_s: float) -> None:
        self._actor = actor
        self._deadline_s = deadline_s

    async def _call(self, method: str, *args: Any) -> Any:
        call = getattr(self._actor, method).remote(*args)
        return await answer(call, who="the learner", deadline_s=self._deadline_s)

    async def step(self, groups: Sequence[TrajectoryGroup]) -> "LearnerReport":
        return await self._call("step", list(groups))

    async def snapshot(self) -> object:
        return self._actor.snapshot.remote()

    async def save(self, folder: str, step: int, state: dict[str, Any]) -> str:
        return await self._call("save", str(Path(folder).resolve()), step, state)  # its process has another cwd

    async def restore(self, path: str) -> int:
        return await self._call("restore", str(Path(path).resolve()))

    async def close(self) -> None:
        """Ends with Ray."""
