"""The local engine against transformers' `generate`, paired: the same weights, prompts, output lengths and threads.

    shoal bench engine [--threads 1] [--repeats 3] [--json]

Both sample at temperature 1 from a tiny hybrid model in fp32. Prompt and output lengths are fixed in
engine_requests.json. `generate` runs all requests as one left-padded batch until the longest output is done; of its
tokens only those count that were asked for. The engine also returns a logprob for each token, `generate` does not.
The sides take turns in one process (A B A B ...); each ratio is the median over the pairs. Start-up (from the start of
a process to its first token) and peak memory are taken in a process of each side's own.
"""

import argparse
import asyncio
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.machine import describe_machine
from benchmarks.stored_result import save_result

FOLDER = Path(__file__).resolve().parent
BATCHES = (16, 64)
PRESET = "tiny_hybrid"
START_TIMEOUT_S = 180.0

Generate = Callable[[Sequence[np.ndarray], Sequence[int]], None]
"""(prompts, output lengths): make all of them at once."""


def load_requests(count: int, vocab_size: int) -> tuple[list[np.ndarray], list[int]]:
    """The first `count` prompts and output lengths."""
    lengths = json.loads((FOLDER / "engine_requests.json").read_text())
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, vocab_size, length).astype(np.int32) for length in lengths["prompt_tokens"]]
    return prompts[:count], lengths["output_tokens"][:count]


def save_weights(folder: Path) -> None:
    """A random tiny model as a transformers folder, which both sides load."""
    import torch

    from policy.model.checkpoint_io import save_model
    from policy.model.hybrid import PRESETS, HybridModel

    torch.manual_seed(0)
    save_model(HybridModel(PRESETS[PRESET]), folder)


def local_side(folder: Path, threads: int) -> Generate:
    """Our engine behind a blocking call."""
    import torch

    from conf.schema import EngineConfig
    from policy.engine.local_engine import LocalEngine
    from policy.engine.protocol import Completion, GenerationRequest, SamplingSpec
    from policy.model.checkpoint_io import load_model, to_numpy_tensors
    from policy.sync.snapshot import PolicySnapshot

    torch.set_num_threads(threads)
    model = load_model(folder)
    engine = LocalEngine(model, EngineConfig(max_running=max(BATCHES), max_model_tokens=384, threads=threads))
    loop = asyncio.new_event_loop()
    loop.run_until_complete(engine.load_weights(PolicySnapshot.create(0, to_numpy_tensors(model))))
    num_calls = 0

    async def generate_all(prompts: Sequence[np.ndarray], lengths: Sequence[int]) -> list[Completion]:
        nonlocal num_calls
        num_calls += 1
        requests = [
            GenerationRequest(
                request_id=f"{num_calls}-{i}", prompt_ids=prompt, sampling=SamplingSpec(max_tokens=length)
            )
            for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
        ]
        await engine.load_weights(PolicySnapshot.create(num_calls, to_numpy_tensors(model)))  # forget kept prompts
        return await asyncio.gather(*map(engine.generate, requests))

    def generate(prompts: Sequence[np.ndarray], lengths: Sequence[int]) -> None:
        completions = loop.run_until_complete(generate_all(prompts, lengths))
        assert [len(completion.token_ids) for completion in completions] == list(lengths)

    return generate


def transformers_side(folder: Path, threads: int) -> Generate:
    """transformers' generate on one left-padded batch."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def generate(prompts: Sequence[np.ndarray], lengths: Sequence[int]) -> None:
        width, longest = max(map(len, prompts)), max(lengths)
        token_ids = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.zeros_like(token_ids)
        for row, prompt in enumerate(prompts):
            token_ids[row, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
            mask[row, width - len(prompt) :] = 1
        with torch.inference_mode():
            output = model.generate(
                token_ids,
                attention_mask=mask,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=longest,
                min_new_tokens=longest,
                pad_token_id=0,
            )
        assert output.shape == (len(prompts), width + longest)

    return generate


SIDES = {"local": local_side, "transformers": transformers_side}


def throughput(generate: Generate, prompts: list[np.ndarray], lengths: list[int]) -> float:
    """Tokens that were asked for, per second."""
    started = time.perf_counter()
    generate(prompts, lengths)
    return sum(lengths) / (time.perf_counter() - started)


def paired(sides: dict[str, Generate], count: int, repeats: int, vocab_size: int) -> dict[str, list[float]]:
    """tokens/s of each side, one number per repeat, the sides taking turns."""
    prompts, lengths = load_requests(count, vocab_size)
    for generate in sides.values():
        generate(prompts, [8] * count)  # warm-up
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, generate in sides.items():
            rates[name].append(round(throughput(generate, prompts, lengths), 1))
        print(f"{count:3d} requests: " + ", ".join(f"{name} {rates[name][-1]:.0f}" for name in sides) + " tokens/s")
    return rates


def run_child(side: str, folder: Path, threads: int, vocab_size: int) -> None:
    """One side alone: say when the first token is there, run the largest batch, say the peak memory."""
    generate = SIDES[side](folder, threads)
    generate([np.ones(16, np.int32)], [1])
    print("ready", flush=True)
    generate(*load_requests(max(BATCHES), vocab_size))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, flush=True)


def measure_child(side: str, folder: Path, threads: int) -> dict[str, float]:
    """Seconds to the first token and peak MiB of one side in a process of its own."""
    command = [sys.executable, __file__, "--child", side, "--folder", str(folder), "--threads", str(threads)]
    paths = os.pathsep.join([str(FOLDER.parent), os.environ.get("PYTHONPATH", "")])
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": paths}) as child:
        assert child.stdout is not None
        ready = child.stdout.readline().strip()
        start_s = time.perf_counter() - started
        output, _ = child.communicate(timeout=START_TIMEOUT_S)
    if ready != "ready" or child.returncode:
        raise RuntimeError(f"the {side} process ended with code {child.returncode}")
    return {"start_s": round(start_s, 2), "peak_mib": round(float(output.split()[-1]), 1)}


def measure(folder: Path, threads: int, repeats: int, vocab_size: int) -> dict[str, object]:
    save_weights(folder)
    alone = {side: measure_child(side, folder, threads) for side in SIDES}
    sides = {name: make(folder, threads) for name, make in SIDES.items()}
    rates = {count: paired(sides, count, repeats, vocab_size) for count in BATCHES}
    ratios = {
        f"speedup_over_transformers_{count}": round(
            statistics.median(a / b for a, b in zip(side["local"], side["transformers"], strict=True)), 2
        )
        for count, side in rates.items()
    }
    ratios["speedup_over_transformers"] = min(ratios.values())
    figures = {f"{name}_tokens_per_second_{count}": rate for count in BATCHES for name, rate in rates[count].items()}
    figures |= {f"{name}_{what}": value for name, values in alone.items() for what, value in values.items()}
    lengths = json.loads((FOLDER / "engine_requests.json").read_text())
    figures |= {"threads": threads, "preset": PRESET, "requests": lengths}
    return {"name": "engine", "ratios": ratios, "figures": figures, "machine": describe_machine(), "paired": True}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, help="torch threads of both sides")
    parser.add_argument("--repeats", type=int, default=3, help="pairs of runs")
    parser.add_argument("--output", type=Path, default=FOLDER / "results" / "engine.json")
    parser.add_argument("--json", action="store_true", help="the result as the last line of output")
    parser.add_argument("--child", choices=sorted(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    from policy.model.hybrid import PRESETS

    vocab_size = PRESETS[PRESET].vocab_size
    if arguments.child:
        run_child(arguments.child, arguments.folder, arguments.threads, vocab_size)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), arguments.threads, arguments.repeats, vocab_size)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    save_result(arguments.output, result)
    print(json.dumps(result) if arguments.json else json.dumps(result["ratios"], indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
