"""What a result was measured on."""

from __future__ import annotations

import platform
from pathlib import Path

import torch


def device_name(gpu: bool) -> str:
    """The name of the GPU, or of the CPU."""
    if gpu:
        return str(torch.cuda.get_device_name())
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
