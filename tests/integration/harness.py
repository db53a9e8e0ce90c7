"""Runs a scenario under stock DDP in N real processes and under EasyScale in executor processes, and compares.

Processes are forked by one `zygote.py`, which has imported everything; reference runs are kept for the session.
"""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..elastic.faults import Fault
from ..ports import free_port
from .exact import differences, exact
from .worker import Task

_DIED = "died"
REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass
class Outcome:
    """What a run left behind.

    Args:
        notes: rank -> what was noted, in order.
        files: relative path -> content, of the files in the run's folder.
        errors: what each process raised, if anything.
        logs: what each process printed.
        left: the files in the elastic folder, if there was one: name -> the boundary that it was saved at.
    """

    notes: dict[int, list[tuple[str, Any]]]
    files: dict[str, Any]
    errors: list[dict[str, Any] | None]
    logs: list[str]
    left: dict[str, str] = field(default_factory=dict)

    @property
    def error(self) -> dict[str, Any] | None:
        """The first process's error."""
        return next((e for e in self.errors if e is not None), None)


class RunFailedError(AssertionError):
    """A run that was to end well did not."""


class Runs:
    """Starts runs; keeps reference runs."""

    def __init__(self, scenarios: Iterable[str] = (), environment: Mapping[str, str] | None = None) -> None:
        self._environment = dict(environment or {})
        self._scenarios = list(scenarios)
        self._zygote: subprocess.Popen[str] | None = None
        self._kept: dict[Any, Outcome] = {}
        self._folder = Path(tempfile.mkdtemp(prefix="easyscale-tests-"))
        self._count = 0

    def close(self) -> None:
        """End the zygote and remove all files."""
        if self._zygote is not None:
            assert self._zygote.stdin is not None
            self._zygote.stdin.close()
            self._zygote.wait(10)
            assert self._zygote.stdout is not None
            self._zygote.stdout.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def reference(
        self, build: str, config: dict[str, Any], num_ests: int, reduction: str = "ddp", **options: Any
    ) -> Outcome:
        """The stock run; made once per session."""
        order = "tree" if reduction == "tree" else "ddp"
        key = build, repr(sorted(config.items())), num_ests, order, repr(options)
        if key not in self._kept:
            task = Task(build, config, "", num_ests, index=0, port=0, reduction=order, **options)
            outcome = self._run(task, processes=num_ests)
            if any(error is not None and error["traceback"] == _DIED for error in outcome.errors):
                # Stock processes that fork loader workers beside gloo's threads crash now and then.
                outcome = self._run(task, processes=num_ests)
            self._kept[key] = outcome
        return self._kept[key]

    def easyscale(
        self, build: str, config: dict[str, Any], placement: tuple[int, ...], reduction: str = "auto", **options: Any
    ) -> Outcome:
        """A run of the whole script under one placement."""
        task = Task(build, config, "", sum(placement), 0, 0, placement=placement, reduction=reduction, **options)
        return self._run(task, processes=len(placement))

    def elastic(
        self,
        build: str,
        config: dict[str, Any],
        stages: list[tuple[tuple[int, ...], int | None]],
        reduction: str = "auto",
        **options: Any,
    ) -> Outcome:
        """Stages with a checkpoint and new processes between: (placement, micro-batch to stop after or None)."""
        joined = Outcome({}, {}, [], [])
        resume: str | None = None
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            for number, (placement, stop_at) in enumerate(stages):
                save = str(Path(folder) / f"{number}.ckpt") if stop_at is not None else None
                held = {"stop_at": stop_at, "save": save, "resume": resume, **options}
                part = self.easyscale(build, config, placement, reduction, **held)
                if part.error is not None:
                    raise RunFailedError(f"stage {number} on {placement}: {part.error['traceback']}")
                for rank, values in part.notes.items():
                    joined.notes.setdefault(rank, []).extend(values)
                joined.files, joined.logs = part.files, [*joined.logs, *part.logs]
                resume = save
        return joined

    def lives(
        self,
        build: str,
        config: dict[str, Any],
        placements: list[tuple[int, ...]],
        faults: Iterable[Fault],
        reduction: str = "auto",
        **options: Any,
    ) -> list[Outcome]:
        """An elastic run that is started again and again, in one folder: one outcome per placement."""
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            root, elastic = Path(folder) / "root", Path(folder) / "elastic"
            parts = []
            for life, placement in enumerate(placements):
                task = Task(
                    build, config, "", sum(placement), 0, 0, placement=placement, reduction=reduction,
                    strategy={"elastic_dir": str(elastic), **options},
                    faults=tuple(fault for fault in faults if fault.life == life),
                )  # fmt: skip
                parts.append(self._run(task, processes=len(placement), root=root))
                parts[-1].left = {path.name: _following(path) for path in elastic.rglob("*.ckpt")}
        return parts

    def _run(self, task: Task, processes: int, root: Path | None = None) -> Outcome:
        self._count += 1
        home = self._folder / str(self._count)
        root = root or home / "root"
        root.mkdir(parents=True, exist_ok=True)
        home.mkdir(exist_ok=True)
        port = free_port()
        files, pids = [], []
        for index in range(processes):
            file = home / str(index)
            file.write_bytes(pickle.dumps(replace(task, root=str(root), index=index, port=port)))
            files.append(file)
            pids.append(self._fork(file))
        answers = _answers(files, pids)
        logs = [file.with_name(file.name + ".log").read_text(errors="replace") for file in files]
        for answer, log in zip(answers, logs, strict=True):
            if answer["error"] is not None:
                answer["error"]["log"] = log[-3000:]
        notes = {rank: values for answer in answers for rank, values in answer["notes"].items()}
        outcome = Outcome(notes, _written(root), [answer["error"] for answer in answers], logs)
        shutil.rmtree(home)
        return outcome

    def _fork(self, file: Path) -> int:
        if self._zygote is None:
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1"}
            environment.update(self._environment)
            environment.pop("EASYSCALE_NUM_ESTS", None)
            self._zygote = subprocess.Popen(
                [sys.executable, "-m", f"{__package__}.zygote", *self._scenarios],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=REPOSITORY,
                env=environment,
            )
            assert self._zygote.stdout is not None
            while self._zygote.stdout.readline().strip() != "ready":
                assert self._zygote.poll() is None, "the zygote has died"
        assert self._zygote.stdin is not None
        assert self._zygote.stdout is not None
        self._zygote.stdin.write(f"{file}\n")
        self._zygote.stdin.flush()
        return int(self._zygote.stdout.readline())


def compare(expected: Outcome, got: Outcome, *, files: bool | str = True, limit: int = 12) -> None:
    """Fail unless a run equals its reference in everything that was noted, on every rank.

    Args:
        expected: the reference.
        got: the run.
        files: compare the files in the run's folder too; ``"names"``: only which there are.
        limit: how many differences to name.
    """
    found: list[str] = []
    for rank in sorted(expected.notes):
        mine, theirs = expected.notes[rank], got.notes.get(rank, [])
        where = next((i for i, (one, other) in enumerate(zip(mine, theirs, strict=False)) if one != other), None)
        if where is not None:
            (name, one), (other_name, other) = mine[where], theirs[where]
            if name != other_name:
                found.append(f"rank {rank}: reference noted `{name}`, the run `{other_name}`")
            else:
                found.extend(f"rank {rank}: {line}" for line in differences(one, other, name))
        elif len(mine) != len(theirs):
            longer = (mine if len(mine) > len(theirs) else theirs)[min(len(mine), len(theirs))][0]
            found.append(f"rank {rank}: {len(mine)} notes in the reference, {len(theirs)} in the run; next `{longer}`")
    if sorted(expected.notes) != sorted(got.notes):
        found.append(f"ranks {sorted(expected.notes)} in the reference, {sorted(got.notes)} in the run")
    if files == "names":
        found.extend(differences(sorted(expected.files), sorted(got.files), "files"))
    elif files:
        found.extend(differences(expected.files, got.files, "files"))
    assert expected.notes, "the reference noted nothing"
    assert not found, f"{len(found)} differences:\n  " + "\n  ".join(found[:limit])


def _answers(files: list[Path], pids: list[int], timeout: float = 60.0) -> list[dict[str, Any]]:
    """Wait for all processes; once one has failed, the others get a few seconds."""
    deadline = time.monotonic() + timeout
    answers: dict[int, dict[str, Any]] = {}
    try:
        while len(answers) < len(files) and time.monotonic() < deadline:
            time.sleep(0.01)
            for index, (file, pid) in enumerate(zip(files, pids, strict=True)):
                out = file.with_name(file.name + ".out")
                if index in answers:
                    continue
                dead = not _alive(pid)
                if out.exists():
                    answers[index] = pickle.loads(out.read_bytes())
                    if answers[index]["error"] is not None:
                        deadline = min(deadline, time.monotonic() + 10)
                elif dead:
                    answers[index] = _lost(_DIED)
                    deadline = min(deadline, time.monotonic() + 10)
    finally:
        for pid in pids:
            if _alive(pid):
                _end(pid)
    return [answers.get(index) or _lost("did not end in time") for index in range(len(files))]


def _lost(what: str) -> dict[str, Any]:
    error = {"type": "Lost", "message": what, "notes": [], "traceback": what, "code": None}
    return {"notes": {}, "error": error, "seconds": 0.0}


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _end(pid: int) -> None:
    """Give a process that has answered a moment to end, then end it and what it started."""
    deadline = time.monotonic() + 2
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.005)
    if _alive(pid):
        try:
            os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:
            return


def _written(root: Path) -> dict[str, Any]:
    """The files of a run: checkpoints tensor by tensor, text as it is, others by name; run folders replaced."""
    written: dict[str, Any] = {}
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        name = str(path.relative_to(root))
        if path.suffix == ".ckpt":
            content = torch.load(path, map_location="cpu", weights_only=False)
            content.pop("easyscale", None)
            written[name] = _without(str(root), exact(content))
        elif name.split("/")[-1].startswith("events.out"):
            key = name.rsplit("events.out", 1)[0] + "events.out"
            written[key] = written.get(key, 0) + 1
        elif path.suffix in (".csv", ".yaml", ".txt"):
            written[name] = path.read_text().replace(str(root), "ROOT")
        else:
            written[name] = "exists"
    return written


def _following(path: Path) -> str:
    return torch.load(path, map_location="cpu", weights_only=True)["easyscale"]["pending"]


def _without(root: str, value: Any) -> Any:
    if isinstance(value, str):
        return value.replace(root, "ROOT")
    if isinstance(value, dict):
        return {_without(root, k): _without(root, v) for k, v in value.items() if not _is_ours(k)}
    return [_without(root, v) for v in value] if isinstance(value, list) else value


def _is_ours(key: Any) -> bool:
    """The reference has one callback more, which has no state."""
    return isinstance(key, str) and key.startswith("DeterminismCallback")
