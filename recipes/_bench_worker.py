"""One side of an interleaved comparison, in processes of its own.

Each process calls `run_file` and trains in blocks of a few steps. After the warm-up it writes how much memory it has
used into ``ready.<rank>``. Before each block it waits until the file ``go`` in the side's directory allows it, so that
only one side computes at a time; after it rank 0 adds a line to ``done``. A block's time runs from the start of its
first step on the lead to the start of the next block's, data loading included, and waits for the device first.
"""

from __future__ import annotations

import json
import resource
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_POLL_S = 0.001
_PATIENCE_S = 900.0

COLLECTIVES = ("all_reduce 1", "all_reduce 1M", "all_gather 1", "broadcast 1", "barrier", "send and receive 1")


@dataclass(frozen=True)
class Side:
    """What one side of a comparison runs.

    Args:
        kind: ``accumulate`` (stock, one process), ``ddp`` (stock, one process per worker, each with a device of its
            own), ``packing`` (stock DDP over gloo, all processes on one device) or ``easyscale``.
        model: see `_bench_models.MODELS`; or ``collectives``, which times each of `COLLECTIVES` instead of steps.
        workers: batches per step: accumulated ones, DDP ranks or ESTs.
        executors: processes.
        image_size: pixels along an edge.
        batch_size: samples per batch.
        steps: optimizer steps of a block; calls of each collective.
        blocks: timed blocks.
        warmup: steps before the first block.
        accelerator: ``cpu`` or ``gpu``.
        threads: CPU threads per process.
        reduction: of EasyScale.
        directory: where the side waits and reports.
        workload: fields of `WorkloadConf` to train instead of ``model``; its data is synthetic.
        precision: of the Trainer.
        offload: EasyScale's ``gradient_offload``.
        input_offload: EasyScale's.
        overlaps: EasyScale's ``overlap_backward``.
        repeats: one batch is made once and trained on again and again, so that data costs nothing.
        slices: report how long each EST has held the baton.
        releases: free the allocator's cache after the warm-up, once ``go`` holds -1.
        snapshot_every: optimizer steps between EasyScale's snapshots, which go to the side's directory; or ``auto``.
    """

    kind: str
    model: str
    workers: int
    executors: int
    image_size: int
    batch_size: int
    steps: int
    blocks: int
    warmup: int
    accelerator: str
    threads: int
    reduction: str
    directory: str
    workload: dict[str, Any] | None = None
    precision: str = "32-true"
    offload: str | None = None
    input_offload: str | None = None
    overlaps: bool | str = "auto"
    repeats: bool = False
    slices: bool = False
    releases: bool = False
    snapshot_every: int | str | None = None

    def ranks(self) -> list[dict[str, str]]:
        """For each process, the variables that tell it which one it is."""
        if self.kind == "packing":
            return [{"NODE_RANK": str(rank), "LOCAL_RANK": "0"} for rank in range(self.workers)]
        if self.executors == 1:
            return [{}]
        return [{"NODE_RANK": "0", "LOCAL_RANK": str(rank)} for rank in range(self.executors)]

    def write(self) -> Path:
        """Keep the side as a file for its processes."""
        file = Path(self.directory) / "spec.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(asdict(self)))
        return file


class Gate:
    """The worker's end of the files.

    Args:
        directory: of the side.
        rank: of this process; the first tells how long blocks took.
    """

    def __init__(self, directory: str, rank: int) -> None:
        self._go = Path(directory) / "go"
        self._rank = rank

    def say(self, what: str, facts: Mapping[str, Any]) -> None:
        """Write the file ``what`` of this process."""
        file = self._go.with_name(f"{what}.{self._rank}")
        temporary = file.with_name(f"new.{file.name}")
        temporary.write_text(json.dumps(facts))
        temporary.replace(file)

    def wait(self, block: int) -> None:
        """Return when `block` may run.

        Raises:
            TimeoutError: if nobody allows it.
        """
        began = time.monotonic()
        while not (self._go.exists() and int(self._go.read_text()) >= block):
            if time.monotonic() - began > _PATIENCE_S:
                raise TimeoutError(f"nobody allowed block {block} for {_PATIENCE_S:.0f} s.")
            time.sleep(_POLL_S)

    def report(self, entry: Mapping[str, Any]) -> None:
        """Add a line to ``done``."""
        if self._rank == 0:
            with self._go.with_name("done").open("a") as file:
                file.write(json.dumps(entry) + "\n")


def main(side: Side) -> None:
    """Run one side."""
    import lightning.pytorch as pl
    import torch
    import torch.distributed as dist

    from ._bench_models import BenchModule, loader, repeated
    from ._bench_slices import Slices
    from .workloads import build

    def synchronize() -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()

    class Blocks(pl.Callback):
        """Runs the training loop block by block."""

        gate: Gate | None = None
        slices: Slices | None = None
        began = began_cpu = 0.0

        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            # Clones of the callback in other ESTs do not wait: the lead holds the baton while it does.
            if getattr(trainer.strategy, "is_lead", True):
                session = getattr(trainer.strategy, "session", None)
                self.gate = Gate(side.directory, session.peers.index if session else trainer.global_rank)
                if side.slices and session is not None:
                    on_device = trainer.strategy.root_device.type == "cuda"
                    self.slices = Slices(session.contexts, on_device=on_device)
            if side.model == "collectives":
                self.collectives(trainer)

        def on_train_batch_start(
            self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
        ) -> None:
            micro = side.workers if side.kind == "accumulate" else 1
            block, rest = divmod(batch_idx - side.warmup * micro, side.steps * micro)
            if self.gate is None or rest or block < 0 or side.model == "collectives":
                return
            if block > 0:
                if self.slices is not None:
                    self.slices.end()
                synchronize()
                seconds, cpu = time.perf_counter() - self.began, time.process_time() - self.began_cpu
                entry = {"seconds": seconds / side.steps, "cpu": cpu / side.steps, **memory(), **counts(trainer)}
                if self.slices is not None:
                    entry["slices"] = {rank: s / side.steps for rank, s in self.slices.seconds().items()}
                self.gate.report(entry)
            else:
                self.warmed_up()
            self.gate.wait(block)
            synchronize()
            self.began, self.began_cpu = time.perf_counter(), time.process_time()
            if self.slices is not None:
                self.slices.begin()

        def warmed_up(self) -> None:
            assert self.gate is not None
            synchronize()
            self.gate.say("ready", memory())
            if side.releases:
                self.gate.wait(-1)
                if torch.cuda.is_initialized():
                    torch.cuda.empty_cache()
                self.gate.say("idle", {})

        def collectives(self, trainer: pl.Trainer) -> None:
            device = trainer.strategy.root_device
            one, many = torch.ones(1, device=device), torch.ones(1 << 20, device=device)
            outputs = [torch.empty_like(one) for _ in range(side.workers)]

            def message() -> None:
                if dist.get_rank() == 0:
                    dist.send(one, 1)
                elif dist.get_rank() == 1:
                    dist.recv(one, 0)

            calls: tuple[Callable[[], Any], ...] = (
                lambda: dist.all_reduce(one),
                lambda: dist.all_reduce(many),
                lambda: dist.all_gather(outputs, one),
                lambda: dist.broadcast(one, 0),
                dist.barrier,
                message,
            )
            session = getattr(trainer.strategy, "session", None)

            def switches() -> int:
                return 0 if session is None else session.executor.switches

            for block in range(-1, side.blocks):
                dist.barrier()
                if self.gate is not None and block >= 0:
                    if block == 0:
                        self.warmed_up()
                    self.gate.wait(block)
                entry = {}
                for name, call in zip(COLLECTIVES, calls, strict=True):
                    dist.barrier()
                    synchronize()
                    began, before = time.perf_counter(), switches()
                    for _ in range(side.steps):
                        call()
                    synchronize()
                    dist.barrier()
                    entry[name] = (time.perf_counter() - began) / side.steps
                    entry[f"{name} switches"] = (switches() - before) / side.steps
                if self.gate is not None and block >= 0:
                    self.gate.report(entry)

    def counts(trainer: pl.Trainer) -> dict[str, Any]:
        """What the runtime has counted so far."""
        session = getattr(trainer.strategy, "session", None)
        if session is None:
            return {}
        executor = session.executor
        physical = executor.peers.physical_collectives
        done = {"switches": executor.switches, "meetings": executor.meetings, "physical": physical}
        return {"counts": {**done, "snapshots": session.snapshots.written}}

    torch.set_num_threads(side.threads)
    pl.seed_everything(1, verbose=False)
    collective = side.model == "collectives"
    model = "empty" if collective else side.model
    accumulated = side.workers if side.kind == "accumulate" else 1
    steps = 1 if collective else side.warmup + side.blocks * side.steps + 1
    trainer = pl.Trainer(
        **_arguments(side),
        accelerator=side.accelerator,
        accumulate_grad_batches=accumulated,
        precision=side.precision,  # type: ignore[arg-type]
        max_steps=steps,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.callbacks.append(Blocks())  # type: ignore[attr-defined]
    if side.workload is not None:
        samples = steps * side.workers * side.batch_size
        module, data = build({**side.workload, "data": "synthetic", "samples": samples}, side.directory)
        if side.repeats:
            trainer.fit(module, repeated(data, steps * side.workers, pin=side.accelerator == "gpu"))
        else:
            trainer.fit(module, datamodule=data)
        return
    batches = loader(model, side.image_size, side.batch_size, steps * side.workers, pin=side.accelerator == "gpu")
    trainer.fit(BenchModule(model, side.image_size), batches)


def memory() -> dict[str, int]:
    """Bytes that this process uses, and at most has used so far: in all, and of the device."""
    import torch

    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    out = {"rss": resident, "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if torch.cuda.is_initialized():
        out |= {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    return out


def _arguments(side: Side) -> dict[str, Any]:
    from lightning_easyscale.callbacks import DeterminismCallback

    stock = [DeterminismCallback("D1", threads=side.threads)]
    if side.kind == "accumulate":
        return {"strategy": "auto", "devices": 1, "callbacks": stock}
    if side.kind == "ddp":
        return {"strategy": "ddp", "devices": side.executors, "callbacks": stock}
    if side.kind == "packing":
        from lightning.pytorch.strategies import DDPStrategy

        strategy = DDPStrategy(process_group_backend="gloo")
        return {"strategy": strategy, "devices": 1, "num_nodes": side.workers, "callbacks": stock}
    from lightning_easyscale import EasyScaleStrategy

    strategy = EasyScaleStrategy(
        num_ests=side.workers,
        threads_per_est=side.threads,
        reduction=side.reduction,  # type: ignore[arg-type]
        gradient_offload=side.offload,  # type: ignore[arg-type]
        input_offload=side.input_offload,  # type: ignore[arg-type]
        overlap_backward=side.overlaps,
        elastic_dir=_empty(Path(side.directory) / "elastic") if side.snapshot_every is not None else None,
        snapshot_every_n_steps=side.snapshot_every,  # type: ignore[arg-type]
    )
    return {"strategy": strategy, "devices": side.executors}


def _empty(directory: Path) -> Path:
    """A folder from which no run goes on."""
    shutil.rmtree(directory, ignore_errors=True)
    return directory


def run_file(file: Path) -> None:
    """Run the side in a file."""
    main(Side(**json.loads(file.read_text())))
