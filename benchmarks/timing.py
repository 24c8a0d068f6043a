"""How things are timed: with how many threads, for how many rounds, and beside whom."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch

TURN = 0.5  # seconds a turn of one contender may take, of which it has one round at least


def stopwatch(call: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """What `call` returns, and the seconds it took."""
    start = time.perf_counter()
    result = call(*arguments)
    return result, time.perf_counter() - start


def rounds(seconds: float) -> dict[str, int]:
    """For benchmark.pedantic, of a call that takes about `seconds`."""
    count = max(1, min(1000, int(TURN / seconds)))
    return {"rounds": count, "warmup_rounds": min(count - 1, 3)}


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch on `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Others:
    """How much of the processor other processes use: as a share of one core since the last `start`."""

    def __init__(self, patience: float) -> None:
        self._own = psutil.Process()
        self._patience = patience

    def start(self) -> None:
        self._began, self._used = time.perf_counter(), self._theirs()

    def share(self) -> float:
        return max(0.0, (self._theirs() - self._used) / (time.perf_counter() - self._began))

    def wait(self) -> None:
        """Until others use less than a tenth of a core, or patience is at its end."""
        while self._patience > 0:
            self.start()
            time.sleep(0.5)
            if self.share() < 0.1:
                return
            self._patience -= 0.5

    def _theirs(self) -> float:
        whole, own = psutil.cpu_times(), self._own.cpu_times()
        idle = whole.idle + getattr(whole, "iowait", 0.0)
        return sum(whole) - getattr(whole, "guest", 0.0) - getattr(whole, "guest_nice", 0.0) - idle - own.user - own.system
