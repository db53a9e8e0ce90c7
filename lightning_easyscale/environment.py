"""Variables that count only when a process starts with them.

CPU libraries read their instruction-set variables once, when they load, and `import torch` loads them. Assigning to
``os.environ`` afterwards changes nothing, silently. So what a process *has* is what it was started with: the kernel
keeps that in ``/proc/self/environ``, and once torch is loaded this file compares with it, not with ``os.environ``.

Where a user's own process must have other variables than it was started with, it is replaced, once, by the same
command with the right ones. ``exec`` keeps the process id, standard streams and working directory, so whatever started
the script notices nothing.

Invariants: a process restarts at most once; nothing here imports torch.
"""

from __future__ import annotations

import builtins
import logging
import multiprocessing
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from lightning_easyscale.emulation import ISA_VARIABLES

log = logging.getLogger(__name__)

# Holds the id of the process that was restarted. An id, because children inherit the variable but not the id.
_RESTARTED = "EASYSCALE_RESTARTED_PID"


def _directory() -> str | None:
    try:
        return os.getcwd()
    except FileNotFoundError:
        return None


def _initial_environment() -> dict[str, str]:
    try:
        raw = Path("/proc/self/environ").read_bytes()
    except OSError:
        return dict(os.environ)
    pairs = (os.fsdecode(entry).partition("=") for entry in raw.split(b"\0") if entry)
    return {key: value for key, _, value in pairs}


# Taken at import. Relative paths of the command line are relative to the directory the script started in. As long as
# torch is not loaded, what counts is what it will find, which a script may have set itself.
_START_DIRECTORY = _directory()
_START_ENVIRONMENT = _initial_environment() if "torch" in sys.modules else dict(os.environ)


def apply_environment(environment: Mapping[str, str], base: Mapping[str, str] | None = None) -> dict[str, str]:
    """The full environment for a process that is to run under `environment`.

    Args:
        environment: variables to set. It has the whole say about instruction sets: those of `ISA_VARIABLES` that it
            does not name are removed.
        base: what to start from; ``os.environ`` if not given.

    Returns:
        A new mapping, ready for ``subprocess`` or ``os.execve``.
    """
    full = dict(os.environ if base is None else base)
    for name in ISA_VARIABLES:
        full.pop(name, None)
    return {**full, **environment}


def isa_environment() -> dict[str, str]:
    """The instruction-set variables that are in force in this process."""
    return {name: _START_ENVIRONMENT[name] for name in ISA_VARIABLES if name in _START_ENVIRONMENT}


def environment_in_force(environment: Mapping[str, str]) -> bool:
    """Whether this process has had `environment`, and no other instruction-set variable, since torch was loaded."""
    wanted: dict[str, str | None] = dict.fromkeys(ISA_VARIABLES)
    wanted.update(environment)
    return all(_START_ENVIRONMENT.get(name) == value for name, value in wanted.items())


def ensure_environment(environment: Mapping[str, str], *, why: str) -> None:
    """Returns if `environment` is in force in this process; otherwise restarts its script, once, with it.

    A restart does not return: the process is replaced by the same command (script, ``-m``, ``-c``, options,
    arguments) in the directory it was started in, and everything the script did so far happens again. Call it
    before other processes, process groups or files are open.

    Args:
        environment: the variables needed, as for `apply_environment`.
        why: what needs them, as the end of a sentence "... because <why>".

    Raises:
        RuntimeError: where there is no script to restart (notebook, interactive session, standard input), where a
            restart would break someone else's process (pytest, a `multiprocessing` child, a live process group), or
            where a restart has not helped. The message has the cure.
    """
    if environment_in_force(environment):
        return
    settings = _as_shell(environment)
    obstacle = _obstacle()
    if obstacle:
        raise RuntimeError(
            f"This process must start with `{settings}`, because {why}, and cannot restart itself: {obstacle}."
            f" HINT: set these variables for the process that Python starts in, or run a script: `{settings} python"
            " script.py`."
        )
    command = [sys.executable, *sys.orig_argv[1:]]
    log.warning("Restarting `%s` with `%s`, because %s.", shlex.join(command), settings, why)
    _restart(command, {**apply_environment(environment), _RESTARTED: str(os.getpid())})


def _as_shell(environment: Mapping[str, str]) -> str:
    """`environment` as a user would type it in front of a command."""
    removed = [f"-u {name}" for name in ISA_VARIABLES if name in _START_ENVIRONMENT and name not in environment]
    return shlex.join(["env", *" ".join(removed).split(), *(f"{key}={value}" for key, value in environment.items())])


def _obstacle() -> str:
    """Why the running script cannot be restarted; empty if it can."""
    main: Any = sys.modules.get("__main__")
    torch: Any = sys.modules.get("torch")
    if os.environ.get(_RESTARTED) == str(os.getpid()):
        return (
            "it was restarted once already and its variables are still others."
            " One process hosts devices of one type only; run stages with different types in processes of their own"
        )
    if _runs_under_pytest():
        return "it runs under pytest, and the test session would start again from nothing"
    if multiprocessing.parent_process() is not None:
        return "it is a `multiprocessing` child, and only its parent knows how to start it"
    if hasattr(sys, "ps1") or sys.flags.interactive or hasattr(builtins, "get_ipython"):
        return "it is an interactive session or a notebook, which has no script to run again"
    if getattr(main, "__file__", "<none>").startswith("<") and sys.argv[:1] != ["-c"]:
        return "its program was read from standard input, which has no script to run again"
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        return "it already belongs to a process group, whose other members would wait for it"
    return ""


def _runs_under_pytest() -> bool:
    # Both: a script that a test starts inherits the variable, and a script may import pytest.
    return "_pytest.runner" in sys.modules and "PYTEST_CURRENT_TEST" in os.environ


def _restart(command: list[str], environment: dict[str, str]) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if _START_DIRECTORY is not None:
        os.chdir(_START_DIRECTORY)
    os.execve(command[0], command, environment)
