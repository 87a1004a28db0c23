"""What a computation takes of a machine's memory."""

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeVar

Result = TypeVar("Result")


def resident_mb(field: Literal["VmRSS", "VmHWM"]) -> float:
    """Memory of this process in 2^20 bytes, on Linux: what it holds now (VmRSS), or held at most (VmHWM)."""
    # not getrusage: its maximum is inherited from the process that started this one
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 2**10


def call_in_fresh_process(function: Callable[..., Result], *arguments: object) -> Result:
    """What a function of a module returns in a process of its own, which holds nothing of this one's."""
    # glibc keeps much of what is freed, by habits that change with the order of allocations: make it give all back
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)
