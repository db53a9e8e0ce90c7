from __future__ import annotations

from collections.abc import Iterator

import pytest

from ..integration.harness import Runs


@pytest.fixture(scope="session")
def runs() -> Iterator[Runs]:
    runs = Runs(["tests.elastic.jobs"])
    yield runs
    runs.close()


@pytest.fixture(autouse=True)
def in_the_table_of_faults(request: pytest.FixtureRequest) -> None:
    """A test that injects a fault, or is marked with one, is a line of the table (`tests/report.py`)."""
    call = getattr(request.node, "callspec", None)
    injected, marker = call.params.get("fault") if call is not None else None, request.node.get_closest_marker("fault")
    if injected is None and marker is None:
        return
    faults = injected if isinstance(injected, list) else [injected]
    words = request.node.originalname.removeprefix("test_").replace("_", " ")
    request.node.user_properties += [
        ("fault", call.id if injected is not None else words + (f": {call.id}" if call is not None else "")),
        ("where", marker.args[0] if injected is None else "; ".join(map(str, faults))),
        ("asserts", " ".join((request.function.__doc__ or "As its name says.").split())),
    ]
