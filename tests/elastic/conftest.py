from __future__ import annotations

from collections.abc import Iterator

import pytest

from ..integration.harness import Runs


@pytest.fixture(scope="session")
def runs() -> Iterator[Runs]:
    runs = Runs(["tests.elastic.jobs"])
    yield runs
    runs.close()
