"""One side of an interleaved comparison, in processes of its own.

``python -m recipes._bench_worker spec.json`` trains in blocks of a few steps. After the warm-up it writes ``ready``.
Before each block every process waits until the file ``go`` in the side's directory allows it, so that only one side
computes at a time; after it rank 0 adds a line to ``done``. A block's time runs from the start of its first step on the
lead to the start of the next block's, data loading included, and waits for the device first.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
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
        kind: ``accumulate`` (stock, one process), ``ddp`` (stock, one process per worker) or ``easyscale``.
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

    def write(self) -> Path:
        """Keep the side as a file for its processes."""
        file = Path(self.directory) / "spec.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(asdict(self)))
        return file


class Gate:
    """The worker's end of the two files.

    Args:
        directory: of the side.
        reports: whether this process tells how long blocks took.
    """

    def __init__(self, directory: str, *, reports: bool) -> None:
        self._go = Path(directory) / "go"
        self._done = Path(directory) / "done"
        self._reports = reports

    def wait(self, block: int) -> None:
        """Say at the first block that the warm-up is over; return when `block` may run.

        Raises:
            TimeoutError: if nobody allows it.
        """
        if block == 0 and self._reports:
            self._go.with_name("ready").write_text("\n")
        began = time.monotonic()
        while not (self._go.exists() and int(self._go.read_text() or -1) >= block):
            if time.monotonic() - began > _PATIENCE_S:
                raise TimeoutError(f"nobody allowed block {block} for {_PATIENCE_S:.0f} s.")
            time.sleep(_POLL_S)

    def report(self, entry: dict[str, Any]) -> None:
        """Add a line to ``done``."""
        if self._reports:
            with self._done.open("a") as file:
                file.write(json.dumps(entry) + "\n")


def main(side: Side) -> None:
    """Run one side."""
    import lightning.pytorch as pl
    import torch
    import torch.distributed as dist

    from ._bench_models import BenchModule, loader
    from .workloads import build

    def synchronize() -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()

    class Blocks(pl.Callback):
        """Runs the training loop block by block."""

        gate: Gate | None = None
        began = began_cpu = 0.0

        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            # Clones of the callback in other ESTs do not wait: the lead holds the baton while it does.
            if getattr(trainer.strategy, "is_lead", True):
                self.gate = Gate(side.directory, reports=trainer.global_rank == 0)
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
                synchronize()
                seconds, cpu = time.perf_counter() - self.began, time.process_time() - self.began_cpu
                self.gate.report({"seconds": seconds / side.steps, "cpu": cpu / side.steps, **facts(trainer)})
            self.gate.wait(block)
            synchronize()
            self.began, self.began_cpu = time.perf_counter(), time.process_time()

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

    def facts(trainer: pl.Trainer) -> dict[str, Any]:
        """Memory of this process in bytes, and what the runtime has counted so far."""
        out: dict[str, Any] = {"rss": resident(), "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
        if torch.cuda.is_initialized():
            out["allocated"] = torch.cuda.max_memory_allocated()
            free, total = torch.cuda.mem_get_info()
            out["device"] = total - free
        session = getattr(trainer.strategy, "session", None)
        if session is not None:
            executor = session.executor
            out["counts"] = {
                "switches": executor.switches,
                "meetings": executor.meetings,
                "physical": executor.peers.physical_collectives,
            }
        return out

    pl.seed_everything(1, verbose=False)
    collective = side.model == "collectives"
    model = "empty" if collective else side.model
    accumulated = side.workers if side.kind == "accumulate" else 1
    steps = 1 if collective else side.warmup + side.blocks * side.steps + 1
    trainer = pl.Trainer(
        **_arguments(side),
        accelerator=side.accelerator,
        accumulate_grad_batches=accumulated,
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
        trainer.fit(module, datamodule=data)
        return
    trainer.fit(
        BenchModule(model, side.image_size), loader(model, side.image_size, side.batch_size, steps * side.workers)
    )


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _arguments(side: Side) -> dict[str, Any]:
    from lightning_easyscale.callbacks import DeterminismCallback

    stock = [DeterminismCallback("D1", threads=side.threads)]
    if side.kind == "accumulate":
        return {"strategy": "auto", "devices": 1, "callbacks": stock}
    if side.kind == "ddp":
        return {"strategy": "ddp", "devices": side.executors, "callbacks": stock}
    from lightning_easyscale import EasyScaleStrategy

    strategy = EasyScaleStrategy(
        num_ests=side.workers,
        threads_per_est=side.threads,
        reduction=side.reduction,  # type: ignore[arg-type]
    )
    return {"strategy": strategy, "devices": side.executors}


if __name__ == "__main__":
    main(Side(**json.loads(Path(sys.argv[1]).read_text())))
