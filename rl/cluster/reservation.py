"""Room for a run on the nodes of a Ray cluster: reserved whole, and every node looked at before it is used."""

import os
from pathlib import Path
from typing import Any

from conf.schema import TrainConfig
from rl.cluster.placement import NodeCapacity, PlacementError, Plan, amounts, check_fits


def living_nodes() -> list[NodeCapacity]:
    """Of the cluster that this process joined, with all their resources."""
    import ray

    return [
        NodeCapacity(
            name=f"{node['NodeManagerHostname']}/{node['NodeID'][:6]}",
            cpus=node["Resources"].get("CPU", 0.0),
            gpus=int(node["Resources"].get("GPU", 0)),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def reserve(wanted: Plan, name: str, *, deadline_s: float) -> Any:
    """A placement group of the plan's bundles, all of them held.

    Raises `PlacementError`: at once where no cluster of these nodes could hold them, and at the deadline where others
    hold what is missing.
    """
    import ray
    from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

    check_fits(wanted, living_nodes())
    group = placement_group([b.resources for b in wanted.bundles], strategy=wanted.strategy, name=f"shoal-{name}")
    if group.wait(timeout_seconds=deadline_s):
        return group
    remove_placement_group(group)  # else it would take what it asked for as soon as that is free
    free = ray.available_resources()
    others = [other for other in placement_group_table().values() if other["state"] == "CREATED"]
    held = "; ".join(
        f"{other['name'] or 'a placement group without a name'}: "
        + amounts(*(sum(b.get(kind, 0.0) for b in other["bundles"].values()) for kind in ("CPU", "GPU")))
        for other in others
    )
    raise PlacementError(
        f"the cluster could hold the run but was busy for {deadline_s:.0f} s: asked {amounts(wanted.cpus, wanted.gpus)}"
        f" ({wanted.strategy}), free {amounts(free.get('CPU', 0.0), free.get('GPU', 0.0))}. Held by "
        f"{held or 'tasks or actors outside of placement groups'}. Wait for them, ask for less, or raise "
        "cluster.start_timeout_s"
    )


def node_problem(config: TrainConfig, logs: str) -> str:
    """What a part of the run would lack on the node where this runs; "" = nothing."""
    from policy.model.initial import initial_weights_file

    if not os.access(logs, os.W_OK):
        return f"the run folder {Path(logs).parent} is not there or cannot be written: put run.root on shared storage"
    if config.policy.path and not Path(config.policy.path, "config.json").is_file():
        return f"policy.path={config.policy.path} holds no config.json there: put it on shared storage"
    try:
        initial_weights_file(config.policy, config.env.name)
    except ValueError as error:
        return str(error)
    return ""


def check_nodes(config: TrainConfig, group: Any, logs: str, *, runtime_env: dict[str, Any], deadline_s: float) -> None:
    """Raise `PlacementError` where a node of the group, other than this one, lacks our package or the run's files."""
    import ray
    from ray.exceptions import RayError
    from ray.util.placement_group import placement_group_table
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    nodes = placement_group_table(group)["bundles_to_node_id"]
    bundle_of = {node: bundle for bundle, node in nodes.items()}
    bundle_of.pop(ray.get_runtime_context().get_node_id(), None)
    remote: Any = ray.remote
    for node, bundle in bundle_of.items():
        place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=int(bundle))
        look = remote(node_problem).options(
            num_cpus=0, max_retries=0, runtime_env=runtime_env, scheduling_strategy=place
        )
        try:
            problem = ray.get(look.remote(config, logs), timeout=deadline_s)
        except RayError as error:
            reason = str(error).strip().splitlines()[-1]
            problem = f"it cannot run Shoal: {reason}. Install the same version of it on every node"
        if problem:
            raise PlacementError(f"node {node[:6]}: {problem} (docs/cluster.md)")
