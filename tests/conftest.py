"""What every test runs under."""

import os
from collections.abc import Generator
from pathlib import Path

import pytest

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


def pytest_configure() -> None:
    """Before torch, ray and wandb are imported: one thread each, nothing sent anywhere, nothing asked."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["WANDB_MODE"] = "offline"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.pop("WANDB_API_KEY", None)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two finished runs, `first-run` and `second-run`, for whatever reads runs. Write nothing to it.

    Their policy is random and earns nothing, so an advantage is made up.
    """
    from rl.cli import main
    from tests.training import SMALL

    root = tmp_path_factory.mktemp("session") / "runs"
    words = ["env=tool_gate", "steps=3", "evaluation.every=1", "evaluation.tasks=4", "rollout.max_turn_tokens=8"]
    words += ["learner.loss.advantage=tests.training:first_is_best", f"run.root={root}"]
    for number, name in enumerate(("first-run", "second-run"), start=1):
        assert main(["train", *SMALL, *words, f"run.name={name}", f"seed={number}"]) == 0
    return root
