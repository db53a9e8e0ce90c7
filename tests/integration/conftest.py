from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import pytest

from .harness import Runs
from .scenario import Feature
from .scenarios import MODULES


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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let reports say which feature a test stands for; `tests.report` makes the table of them."""
    for item in items:
        parameters = getattr(item, "callspec", None)
        feature = parameters.params.get("item") if parameters is not None else None
        if isinstance(feature, Feature):
            assert parameters is not None
            item.user_properties += [
                ("feature", feature.name),
                ("group", feature.group),
                ("placement", "+".join(map(str, parameters.params["placement"]))),
                ("device", "CPU" if item.get_closest_marker("gpu") is None else "GPU"),
            ]
