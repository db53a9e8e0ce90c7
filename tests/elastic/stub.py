"""Stands for a training script: keeps the contract of an elastic job, and imports nothing slow.

Usage: stub.py STEPS [FAULT ...], where a FAULT is ``rank:step:kind[:times]``; kinds: ``raise``, ``exit``, ``kill``,
``hang`` (on SIGTERM, instead of saving), ``die`` (killed while saving), ``after``
(fails when training has ended), ``refuse`` (fails when it starts), ``desert`` (ends where it was to
enter the next world), ``linger`` (works on then, without saving on SIGTERM). Executor 0 steps; the others
wait for it. Every executor also notes its start in ``starts.jsonl``.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import sys
import time
from pathlib import Path

folder = Path(os.environ["EASYSCALE_ELASTIC_DIR"])
events = Path(os.environ["EASYSCALE_EVENTS"])
checkpoints = folder / "checkpoints"
checkpoints.mkdir(exist_ok=True)
steps = int(sys.argv[1])
faults = [fault.split(":") for fault in sys.argv[2:]]


def append(path: Path, **fields: object) -> None:
    with path.open("a") as file:
        file.write(json.dumps(fields) + "\n")


def report(event: str, **data: object) -> None:
    append(events, event=event, time=time.time(), pid=os.getpid(), **data)


def due(step: int, *kinds: str) -> list[str] | None:
    """The fault that is due; each happens `times` times, counted in a file."""
    for number, (who, when, kind, *times) in enumerate(faults):
        if int(who) == rank and int(when) <= step and kind in kinds:
            done = folder / f"fault{number}"
            count = int(done.read_text()) if done.exists() else 0
            if count < int(times[0] if times else 1):
                done.write_text(str(count + 1))
                return [kind, when]
    return None


stopping = False


def on_sigterm(*_: object) -> None:
    global stopping
    stopping = True


signal.signal(signal.SIGTERM, on_sigterm)
variables = ("RANK", "WORLD_SIZE", "EASYSCALE_NUM_ESTS", "EASYSCALE_DEVICES", "ATEN_CPU_CAPABILITY")
append(folder / "starts.jsonl", **{name: os.environ.get(name) for name in variables})


def join() -> None:
    """Meet the executors of this world."""
    global rank, size, step, first
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if due(0, "refuse"):
        sys.exit(4)
    report("ready")
    group = os.environ["MASTER_PORT"]
    (folder / f"ready-{group}-{rank}").touch()
    if rank == 0:
        if size > int(os.environ.get("EASYSCALE_NUM_ESTS", 4)):
            sys.exit("too many devices")
        while len(list(folder.glob(f"ready-{group}-*"))) < size:
            time.sleep(0.01)
        generation = int(os.environ["EASYSCALE_GENERATION"])
        report("formed", num_ests=4, placement=[4 // size] * size, generation=generation)
    files = sorted(checkpoints.glob("*.ckpt"), key=lambda f: int(f.stem))
    step = first = int(files[-1].stem) if files else 0


def next_world() -> bool:
    """Enter the world that was announced, if this executor is in it."""
    file = Path(os.environ["EASYSCALE_WORLD"])
    world = json.loads(file.read_text()) if file.exists() else {"generation": 0}
    member = os.environ["EASYSCALE_MEMBER"]
    if world["generation"] <= int(os.environ["EASYSCALE_GENERATION"]) or member not in world["members"]:
        return False
    names = ("RANK", "WORLD_SIZE", "MASTER_PORT", "EASYSCALE_GENERATION")
    values = (world["members"].index(member), len(world["members"]), world["port"], world["generation"])
    os.environ.update({name: str(value) for name, value in zip(names, values, strict=True)})
    return True


rank = size = step = first = 0
join()
while True:
    time.sleep(0.01)
    if rank == 0:
        step += 1
        events.with_suffix(".step").write_bytes(struct.pack("<q", step))
        if step == first + 1:
            report("first_step", step=step)
    else:
        noted = events.with_suffix(".step")
        raw = noted.read_bytes() if noted.exists() else b""
        step = struct.unpack("<q", raw)[0] if len(raw) == 8 else 0
    kind, at = due(step, "raise", "exit", "kill") or ("", "")
    if kind == "raise":
        error = {"type": "ZeroDivisionError", "message": "on purpose"}
        report("exception", executor=rank, rank=2 * rank, step=int(at), **error)
        sys.exit(1)
    if kind == "exit":
        sys.exit(3)
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if stopping:
        if due(step, "hang"):
            time.sleep(60)
        if due(step, "die"):
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == 0:
            (checkpoints / f"{step}.ckpt").write_text("")
            report("saved", step=step)
        if due(step, "desert") or not next_world():
            sys.exit(75)
        stopping = False
        join()
    if step >= steps:
        if rank == 0:
            report("trained")
            if due(step, "linger"):
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                time.sleep(1)
        sys.exit(1 if due(step, "after") else 0)
