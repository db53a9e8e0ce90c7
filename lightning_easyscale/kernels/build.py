"""Builds and loads the C++ kernels of the format: once per source, compiler and vector width, cached on disk.

The library has a plain C interface and is loaded with `ctypes`, so it depends on neither the Python nor the torch
version, and calls release the interpreter lock. The cache is ``lightning_easyscale`` under ``$XDG_CACHE_HOME``
(default ``~/.cache``).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from lightning_easyscale.emulation import host_cpu

from .coefficients import c_header

WIDTHS: dict[str, tuple[str, ...]] = {
    "avx2": ("-mavx2", "-mfma"),
    "avx512": ("-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma", "-mprefer-vector-width=512"),
}
"""Compiler flags of each build; all give the same bits."""

# Contraction is off: the sources say which multiply-adds are fused.
_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-shared",
    "-fopenmp",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
]
_SOURCES = ("functions.h", "winograd.h", "kernels.cpp")


def cache_folder() -> Path:
    """Where what can be made again is kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_easyscale"


def why_unavailable() -> str:
    """Why this machine cannot run the CPU kernels, with the cure; empty where it can."""
    if host_cpu().why_not or host_cpu().isa == "default":
        return (
            f"the CPU ({host_cpu().model}) has no AVX2 with fused multiply-add, which D2's `portable` policy computes"
            " with. HINT: run on an x86-64 CPU of 2013 or later, or on a GPU."
        )
    if _compiler() is None:
        return (
            "no C++ compiler is present, and D2's `portable` policy builds its CPU kernels with one."
            " HINT: install g++ (for example `apt-get install g++`), or name a compiler in the variable CXX."
        )
    return ""


def default_width() -> str:
    """The widest build this CPU can run."""
    return host_cpu().isa


@cache
def load(width: str) -> ctypes.CDLL:
    """The library for one vector width, built where it is not in the cache.

    Args:
        width: a key of `WIDTHS`.

    Raises:
        RuntimeError: where `why_unavailable` says why, and if the compiler fails.
    """
    reason = why_unavailable()
    if reason:
        raise RuntimeError(f"The CPU kernels of D2 cannot run here: {reason}")
    library = ctypes.CDLL(str(_built(width)))
    pointer, number, count = ctypes.c_void_p, ctypes.c_int, ctypes.c_long
    strided = (pointer, count, count, count)
    library.es_matmul.argtypes = [*strided, *strided, pointer, count, count, count, count, number, number]
    library.es_matmul.restype = None
    library.es_sum.argtypes = [pointer, pointer, count, count, count, number]
    library.es_sum.restype = None
    library.es_unary.argtypes = [number, pointer, pointer, count, number]
    library.es_unary.restype = number
    library.es_random.argtypes = [number, ctypes.c_uint64, pointer, count, number]
    library.es_random.restype = None
    library.es_index_add.argtypes = [pointer, pointer, pointer, count, count, number]
    library.es_index_add.restype = None
    image = (pointer, count, count, count, count)
    library.es_input_squares.argtypes = [*image, pointer, *(count,) * 9, number]
    library.es_input_squares.restype = None
    library.es_gradient_squares.argtypes = [*image, pointer, *(count,) * 5, number]
    library.es_gradient_squares.restype = None
    library.es_output_squares.argtypes = [pointer, pointer, *(count,) * 5, number]
    library.es_output_squares.restype = None
    library.es_weight_squares.argtypes = [*image, pointer, count, count, number]
    library.es_weight_squares.restype = None
    library.es_weight_gradient.argtypes = [pointer, pointer, count, number]
    library.es_weight_gradient.restype = None
    return library


def _compiler() -> str | None:
    named = os.environ.get("CXX")
    return next((found for name in ((named,) if named else ("g++", "clang++")) if (found := shutil.which(name))), None)


def _built(width: str) -> Path:
    compiler = _compiler()
    assert compiler is not None
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    here = Path(__file__).parent
    texts = {"coefficients.h": c_header(), **{name: (here / name).read_text() for name in _SOURCES}}
    command = [compiler, *_FLAGS, *WIDTHS[width]]
    key = hashlib.blake2b(repr((command, version, texts)).encode(), digest_size=12).hexdigest()
    cache = cache_folder()
    target = cache / f"kernels-{width}-{key}.so"
    if target.exists():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        for name, text in texts.items():
            (Path(folder) / name).write_text(text)
        made = Path(folder) / target.name
        done = subprocess.run(
            [*command, "-o", str(made), "kernels.cpp"], cwd=folder, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise RuntimeError(
                f"`{' '.join(command)}` failed on the CPU kernels of D2: {done.stderr.strip()[-1500:]}"
                " HINT: name a compiler with OpenMP (g++ 9 or later) in the variable CXX."
            )
        os.replace(made, target)  # processes that build at once each replace it by the same
    return target
