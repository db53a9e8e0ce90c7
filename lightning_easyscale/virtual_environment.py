"""The cluster as an EST sees it: rank r of N, whatever hosts it."""

from __future__ import annotations

from lightning.fabric.plugins.environments import ClusterEnvironment


class VirtualEnvironment(ClusterEnvironment):
    """Presents an EST's rank to Lightning and keeps the physical environment for the launcher.

    Args:
        physical: the environment that started the processes.
        rank: the EST's rank.
        local_rank: its rank among the ESTs of its host.
        num_ests: N, the size of the virtual world.
    """

    def __init__(self, physical: ClusterEnvironment, *, rank: int, local_rank: int, num_ests: int) -> None:
        super().__init__()
        self.physical = physical
        self._rank = rank
        self._local_rank = local_rank
        self._num_ests = num_ests

    def for_rank(self, rank: int) -> VirtualEnvironment:
        """The same environment for another EST of the same host."""
        return VirtualEnvironment(
            self.physical, rank=rank, local_rank=self._local_rank + rank - self._rank, num_ests=self._num_ests
        )

    @property
    def creates_processes_externally(self) -> bool:
        """Whether something else (torchrun, Slurm) starts the processes."""
        return self.physical.creates_processes_externally

    @property
    def main_address(self) -> str:
        """Where the executors meet."""
        return self.physical.main_address

    @property
    def main_port(self) -> int:
        """The port there."""
        return self.physical.main_port

    @staticmethod
    def detect() -> bool:
        """Never chosen automatically; the strategy creates it."""
        return False

    def world_size(self) -> int:
        """N."""
        return self._num_ests

    def set_world_size(self, size: int) -> None:
        """Ignored: N is a property of the job."""

    def global_rank(self) -> int:
        """The EST's rank."""
        return self._rank

    def set_global_rank(self, rank: int) -> None:
        """Ignored: the rank is a property of the EST."""

    def local_rank(self) -> int:
        """The EST's rank among the ESTs of its host."""
        return self._local_rank

    def node_rank(self) -> int:
        """The host's index."""
        return self.physical.node_rank()

    def teardown(self) -> None:
        """Nothing: the session restores the environment variables."""
