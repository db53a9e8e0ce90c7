from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from .harness import Runs
from .scenario import Feature
from .scenarios import MODULES
from .table import table

_RESULTS: pytest.StashKey[dict] = pytest.StashKey()


@pytest.fixture(scope="session")
def runs() -> Iterator[Runs]:
    runs = Runs(MODULES)
    yield runs
    runs.close()


@pytest.fixture
def fresh_runs() -> Iterator[Callable[[Mapping[str, str]], Runs]]:
    """Makes runs whose processes start with an environment of their own, for device types."""
    made: list[Runs] = []

    def make(environment: Mapping[str, str]) -> Runs:
        made.append(Runs(MODULES, environment))
        return made[-1]

    yield make
    for runs in made:
        runs.close()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_RESULTS] = {}


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Note how each feature did, for the table."""
    report = (yield).get_result()  # type: ignore[misc]
    parameters = getattr(item, "callspec", None)
    if report.when == "call" and parameters is not None and isinstance(parameters.params.get("item"), Feature):
        outcome = "equal" if report.passed else "not yet" if report.skipped else "differs"
        feature = parameters.params["item"]
        key = feature.group, feature.name, parameters.params["placement"]
        item.config.stash[_RESULTS][key] = outcome


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the table of features where ``EASYSCALE_FEATURE_TABLE`` says, from a run of all of them."""
    results, path = session.config.stash[_RESULTS], os.environ.get("EASYSCALE_FEATURE_TABLE")
    if path and results:
        Path(path).write_text(table(results))
