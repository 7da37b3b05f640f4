"""Each benchmark at its smallest setting, on what real runs produce: one that no test runs breaks unseen (faults J1).

Those that take long, or need vLLM or a browser, are part of `make test-all`.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from rl.cli.bench import SHARED, run_benchmark
from rl.cli.main import main

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = ("rollout.groups_per_step=2", "rollout.group_size=4", "engine.max_model_tokens=384")


def written(name: str, *words: str, output: Path) -> dict[str, Any]:
    assert run_benchmark(name, [*words, "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert result["name"].startswith(name) and result["made_at"]["commit"] is not None
    return result


@pytest.mark.slow
def test_the_benchmark_of_the_engine_compares_both_sides(tmp_path: Path) -> None:
    result = written("engine", "--repeats", "1", "--batches", "2", output=tmp_path / "engine.json")
    assert result["ratios"]["speedup_over_transformers_2"] > 0


@pytest.mark.sweep
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_benchmark_of_curricula_trains_both_sides(tmp_path: Path) -> None:
    warm = tmp_path / "warm.safetensors"
    levels = ("curriculum=uniform", "curriculum.max_level=5", "engine.max_model_tokens=384")
    assert main(["sft", "env=calculator", *levels, "sft.steps=2", f"sft.output={warm}"]) == 0
    words = ["--warm", str(warm), "--root", str(tmp_path / "runs"), "--seeds", "1", "--steps", "2", "--every", "1"]
    words += ["--tasks", "4", "--final-tasks", "4", *TINY]
    result = written("curriculum", *words, output=tmp_path / "curriculum.json")
    assert len(result["figures"]["calculator"]["sides"]) == 2


@pytest.mark.sweep
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_benchmark_of_the_page_counts_what_a_watcher_costs(tmp_path: Path) -> None:
    words = ("--only", "cost", "--pairs", "2", "--steps", "3")
    assert "server_cpu_share" in written("dashboard", *words, output=tmp_path / "dashboard.json")["ratios"]


@pytest.mark.sweep
@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.timeout(900)
def test_the_benchmark_of_vllm_measures_three_engines(tmp_path: Path) -> None:
    words = ("--repeats", "1", "--batches", "1")
    assert written("vllm_engine", *words, output=tmp_path / "vllm_engine.json")["ratios"]


@pytest.mark.sweep
@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.timeout(900)
def test_the_benchmark_of_the_demo_on_vllm_finds_every_token_vllms(tmp_path: Path) -> None:
    words = f"steps=2 evaluation.final_tasks=8 {' '.join(TINY[:2])}"
    output = tmp_path / "vllm_demo.json"
    assert run_benchmark("vllm_demo", ["--words", words, "--output", str(output)]) in (
        0,
        1,
    )  # 1: two steps prove little
    assert json.loads(output.read_text())["figures"]["vllm"]["engines"] == ["vllm"]


@pytest.mark.sweep
@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.timeout(900)
def test_the_benchmark_of_kills_loses_nothing_in_one(tmp_path: Path) -> None:
    assert written("vllm_kills", "--kills", "1", output=tmp_path / "vllm_kills.json")["figures"]["lost"] == 0


def test_every_benchmark_is_run_by_a_test() -> None:
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    names = {path.stem for path in BENCHMARKS.glob("*.py")} - set(SHARED)
    without = {name for name in names if f'run_benchmark("{name}"' not in tests and f'written("{name}"' not in tests}
    assert without == {"e2e"}, "e2e needs an environment with TRL of its own; its parts are tested in test_e2e.py"
