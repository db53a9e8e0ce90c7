"""When a running job takes other devices, and when it does not."""

from __future__ import annotations

from .group import Devices


def why_no_resize(
    wanted: Devices, *, running: Devices, target: Devices | None, phase: str, num_ests: int | None
) -> str | None:
    """Why a job does not take the devices that were asked for; None where it does.

    Args:
        wanted: the devices.
        running: those it runs on.
        target: those it is on its way to.
        phase: what it is doing.
        num_ests: N, once it is known.
    """
    if phase == "ending":
        return "training has ended: it takes no other devices."
    if phase == "stopping for good":
        return "the job is stopping: it takes no other devices."
    if target is not None or phase == "starting":
        return f"the job is on its way to {target or running} already. HINT: wait for its first step there."
    if phase == "stopping":
        return "an executor was told to end and the job is saving. HINT: resize after its next step."
    if num_ests is not None and wanted.count > num_ests:
        return (
            f"`--devices` asks for {wanted.count} devices for {num_ests} ESTs: every device needs at least one."
            f" HINT: resize to at most {num_ests}."
        )
    if wanted == running:
        return f"the job runs on {wanted} already."
    return None
