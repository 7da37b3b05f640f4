"""What a checkout without an extra can still do: collect its tests."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

WITHOUT_VLLM = """
import importlib.util, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] == "vllm" else find_spec(name, *rest)
sys.modules["vllm"] = None  # an import raises ModuleNotFoundError
import pytest
sys.exit(pytest.main(["--collect-only", "-qq", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


@pytest.mark.slow
def test_without_vllm_every_test_that_names_it_is_still_collected() -> None:  # faults G8
    files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "vllm" in path.read_text()]
    assert len(files) > 10
    words = [sys.executable, "-c", WITHOUT_VLLM, *files]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
