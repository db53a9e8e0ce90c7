"""A look at whether device types really give different bits.

Emulated types differ only where the CPU and its libraries can: a CPU without AVX-512 has fewer instruction sets to
offer, and a build of torch without MKL or oneDNN ignores their variables. So nothing is assumed: a tiny model runs once
under each type, in a process of its own, and the digests are compared. The answer belongs to a CPU model, a torch
build and a type's environment, and is kept on disk under that key.

Invariant: the probe never fails a job. It informs; where it cannot run, it says so.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from lightning_easyscale.devices import DeviceType, device_type
from lightning_easyscale.emulation import host_cpu
from lightning_easyscale.environment import apply_environment

log = logging.getLogger(__name__)

_TIMEOUT_S = 120.0
_memo: dict[str, str] = {}


def _print_digest() -> None:
    """Prints a digest of forward and backward of a tiny model; its source runs in a process of its own."""
    import hashlib

    import torch
    from torch.nn import functional

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)

    # Made from integers: generators draw other numbers under other instruction sets, and inputs must be equal.
    def values(*shape: int) -> torch.Tensor:
        steps = torch.arange(torch.Size(shape).numel(), dtype=torch.int64) * 2654435761 % 2000 - 1000
        return (steps.to(torch.float32) / 1000).reshape(shape)

    image, kernel, weight = values(4, 3, 16, 16), values(8, 3, 3, 3), values(8 * 14 * 14, 10) / 40
    kernel.requires_grad_()
    weight.requires_grad_()
    features = functional.conv2d(image, kernel)
    logits = torch.relu(features).flatten(1) @ weight
    loss = torch.softmax(logits, dim=1).exp().mean()
    loss.backward()
    digest = hashlib.sha256()
    for tensor in (features, logits, loss, kernel.grad, weight.grad):
        assert tensor is not None
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    print(digest.hexdigest())


def probe(types: Sequence[str], *, emulate: bool | None = None) -> dict[str, str]:
    """Runs a tiny model (convolution, matmul, softmax, exp; forward and backward) once under each type's environment.

    Args:
        types: names of CPU types; repetitions count once.
        emulate: as in `devices.device_type`.

    Returns:
        SHA-256 of all results for each type, in the order given. Types with equal digests give equal bits at least on
        this model.

    Raises:
        ValueError: for a type that is not on this machine, or a CUDA type, whose identity needs no probe.
        RuntimeError: if a probing process fails, with the end of what it printed.
    """
    resolved = {name: device_type(name, emulate=emulate) for name in dict.fromkeys(types)}
    cuda = [name for name, found in resolved.items() if found.kind != "cpu"]
    if cuda:
        raise ValueError(f"`types` has the CUDA devices {cuda}. HINT: probe CPU types only.")
    keys = {name: _key(found) for name, found in resolved.items()}
    missing = {keys[name]: found for name, found in resolved.items() if _known(keys[name]) is None}
    # All at once: nearly all of the time is spent importing torch.
    running = {key: _start(found.environment) for key, found in missing.items()}
    outcomes = {key: _finish(process) for key, process in running.items()}
    for key, (digest, failure) in outcomes.items():
        if failure:
            raise RuntimeError(f"the probe of {missing[key].name} {failure}")
        _remember(key, digest)
    return {name: _memo[key] for name, key in keys.items()}


def indistinguishable(digests: Mapping[str, str]) -> tuple[tuple[str, ...], ...]:
    """Groups of two or more types whose digests are equal, as returned by `probe`."""
    groups: dict[str, list[str]] = {}
    for name, digest in digests.items():
        groups.setdefault(digest, []).append(name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


def what_does_not_differ(types: Sequence[str], *, emulate: bool | None = None) -> str:
    """A sentence for a warning if types in use cannot be told apart on this machine or be probed; else empty.

    Args:
        types: the names in use; fewer than two different ones need no probe.
        emulate: as in `devices.device_type`.
    """
    if len(set(types)) < 2:
        return ""
    try:
        same = indistinguishable(probe(types, emulate=emulate))
    except (OSError, RuntimeError) as error:
        return f"Whether the device types {', '.join(dict.fromkeys(types))} differ in bits could not be probed: {error}"
    if not same:
        return ""
    groups = "; ".join(" = ".join(group) for group in same)
    return (
        f"On this machine ({host_cpu().model}, {host_cpu().isa}) these device types give the same bits: {groups}."
        " An experiment that expects them to differ shows nothing here."
    )


def _key(found: DeviceType) -> str:
    environment = sorted(found.environment.items())
    facts = [
        host_cpu().model,
        *found.identity,
        environment,
        version("torch"),
        sys.version,
        inspect.getsource(_print_digest),
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]


def _cache_file(key: str) -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root, "lightning_easyscale", f"probe-{key}.txt")


def _known(key: str) -> str | None:
    if key not in _memo:
        try:
            digest = _cache_file(key).read_text().strip()
        except OSError:
            return None
        if len(digest) != hashlib.sha256().digest_size * 2:
            return None
        _memo[key] = digest
    return _memo[key]


def _remember(key: str, digest: str) -> None:
    _memo[key] = digest
    target = _cache_file(key)
    temporary = target.with_suffix(f".{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(digest)
        temporary.replace(target)
    except OSError as error:
        log.debug("The result of the probe is not kept: %s", error)


def _start(environment: Mapping[str, str]) -> subprocess.Popen[str]:
    program = f"{inspect.getsource(_print_digest)}\n_print_digest()"
    return subprocess.Popen(
        [sys.executable, "-c", program],
        env=apply_environment(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    """``(digest, "")``, or ``("", what went wrong)``; no process is left behind either way."""
    with process:
        try:
            out, err = process.communicate(timeout=_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            return "", f"did not end within {_TIMEOUT_S:.0f} s"
    if process.returncode != 0:
        return "", f"ended with status {process.returncode}: {err.strip()[-500:]}"
    return out.strip(), ""
