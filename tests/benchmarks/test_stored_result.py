"""A committed number says which code it was made with, and is marked when that code has changed."""

import json
import subprocess
from pathlib import Path

import pytest

from benchmarks import stored_result
from benchmarks.stored_result import CHECKOUT, MEASURES, RESULTS, save_result, why_stale
from rl.cli.bench import SHARED
from scripts.stale_results import PAGE, with_stale_results

needs_git = pytest.mark.skipif(not (CHECKOUT / ".git").exists(), reason="not a git checkout")


@needs_git
def test_results_older_than_what_they_measure_are_marked() -> None:
    """J1"""
    page = PAGE.read_text()
    assert page == with_stale_results(page), "run `python -m scripts.stale_results`"


def test_every_benchmark_says_what_it_measures_and_it_is_there() -> None:
    names = {path.stem for path in (CHECKOUT / "benchmarks").glob("*.py")} - set(SHARED)
    assert names == set(MEASURES)
    assert [place for places in MEASURES.values() for place in places if not (CHECKOUT / place).exists()] == []
    for path in RESULTS.glob("*.json"):
        assert any(path.stem.startswith(name) for name in names), f"{path.name} is of no benchmark"


@needs_git
def test_a_result_is_old_once_its_script_or_what_it_measures_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """J1, in a repository of three commits."""

    def git(*words: str) -> None:
        who = ("-c", "user.name=t", "-c", "user.email=t@t")
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True, timeout=60)

    def commit(file: str, text: str) -> None:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
        git("add", "-A")
        git("commit", "-m", file)

    monkeypatch.setattr(stored_result, "CHECKOUT", tmp_path)
    git("init")
    commit("benchmarks/sandbox.py", "1")
    commit("envs/sandbox/jail.py", "1")
    result = tmp_path / "sandbox.json"
    assert save_result(result, {"name": "sandbox"})["made_at"]["changed"] is False
    assert why_stale(result) == ""
    commit("envs/pool.py", "1")
    assert why_stale(result) == ""
    commit("envs/sandbox/jail.py", "2")
    assert why_stale(result) == "changed since: envs/sandbox"
    commit("benchmarks/sandbox.py", "2")
    assert why_stale(result) == "changed since: benchmarks/sandbox.py, envs/sandbox"
    (tmp_path / "envs/sandbox/jail.py").write_text("3")
    save_result(result, {"name": "sandbox"})
    assert why_stale(result) == "made in a changed tree"
    result.write_text(json.dumps({"name": "sandbox"}))
    assert why_stale(result) == "names no commit"
