"""The blocks of README and docs as tests see them: what is code, what a shell would run, is an output as shown."""

import doctest
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.glob("*.md")), ROOT / "README.md"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?<=\n\n)(?: {4}.*\n(?:\n(?= {4}))*)+")
TAG = re.compile(r"<!-- not run here: ((?:(?!-->).)+) -->\s*\Z", re.DOTALL)
SHELL = re.compile(r"(\$ |\w+=\S+ |)(shoal|make|pip|python|ssh|source|export|curl|ray|wandb|mkdocs)\b")
MASKS = (
    (re.compile(r"\d{8}-\d{6}-[a-z-]+-[0-9a-f]{4}(-\d+)?|\d{8}-\d{6}-[0-9a-f]{4}"), "RUN"),
    (re.compile(r"[▁▂▃▄▅▆▇█]+"), ""),
    (re.compile(r"  ! [a-z_, ]+$", re.MULTILINE), ""),
    (re.compile(r"(\b\d+(\.\d+)? ?(ms|s|m|h)\b ?)+"), "0 s "),
    (re.compile(r"(?<!\w)-?\d[\d,.]*(e[+-]?\d+)?"), "0"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """One block of a page."""

    page: Path
    line: int
    """Of its first line, from 1."""
    kind: str
    """`python`, `yaml`, `toml`, `json`, `console`, `shell`; or `text`: a picture or an output, not code."""
    text: str
    why_not: str
    """What its `<!-- not run here: ... -->` says; empty where it has none."""

    @property
    def where(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """Fenced and indented ones, in order."""
    text = page.read_text()
    found = [(block.start(2), block[1], block[2], block.start()) for block in FENCE.finditer(text)]
    outside = FENCE.sub(lambda fence: re.sub(r"[^\n]", "x", fence[0]), text)  # as long as it was, so that places stand
    for block in INDENTED.finditer(outside):
        found.append((block.start(), "", re.sub(r"^ {4}", "", block[0], flags=re.MULTILINE), block.start()))
    made = []
    for start, language, content, begins in sorted(found):
        tag = TAG.search(text, 0, begins)
        kind = language or ("shell" if SHELL.match(content) else "text")
        if kind == "shell" and content.startswith("$ "):
            kind = "console"
        why_not = " ".join(tag[1].split()) if tag else ""
        made.append(Block(page=page, line=text.count("\n", 0, start) + 1, kind=kind, text=content, why_not=why_not))
    return made


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))


def commands(block: Block) -> Iterator[str]:
    """What a shell block types, without the remarks beside it: "shoal ls    all runs" -> "shoal ls"."""
    for line in re.sub(r"\\\n\s*", "", block.text).splitlines():
        for command in line.split(" · "):
            if command := re.split(r"\s{2,}|\s#", command.strip())[0]:
                yield command


def examples(block: Block) -> Iterator[tuple[str, str]]:
    """(command, output that is shown) of each "$" in a console block."""
    for example in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        command, _, output = re.sub(r"\\\n\s*", "", example).partition("\n")
        yield command.strip(), output


def shoal_words(command: str) -> list[str]:
    """Arguments of a `shoal` command, up to a pipe or the like; empty for another program."""
    words = shlex.split(command)
    while words and re.fullmatch(r"[A-Z]\w*=.*", words[0]):
        words = words[1:]
    if not words or words[0] != "shoal":
        return []
    ends = (i for i, word in enumerate(words) if word in {">", "|", "&", "&&", ";", "2>"} or word.endswith(";"))
    return words[1 : next(ends, None)]


def looks_as_shown(want: str, got: str) -> bool:
    """Equal but for numbers, times, alerts, names of runs, curves and spaces; "..." stands for anything."""
    for pattern, mask in MASKS:
        want, got = pattern.sub(mask, want), pattern.sub(mask, got)
    want = re.sub(r"\s*\.\.\.\s*", "...", want)  # else spaces beside it would have to be there
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    return doctest.OutputChecker().check_output(want.strip() + "\n", got.strip() + "\n", flags)


def write_files(page: Path, folder: Path) -> list[str]:
    """Write what a page shows as files; returns the names of modules.

    Those are blocks that begin with "# name.py" or "# some/name.yaml", or follow on "... `name.py`:".
    """
    modules, text = [], page.read_text()
    for fence in FENCE.finditer(text):
        named = re.match(r"# ([\w/]+)\.(py|yaml)\n", fence[2]) or re.search(
            r"`([\w/]+)\.(py|yaml)`:\s*\Z", text[: fence.start()]
        )
        if named:
            path = folder / f"{named[1]}.{named[2]}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(fence[2])
            modules += [named[1]] * (named[2] == "py")
    return modules


def table_names(page: Path, heading: str) -> list[str]:
    """What stands in backticks in the first column of the tables under a heading."""
    section = page.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return [name for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE) for name in re.findall(r"`(.*?)`", row)]
