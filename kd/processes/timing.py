"""Times calls in turn, so that disturbances of the machine affect all of them equally."""
import statistics
import time
from collections.abc import Callable, Hashable

import torch

Call = Callable[[], object]


def interleave(calls: dict[Hashable, Call], rounds: int, warmup: int = 1,
               before: Callable[[Hashable], object] = lambda name: None,
               clock: Callable[[], float] = time.perf_counter) -> dict[Hashable, list[float]]:
    """Time calls in turn, round by round.

    Args:
        calls: by name; each round calls all of them once, in this order.
        rounds: how many rounds are timed, after `warmup` rounds that are not.
        before: is called with the name before each call, and is not timed.
        clock: gives seconds.
    Returns:
        Seconds of each timed round, by name. A call on a GPU is timed to its end.
    """
    seconds = {name: [] for name in calls}
    for number in range(-warmup, rounds):
        for name, call in calls.items():
            before(name)
            synchronize()
            start = clock()
            call()
            synchronize()
            if number >= 0:
                seconds[name].append(clock() - start)
    return seconds


def medians_ms(seconds: dict[Hashable, list[float]]) -> dict[Hashable, float]:
    """The median of each list, in milliseconds."""
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}


def synchronize() -> None:
    """Wait for the GPU, if this process uses one."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    elif torch.mps.is_available():
        torch.mps.synchronize()
