"""Where a step's time goes, measured without making the device wait."""

import time

import torch


class StepClock:
    """Adds up the time of the named parts of steps.

    On a GPU the marks are events in its queue, which are read only when the sums are asked for.

    Args:
        device: Where the steps run.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.marks: list[tuple[str, float | torch.cuda.Event]] = []
        self.mark("")

    def mark(self, part: str) -> None:
        """The time since the last mark belongs to `part`; to none if it is empty."""
        if not self.cuda:
            self.marks.append((part, time.perf_counter()))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append((part, event))

    def pop_shares(self) -> dict[str, float]:
        """Share of each part in the time since the last call; they sum to 1."""
        if self.cuda:
            torch.cuda.synchronize()
        sums: dict[str, float] = {}
        for (_, start), (part, end) in zip(self.marks, self.marks[1:], strict=False):
            if isinstance(start, float):
                assert isinstance(end, float)
                seconds = end - start
            else:
                assert isinstance(end, torch.cuda.Event)
                seconds = start.elapsed_time(end) / 1000
            sums[part] = sums.get(part, 0.0) + seconds
        self.marks = self.marks[-1:]
        sums.pop("", None)
        whole = sum(sums.values()) or 1.0
        return {part: seconds / whole for part, seconds in sums.items()}
