"""Ends what the tests of engines keep."""

from collections.abc import Iterator

import pytest

from tests.policy.serving import close_kept


@pytest.fixture(scope="package", autouse=True)
def _kept_engines() -> Iterator[None]:
    yield
    close_kept()
