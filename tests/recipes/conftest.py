"""One warm process for all tests that fork stages."""

import pytest

from lightning_easyscale import devices

POOL = ("v100", "t4")


@pytest.fixture(scope="session")
def warm():
    from recipes._warm import WarmProcesses

    environment = devices.apply_environment(devices.pinned_environment(POOL, emulate=True))
    with WarmProcesses(environment) as processes:
        yield processes


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    pytest.importorskip("mlxtend")
    return tmp_path_factory.mktemp("stages")
