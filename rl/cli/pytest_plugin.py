"""A pytest plugin: three lines check an environment.

    def test_eggs(shoal_env_check):
        shoal_env_check("my_envs:Eggs")

pytest loads it in every run on a machine that has Shoal, so it imports nothing until the fixture is called.
"""

from collections.abc import Callable, Mapping
from typing import Any

import pytest


@pytest.fixture
def shoal_env_check() -> Callable[..., None]:
    """Fails the test with the report of `shoal env check`, unless all probes pass."""

    def check(
        env_id: str, *, levels: tuple[int, ...] = (), seeds: int = 10, kwargs: Mapping[str, Any] | None = None
    ) -> None:
        from rl.cli.environments.env_check import check, report_text

        report = check(env_id, levels=levels, num_seeds=seeds, kwargs=kwargs)
        if not report.passed:
            pytest.fail(f"\n{report_text(report)}", pytrace=False)

    return check
