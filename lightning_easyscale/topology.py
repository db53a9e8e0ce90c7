"""Which executors a job has, which of them this process is, and which ESTs each one hosts.

Three ways lead to a process: the launcher of this package started it and numbered it (`EXECUTOR_VARIABLE`); something
else did (torchrun, Slurm, the user) and the cluster environment numbers it; or it is the user's own script, executor 0
of its host, which has yet to start the others.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning.fabric.plugins.environments import ClusterEnvironment, LightningEnvironment, TorchElasticEnvironment

from .placement import Placement
from .planning import plan
from .virtual_environment import VirtualEnvironment

EXECUTOR_VARIABLE = "EASYSCALE_EXECUTOR"
"""Names the executor in processes that a launcher of ours has started."""

NUM_ESTS_VARIABLE = "EASYSCALE_NUM_ESTS"
"""N where `num_ests` is not given."""


@dataclass(frozen=True)
class Topology:
    """The executors of a job, seen from one of them.

    Args:
        placement: which ESTs each executor hosts.
        executor: the executor that this process is; beyond the placement's: a spare, which hosts no EST.
        local_executors: the executors of this host.
        starts_processes: whether this process has to start the other executors of its host.
        under_agent: whether torchrun or the supervisor decides about processes.
        physical: the environment that numbers processes.
        max_ests: how many ESTs fit on this executor; None: nobody has said.
    """

    placement: Placement
    executor: int
    local_executors: range
    starts_processes: bool
    under_agent: bool
    physical: ClusterEnvironment
    max_ests: int | None = None

    @property
    def is_spare(self) -> bool:
        """Whether an agent started this process beyond the number of ESTs: it waits, in case it is needed later."""
        return self.executor >= self.placement.num_executors

    @property
    def spares(self) -> int:
        """How many processes an agent has started beyond the number of ESTs."""
        return self.physical.world_size() - self.placement.num_executors if self.under_agent else 0

    @property
    def lead(self) -> int:
        """The lowest EST rank of this executor; of a spare, a rank that no EST has."""
        return self.executor if self.is_spare else self.placement.ranges[self.executor][0]

    @property
    def first_rank_of_host(self) -> int:
        """The lowest EST rank on this host."""
        first = self.local_executors[0]
        return first if first >= self.placement.num_executors else self.placement.ranges[first][0]

    @property
    def position_on_host(self) -> int:
        """Which of the host's executors this process is."""
        return self.executor - self.local_executors[0]

    def virtual_environment(self) -> VirtualEnvironment:
        """The cluster as the lead EST sees it."""
        return VirtualEnvironment(
            self.physical,
            rank=self.lead,
            local_rank=self.lead - self.first_rank_of_host,
            num_ests=self.placement.num_ests,
        )


def started_by_agent(physical: ClusterEnvironment) -> bool:
    """Whether torchrun or the supervisor has started this process and decides how many there are."""
    return isinstance(physical, TorchElasticEnvironment) and EXECUTOR_VARIABLE not in os.environ


def find_topology(
    physical: ClusterEnvironment,
    *,
    num_devices: int,
    num_nodes: int,
    num_ests: int | None,
    ests_per_executor: Sequence[int] | None,
    types: Sequence[str] = (),
    step_seconds: Mapping[str, float] | None = None,
    max_ests: Mapping[str, int] | None = None,
    spares: bool = False,
) -> Topology:
    """Find out which executor this process is, and place the ESTs.

    Args:
        physical: the environment that numbers processes.
        num_devices: devices of this host, as the Trainer was told.
        num_nodes: hosts, as the Trainer was told.
        num_ests: N, if it was given.
        ests_per_executor: how many ESTs each executor hosts; by default the planner decides.
        types: device type of each executor of this host.
        step_seconds: seconds of one EST's step per device type, from which the planner balances the ESTs.
        max_ests: ESTs that fit into one device's memory per type, which the planner does not exceed.
        spares: whether processes that an agent has started beyond N may wait.

    Raises:
        ValueError: if N is unknown under torchrun, or the ESTs do not fit the executors or their memory.
    """
    ours = os.environ.get(EXECUTOR_VARIABLE)
    agent = started_by_agent(physical)
    if physical.creates_processes_externally and ours is None:
        if isinstance(physical, LightningEnvironment):
            physical.set_world_size(num_nodes * num_devices)
            physical.set_global_rank(physical.node_rank() * num_devices + physical.local_rank())
        executors, executor = physical.world_size(), physical.global_rank()
        first = executor - physical.local_rank()
        per_host = int(os.environ.get("LOCAL_WORLD_SIZE", num_devices))
    else:
        executors, per_host = num_nodes * num_devices, num_devices
        first = physical.node_rank() * num_devices
        executor = int(ours) if ours is not None else first
    given = _given_ests(num_ests, ests_per_executor, agent=agent)
    if ests_per_executor is not None:
        placement = _as_given(executors, given, ests_per_executor)
        _check_memory(placement, first, types, max_ests or {})
    else:
        # What an agent starts beyond the number of ESTs waits as spares, if there is a folder to wait for.
        used = min(executors, given or executors) if agent and spares else executors
        placement = _planned(executors, given or executors, used, types, step_seconds, max_ests or {})
    own_type = dict(enumerate(types, first)).get(executor, "")
    return Topology(
        placement=placement,
        executor=executor,
        local_executors=range(first, first + per_host),
        starts_processes=ours is None and not physical.creates_processes_externally,
        under_agent=agent,
        physical=physical,
        max_ests=(max_ests or {}).get(own_type),
    )


def _given_ests(num_ests: int | None, counts: Sequence[int] | None, *, agent: bool) -> int | None:
    given = num_ests or int(os.environ.get(NUM_ESTS_VARIABLE, 0)) or (sum(counts) if counts is not None else None)
    if given is None and agent:
        raise ValueError(
            "`num_ests` must be given under torchrun, where the number of devices may change."
            f" HINT: `EasyScaleStrategy(num_ests=...)` or the environment variable {NUM_ESTS_VARIABLE}."
        )
    return given


def _as_given(executors: int, given: int | None, counts: Sequence[int]) -> Placement:
    if len(counts) != executors:
        raise ValueError(
            f"`ests_per_executor={list(counts)}` names {len(counts)} devices, but the Trainer runs on {executors}."
            " HINT: give one count per device."
        )
    return Placement.check(counts, given or executors)


def _check_memory(placement: Placement, first: int, types: Sequence[str], max_ests: Mapping[str, int]) -> None:
    for executor, (name, ests) in enumerate(zip(types, placement.ests_per_executor[first:], strict=False), first):
        if ests > max_ests.get(name, ests):
            raise ValueError(
                f"`ests_per_executor={list(placement.ests_per_executor)}` gives executor {executor} {ests} ESTs, but"
                f" `max_ests` says that a {name} holds {max_ests[name]}. HINT: change one of the two."
            )


def _planned(
    executors: int,
    num_ests: int,
    used: int,
    types: Sequence[str],
    step_seconds: Mapping[str, float] | None,
    max_ests: Mapping[str, int],
) -> Placement:
    """The planner's split over the first `used` executors; with equal speeds, or none given, it is the even one."""
    if step_seconds is None and not max_ests:
        return Placement.even(num_ests, used)
    if len(types) != executors:
        name = "max_ests" if step_seconds is None else "step_seconds"
        raise ValueError(
            f"`{name}` balances the devices of one host, but {executors - len(types)} of the {executors}"
            " executors run elsewhere. HINT: give `ests_per_executor`."
        )
    seconds = dict.fromkeys(types, 1.0) if step_seconds is None else step_seconds
    return plan(num_ests, types[:used], seconds, max_ests=max_ests, use_every_device=True).placement
