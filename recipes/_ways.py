"""Ways to compute that benchmarks compare, from fast to exact everywhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from lightning_easyscale import determinism, kernels

WAYS = ("tf32", "nondeterministic", "d1", "d2")


@contextmanager
def in_force(way: str, *, threads: int, device_type: str) -> Iterator[None]:
    """One of `WAYS` for the time of a ``with`` block."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark
    cudnn.allow_tf32 = matmul.allow_tf32 = way == "tf32"
    try:
        with ExitStack() as stack:
            if way in ("d1", "d2"):
                level = determinism.Level.parse("D1" if way == "d1" else "D1+D2")
                record = determinism.apply(level, threads=threads, device_type=device_type, policy="portable")
                stack.callback(determinism.restore, record)
                stack.enter_context(determinism.deterministic_replacements())
            else:
                cudnn.benchmark = True  # the fastest kernels, whichever they are
            if way == "d2":
                stack.enter_context(kernels.portable())
            yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark = before
