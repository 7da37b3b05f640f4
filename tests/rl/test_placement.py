"""Where the parts of a run go: planned from the config, refused where it can never fit, placed by a real Ray.

The clusters are simulated: several nodes on this machine, with GPUs in name only. Tests marked `gpu` need a real one.
"""

import json
import logging
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.keys import ConfigError
from conf.loading import load_config
from conf.schema import TrainConfig
from policy.model.device import claim_device
from policy.model.hybrid_config import PRESETS
from policy.vllm.core import VllmCore
from policy.vllm.packages import vllm_build
from rl.cluster.placement import Bundle, NodeCapacity, PlacementError, Plan, check_fits, plan
from rl.cluster.protocol import ClusterError
from rl.cluster.ray import with_absolute_paths
from rl.cluster.ray_start import start_ray
from rl.cluster.reservation import node_problem, reserve
from rl.runs.run_folder import RunFolder
from rollout.record.ledger import read_audit
from rollout.worker import vllm_settings

SEPARATE = ("cluster.learner_gpus=1", "cluster.worker_gpus=1")
SHARED = ("cluster=gpu_shared",)
ELSEWHERE = "cluster.address=10.0.0.1:6379"
"""A cluster of other machines: then vLLM need not be installed on this one."""
TWO_RANKS = ("engine=vllm", "engine.vllm.tensor_parallel=2", "cluster=gpu_separate", "cluster.worker_gpus=2", ELSEWHERE)


def planned(*overrides: str) -> Plan:
    return plan(load_config(list(overrides)))


def node(cpus: float = 8, gpus: int = 0, name: str = "n") -> NodeCapacity:
    return NodeCapacity(name=name, cpus=cpus, gpus=gpus)


def gpu_bundles(*gpus: float, strategy: str = "PACK") -> Plan:
    bundles = tuple(Bundle(parts=(f"part-{i}",), cpus=0, gpus=amount) for i, amount in enumerate(gpus))
    return Plan(bundles=bundles, strategy=strategy, shares={})


def test_separate_gives_each_part_a_bundle_of_its_own() -> None:
    found = planned(*SEPARATE, "rollout.workers=2", "rollout.env_pools=2")
    assert [bundle.resources for bundle in found.bundles] == [
        *[{"CPU": 1, "GPU": 1}] * 3,
        *[{"CPU": 0.5}] * 2,
    ]
    assert {name: share.bundle for name, share in found.shares.items()} == {
        "learner": 0, "worker-0": 1, "worker-1": 2, "pool-0": 3, "pool-1": 4,
    }  # fmt: skip


def test_shared_puts_learner_and_workers_into_one_bundle() -> None:
    found = planned(*SHARED, "rollout.workers=2", "cluster.worker_gpus=0.25", "engine.threads=2")
    assert [bundle.resources for bundle in found.bundles] == [{"CPU": 5, "GPU": 1}, {"CPU": 0.5}]
    assert {found.shares[name].bundle for name in ("learner", "worker-0", "worker-1")} == {0}
    assert [found.shares[name].gpus for name in ("learner", "worker-1")] == [0.5, 0.25]


def test_a_worker_of_two_ranks_has_both_of_its_gpus_in_one_bundle() -> None:
    found = planned(*TWO_RANKS, "rollout.workers=2")
    assert [bundle.resources for bundle in found.bundles] == [
        {"CPU": 1, "GPU": 1},
        *[{"CPU": 1, "GPU": 2}] * 2,
        {"CPU": 0.5},
    ]
    assert [found.shares[name].gpus for name in ("learner", "worker-0", "worker-1")] == [1, 2, 2]


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        (["cluster=gpu_shared"], 0.46),
        (["cluster=gpu_separate", "rollout.workers=4", "cluster.worker_gpus=0.25"], 0.23),
        (["cluster=gpu_shared", "engine.vllm.extra.gpu_memory_utilization=0.3"], 0.3),
        (["cluster=gpu_separate"], None),
        ([*TWO_RANKS], None),
        ([], None),
    ],
)
def test_vllm_asks_for_the_memory_of_its_share_unless_the_user_says_how_much(
    words: list[str], asked: float | None
) -> None:
    """What it asks for must be free when it starts; of a shared GPU its default, 0.92, never is."""
    settings = vllm_settings(load_config(["engine=vllm", ELSEWHERE, *words]))
    core = VllmCore(PRESETS["tiny_hybrid"], settings)
    assert core._arguments("folder", returns_routes=False).get("gpu_memory_utilization") == asked


def test_a_run_without_gpus_asks_for_none() -> None:
    found = planned()
    assert (found.cpus, found.gpus) == (2.5, 0)
    assert all("GPU" not in bundle.resources for bundle in found.bundles)


@pytest.mark.parametrize(
    ("wanted", "nodes", "message"),
    [
        (planned(*SEPARATE), [node(gpus=0)], r"no node holds learner \(1 CPU, 1 GPU\); nearest is n with 8 CPU, 0 GPU"),
        (planned(*SEPARATE), [node(gpus=1)], "2 GPU are asked for, 1 exist"),
        (planned(), [node(cpus=1), node(cpus=1)], "2.5 CPU are asked for, 2 exist"),
        (planned("engine.threads=4"), [node(cpus=3), node(cpus=3)], r"no node holds worker-0 \(4 CPU\)"),
        (planned(*TWO_RANKS), [node(gpus=1)] * 3, r"no node holds worker-0 \(1 CPU, 2 GPU\); nearest is n with 8"),
        (planned(*TWO_RANKS, "rollout.workers=2"), [node(gpus=2), node(gpus=2)], "5 GPU are asked for, 4 exist"),
        (planned(*TWO_RANKS, "rollout.workers=2"), [node(gpus=3), node(gpus=1), node(gpus=1)], "beside each other"),
        (planned("cluster.strategy=STRICT_PACK"), [node(cpus=2), node(cpus=2)], "beside each other .* STRICT_PACK"),
        (planned("cluster.strategy=STRICT_SPREAD"), [node(), node()], "a node for each of 3 bundles, there are 2"),
        (gpu_bundles(0.6, 0.6, 0.6), [node(gpus=2)], "do not fit beside each other"),
        (gpu_bundles(0.5, 1, 1), [node(gpus=1), node(gpus=1)], "2.5 GPU are asked for"),
        (gpu_bundles(2, 2), [node(gpus=3), node(gpus=1)], "do not fit beside each other"),
        (gpu_bundles(4), [node(gpus=2, name="small"), node(gpus=3, name="big")], "nearest is big with 8 CPU, 3 GPU"),
        (planned(), [], "no living node"),
    ],
)  # fmt: skip
def test_what_can_never_fit_is_refused_with_what_is_asked_and_what_there_is(
    wanted: Plan, nodes: list[NodeCapacity], message: str
) -> None:
    with pytest.raises(PlacementError, match=message):
        check_fits(wanted, nodes)


@pytest.mark.parametrize(
    ("wanted", "nodes"),
    [
        (planned(*SEPARATE), [node(gpus=1), node(gpus=1)]),
        (planned(*SHARED), [node(gpus=1)]),
        (planned(*TWO_RANKS), [node(gpus=1), node(gpus=2)]),
        (planned(*TWO_RANKS, "rollout.workers=2"), [node(gpus=3), node(gpus=2)]),
        (planned("cluster.strategy=STRICT_SPREAD"), [node(cpus=1), node(cpus=0.5), node(cpus=1)]),
        (gpu_bundles(0.5, 0.5, 1), [node(gpus=2)]),
        (gpu_bundles(1, 2, 1), [node(gpus=2), node(gpus=2)]),  # greedy in the order asked would split both nodes
        (gpu_bundles(*[0.5] * 64), [node(gpus=8)] * 4),
        (gpu_bundles(*[0.3] * 40), [node(gpus=7)] * 2),  # 42 shares fit
    ],
)
def test_what_fits_somehow_is_not_refused(wanted: Plan, nodes: list[NodeCapacity]) -> None:
    check_fits(wanted, nodes)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cluster.worker_gpus=2"], "at most 1: engine.kind=local computes on one GPU"),
        (["cluster.learner_gpus=2"], "cluster.learner_gpus=2.0 is out of range: must be 0 to 1"),
        (["cluster=gpu_shared", "rollout.workers=2"], r"0.5 \+ 2 \* 0.5 = 1.5, at most 1"),
        (["cluster.layout=shared"], "must both be more than 0"),
        ([*TWO_RANKS, "cluster.worker_gpus=1"], "cluster.worker_gpus=1 must be engine.vllm.tensor_parallel = 2$"),
        ([*TWO_RANKS, "cluster.worker_gpus=0.5"], "cluster.worker_gpus=0.5 must be engine.vllm.tensor_parallel = 2$"),
        ([*TWO_RANKS, "engine.vllm.tensor_parallel=1"], "tensor_parallel = 1, or a share of one GPU$"),
        ([*TWO_RANKS, "cluster.layout=shared", "cluster.learner_gpus=0.5"], r"0.5 \+ 1 \* 2 = 2.5, at most 1"),
        (["cluster.strategy=PAKC"], "Did you mean 'PACK'"),
        (["cluster=inprocess", "cluster.worker_gpus=1"], "has no effect: cluster.kind=inprocess"),
    ],
)
def test_a_layout_that_cannot_be_meant_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(words)


def test_a_node_without_the_run_folder_or_the_weights_says_so(tmp_path: Path) -> None:
    config = load_config([])
    assert node_problem(config, str(tmp_path)) == ""
    assert "put run.root on shared storage" in node_problem(config, str(tmp_path / "elsewhere" / "logs"))
    (tmp_path / "warm.safetensors").touch()
    config = load_config([f"policy.init={tmp_path / 'warm.safetensors'}"])
    (tmp_path / "warm.safetensors").unlink()
    assert "warm.safetensors" in node_problem(config, str(tmp_path))


def test_an_address_where_nothing_listens_is_refused_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(ClusterError, match=f"cluster.address=127.0.0.1:{port}: no Ray head answers there"):
        start_ray(load_config([f"cluster.address=127.0.0.1:{port}"]), "test")


def test_files_are_named_by_their_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "warm.safetensors").touch()
    config = with_absolute_paths(load_config(["policy.init=warm.safetensors"]))
    assert config.policy.init == str(tmp_path / "warm.safetensors")
    assert with_absolute_paths(TrainConfig()) == TrainConfig()


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_a_gpu_in_name_only_is_computed_on_the_cpu() -> None:
    assert claim_device(1.0) == claim_device(0.5) == claim_device(0.0) == torch.device("cpu")


# --- on a simulated cluster ---

RUN = (
    "seed=3", "rollout.groups_per_step=2", "rollout.group_size=4", "evaluation.every=0", "evaluation.final_tasks=8",
    "monitor.wandb=disabled", "monitor.progress=false", "cluster.heartbeat_s=1", *SEPARATE, "engine.threads=2",
)  # fmt: skip
LEARNER_NODE = {"num_cpus": 1, "num_gpus": 1}
WORKER_NODE = {"num_cpus": 3, "num_gpus": 1}
"""The only kind that has room for a worker of two threads; the pool has room beside it alone."""


@dataclass(kw_only=True, slots=True)
class Simulated:
    """A running cluster: a head without CPUs, and nodes with a GPU in name."""

    ray: Any
    nodes: Any
    worker_node: Any

    @staticmethod
    def add(nodes: Any, resources: dict[str, int]) -> Any:
        return nodes.add_node(object_store_memory=80 << 20, **resources)

    def start(self, tmp_path: Path, *overrides: str) -> "subprocess.Popen[str]":
        words = [sys.executable, "-m", "rl.cli", "train", *RUN, f"cluster.address={self.nodes.address}"]
        words += [f"run.root={tmp_path / 'runs'}", *overrides]
        return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def node_of_actors(self) -> dict[str, str]:
        """Class name -> id of the node it lives on, as Ray tells."""
        from ray._private import state  # the public list asks a dashboard, and there is none

        living = [actor for actor in state.actors().values() if actor["State"] == "ALIVE"]
        return {actor["ActorClassName"]: actor["Address"]["NodeID"] for actor in living}

    def wait_for_actors(self, process: "subprocess.Popen[str]", *, besides: str = "") -> dict[str, str]:
        """`node_of_actors` once all three kinds live, none on the node `besides`."""
        until = time.monotonic() + 90
        while len(found := self.node_of_actors()) < 3 or besides in found.values():
            assert process.poll() is None, process.communicate()[0][-4000:]
            assert time.monotonic() < until, found
            time.sleep(0.2)
        return found


@pytest.fixture(scope="module")
def simulated() -> Iterator[Simulated]:
    """Authenticated by a token in the environment, as a real cluster is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_worker_niceness", "0")
        import ray
        from ray._raylet import AuthenticationTokenLoader  # pyright: ignore[reportAttributeAccessIssue]
        from ray.cluster_utils import Cluster

        tokens = AuthenticationTokenLoader.instance()
        tokens.reset_cache()  # a process that ran Ray before, in another test, has read its token once and keeps it
        head = {"num_cpus": 0, "num_gpus": 0, "object_store_memory": 80 << 20, "include_dashboard": False}
        nodes = Cluster(initialize_head=True, head_node_args=head)
        try:
            Simulated.add(nodes, LEARNER_NODE)
            worker_node = Simulated.add(nodes, WORKER_NODE)
            ray.init(address=nodes.address, namespace="test", log_to_driver=False, logging_level=logging.ERROR)
            yield Simulated(ray=ray, nodes=nodes, worker_node=worker_node)
        finally:
            ray.shutdown()
            nodes.shutdown()
            tokens.reset_cache()


@pytest.mark.ray
def test_a_request_too_large_is_refused_at_once_and_one_of_a_busy_cluster_names_the_holder(
    simulated: Simulated,
) -> None:
    wanted = planned(*SEPARATE, "engine.threads=2")
    started_s = time.monotonic()
    with pytest.raises(PlacementError, match=r"never be placed: 3 GPU are asked for, 2 exist"):
        reserve(planned(*SEPARATE, "rollout.workers=2"), "large", deadline_s=60)
    assert time.monotonic() - started_s < 5
    held = reserve(wanted, "first", deadline_s=30)
    with pytest.raises(PlacementError, match=r"busy for 1 s: asked 3.5 CPU, 2 GPU .*shoal-first: 3.5 CPU, 2 GPU"):
        reserve(wanted, "second", deadline_s=1)
    from ray.util.placement_group import remove_placement_group

    remove_placement_group(held)


@pytest.mark.ray
@pytest.mark.timeout(280)
def test_a_run_spans_nodes_and_goes_on_after_the_node_of_its_worker_died_and_another_joined(
    simulated: Simulated, tmp_path: Path
) -> None:
    process = simulated.start(tmp_path, "steps=8", "env.kwargs.latency_median_s=0.2", "cluster.stall_timeout_s=150")
    first = simulated.wait_for_actors(process)
    lost = simulated.worker_node.node_id
    assert first["RolloutWorkerActor"] == first["EnvPoolActor"] == lost != first["LearnerActor"]
    folder = RunFolder.resolve(tmp_path / "runs", "latest")
    until = time.monotonic() + 90
    while folder.state().step < 1:
        assert time.monotonic() < until
        time.sleep(0.2)
    simulated.nodes.remove_node(simulated.worker_node, allow_graceful=False)
    joined = Simulated.add(simulated.nodes, WORKER_NODE)
    second = simulated.wait_for_actors(process, besides=lost)
    assert second["RolloutWorkerActor"] == second["EnvPoolActor"] == joined.node_id
    output, _ = process.communicate(timeout=150)
    assert process.returncode == 0, output[-4000:]
    audit = read_audit(folder.ledger)
    assert (audit["balanced"], audit["consumed"]) == (True, 16)
    kinds = [json.loads(line)["kind"] for line in folder.events.read_text().splitlines()]
    assert {"worker_lost", "worker_restarted"} <= set(kinds)


# --- on a real GPU ---

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: torch.cuda.is_available() is false")


@gpu
@needs_gpu
def test_a_share_of_a_gpu_is_all_the_memory_a_process_can_take() -> None:
    device = claim_device(0.05)
    share = 0.05 * torch.cuda.get_device_properties(device).total_memory
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(int(1.2 * share), dtype=torch.uint8, device=device)


@gpu
@needs_gpu
@pytest.mark.ray
@pytest.mark.timeout(280)
@pytest.mark.parametrize(
    "engine",
    ["local", pytest.param("vllm", marks=pytest.mark.skipif(vllm_build() != "gpu", reason="needs the extra `vllm`"))],
)
def test_learner_and_engine_train_on_shares_of_one_gpu_and_agree_on_logprobs(tmp_path: Path, engine: str) -> None:
    words = [*RUN[:6], f"engine={engine}", "cluster=gpu_shared", "steps=2", f"run.root={tmp_path / 'runs'}"]
    done = subprocess.run(
        [sys.executable, "-m", "rl.cli", "train", *words], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-4000:]  # the first batch is checked against the engine's logprobs
