"""Which executor a process is, and which ESTs it hosts."""

import pytest
from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment

from lightning_easyscale.topology import EXECUTOR_VARIABLE, NUM_ESTS_VARIABLE, find_topology


def find(**changes):
    arguments = {"num_devices": 2, "num_nodes": 1, "num_ests": 5, "ests_per_executor": None, **changes}
    return find_topology(LightningEnvironment(), **arguments)


def test_the_script_is_executor_0_and_starts_the_others(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    topology = find()
    assert (topology.executor, topology.starts_processes, topology.lead) == (0, True, 0)
    assert topology.placement.ests_per_executor == (3, 2)


def test_a_started_process_knows_its_number(monkeypatch):
    monkeypatch.setenv(EXECUTOR_VARIABLE, "1")
    topology = find()
    assert (topology.executor, topology.starts_processes, topology.lead) == (1, False, 3)


def test_user_started_nodes_are_numbered_by_the_environment(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("NODE_RANK", "1")
    topology = find(num_nodes=2, num_ests=6, ests_per_executor=[1, 1, 1, 3])
    assert (topology.executor, topology.lead, topology.first_rank_of_host) == (3, 3, 2)
    assert topology.virtual_environment().local_rank() == 1


def test_the_number_of_ests_falls_back_to_the_variable_and_then_to_the_devices(monkeypatch):
    assert find(num_ests=None).placement.num_ests == 2
    monkeypatch.setenv(NUM_ESTS_VARIABLE, "7")
    assert find(num_ests=None).placement.num_ests == 7


def test_the_planner_gives_a_faster_device_more_ests():
    types, seconds = ["v100", "p100"], {"v100": 0.1, "p100": 0.2}
    assert find(num_ests=6, types=types, step_seconds=seconds).placement.ests_per_executor == (4, 2)
    assert find(num_ests=2, types=types, step_seconds=seconds).placement.ests_per_executor == (1, 1)


def test_the_planner_knows_the_number_of_ests_from_the_variable(monkeypatch):
    monkeypatch.setenv(NUM_ESTS_VARIABLE, "6")
    found = find(num_ests=None, types=["v100", "p100"], step_seconds={"v100": 0.1, "p100": 0.2})
    assert found.placement.ests_per_executor == (4, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_ests": 1}, "`num_ests=1` cannot run on 2 devices"),
        ({"ests_per_executor": [5]}, "names 1 devices, but the Trainer runs on 2"),
        ({"ests_per_executor": [3, 3]}, "adds up to 6, not to `num_ests=5`"),
        ({"num_nodes": 2, "types": ["v100", "p100"], "step_seconds": {"v100": 1.0, "p100": 1.0}}, "run elsewhere"),
        ({"types": ["v100", "p100"], "step_seconds": {"v100": 1.0}}, "no time for device type `p100`"),
        ({"types": ["v100", "p100"], "max_ests": {"v100": 1, "p100": 2}}, "hold 3 ESTs by their memory limits"),
        (
            {"types": ["v100", "p100"], "max_ests": {"p100": 1}, "ests_per_executor": [3, 2]},
            r"\[3, 2\]` gives executor 1 2 ESTs, but `max_ests` says that a p100 holds 1",
        ),
        ({"types": ["v100"], "max_ests": {"v100": 1}}, "`max_ests` balances the devices of one host"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        find(**changes)


def test_no_device_gets_more_ests_than_fit():
    types, seconds = ["v100", "p100"], {"v100": 0.1, "p100": 0.9}
    fast = find(types=types, step_seconds=seconds)
    assert fast.placement.ests_per_executor == (4, 1)
    small = find(types=types, step_seconds=seconds, max_ests={"v100": 2})
    assert small.placement.ests_per_executor == (2, 3)
    assert find(types=types, max_ests={"v100": 1}).placement.ests_per_executor == (1, 4)


@pytest.mark.parametrize(("executor", "limit"), [("0", 4), ("1", None)])
def test_an_executor_knows_its_own_limit(monkeypatch, executor, limit):
    monkeypatch.setenv(EXECUTOR_VARIABLE, executor)
    assert find(types=["v100", "p100"], max_ests={"v100": 4}).max_ests == limit


def test_limits_are_those_of_this_hosts_devices(monkeypatch):
    monkeypatch.setenv("NODE_RANK", "1")
    monkeypatch.setenv(EXECUTOR_VARIABLE, "3")
    second = {"num_nodes": 2, "types": ["p100", "v100"], "max_ests": {"v100": 2}}
    assert find(**second, ests_per_executor=[3, 1, 1, 2], num_ests=7).max_ests == 2
    with pytest.raises(ValueError, match="gives executor 3 3 ESTs"):
        find(**second, ests_per_executor=[3, 1, 1, 3], num_ests=8)


def under_an_agent(monkeypatch, *, rank, world_size, num_ests, spares=True, **options):
    variables = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": 1, "GROUP_RANK": rank}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    return find_topology(
        TorchElasticEnvironment(),
        num_devices=7,
        num_nodes=1,
        num_ests=num_ests,
        ests_per_executor=None,
        spares=spares,
        **options,
    )


def test_processes_beyond_the_number_of_ests_are_spares(monkeypatch):
    used = under_an_agent(monkeypatch, rank=1, world_size=4, num_ests=2)
    assert (used.placement.ests_per_executor, used.is_spare, used.lead) == ((1, 1), False, 1)
    spare = under_an_agent(monkeypatch, rank=2, world_size=4, num_ests=2)
    assert spare.is_spare
    assert spare.virtual_environment().global_rank() == 2, "never a rank that an EST has, nor 0, which writes files"


def test_the_planner_leaves_spares_out(monkeypatch):
    seconds = {"v100": 0.1, "t4": 0.3}
    found = under_an_agent(
        monkeypatch, rank=0, world_size=3, num_ests=2, types=["v100", "v100", "t4"], step_seconds=seconds
    )
    assert found.placement.ests_per_executor == (1, 1)


def test_spares_need_a_folder_that_tells_them_the_end(monkeypatch):
    with pytest.raises(ValueError, match="cannot run on 4 devices"):
        under_an_agent(monkeypatch, rank=2, world_size=4, num_ests=2, spares=False)
