"""A run on vLLM as a user starts it, the process that holds the engine killed while it samples."""

from pathlib import Path

import pytest

from benchmarks.vllm_kills import count, is_intact, train
from policy.vllm_packages import vllm_build

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.ray,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(vllm_build() is None, reason="needs the vLLM extra"),
]


@pytest.mark.parametrize("process", ["inproc", pytest.param("core", marks=pytest.mark.slow)])
def test_a_killed_engine_is_replaced_and_nothing_is_lost_doubled_or_stale(tmp_path: Path, process: str) -> None:
    """Killed is the worker's process, or that of vLLM's core below it. Twenty kills: benchmarks/vllm_kills.py."""
    found = count(train(tmp_path, 1, process))
    assert is_intact(found), found
    assert (found["kills"], found["steps"]) == (1, 10)
    assert found["engines"] == ["vllm"]  # not one token of the local engine, held-out ones included
