"""Which resources each part of a run asks Ray for, and whether a cluster can ever give them.

Pure planning: nothing here talks to Ray. `plan` turns a config into bundles, one for each part that must stay whole;
Ray puts every bundle on one node, and a restarted actor comes back inside its own. `check_fits` looks for any way to
lay the bundles on empty nodes: where there is none, waiting is in vain, and it says so before anything is asked for.

    separate   learner [1 CPU, L GPU]   worker-i [1 CPU, W GPU]   pool-i [0.5 CPU]
    shared     learner + all workers [1 + n CPU, L + n * W GPU]   pool-i [0.5 CPU]
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import isclose

from conf.schema import TrainConfig

POOL_CPUS = 0.5
MAX_TRIES = 20_000
"""Nodes tried for bundles before a request counts as one that may fit: Ray's own answer then comes at the deadline."""


class PlacementError(RuntimeError):
    """Raised when the nodes cannot hold a run, or hold others until the deadline: what is asked, what there is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bundle:
    """Resources of one node, kept for the named parts."""

    parts: tuple[str, ...]
    """Actors inside, e.g. ("learner",)."""
    cpus: float
    gpus: float = 0.0
    """Less than 1 = a share of one GPU; else a whole number."""

    @property
    def resources(self) -> dict[str, float]:
        """As Ray wants them, without zeros."""
        return {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}

    def __str__(self) -> str:
        return f"{' + '.join(self.parts)} ({amounts(self.cpus, self.gpus)})"


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """What one actor takes of its bundle."""

    bundle: int
    """Index in `Plan.bundles`."""
    cpus: float
    gpus: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """All bundles of a run.

    Example: plan(TrainConfig()).shares["worker-0"] -> Share(bundle=1, cpus=1, gpus=0)
    """

    bundles: tuple[Bundle, ...]
    strategy: str
    """PACK | SPREAD | STRICT_PACK | STRICT_SPREAD, as Ray means them."""
    shares: dict[str, Share]
    """Actor -> its share."""

    @property
    def cpus(self) -> float:
        return sum(bundle.cpus for bundle in self.bundles)

    @property
    def gpus(self) -> float:
        return sum(bundle.gpus for bundle in self.bundles)


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeCapacity:
    """A living node, as if nothing ran on it."""

    name: str
    cpus: float
    gpus: int


@dataclass(frozen=True, slots=True)
class _Free:
    """What is left of a node while bundles are laid on it."""

    cpus: float
    gpus: tuple[float, ...]
    """Of each GPU, ascending."""
    used: bool = False

    def without(self, bundle: Bundle) -> "_Free | None":
        """After the bundle took its part; None where it does not fit. A share goes to the fullest GPU that has it."""
        cpus, gpus = self.cpus - bundle.cpus, list(self.gpus)
        if cpus < -1e-9:
            return None
        if 0 < bundle.gpus < 1:
            room = next((i for i, free in enumerate(gpus) if free >= bundle.gpus - 1e-9), None)
            if room is None:
                return None
            gpus[room] -= bundle.gpus
        elif bundle.gpus:
            if sum(isclose(free, 1) for free in gpus) < bundle.gpus:
                return None
            gpus = gpus[: len(gpus) - int(bundle.gpus)]
        return _Free(cpus, tuple(sorted(round(free, 6) for free in gpus)), True)


def amounts(cpus: float, gpus: float) -> str:
    """Example: amounts(1, 0.5) -> "1 CPU, 0.5 GPU" """
    return f"{cpus:g} CPU" + (f", {gpus:g} GPU" if gpus else "")


def plan(config: TrainConfig) -> Plan:
    """Bundles and shares of the config's actors. A part takes as many CPUs as it has torch threads."""
    cluster, rollout = config.cluster, config.rollout
    workers = [f"worker-{i}" for i in range(rollout.workers)]
    learner_cpus, worker_cpus = float(config.learner.threads), float(config.engine.threads)
    if cluster.layout == "shared":
        together = Bundle(
            parts=("learner", *workers),
            cpus=learner_cpus + len(workers) * worker_cpus,
            gpus=round(cluster.learner_gpus + len(workers) * cluster.worker_gpus, 6),
        )
        bundles, worker_bundle = [together], [0] * len(workers)
    else:
        bundles = [Bundle(parts=("learner",), cpus=learner_cpus, gpus=cluster.learner_gpus)]
        bundles += [Bundle(parts=(name,), cpus=worker_cpus, gpus=cluster.worker_gpus) for name in workers]
        worker_bundle = list(range(1, len(bundles)))
    shares = {"learner": Share(bundle=0, cpus=learner_cpus, gpus=cluster.learner_gpus)}
    for name, index in zip(workers, worker_bundle, strict=True):
        shares[name] = Share(bundle=index, cpus=worker_cpus, gpus=cluster.worker_gpus)
    for i in range(rollout.env_pools):
        shares[f"pool-{i}"] = Share(bundle=len(bundles), cpus=POOL_CPUS, gpus=0.0)
        bundles.append(Bundle(parts=(f"pool-{i}",), cpus=POOL_CPUS))
    return Plan(bundles=tuple(bundles), strategy=cluster.strategy, shares=shares)


def check_fits(wanted: Plan, nodes: Sequence[NodeCapacity]) -> None:
    """Raise `PlacementError` where the nodes could not hold the plan even if they were empty."""
    if not nodes:
        raise PlacementError("the cluster has no living node")
    for bundle in wanted.bundles:
        if not any(_empty(node).without(bundle) for node in nodes):
            near = min(nodes, key=lambda node: _missing(bundle, node))
            raise PlacementError(_refusal(wanted, nodes, f"no node holds {bundle}; nearest is {_describe(near)}"))
    for what, asked, has in (
        ("CPU", wanted.cpus, sum(node.cpus for node in nodes)),
        ("GPU", wanted.gpus, sum(node.gpus for node in nodes)),
    ):
        if asked > has + 1e-9:
            raise PlacementError(_refusal(wanted, nodes, f"{asked:g} {what} are asked for, {has:g} exist"))
    if wanted.strategy == "STRICT_SPREAD" and len(wanted.bundles) > len(nodes):
        why = f"STRICT_SPREAD wants a node for each of {len(wanted.bundles)} bundles, there are {len(nodes)} nodes"
        raise PlacementError(_refusal(wanted, nodes, why))
    ordered = sorted(wanted.bundles, key=lambda bundle: (bundle.gpus, bundle.cpus), reverse=True)
    if not _lay(ordered, [_empty(node) for node in nodes], wanted.strategy, [MAX_TRIES]):
        near = max(nodes, key=lambda node: (node.gpus, node.cpus))
        why = f"the bundles do not fit beside each other with strategy {wanted.strategy}; largest is {_describe(near)}"
        raise PlacementError(_refusal(wanted, nodes, why))


def _lay(bundles: Sequence[Bundle], free: list[_Free], strategy: str, tries: list[int]) -> bool:
    """Whether all bundles find a node; depth first. `tries[0]` counts down; at 0 the answer is maybe: True."""
    if not bundles:
        return True
    for i in {node: i for i, node in enumerate(free)}.values():  # equal nodes need one try
        if strategy == "STRICT_SPREAD" and free[i].used:
            continue
        if strategy == "STRICT_PACK" and not free[i].used and any(node.used for node in free):
            continue
        tries[0] -= 1
        if tries[0] <= 0:
            return True
        left = free[i].without(bundles[0])
        if left is not None and _lay(bundles[1:], [*free[:i], left, *free[i + 1 :]], strategy, tries):
            return True
    return False


def _empty(node: NodeCapacity) -> _Free:
    return _Free(node.cpus, (1.0,) * node.gpus)


def _missing(bundle: Bundle, node: NodeCapacity) -> tuple[float, float]:
    """(GPUs, CPUs) that the node lacks."""
    return max(0.0, bundle.gpus - node.gpus), max(0.0, bundle.cpus - node.cpus)


def _describe(node: NodeCapacity) -> str:
    return f"{node.name} with {node.cpus:g} CPU, {node.gpus} GPU"


def _refusal(wanted: Plan, nodes: Sequence[NodeCapacity], why: str) -> str:
    kinds = Counter(amounts(bundle.cpus, bundle.gpus) for bundle in wanted.bundles)
    asked = "; ".join(f"{count} x [{kind}]" for kind, count in kinds.items())
    has = ", ".join(_describe(node) for node in nodes[:8]) + (f" and {len(nodes) - 8} more" if len(nodes) > 8 else "")
    return (
        f"the run can never be placed: {why}. Asked: {asked}, {wanted.strategy}. There is: {has}. Change "
        "cluster.learner_gpus, cluster.worker_gpus, rollout.workers, rollout.env_pools, cluster.layout or "
        "cluster.strategy, or add nodes (docs/cluster.md)"
    )
