"""The live cluster: the simulator's policies drive real jobs.

A policy's answer is in force at once: devices it takes from a job count as free, devices it gives as taken. The
processes follow: a job whose devices changed is told to stop at its next step with a checkpoint, and starts again on
the new ones when those are really free. Nothing is decided between events, as in the simulation.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from lightning_easyscale.planning import Profile, plan
from lightning_easyscale.planning.by_type import Counts
from lightning_easyscale.simulation import Costs, JobState, Policy, View
from lightning_easyscale.simulation.policy import Changes

from ._profile_config import LEVELS
from ._runs import RunFailedError
from ._stage import RunSpec
from ._stage_callbacks import read_report
from ._warm import WarmProcesses, WarmRun

_POLL_S = 0.02


@dataclass
class LiveJob:
    """A job and its processes.

    Args:
        state: what the policy sees.
        base: the stage that all of its stages are made from.
        warm: what its processes are forked from.
        run: processes, while there are some.
        stage: the running stage.
        running_on: its devices.
        done: optimizer steps at the last checkpoint.
        told: whether the running stage was told to stop.
        stages: (time it started, devices, first step, last step) of the stages that have ended.
    """

    state: JobState
    base: RunSpec
    warm: WarmProcesses
    run: WarmRun | None = None
    stage: RunSpec | None = None
    running_on: Counts | None = None
    done: int = 0
    told: bool = False
    began: float = 0.0
    stages: list[tuple[float, Counts, int, int]] = field(default_factory=list)

    @property
    def steps_done(self) -> int:
        """Optimizer steps so far."""
        if self.stage is None or self.stage.report is None:
            return self.done
        lines = read_report(self.stage.report, 0)
        return lines[-1][0] if lines else self.done


def stage_of(
    base: RunSpec, number: int, *, types: Sequence[str], counts: Counts, seconds: Mapping[str, float], first_step: int
) -> RunSpec:
    """The stage of a job on `counts` devices per type, with the planner's split of its ESTs."""
    names = tuple(t for t, n in zip(types, counts, strict=True) for _ in range(n))
    found = plan(base.num_ests, names, seconds)
    names = tuple(names[i] for i in found.used)  # a device that would only slow the others down stays idle
    home = Path(base.record).parent
    pace = dict(zip(types, base.pace[0][1], strict=True))
    return replace(
        base,
        devices=",".join(f"{name}:{n}" for name, n in Counter(names).items()),
        ests_per_executor=found.placement.ests_per_executor,
        first_step=first_step,
        save=str(home / f"stage_{number}.ckpt"),
        resume=str(home / f"stage_{number - 1}.ckpt") if number else None,
        pace=((0, tuple(pace[name] for name in names)),),
        report=str(home / f"steps_{number}"),
        control=str(home / f"stop_{number}"),
    )


class LiveCluster:
    """Runs jobs under a policy.

    Args:
        types: device types.
        capacity: devices per type.
        policy: who decides.
        jobs: in order of submission.
        profile: speeds, for the split of ESTs.
        costs: what the policy is told that changes cost.
        on_event: told of starts, changes and ends.
    """

    def __init__(
        self,
        types: Sequence[str],
        capacity: Counts,
        policy: Policy,
        jobs: Sequence[LiveJob],
        profile: Profile,
        *,
        costs: Costs,
        on_event: Callable[[str], None],
    ) -> None:
        policy.check([job.state for job in jobs], capacity, types)
        self.jobs, self.policy, self.profile, self.on_event = list(jobs), policy, profile, on_event
        self.view = View(0.0, tuple(types), capacity, list(capacity), list(capacity), {}, costs)
        self._free = list(capacity)  # of processes
        self._begin = 0.0

    def run(self, timeout_s: float) -> None:
        """Run all jobs to their end.

        Raises:
            RunFailedError: if a process fails or it takes too long.
        """
        self._begin = time.monotonic()
        waiting = list(self.jobs)
        left = len(self.jobs)
        try:
            while left:
                now = self.view.now = time.monotonic() - self._begin
                if now > timeout_s:
                    raise RunFailedError(f"{left} jobs have not ended after {timeout_s:.0f} s.")
                while waiting and waiting[0].state.spec.submit_s <= now:
                    job = waiting.pop(0)
                    self.view.active[job.state.index] = job.state
                    self.view.arrived.append(job.state)
                left -= sum(self._look_after(job) for job in self.jobs if job.run is not None)
                if self.view.arrived or self.view.gone:
                    self._decide()
                self._follow()
                time.sleep(_POLL_S)
        finally:
            for job in self.jobs:
                if job.run is not None:
                    job.run.kill()

    def _look_after(self, job: LiveJob) -> bool:
        """Notice the end of a stage; True if it was the job's."""
        assert job.run is not None
        if not job.run.poll():
            return False
        assert job.running_on is not None
        steps, state = job.steps_done, job.state
        job.stages.append((job.began, job.running_on, job.done, steps))
        self._free = [a + b for a, b in zip(self._free, job.running_on, strict=True)]
        job.done, job.run, job.running_on, job.told = steps, None, None, False
        if steps < state.spec.steps:
            return False
        self._release(state)
        state.remaining, state.finished_s = 0.0, self.view.now
        state.segments.append((self.view.now, None))
        del self.view.active[state.index]
        self.view.gone.append(state)
        self.on_event(f"{self.view.now:7.1f} s  {state.spec.name} has ended")
        return True

    def _release(self, state: JobState) -> None:
        if state.counts is not None:
            state.advance(self.view.now)
            self.view.free = [a + b for a, b in zip(self.view.free, state.counts, strict=True)]
            state.counts = None

    def _decide(self) -> None:
        now = self.view.now
        for job in self.jobs:  # what policies look at comes from the processes, not from a model
            if job.state.index in self.view.active:
                job.state.remaining = job.state.spec.steps - job.steps_done
                if job.state.counts is not None:
                    job.state.device_seconds += (now - job.state.updated_s) * sum(job.state.counts)
                job.state.updated_s = job.state.resume_s = now
        changes = self.policy.decide(self.view)
        self.view.arrived, self.view.gone = [], []
        self._apply(changes)

    def _apply(self, changes: Changes) -> None:
        now = self.view.now
        changed = {i: c for i, c in changes.items() if c != self.jobs[i].state.counts}
        for index, counts in changed.items():
            state = self.jobs[index].state
            if state.started_s is None:
                state.started_s = now
            else:
                state.rescales += counts is not None
                state.preemptions += counts is None
            self._release(state)
            state.segments.append((now, counts))
        for index, counts in changed.items():
            if counts is not None:
                state = self.jobs[index].state
                state.counts, state.step_s = counts, state.planner.seconds(counts)
                self.view.free = [a - b for a, b in zip(self.view.free, counts, strict=True)]
            self.on_event(f"{now:7.1f} s  {self.jobs[index].state.spec.name} -> {self._text(counts)}")
        if min(self.view.free) < 0:
            raise RuntimeError(f"policy `{self.policy.name}` over-committed the cluster: {self.view.free} left.")

    def _follow(self) -> None:
        """Let the processes follow what was decided."""
        for job in self.jobs:
            state = job.state
            if job.run is not None and job.running_on != state.counts and not job.told:
                assert job.stage is not None
                assert job.stage.control is not None
                Path(job.stage.control).touch()
                job.told = True
            elif job.run is None and state.counts is not None:
                left = [a - b for a, b in zip(self._free, state.counts, strict=True)]
                if min(left) >= 0:
                    self._free = left
                    self._start(job, state.counts)

    def _start(self, job: LiveJob, counts: Counts) -> None:
        spec = job.state.spec
        kernels, number = LEVELS[job.base.level], len(job.stages)
        held = [t for t, n in zip(self.view.types, counts, strict=True) if n]
        seconds = {t: self.profile.seconds(spec.workload, t, kernels, spec.batch_size) for t in held}
        job.stage = stage_of(
            job.base, number, types=self.view.types, counts=counts, seconds=seconds, first_step=job.done
        )
        job.run = job.warm.start(job.stage, Path(job.base.record).parent / f"log_{number}")
        job.running_on, job.began = counts, time.monotonic() - self._begin

    def _text(self, counts: Counts | None) -> str:
        if counts is None:
            return "waits"
        return " + ".join(f"{n} {t}" for t, n in zip(self.view.types, counts, strict=True) if n)
