"""How long executors take to exchange gradients, apart from any computing.

Processes that do nothing else run a job's own reduction. All sizes and all numbers of executors take turns within one
round, so that a load on the machine hits all of them alike. An exchange lasts until its last executor is done, and the
lower quartile over the rounds counts: what else runs on the machine only ever adds time.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning_easyscale.planning import Exchange

from ._runs import RunFailedError, _tail, child_environment


def measure_exchanges(
    sizes: Sequence[int],
    executors: Sequence[int],
    *,
    rounds: int,
    kind: str,
    environment: Mapping[str, str],
    directory: Path,
    timeout_s: float,
) -> list[Exchange]:
    """Measure.

    Args:
        sizes: bytes of gradients.
        executors: how many take part, at least 2 each.
        rounds: how often all of them are measured.
        kind: ``cpu`` or ``cuda``.
        environment: of the processes.
        directory: for logs and the result.
        timeout_s: longest time, in seconds.

    Raises:
        RunFailedError: if a process fails or takes too long.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for stale in ("store", "seconds.json"):
        (directory / stale).unlink(missing_ok=True)
    task = {"sizes": list(sizes), "executors": list(executors), "rounds": rounds, "kind": kind, "dir": str(directory)}
    logs = [directory / f"log.{rank}" for rank in range(max(executors))]
    processes = []
    for rank, log in enumerate(logs):
        command = [sys.executable, "-m", "recipes._exchange", str(rank), json.dumps(task)]
        with log.open("wb") as out:
            processes.append(
                subprocess.Popen(
                    command, env=child_environment(dict(environment)), stdout=out, stderr=subprocess.STDOUT
                )
            )
    end = time.monotonic() + timeout_s
    try:
        for process, log in zip(processes, logs, strict=True):
            try:
                status = process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise RunFailedError(f"exchanges have not ended after {timeout_s:.0f} s:\n{_tail(log)}") from None
            if status:
                raise RunFailedError(f"exchanges ended with status {status}; the log is {log}:\n{_tail(log)}")
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [Exchange(*row) for row in json.loads((directory / "seconds.json").read_text())]


def _executor(rank: int, *, sizes: Sequence[int], executors: Sequence[int], rounds: int, kind: str, dir: str) -> None:
    """One executor; executor 0 writes the result."""
    import torch
    import torch.distributed as dist

    from lightning_easyscale.placement import Placement
    from lightning_easyscale.reduction import RingReduction, TreeReduction
    from lightning_easyscale.reduction.bucket import BucketForm, LocalGradients

    torch.set_num_threads(1)
    device = torch.device(kind, rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo",
        init_method=f"file://{dir}/store",
        rank=rank,
        world_size=max(executors),
    )
    order = TreeReduction if kind == "cuda" else RingReduction  # what `reduction="auto"` takes for many ESTs
    reductions: dict[int, TreeReduction | RingReduction] = {}
    for k in executors:
        group = dist.new_group(list(range(k)))
        if rank < k:
            reductions[k] = order(Placement((1,) * k), rank, group, k)
    took: dict[tuple[int, int], list[float]] = {(size, k): [] for k in executors for size in sizes}
    for _ in range(rounds + 1):  # the first one opens connections
        for size, k in took:
            flat = torch.ones(max(1, size // 4), device=device)
            dist.barrier()
            began = time.perf_counter()
            if k in reductions:
                reduction = reductions[k]
                if isinstance(reduction, TreeReduction):
                    reduction.start(0, [flat]).wait()
                else:
                    reduction.start(0, LocalGradients(BucketForm([0], [flat]), [[flat]], None))()
                if kind == "cuda":
                    torch.cuda.synchronize()
            took[size, k].append(time.perf_counter() - began if k in reductions else 0.0)
    everyone: list[dict[tuple[int, int], list[float]]] = [{} for _ in range(max(executors))]
    dist.all_gather_object(everyone, took)
    for reduction in reductions.values():
        reduction.close()
    if rank == 0:
        rows = []
        for size, k in took:
            lasted = sorted(max(times) for times in zip(*(e[size, k][1:] for e in everyone), strict=True))
            rows.append((float(size), k, lasted[len(lasted) // 4]))
        Path(dir, "seconds.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


if __name__ == "__main__":
    _executor(int(sys.argv[1]), **json.loads(sys.argv[2]))
