"""The plan of the house (docs/concepts.md): rooms of a size that one sees at a glance, and imports without circles."""

import ast
import statistics
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("rl", "rollout", "envs", "policy", "conf")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
SITE = ROOT / "policy" / "vllm" / "vllm_site"
"""Holds a sitecustomize.py for other processes; no package of ours."""
WINGS = sorted({path.parent for path in FILES} - {SITE})
MAX_FILES_OF_A_FOLDER = 18
MAX_MEDIAN_LINES = 150


def module_of(path: Path) -> str:
    """Dotted name of a file: "rl/cli/__init__.py" -> "rl.cli"."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(source: str, known: set[str]) -> set[str]:
    """Modules of ours that a file imports anywhere: at its top, inside functions, for type checking."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (whole & known) or {node.module or ""}
    return found & known


def circle(sources: dict[str, str]) -> list[str]:
    """A circle of imports among these modules, each imported by the next; empty where there is none."""
    graph = {name: imported(source, set(sources)) - {name} for name, source in sources.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_no_circle_of_imports_also_through_functions_and_type_checking():
    assert circle({module_of(path): path.read_text() for path in FILES}) == []


def test_the_search_for_circles_sees_planted_ones():
    lazy = {"rl.a": "def f():\n    from rl.b import x", "rl.b": "import rl.a", "rl.c": "import rl.b"}
    assert set(circle(lazy)) == {"rl.a", "rl.b"}
    typed = {"rl.a": "if TYPE_CHECKING:\n    from rl import b", "rl.b": "from rl.a import y"}
    assert set(circle(typed)) == {"rl.a", "rl.b"}
    assert circle({"rl.a": "import rl.b", "rl.b": ""}) == []


def test_no_folder_holds_more_files_than_one_takes_in_at_a_glance():
    sizes = Counter(str(path.parent.relative_to(ROOT)) for path in FILES)
    assert {folder: n for folder, n in sizes.items() if n > MAX_FILES_OF_A_FOLDER} == {}


def test_half_of_the_files_are_short():
    assert statistics.median(path.read_text().count("\n") for path in FILES) <= MAX_MEDIAN_LINES


@pytest.mark.parametrize(
    "folder", sorted({path.parent for path in FILES} - {SITE}), ids=lambda p: str(p.relative_to(ROOT))
)
def test_each_wing_says_in_a_few_lines_what_it_is(folder: Path):
    lines = (folder / "__init__.py").read_text().splitlines() if (folder / "__init__.py").exists() else []
    docstring = ast.get_docstring(ast.parse("\n".join(lines))) or ""
    assert docstring and len(docstring.splitlines()) <= 10, f"{folder.relative_to(ROOT)}/__init__.py"
