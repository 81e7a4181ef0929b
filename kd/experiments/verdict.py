"""Whether a gain is more than chance: intervals over seeds, and a verdict in words."""
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import mean, stdev

import numpy as np

from data.errors import counted

CONFIDENCE = 0.95
PAYS, DOES_NOT_PAY, CANNOT_TELL = "pays", "does not pay", "cannot tell"
FEW, MANY = 3, 30  # seeds to train when nothing is known about their spread; the most that an advice names


@dataclass(frozen=True)
class Judgement:
    """What pairs of runs, each of one seed, say about a gain in AP."""

    verdict: str
    reason: str = ""                # why it cannot tell, and how many seeds may be needed
    baseline: str = ""              # the name of what the gain is over
    gain: float | None = None       # in AP, as a fraction: mean over the pairs
    interval: float | None = None   # half the width of its confidence interval, from two or more pairs
    pairs: int = 0
    seeds: int | None = None        # see `seeds_needed`

    def __str__(self) -> str:
        return f"{self.verdict} ({self.reason})" if self.reason else self.verdict


def judge(differences: Sequence[float], baseline: str) -> Judgement:
    """The verdict on a gain from its differences by seed.

    It pays if the whole confidence interval is above 0, and does not if no part of it is. Otherwise, and with only
    one seed, nobody can tell.
    """
    n = len(differences)
    gain, half = paired_interval(differences)
    if half is None:
        return Judgement(CANNOT_TELL, f"1 seed: train at least {FEW}", baseline, gain, None, n, FEW)
    if gain - half > 0 or gain + half <= 0:
        return Judgement(PAYS if gain > 0 else DOES_NOT_PAY, "", baseline, gain, half, n, n)
    seeds = seeds_needed(gain, stdev(differences), n)
    advice = f"more than {MANY} seeds" if seeds is None else f"about {counted(seeds - n, 'more seed')}"
    return Judgement(CANNOT_TELL, advice, baseline, gain, half, n, seeds)


def seeds_needed(gain: float, deviation: float, have: int) -> int | None:
    """The first number of seeds above `have` whose interval would not contain 0; None if there is none up to `MANY`.

    Args:
        gain, deviation: mean and standard deviation of the differences, taken to stay as they are.
    """
    for n in range(have + 1, MANY + 1):
        error = deviation / math.sqrt(n)
        if 1.95 * error < abs(gain) and t_quantile(n - 1) * error < abs(gain):  # t is always above 1.95
            return n
    return None


def paired_interval(differences: Sequence[float]) -> tuple[float, float | None]:
    """Mean of paired differences, and half the width of its confidence interval by Student's t; None for only one."""
    n = len(differences)
    if n < 2:
        return mean(differences), None
    return mean(differences), t_quantile(n - 1) * stdev(differences) / math.sqrt(n)


@cache
def t_quantile(freedom: int, confidence: float = CONFIDENCE) -> float:
    """The standard errors to either side that contain `confidence` of Student's t distribution.

    With t = sqrt(freedom) * tan(a), the density is proportional to cos(a) ** (freedom - 1), summed in fine steps.
    """
    edges = np.linspace(0, np.pi / 2, 1_000_001)
    share = np.cumsum(np.cos((edges[1:] + edges[:-1]) / 2) ** (freedom - 1))
    return float(np.sqrt(freedom) * np.tan(np.interp(confidence, share / share[-1], edges[1:])))
