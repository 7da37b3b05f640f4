"""What every test runs under."""

import os
import secrets
import shutil
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from policy.import_guard import mend_imports

REQUIRED = "SHOAL_REQUIRE"
"""Variable with markers, separated by commas: a skipped test that carries one of them has failed. CI sets it."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    wanted = [name for name in os.environ.get(REQUIRED, "").split(",") if name and item.get_closest_marker(name)]
    if report.skipped and wanted:
        reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome, report.longrepr = "failed", f"skipped, but {REQUIRED} names {', '.join(wanted)}: {reason}"
    return report


GROUPS = ("vllm", "ray", "browser")
"""Markers whose tests run one after the other when there are several workers (`-n 2 --dist loadgroup`): two engines of
vLLM, Ray clusters or browsers at once are too much for two cores. The longest first: no worker is left with them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Groups for pytest-xdist; without it nothing but the order changes."""
    order = {name: number for number, name in enumerate(GROUPS)}

    def group(item: pytest.Item) -> str:
        return next((name for name in GROUPS if item.get_closest_marker(name)), "")

    for item in items:
        if name := group(item):
            item.add_marker(pytest.mark.xdist_group(name))
    items.sort(key=lambda item: order.get(group(item), len(GROUPS)))  # stable: files stay together


def pytest_configure() -> None:
    """Before torch, ray and wandb are imported: one thread each, nothing sent anywhere, nothing asked."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Ray reads both once a process, at its first import: whichever test comes first, all of them use one token
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ["WANDB_MODE"] = "offline"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.pop("WANDB_API_KEY", None)
    mend_imports()  # where the vLLM extra is installed, tests import transformers and TRL themselves


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two finished runs, `first-run` and `second-run`, for whatever reads runs. Write nothing to it.

    Their policy is random and earns nothing, so an advantage is made up.
    """
    from rl.cli.main import main
    from tests.rl.training import SMALL

    root = tmp_path_factory.mktemp("session") / "runs"
    words = ["env=tool_gate", "steps=3", "evaluation.every=1", "evaluation.tasks=4", "rollout.max_turn_tokens=8"]
    words += ["learner.loss.advantage=tests.rl.training:first_is_best", f"run.root={root}"]
    for number, name in enumerate(("first-run", "second-run"), start=1):
        assert main(["train", *SMALL, *words, f"run.name={name}", f"seed={number}"]) == 0
    return root


@pytest.fixture
def page() -> Iterator[Any]:
    """A page of headless Chromium. Without it the test is skipped, and told how it would not be."""
    install = "pip install playwright, and Chromium: apt-get install chromium"
    sync_api = pytest.importorskip("playwright.sync_api", reason=f"no browser test: {install}")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip(f"no Chromium: {install}")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.set_default_timeout(30_000)
        yield page
        browser.close()
