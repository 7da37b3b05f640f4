"""vLLM with its core in a process of its own, and with two ranks: what the contract suite cannot ask every engine."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from benchmarks.vllm_kills import core_of
from policy.engine.protocol import EngineClosed, EngineError
from policy.sync.snapshot import PolicySnapshot, WeightSyncError
from policy.sync.weight_files import StoredSnapshot
from policy.sync.weight_sender import WeightSender
from policy.vllm.core import memory_file
from policy.vllm.packages import vllm_build
from policy.vllm.parameter_map import Shard
from policy.vllm.rank_extension import RankExtension
from tests.policy.engine_cases import MAX_TOKENS, VLLM
from tests.policy.serving import ask, assert_close, in_loop, learner_logprobs, random_prompt, serving, until
from tests.policy.test_engine_swaps import first_fed_by

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.timeout(280)
needs = pytest.mark.skipif(vllm_build() is None, reason="needs the vLLM extra")


@pytest.mark.vllm
@needs
@in_loop
async def test_a_core_of_its_own_swaps_under_a_request_keeps_routes_and_its_end_is_an_engine_error() -> None:
    case = VLLM["vllm-core-moe"]
    async with serving(case) as engine:
        request = ask(random_prompt(9), max_tokens=MAX_TOKENS)
        running = asyncio.create_task(engine.generate(request))
        await until(lambda: engine.stats().sampled_tokens >= 5)
        await engine.load_weights(case.snapshot(2, seed=1))
        completion = await running
        versions = completion.policy_versions
        assert (versions[0], versions[-1], (np.diff(versions) != 0).sum()) == (1, 2, 1)
        for version, seed in ((1, 0), (2, 1)):
            named = versions == version
            first_fed = first_fed_by(version, request, completion)
            expected = learner_logprobs(case, seed, request, completion, routes_from=first_fed)
            assert_close(case, completion.logprobs[named], expected[named], f"version {version}")
        assert completion.routed_experts is not None and completion.prompt_routes is not None
        assert (completion.routed_experts[:-1] >= 0).all() and (completion.prompt_routes >= 0).all()

        assert not engine.died
        core = core_of(os.getpid())
        busy = [asyncio.create_task(engine.generate(ask([i], max_tokens=MAX_TOKENS))) for i in range(6)]
        await until(lambda: engine.stats().running > 0)
        os.kill(core, signal.SIGKILL)
        outcomes = await asyncio.wait_for(asyncio.gather(*busy, return_exceptions=True), 30)
        assert {type(outcome) for outcome in outcomes} == {EngineClosed}
        with pytest.raises(EngineError):
            await engine.load_weights(case.snapshot(3))
        assert engine.died


@pytest.mark.vllm
@pytest.mark.sweep
@needs
@pytest.mark.parametrize("what", ["its next request", "a request that runs", "a swap"])
@in_loop
async def test_a_core_that_hangs_is_ended_and_its_engine_with_it(what: str) -> None:
    case = VLLM["vllm-core"]
    engine = case.make(hang_s=8.0)
    try:
        await engine.load_weights(case.snapshot(1))
        core = core_of(os.getpid())
        request = asyncio.create_task(engine.generate(ask([1, 2, 3], max_tokens=MAX_TOKENS)))
        if what == "its next request":
            os.kill(core, signal.SIGSTOP)
        await until(lambda: what == "its next request" or engine.stats().running > 0)
        os.kill(core, signal.SIGSTOP)
        waiting = engine.load_weights(case.snapshot(2)) if what == "a swap" else request
        with pytest.raises(EngineClosed, match="said nothing for 8 s"):
            await asyncio.wait_for(waiting, 40)
        with pytest.raises(EngineClosed):
            await request
        assert engine.died and not Path(f"/proc/{core}").exists()
    finally:
        await engine.close()


@pytest.mark.vllm
@needs
@pytest.mark.sweep
@in_loop
async def test_two_ranks_hold_their_halves_of_each_update_and_answer_as_the_learner_does() -> None:
    case = VLLM["vllm-two-ranks"]
    async with serving(case) as engine:
        for version in range(2, 5):
            await engine.load_weights(case.snapshot(version, seed=version % 3))  # each compared by both ranks
        request = ask(random_prompt(20), max_tokens=40)
        completion = await engine.generate(request)
        assert set(completion.policy_versions) == {4}
        assert_close(case, completion.logprobs, learner_logprobs(case, 1, request, completion))
        assert completion.routed_experts is not None and (completion.routed_experts[:-1] >= 0).all()


@pytest.mark.vllm
@needs
@pytest.mark.parametrize(
    "name", ["vllm-dense", *(pytest.param(name, marks=pytest.mark.sweep) for name in ("vllm-core", "vllm-two-ranks"))]
)
@in_loop
async def test_weights_by_broadcast_are_those_by_file_and_what_does_not_arrive_leaves_the_old_ones(
    name: str, tmp_path: Path
) -> None:
    case, prompt = VLLM[name], random_prompt(12)
    sender = WeightSender("127.0.0.1", keep=2)
    async with serving(case) as engine:

        async def greedy() -> tuple[list[int], list[float], set[int]]:
            completion = await engine.generate(ask(prompt, max_tokens=30, temperature=0.0))
            versions = set(completion.policy_versions.tolist())
            return completion.token_ids.tolist(), completion.logprobs.tolist(), versions

        await engine.load_weights(StoredSnapshot.write(case.snapshot(2, seed=1), tmp_path, keep=1).open())
        by_file = await greedy()
        await engine.load_weights(case.snapshot(3, seed=2))
        assert (await greedy())[1] != by_file[1]  # other logprobs, though perhaps the same tokens
        await engine.load_weights(sender.offer(case.snapshot(4, seed=1)))  # compared with the digests by every rank
        assert await greedy() == (*by_file[:2], {4})
        offer = sender.offer(case.snapshot(5, seed=2))
        sender.close()
        with pytest.raises(WeightSyncError, match="version 5 could not be received"):
            await engine.load_weights(offer)
        assert await greedy() == (*by_file[:2], {4})


HOLDS_A_CORE = """
import asyncio, os, time
from benchmarks.vllm_kills import core_of
from tests.policy.engine_cases import VLLM

async def main():
    case = VLLM["vllm-core"]
    engine = case.make()
    await engine.load_weights(case.snapshot(1))
    print(core_of(os.getpid()), flush=True)
    time.sleep(600)

if __name__ == "__main__":
    asyncio.run(main())
"""


@pytest.mark.vllm
@pytest.mark.sweep
@needs
def test_a_core_ends_with_the_process_that_started_it_even_if_that_is_killed(tmp_path: Path) -> None:
    program = tmp_path / "holds_a_core.py"
    program.write_text(HOLDS_A_CORE)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE, text=True, env=environment) as owner:
        assert owner.stdout is not None
        core = int(owner.stdout.readline())
        assert Path(f"/proc/{core}").exists()
        owner.kill()
        owner.wait()
        assert_gone(core)


def assert_gone(pid: int) -> None:
    until = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and time.monotonic() < until:
        time.sleep(0.1)
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.vllm
@pytest.mark.sweep
@needs
def test_a_core_whose_owner_is_killed_while_it_starts_ends_too(tmp_path: Path) -> None:
    program = tmp_path / "holds_a_core.py"
    program.write_text(HOLDS_A_CORE)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE, text=True, env=environment) as owner:
        assert owner.stdout is not None
        core, until = 0, time.monotonic() + 200
        while not (core and watches(core)) and time.monotonic() < until:
            time.sleep(0.05)
            with contextlib.suppress(RuntimeError, subprocess.CalledProcessError):
                core = core or core_of(owner.pid)
        owner.kill()
        said, _ = owner.communicate(timeout=30)  # the core holds the other end until it ends
        assert core and not said, "the core was watched when it had started, not before"
        assert_gone(core)


def watches(pid: int) -> bool:
    """Whether a process has opened its owner's fifo."""
    found: list[str] = []
    for file in Path(f"/proc/{pid}/fd").glob("*"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(file))
    return any("shoal-owner-" in target for target in found)


def test_a_shard_takes_its_share_of_each_section_and_all_shards_together_are_the_tensor() -> None:
    halves = [Shard(rank=rank, size=2, linear_keys=2, linear_values=4, kv_heads=1, vocab_size=100) for rank in (0, 1)]
    rows = torch.arange(8)[:, None]

    def of(name: str, tensor: torch.Tensor) -> list[list[int]]:
        return [half.part(name, tensor).flatten().tolist() for half in halves]

    assert of("x.in_proj_qkv.weight", rows) == [[0, 2, 4, 5], [1, 3, 6, 7]]  # of queries, keys and values
    assert of("x.q_proj.weight", rows) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert of("x.k_proj.weight", rows[:2]) == [[0, 1], [0, 1]]  # one head, held twice
    assert of("x.o_proj.weight", rows.T) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert of("x.experts.gate_up_proj", rows[None]) == [[0, 1, 4, 5], [2, 3, 6, 7]]  # of gate and up
    assert of("x.experts.down_proj", rows.T[None]) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert of("x.input_layernorm.weight", rows) == [list(range(8))] * 2
    assert [len(each) for each in of("model.embed_tokens.weight", torch.arange(100)[:, None])] == [64, 36]  # of 128


def test_tensors_pass_through_a_file_in_memory_as_they_are_and_another_digest_is_refused() -> None:
    snapshot = PolicySnapshot.create(1, {"a": np.arange(6, dtype=np.float32).reshape(2, 3).T})
    with memory_file(snapshot.tensors) as path:
        read = load_file(path)
    assert np.array_equal(read["a"], snapshot.tensors["a"])
    with memory_file({"a": snapshot.tensors["a"] + 1}) as path:
        answer = RankExtension().shoal_replace(path, {"a": snapshot.manifest[0].digest})
    assert answer == "'a', as read from the file, does not match its digest"
