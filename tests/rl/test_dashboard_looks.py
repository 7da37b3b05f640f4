"""The page as a person sees it: opened by its printed address, narrow, dark, and asked for what is not there."""

from pathlib import Path
from typing import Any

import pytest

from rl.cli.main import main
from tests.rl.dashboard_runs import RUN, make_run, start_server, until

pytestmark = pytest.mark.browser

READY = "document.getElementById('view').dataset.ready === (location.hash || '#/')"
BROKEN_WORDS = """() => {
  const broken = [];
  for (const cell of document.querySelectorAll('th, td')) {
    const walk = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT);
    for (let node = walk.nextNode(); node; node = walk.nextNode()) {
      for (const word of node.data.matchAll(/[A-Za-z]{2,14}/g)) {
        const range = document.createRange();
        range.setStart(node, word.index); range.setEnd(node, word.index + word[0].length);
        if (new Set([...range.getClientRects()].map((r) => Math.round(r.top))).size > 1) broken.push(word[0]);
      }
    }
  }
  return broken;
}"""
COLOURS = """(selector) => {
  const of = (text) => text.match(/[0-9.]+/g).slice(0, 3).map(Number);
  const node = document.querySelector(selector), style = getComputedStyle(node);
  let paper = node;
  while (paper && getComputedStyle(paper).backgroundColor === 'rgba(0, 0, 0, 0)') paper = paper.parentElement;
  return [of(style.color), of(getComputedStyle(paper || document.body).backgroundColor)];
}"""


def _luminance(colour: list[float]) -> float:
    parts = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def _contrast(page: Any, selector: str) -> float:
    light, dark = sorted((_luminance(colour) for colour in page.evaluate(COLOURS, selector)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_the_printed_address_opens_the_page_and_the_token_leaves_the_address_bar(page, tmp_path: Path) -> None:
    make_run(tmp_path)  # faults G6
    server, printed = start_server(tmp_path, has_token=True)
    try:
        page.goto(printed)
        until(page, READY)
        assert RUN in page.inner_text("#view") and "token" not in page.url
        page.goto(f"{page.url}#/run/{RUN}/overview")
        until(page, READY)
        assert RUN in page.inner_text("#view")
        assert page.context.request.get(f"{printed.partition('?')[0]}api/runs").status == 200
    finally:
        server.kill()
        server.wait(10)


def test_words_of_tables_stay_whole_on_a_telephone_and_the_page_does_not_scroll_sideways(page, tmp_path: Path) -> None:
    make_run(tmp_path)  # faults G7
    server, address = start_server(tmp_path)
    page.set_viewport_size({"width": 390, "height": 844})
    try:
        for view in (
            "",
            *(f"run/{RUN}/{name}" for name in ("overview", "trajectories", "workers", "ledger", "config")),
        ):
            page.goto(f"{address}#/{view}")
            until(page, READY)
            assert page.evaluate(BROKEN_WORDS) == [], view
            assert page.evaluate("document.documentElement.scrollWidth") <= 390, view
        assert main(["report", RUN, "--root", str(tmp_path), "--output", str(tmp_path / "report.html")]) == 0
        page.goto((tmp_path / "report.html").as_uri())
        assert page.evaluate(BROKEN_WORDS) == []
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
    finally:
        server.kill()
        server.wait(10)


def test_a_dark_system_gets_a_dark_page_that_can_be_read(page, tmp_path: Path) -> None:  # faults G7
    make_run(tmp_path)
    server, address = start_server(tmp_path)
    try:
        for scheme, is_dark in (("light", False), ("dark", True)):
            page.emulate_media(color_scheme=scheme)
            page.goto(f"{address}#/run/{RUN}/overview")
            page.reload()
            until(page, READY)
            assert (_luminance(page.evaluate(COLOURS, "body")[1]) < 0.1) == is_dark
            for selector in ("body", "h1", "nav a", ".dim", "#learning", "#verdict"):
                assert _contrast(page, selector) >= 4.5, (scheme, selector)
    finally:
        server.kill()
        server.wait(10)


def test_an_address_that_names_no_page_says_so_instead_of_showing_the_runs(page, tmp_path: Path) -> None:  # faults G7
    make_run(tmp_path)
    server, address = start_server(tmp_path)
    try:
        for name, words in (("nosuch", "there is no page #/nosuch"), (f"run/{RUN}/nosuch", "there is no view nosuch")):
            page.goto(f"{address}#/{name}")
            until(page, f"document.getElementById('view').textContent.includes('{words}')")
            assert page.locator("#view table").count() == 0
    finally:
        server.kill()
        server.wait(10)
