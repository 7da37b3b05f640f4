"""Who may import what, and how long a file or function may be. Read from the source, so nothing has to be installed."""

import ast
import fnmatch
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("rl", "rollout", "envs", "policy", "conf")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in FILES]

ALLOWED: dict[str, tuple[str, ...]] = {
    "ray": ("*/actors.py", "rl/cluster/*.py"),
    "wandb": ("rl/monitor/wandb_sink.py",),
    "trackio": ("rl/monitor/trackio_writer.py",),
    "vllm": ("policy/vllm/*.py",),
    "hydra": ("conf/loading.py",),
    "omegaconf": ("conf/loading.py",),
    "torch": ("policy/*", "rollout/*", "rl/*"),
}
"""Module -> files that may import it at all."""
LAZY = ("wandb", "trackio", "vllm")
"""Never imported while a module is being imported."""
MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 60


def imports(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """(module, whether it happens while the file is imported) of every import, those for type checking left out."""
    stack: list[tuple[ast.AST, bool]] = [(tree, True)]
    while stack:
        node, eager = stack.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            stack += [(child, eager) for child in node.orelse]
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, eager) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            yield node.module or "", eager
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        stack += [(child, eager and not inside) for child in ast.iter_child_nodes(node)]


def problems_of_imports(name: str, source: str) -> list[str]:
    found = []
    for module, eager in imports(ast.parse(source)):
        top = module.split(".")[0]
        if top in ALLOWED and not any(fnmatch.fnmatch(name, pattern) for pattern in ALLOWED[top]):
            found.append(f"{name} may not import {module}")
        if top in LAZY and eager:
            found.append(f"{name} must import {module} inside a function")
    return found


@pytest.mark.parametrize("name", NAMES)
def test_heavy_modules_are_imported_only_where_they_belong(name):
    assert not problems_of_imports(name, (ROOT / name).read_text())


@pytest.mark.parametrize(
    ("name", "source", "problem"),
    [
        ("envs/pool/pool.py", "import torch", "envs/pool/pool.py may not import torch"),
        ("envs/pool/pool.py", "def f():\n    from torch import nn", "envs/pool/pool.py may not import torch"),
        ("rl/train.py", "from ray.util import x", "rl/train.py may not import ray.util"),
        ("rl/monitor/wandb_sink.py", "import wandb", "rl/monitor/wandb_sink.py must import wandb inside a function"),
        ("rl/monitor/wandb_sink.py", "def f():\n    import wandb", None),
        ("envs/pool/actors.py", "import ray", None),
        ("envs/pool/pool.py", "if TYPE_CHECKING:\n    import torch", None),
    ],
)
def test_the_rule_itself_sees_a_planted_violation(name, source, problem):
    assert problems_of_imports(name, source) == ([problem] if problem else [])


def test_imports_only_go_down():
    lint = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run([lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_environment_process_and_the_readers_need_no_torch():
    modules = "envs.pool.pool, envs.registry, envs.tasks.task_source, conf.loading, "
    modules += "rl.cli.main, rl.cli.readers.show, rl.loop.preflight, rl.monitor.monitor"
    code = f"import sys, {modules}; sys.exit(any(m in sys.modules for m in ('torch', 'ray', 'wandb', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


@pytest.mark.parametrize("path", [*FILES, *sorted((ROOT / "tests").rglob("*.py"))], ids=lambda path: path.name)
def test_files_and_functions_stay_short(path):
    source = path.read_text()
    assert source.count("\n") <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < MAX_FUNCTION_LINES, f"{node.name}, line {node.lineno}"


def test_no_file_is_named_like_a_module_of_the_standard_library_or_says_nothing():
    banned = sys.stdlib_module_names | {"utils", "util", "common", "misc", "helpers"}
    assert [name for name in NAMES if Path(name).stem in banned and Path(name).stem != "__init__"] == []


def test_no_setting_of_the_environment_is_touched_by_an_import():
    """`os.environ[...] = ` or `.setdefault` outside a function would change a user's process by importing us."""
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.If):
                assert "os.environ" not in ast.unparse(node), f"{path}, line {node.lineno}"


def test_yaml_and_weights_are_part_of_the_packages():
    """The wheel takes whole packages; what git ignores it would leave out."""
    shipped = [p for package in PACKAGES for ext in ("yaml", "safetensors") for p in (ROOT / package).rglob(f"*.{ext}")]
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    ignored = subprocess.run(
        ["git", "check-ignore", *map(str, shipped)], cwd=ROOT, capture_output=True, text=True, timeout=30
    )
    assert len(shipped) > 15 and ignored.stdout == ""
