"""Puts a Slurm job back into the queue, as Lightning does, once all ESTs have stopped and saved.

Slurm sends the requeue signal (``--signal=SIGUSR1@120``) when a job's time is nearly up, and does not queue it again
by itself. Where it preempts a job it sends SIGTERM, and ``--requeue`` does the rest.
"""

from __future__ import annotations

import os
import subprocess
import warnings

_SECONDS = 60


def requeue_job() -> None:
    """Ask Slurm to start this job again; warns where that fails."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array is not None else os.environ["SLURM_JOB_ID"]
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True, timeout=_SECONDS)
    except (OSError, subprocess.SubprocessError) as error:
        why = (getattr(error, "stderr", None) or str(error)).strip()
        warnings.warn(
            f"the Slurm job {job} could not be put back into the queue: {why}. The checkpoint is committed."
            f" HINT: `scontrol requeue {job}`, or submit the same command again",
            stacklevel=2,
        )
