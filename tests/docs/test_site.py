"""mkdocs makes a website of docs/: strictly, with every page, and with nothing that a browser would fetch elsewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.documentation import DOCS, ROOT

EMBEDDED = re.compile(r"<(?:script|img|iframe|link)\b[^>]*?\b(?:src|href)=\"?(https?:)?//[^>]*>")


def test_every_page_is_in_the_navigation_once() -> None:
    named = re.findall(r"([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(page.name for page in DOCS.glob("*.md")), "nav of mkdocs.yml"


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_fetches_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr[-3000:]
    built = sorted((tmp_path / "site").rglob("*.html"))
    assert {page.stem for page in DOCS.glob("*.md")} < {page.stem for page in built}
    for page in built:
        fetched = [tag[0] for tag in EMBEDDED.finditer(page.read_text())]
        assert fetched == [], page.name
    curriculum = (tmp_path / "site" / "curriculum.html").read_text()
    assert 'href="source/envs/tasks/curriculum.py.html"' in curriculum
    assert "class Curriculum" in re.sub(
        r"<[^>]+>", "", (tmp_path / "site/source/envs/tasks/curriculum.py.html").read_text()
    )
