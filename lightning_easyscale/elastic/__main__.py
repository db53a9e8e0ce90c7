"""Command line of the supervisor: ``python -m lightning_easyscale.elastic run|resize|status|stop``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .control import JobError, JobFolder
from .group import Devices
from .supervisor import Supervisor

_EPILOG = """exit codes of `run`:
  0    the job has finished
  75   stopped with a checkpoint; the same command continues it
  2    it could not start: bad arguments, folder in use, job finished
  130  ended at once by a second Ctrl-C (143: SIGTERM); the newest checkpoint is good
  else the failed executor's own exit code (128 + n: killed by signal n)
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lightning_easyscale.elastic",
        description="Run a training script on devices that may change while it runs.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="do", required=True)
    run = commands.add_parser("run", help="run a job; after a stop or a crash, continue it")
    resize = commands.add_parser("resize", help="move a running job to other devices")
    status = commands.add_parser("status", help="say how a job is doing")
    stop = commands.add_parser("stop", help="let a job save and end; `run` continues it")
    for command in (run, resize, status, stop):
        command.add_argument("--dir", default="elastic_job", help="the job's folder, one per job (%(default)s)")
    for command in (run, resize):
        command.add_argument("--devices", required=True, help="a count (4), or types (v100:1,p100:2)")
    run.add_argument("--num-ests", type=int, help="logical workers, where the script does not say")
    run.add_argument("--max-restarts", type=int, default=3, help="in a row without progress (%(default)s)")
    run.add_argument("--grace", type=float, default=120.0, help="seconds to save in before a kill (%(default)s)")
    run.add_argument("--in-place", action="store_true", help="executors whose devices stay keep their processes")
    run.add_argument("-m", dest="module", action="store_true", help="the script is a module, as in `python -m`")
    run.add_argument("script", help="the training script")
    run.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Carry out a command; returns the exit code."""
    arguments = _parser().parse_args(argv)
    folder = JobFolder(arguments.dir)
    try:
        if arguments.do == "run":
            return _run(folder, arguments)
        if arguments.do == "resize":
            done = folder.request("resize", devices=arguments.devices)
            print(f"resizing: {done['from']} -> {done['to']}")
        elif arguments.do == "stop":
            print(f"stopping on {folder.request('stop')['from']}")
        else:
            print(_status(folder))
    except (JobError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(folder: JobFolder, arguments: argparse.Namespace) -> int:
    devices = Devices.parse(arguments.devices)
    if arguments.num_ests is not None and not 1 <= devices.count <= arguments.num_ests:
        raise ValueError(
            f"`--devices {arguments.devices}` is {devices.count} devices for `--num-ests {arguments.num_ests}`: every"
            " device needs at least one EST. HINT: use fewer devices."
        )
    if folder.read_state().get("state") == "finished":
        raise JobError(f"the job in `{folder.path}` has finished. HINT: give a new one another `--dir`.")
    what = ["-m", arguments.script] if arguments.module else [arguments.script]
    supervisor = Supervisor(
        folder,
        [sys.executable, *what, *arguments.arguments],
        devices,
        num_ests=arguments.num_ests,
        max_restarts=arguments.max_restarts,
        grace=arguments.grace,
        in_place=arguments.in_place,
    )
    return supervisor.run()


def _status(folder: JobFolder) -> str:
    """A line for people; the last known state of a job that does not run."""
    try:
        now = folder.request("status")
    except JobError as error:
        state = folder.read_state()
        if not state:
            raise
        return f"{error} It has done {state['step']} steps, on {state['devices']} last."
    parts = [now["state"], f"step {now['step']}", f"on {now['devices']}"]
    if now["num_ests"] is not None:
        parts.append(f"{now['num_ests']} ESTs")
    parts += [f"{now['restarts']} restarts", f"newest checkpoint {now['checkpoint'] or 'none'}", f"pid {now['pid']}"]
    return ", ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
