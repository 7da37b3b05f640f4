"""The environment that README shows, word for word: it is short, checks, and trains on Ray from a user's own folder."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def source() -> str:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return code


def shoal(folder: Path, *words: str) -> str:
    """Run a command as a user would, in a folder of theirs; its output, where it ended with 0."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "rl.cli", *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_it_has_at_most_20_lines() -> None:
    assert len([line for line in source().splitlines() if line.strip()]) <= 20


@pytest.mark.slow
def test_it_passes_the_check(tmp_path: Path) -> None:
    (tmp_path / "my_shop.py").write_text(source())
    out = shoal(tmp_path, "env", "check", "my_shop:Warehouse", "--levels", "0,9", "--seeds", "10", "--json")
    report = json.loads(out.splitlines()[-1])
    assert report["passed"] and report["id"] == "my_shop:Warehouse"


@pytest.mark.ray
@pytest.mark.slow
def test_it_trains_on_ray_by_its_import_path(tmp_path: Path) -> None:
    (tmp_path / "my_shop.py").write_text(source())
    held_out = "evaluation.final_tasks=20"
    shoal(tmp_path, "sft", "env=my_shop:Warehouse", "sft.steps=20", "sft.output=warm.safetensors", held_out)
    shoal(tmp_path, "train", "env=my_shop:Warehouse", "policy.init=warm.safetensors", "experiment=smoke")
    summary = json.loads((tmp_path / "runs" / "latest" / "summary.json").read_text())
    assert summary["steps"] >= 1 and summary["n"] >= 1
