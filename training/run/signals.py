"""SIGTERM, SIGINT and SIGUSR1 ask a run to stop after the step it is in; a Ctrl-C after that ends it at once."""

import multiprocessing
import os
import signal
from types import FrameType, TracebackType
from typing import Any

import torch
from accelerate import Accelerator

from training.run.engine import PATIENCE

EXIT_INTERRUPTED = 75
"""Exit code of a run that was asked to stop and wrote a checkpoint (EX_TEMPFAIL of sysexits.h: try again later)."""


class Interrupted(Exception):
    """The run was asked to stop, and can go on with `--resume auto`."""


class StopRequest:
    """Within it, signals are kept until the loop asks for them.

    Processes are signalled at different times, or only one of them is: they agree on the step through a group of their
    own on the CPU, so that no GPU waits.

    Args:
        accelerator: The engine.
    """

    # schedulers warn with the last two; Windows lacks them
    NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2")
    SIGNALS = tuple(signal.Signals[name] for name in NAMES if hasattr(signal, name))

    def __init__(self, accelerator: Accelerator) -> None:
        self.signal = 0
        self.speaks = accelerator.is_main_process
        several = accelerator.num_processes > 1
        self.group: Any = torch.distributed.new_group(backend="gloo", timeout=PATIENCE) if several else None

    def __enter__(self) -> "StopRequest":
        self.previous = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        # Loader processes leave SIGTERM to this one, which would wait for them after an error without end.
        if kind is not None:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise because they die
            for child in multiprocessing.active_children():
                child.kill()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        signal.signal(signal.SIGINT, self.previous[signal.SIGINT])
        if self.speaks:
            name = signal.Signals(number).name
            # not print, which the signal may have come into the middle of
            os.write(2, f"\n{name}: stopping after this step, with a checkpoint; Ctrl-C ends at once\n".encode())

    def agreed(self) -> str | None:
        """Name of the signal if any process received one before now; every process gets the same answer."""
        number = torch.tensor(self.signal)
        if self.group is not None:
            torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX, group=self.group)
        return signal.Signals(int(number)).name if number else None

    def wait_for_all(self) -> None:
        """Wait until every process has come here: launchers kill the others soon after one has left."""
        if self.group is not None:
            torch.distributed.barrier(group=self.group)


def ignore_in_workers(worker: int) -> None:
    """Leave a signal that reaches a whole process group, such as Ctrl-C, to the training process."""
    for number in StopRequest.SIGNALS:
        signal.signal(number, signal.SIG_IGN)
