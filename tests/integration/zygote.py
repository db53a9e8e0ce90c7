"""A process that has imported everything and forks workers: a worker costs milliseconds instead of seconds.

Reads one path per line from standard input, forks, answers with the child's process id. The child runs the task in
that file (`worker.py`) and writes its answer beside it. Every worker is a process of its own that has done nothing
yet, so nothing needs to be reset between runs.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import signal
import sys
import warnings


def main() -> None:
    warnings.simplefilter("ignore")
    import lightning.pytorch  # noqa: F401
    import tensorboard.compat.proto.event_pb2  # noqa: F401
    import torch._dynamo
    import torch.utils.tensorboard  # noqa: F401
    import torchmetrics.classification  # noqa: F401

    import lightning_easyscale  # noqa: F401

    from . import worker

    for module in sys.argv[1:]:
        __import__(module)
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print("ready", flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.setsid()
            with open(line.strip() + ".log", "wb", buffering=0) as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            faulthandler.enable()
            os._exit(worker.main(line.strip()))
        print(pid, flush=True)


if __name__ == "__main__":
    main()
