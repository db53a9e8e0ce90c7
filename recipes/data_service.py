"""One shared pool of loader workers against a loader with its own workers per EST.

``python -m recipes.data_service`` reads the same data for N ESTs on one executor in two ways that take turns: through
the data service (`lightning_easyscale.data`: one pool of ``workers`` processes for all ESTs) and through N stock
``DataLoader``s with ``workers`` processes each, which is what N workers of stock DDP on this device would start. It
measures how many worker processes there are, the time until every EST has its first batch, and the batches per second
afterwards: as fast as they come, and by a device that takes ``device_ms`` for each. Into ``hydra.run.dir`` goes
``data_service.json``. The samples of both ways are compared: they must be equal.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, List  # noqa: UP035  OmegaConf reads these at run time

import hydra
import torch
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from lightning_easyscale import determinism
from lightning_easyscale.data.pool import Member, WorkerPools
from lightning_easyscale.data.position import LoaderFollower
from lightning_easyscale.rng import Generators

from ._config import ConfigError
from ._console import errors_as_lines, make_console
from ._machine import device_name

WAYS = ("shared", "stock")


@dataclass
class DataServiceConf:
    """The configuration.

    Args:
        ests: N, ESTs of one executor; several are measured one after the other.
        workers: ``num_workers`` of a loader.
        batch_size: samples of a batch.
        batches: batches per EST of an epoch.
        work: how much is done for a sample: so many blurs of a 3 x 64 x 64 image.
        device_ms: what the device takes for a batch, in the third measurement.
        blocks: epochs in each way.
        seed: of shuffling and augmentation.
    """

    ests: List[int] = field(default_factory=lambda: [2, 4, 8])  # noqa: UP006
    workers: int = 2
    batch_size: int = 16
    batches: int = 24
    work: int = 2
    device_ms: float = 40.0
    blocks: int = 3
    seed: int = 1


ConfigStore.instance().store(name="data_service_schema", node=DataServiceConf)


class Images(Dataset[torch.Tensor]):
    """Noise that is blurred: work that takes a CPU time of its own, with random numbers in it.

    Args:
        length: number of samples.
        work: blurs of each.
    """

    def __init__(self, length: int, work: int) -> None:
        self.length, self.work = length, work

    def __len__(self) -> int:
        """Number of samples."""
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        """A sample; draws from torch's default generator."""
        image = torch.rand(3, 64, 64) + index
        for _ in range(self.work):
            image = torch.nn.functional.avg_pool2d(image, 5, stride=1, padding=2)
        return image


def make_loaders(conf: DataServiceConf, ests: int) -> list[DataLoader[torch.Tensor]]:
    """The loader of every EST, as its stock DDP worker would have it."""
    dataset = Images(ests * conf.batches * conf.batch_size, conf.work)
    return [
        DataLoader(
            dataset,
            batch_size=conf.batch_size,
            num_workers=conf.workers,
            sampler=DistributedSampler(dataset, num_replicas=ests, rank=rank, seed=conf.seed),
        )
        for rank in range(ests)
    ]


@contextmanager
def opened(loaders: list[DataLoader[torch.Tensor]], way: str, seed: int) -> Iterator[list[Iterator[torch.Tensor]]]:
    """The iterators of all ESTs, each begun under generators that stand as in a process of its own."""
    iterators: dict[int, Iterator[torch.Tensor]] = {}
    followers: list[LoaderFollower] = []

    def begin(rank: int) -> None:
        torch.manual_seed(seed)
        iterators[rank] = iter(loaders[rank])

    if way == "shared":
        pools = WorkerPools()
        for rank, loader in enumerate(loaders):
            # The executor lets the other ESTs run to the same point, one after the other.
            following = _begin_next(begin, rank + 1, len(loaders))
            member = Member(rank, {}, on_enter=lambda _: None, let_others_run=following)
            followers.append(LoaderFollower(Generators([]), member, pools))
            followers[-1].attach(loader)
        begin(0)
    else:
        for rank in range(len(loaders)):
            begin(rank)
    try:
        yield [iterators[rank] for rank in range(len(loaders))]
    finally:
        iterators.clear()


def _begin_next(begin: Callable[[int], None], rank: int, count: int) -> Callable[[str], None]:
    return lambda _: begin(rank) if rank < count else None


def measure(conf: DataServiceConf, ests: int, way: str) -> dict[str, Any]:
    """One epoch in one way as fast as it comes, and one at the device's pace."""
    found: dict[str, Any] = {}
    for name, pause in (("samples_per_s", 0.0), ("paced_samples_per_s", conf.device_ms / 1000)):
        loaders = make_loaders(conf, ests)
        began = time.perf_counter()
        with opened(loaders, way, conf.seed) as iterators:
            batches = [next(iterator) for iterator in iterators]
            met = time.perf_counter()
            found["processes"] = len(multiprocessing.active_children())
            if not pause:
                found["first_batch_s"] = met - began
            for _ in range(conf.batches - 1):
                for iterator in iterators:
                    batches.append(next(iterator))
                    time.sleep(pause)
            found[name] = (conf.batches - 1) * ests * conf.batch_size / (time.perf_counter() - met)
            found["digest"] = hashlib.blake2b(torch.stack(batches).numpy()).hexdigest()
        del iterators, iterator  # the last to hold the iterators, whose workers end now
    return found


def run(conf: DataServiceConf, directory: Path, console: Console) -> dict[str, Any]:
    """The benchmark; returns the report.

    Raises:
        ConfigError: for what measures nothing.
        RuntimeError: if the two ways do not give the same samples.
    """
    if conf.workers < 1 or conf.batches < 2 or conf.blocks < 1:
        raise ConfigError(
            f"`workers={conf.workers} batches={conf.batches} blocks={conf.blocks}` measures nothing."
            " HINT: at least 1, 2 and 1."
        )
    started = time.gmtime()
    rows: dict[int, dict[str, list[dict[str, Any]]]] = {}
    for ests in conf.ests:
        rows[ests] = {way: [] for way in WAYS}
        for block in range(conf.blocks):
            for way in WAYS if block % 2 == 0 else reversed(WAYS):
                rows[ests][way].append(measure(conf, ests, way))
        if len({row["digest"] for side in rows[ests].values() for row in side}) != 1:
            raise RuntimeError(f"with {ests} ESTs the shared pool does not give the samples of the stock loaders.")
    report = {
        "started": time.strftime("%Y-%m-%d %H:%M:%S UTC", started),
        "machine": {"device": device_name(False), "cpus": os.cpu_count(), "load": os.getloadavg()},
        "fingerprint": determinism.fingerprint([]),
        "configuration": asdict(conf),
        "ests": {str(ests): _compared(sides) for ests, sides in rows.items()},
    }
    (directory / "data_service.json").write_text(json.dumps(report, indent=1) + "\n")
    console.print(_table(report))
    return report


def _compared(sides: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Every measure: min, median and max of both ways, and the ratio of the medians, shared to stock."""
    compared: dict[str, Any] = {}
    for name in ("processes", "first_batch_s", "samples_per_s", "paced_samples_per_s"):
        values = {way: sorted(row[name] for row in side) for way, side in sides.items()}
        medians = {way: statistics.median(found) for way, found in values.items()}
        compared[name] = {
            **{way: [round(x, 3) for x in (v[0], medians[way], v[-1])] for way, v in values.items()},
            "ratio": round(medians["shared"] / medians["stock"], 3),
        }
    return compared


def _table(report: dict[str, Any]) -> Table:
    table = Table("ESTs", "", "shared pool: min / median / max", "stock loaders", "ratio")
    for ests, measures in report["ests"].items():
        for name, found in measures.items():
            sides = (" / ".join(f"{x:g}" for x in found[way]) for way in WAYS)
            table.add_row(ests, name, *sides, f"{found['ratio']:.3f}")
    return table


@hydra.main(version_base="1.3", config_path="../conf", config_name="data_service")
def main(config: DictConfig) -> None:
    """Command line."""
    console = make_console()
    conf = OmegaConf.to_object(config)
    assert isinstance(conf, DataServiceConf)
    directory = Path(HydraConfig.get().runtime.output_dir).resolve()
    with errors_as_lines(console, RuntimeError):
        run(conf, directory, console)
    console.print(f"report: {directory / 'data_service.json'}")


if __name__ == "__main__":
    main()
