"""What the documentation says is so: its code runs, its links lead somewhere, its tables are those of the code.

Every block of code runs, here or in the test that `ELSEWHERE` names, or says why not, just above itself:
`<!-- not run here: it trains for minutes -->`. What is typed in one is parsed, and its settings are checked.
"""

import importlib
import json
import re
import sys
import tomllib
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from conf.loading import expand_sweep, load_config
from rl.cli.command import CommandTable, parser_of
from rl.cli.main import SHOAL, main
from rl.loop.preflight import check_parts
from rollout.record.trajectory import StopReason
from scripts.config_table import with_tables
from tests.docs.documentation import (
    DOCS,
    FENCE,
    PAGES,
    ROOT,
    Block,
    blocks,
    commands,
    examples,
    looks_as_shown,
    shoal_words,
    table_names,
    without_code,
    write_files,
)
from tests.rl.training import small_config, train_in_process

LINK = re.compile(r"\]\(([^)\s#]*)(?:#([^)\s]+))?\)")
CHEAP = re.compile(
    r"(PYTHONPATH=\S+ )?shoal( (ls|show|top|note|report|plot|export|diff|audit|doctor(?! --engine vllm)|completion"
    r"|env (list|new|check))( .*)?| train .*dry_run=true| (\w+ )*--help|)"
)
ELSEWHERE = {
    "debugging-environments.md": "test_docs_debugging.py",
    "first-ten-minutes.md": "test_docs_first_ten_minutes.py",
    "make demo": "test_docs_first_ten_minutes.py",
    "source <(shoal completion bash)": "test_rl_completion.py",
}
"""Whole pages, and single commands, that another test runs."""
STAND_INS = {"RUN": "first-run", "DIR": "a_model", "N": "1"}
FILES = re.compile(r"(?:policy\.init|sft\.output)=(\S+\.safetensors)")


def python_blocks(page: Path) -> Iterator[tuple[int, str]]:
    """(lines before it, code) of every block that is run."""
    for block in blocks(page):
        if block.kind == "python" and not block.why_not:
            yield block.line - 1, block.text


def typed(block: Block) -> list[str]:
    """The commands of a block, none where it is no shell's."""
    kinds = {"shell": commands, "console": lambda block: (command for command, _ in examples(block))}
    return list(kinds[block.kind](block)) if block.kind in kinds else []


def runs_now(page: Path) -> Iterator[tuple[Block, str, str]]:
    """(block, command, output that is shown) of all that this test runs."""
    for block in blocks(page):
        if page.name not in ELSEWHERE and block.kind in ("shell", "console") and is_run(block):
            outputs = dict(examples(block)) if block.kind == "console" else {}
            for command in typed(block):
                if command not in ELSEWHERE:
                    yield block, command, outputs.get(command, "...")


def runs_here(command: str) -> bool:
    return CHEAP.fullmatch(command) is not None


def is_run(block: Block) -> bool:
    """Whether some test runs all of it; YAML, TOML and JSON are read."""
    if block.page.name in ELSEWHERE or block.kind in ("python", "yaml", "toml", "json"):
        return not block.why_not
    return block.kind in ("shell", "console") and all(
        runs_here(command) or command in ELSEWHERE for command in typed(block)
    )


def anchors(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    titles = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.fixture
def folder(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory of a reader who has written every file that a page shows, beside two finished runs."""
    (tmp_path / "runs").symlink_to(runs)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    monkeypatch.setenv("JUDGE_KEY", "a key that nobody asks for")
    modules = [name for page in PAGES for name in write_files(page, tmp_path)]
    (tmp_path / "a_model").mkdir()
    (tmp_path / "a_model" / "config.json").write_text("{}")
    yield tmp_path
    for module in modules:
        sys.modules.pop(module.replace("/", "."), None)


def test_every_block_of_code_runs_or_says_why_not(capsys: pytest.CaptureFixture[str]) -> None:
    code = [block for page in PAGES for block in blocks(page) if block.kind != "text"]
    silent = [block.where for block in code if not is_run(block) and not block.why_not]
    assert silent == [], "just above the block belongs a line such as `<!-- not run here: it trains for minutes -->`"
    needless = [block.where for block in code if block.why_not and block.kind in ("shell", "console") and is_run(block)]
    assert needless == [], "a test runs these: the remark above them is wrong"
    with capsys.disabled():
        print(f"\ncode blocks: {sum(map(is_run, code))} run, {sum(not is_run(block) for block in code)} not run")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_is_typed_on_a_page_is_understood(page: Path, folder: Path) -> None:
    """Commands and options exist; settings have allowed values; extras and targets are those of this checkout."""
    makefile, extras = (ROOT / "Makefile").read_text(), tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for block in blocks(page):
        read = {"yaml": yaml.safe_load, "toml": tomllib.loads, "json": json.loads}
        if block.kind in read:
            assert read[block.kind](block.text), block.where
        for command in typed(block):
            for target in re.findall(r"^make (\w+)", command):
                assert f"\n{target}:" in makefile, f"{block.where}: {command}"
            for extra in re.findall(r"shoal\[(\w[\w-]*)\]", command):
                assert extra in extras["optional-dependencies"], f"{block.where}: {command}"
            words = shoal_words(command)
            if words and page.name not in ELSEWHERE:
                understood(words, f"{block.where}: {command}", folder)


def understood(words: list[str], where: str, folder: Path) -> None:
    """Raise where `shoal WORDS` would be refused; nothing is run."""
    for name in FILES.findall(" ".join(words)):
        (folder / name).touch()
    words = [re.sub(r"\b[A-Z]+\b", lambda word: STAND_INS.get(word[0], word[0]), word) for word in words]
    table, program, rest = SHOAL, "shoal", words
    while isinstance(table, CommandTable):
        assert rest and rest[0] in table.commands, where
        program, (name, *rest), table = f"{program} {rest[0]}", rest, table.commands[rest[0]]
    parser = parser_of(program, table)
    try:
        args: Namespace = parser.parse_args(rest) if table.takes_rest else parser.parse_intermixed_args(rest)
    except SystemExit as stop:
        assert not stop.code, where
        return
    if name in ("train", "sft"):
        several = "multirun" in args and args.multirun
        for overrides in expand_sweep(args.overrides) if several else [args.overrides]:
            config = load_config(overrides, search_paths=args.config_dir)
            check_parts(config, trains=name == "train")


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if any(runs_now(page))], ids=lambda page: page.stem)
def test_commands_on_a_page_run(page: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In order and in one folder; an output that is shown is what comes, but for its numbers."""
    for block, command, shown in runs_now(page):
        words = [STAND_INS.get(word, word) for word in shoal_words(command)]
        code = main(words)
        got = capsys.readouterr()
        assert code == 0, f"{block.where}: {command}\n{got.out}{got.err}"
        assert looks_as_shown(shown, got.out), f"{block.where}: {command}\n{got.out}"


@pytest.mark.parametrize("page", [page for page in PAGES if any(python_blocks(page))], ids=lambda page: page.stem)
def test_python_on_a_page_runs(
    page: Path, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In order and in one folder, where runs/ holds a run. A block that begins with "# name.py" becomes that module."""
    (tmp_path / "runs").symlink_to(runs)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    modules = write_files(page, tmp_path)
    try:
        for line, code in python_blocks(page):
            if name := re.match(r"# (\w+)\.py\n", code):
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
        for file, test in re.findall(r"`tests/([\w/]+\.py)::(test_\w+)`", page.read_text()):
            assert f"def {test}(" in (ROOT / "tests" / file).read_text(), f"{page.name} names {file}::{test}"


def test_the_tables_of_settings_are_current() -> None:
    page = (DOCS / "configuration.md").read_text()
    assert page == with_tables(page), "run `python -m scripts.config_table`"


def test_every_metric_of_a_run_is_explained_and_every_explained_one_is_written(runs: Path, tmp_path: Path) -> None:
    words = ("policy=tiny_moe", "steps=1", "learner.loss.advantage=tests.rl.training:first_is_best")
    of_experts = train_in_process(small_config(tmp_path, *words)).folder.path
    files = [folder / "metrics.jsonl" for folder in (runs / "latest", of_experts)]
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    written = {name for row in rows for name in row} - {"kind", "step", "policy_version", "time_s"}
    documented = {name: re.sub(r"<\w+>", "[^/]+", name) for name in table_names(DOCS / "runs.md", "Metrics")}
    unknown = {name for name in written if not any(re.fullmatch(known, name) for known in documented.values())}
    assert unknown == set()
    stale = {n for n, known in documented.items() if not any(re.fullmatch(known, name) for name in written)}
    assert stale == set()


def test_every_event_is_explained() -> None:
    paths = [path for folder in ("rl", "rollout") for path in (ROOT / folder).rglob("*.py")]
    code = [path.read_text() for path in paths if "dashboard" not in path.parts]  # its events are those of the page
    told = {kind for text in code for kind in re.findall(r"event\(\s*\"(\w+)\"", text)}
    assert told == set(table_names(DOCS / "runs.md", "Events"))


def test_every_file_of_a_run_folder_is_explained(runs: Path) -> None:
    documented = set(table_names(DOCS / "runs.md", "The folder, file by file"))
    found = {re.sub(r"(\.lock|-wal|-shm)$", "", path.name) for path in (runs / "latest").iterdir()}
    assert found - {"notes.json"} == documented - {"notes.json", "wandb"}  # written on demand; disabled here


@pytest.mark.slow
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


def test_messages_that_the_faq_quotes_are_in_the_code() -> None:
    code = "\n".join(
        path.read_text() for folder in ("rl", "rollout", "envs", "policy", "conf") for path in _sources(folder)
    )
    told = re.sub(r'"\n\s*f?"', "", code)  # literals that go on in the next line
    rows = re.findall(r"^\| (.+?) \| .+ \| .+ \|$", (DOCS / "faq.md").read_text(), re.MULTILINE)
    quoted = [text for row in rows if re.fullmatch(r"(`[^`]+`[ .]*)+", row) for text in re.findall(r"`([^`]+)`", row)]
    assert len(quoted) > 20 and [text for text in quoted if text not in told] == []


def _sources(folder: str) -> Iterator[Path]:
    return (ROOT / folder).rglob("*.py")


def test_the_places_to_begin_a_change_are_there() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text()
    rows = [row.split("|")[2] for row in page[page.index("| to change |") :].splitlines() if row.startswith("|")][2:]
    places = [place for row in rows for place in re.findall(r"`([^`]+)`", row)]
    assert len(rows) >= 20 and [place for place in places if not (ROOT / place).exists()] == []
