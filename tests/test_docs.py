"""What the documentation says is so: its code runs, its links lead somewhere, its tables are those of the code."""

import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rl.cli import main
from rollout.trajectory import StopReason
from scripts.config_table import with_tables
from tests.training import SMALL

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.glob("*.md")), *ROOT.glob("README.md")]
FENCE = re.compile(r"^(<!-- not run -->\n+)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s#]*)(?:#([^)\s]+))?\)")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one finished run. Its policy is random and earns nothing, so an advantage is made up."""
    root = tmp_path_factory.mktemp("documented") / "runs"
    words = ["env=tool_gate", "steps=2", "evaluation.every=1", "evaluation.tasks=4", "rollout.max_turn_tokens=8"]
    advantage = "learner.loss.advantage=tests.training:first_is_best"
    assert main(["train", *SMALL, *words, advantage, f"run.root={root}"]) == 0
    return root


def python_blocks(page: Path) -> Iterator[tuple[int, str]]:
    """(line, code) of every block that is not marked as not run."""
    text = page.read_text()
    for block in FENCE.finditer(text):
        if block[2] == "python" and not block[1]:
            yield text.count("\n", 0, block.start(3)), block[3]


def table_names(page: Path, heading: str) -> list[str]:
    """What stands in backticks in the first column of the tables under a heading."""
    section = page.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return [name for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE) for name in re.findall(r"`(.*?)`", row)]


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))


def anchors(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    titles = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [page for page in PAGES if any(python_blocks(page))], ids=lambda page: page.stem)
def test_python_on_a_page_runs(
    page: Path, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In order and in one folder, where runs/ holds a run. A block that begins with "# name.py" becomes that module."""
    (tmp_path / "runs").symlink_to(runs)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    modules = []
    try:
        for line, code in python_blocks(page):
            if name := re.match(r"# (\w+)\.py\n", code):
                (tmp_path / f"{name[1]}.py").write_text(code)
                modules.append(name[1])
                importlib.import_module(name[1])
            else:
                exec(compile("\n" * line + code, str(page), "exec"), {"__name__": "documentation"})
    finally:
        for module in modules:
            sys.modules.pop(module, None)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_relative_links_resolve(page: Path) -> None:
    for target, anchor in LINK.findall(without_code(page.read_text())):
        if "://" in target:
            continue
        path = page.parent / target if target else page
        assert path.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(path.read_text()), f"{page.name} links to {target}#{anchor}"


def test_tests_that_are_named_exist() -> None:
    for page in PAGES:
        for file, test in re.findall(r"`(?:tests/)?(test_\w+\.py)::(test_\w+)`", page.read_text()):
            assert f"def {test}(" in (ROOT / "tests" / file).read_text(), f"{page.name} names {file}::{test}"


def test_the_tables_of_settings_are_current() -> None:
    page = (DOCS / "configuration.md").read_text()
    assert page == with_tables(page), "run `python -m scripts.config_table`"


def test_every_metric_of_a_run_is_explained_and_every_explained_one_is_written(runs: Path) -> None:
    rows = [json.loads(line) for line in (runs / "latest" / "metrics.jsonl").read_text().splitlines()]
    written = {name for row in rows for name in row} - {"kind", "step", "policy_version", "time_s"}
    documented = {name: re.sub(r"<\w+>", "[^/]+", name) for name in table_names(DOCS / "runs.md", "Metrics")}
    unknown = {name for name in written if not any(re.fullmatch(known, name) for known in documented.values())}
    assert unknown == set()
    stale = {n for n, known in documented.items() if not any(re.fullmatch(known, name) for name in written)}
    assert stale == set()


def test_every_event_is_explained() -> None:
    code = [path.read_text() for folder in ("rl", "rollout") for path in (ROOT / folder).glob("*.py")]
    told = {kind for text in code for kind in re.findall(r"event\(\s*\"(\w+)\"", text)}
    assert told == set(table_names(DOCS / "runs.md", "Events"))


def test_every_file_of_a_run_folder_is_explained(runs: Path) -> None:
    documented = set(table_names(DOCS / "runs.md", "The folder, file by file"))
    found = {re.sub(r"(\.lock|-wal|-shm)$", "", path.name) for path in (runs / "latest").iterdir()}
    assert found == documented - {"wandb"}  # disabled here


def test_json_keys_are_those_that_are_promised(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # reports and plots are written where one stands
    section = (DOCS / "runs.md").read_text().split("\n## JSON\n")[1].split("\n## ")[0]
    promised = dict(re.findall(r"^\| `(.+?)` \| (.+) \|$", section, re.MULTILINE))
    found = {"summary.json": json.loads((runs / "latest" / "summary.json").read_text())}
    for command in promised.keys() - found.keys():
        words = command.replace("RUN", "latest").replace("--traj N", "--traj 1").split()[1:]
        root = [] if words[0] == "env" else ["--root", str(runs)]
        assert main([*words, *root]) == 0
        found[command] = json.loads(capsys.readouterr().out.splitlines()[-1])
    for command, keys in promised.items():
        assert set(found[command]) == set(re.findall(r"`(\w+)`", keys)), command


def test_every_stop_reason_is_explained() -> None:
    assert set(table_names(DOCS / "concepts.md", "What happens on failure")) >= {reason.value for reason in StopReason}
