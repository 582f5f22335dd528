"""Two models on the same examples: what a new one mends and breaks, and how sure that is."""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool


class Pairs(NamedTuple):
    """Numbers of examples by who is right."""

    both: int
    fixed: int  # the new model alone
    broken: int  # the old model alone
    neither: int

    @property
    def total(self) -> int:
        return sum(self)


def count_pairs(old: Bool[np.ndarray, " n"], new: Bool[np.ndarray, " n"]) -> Pairs:
    """The counts of examples that the old and the new model have right."""
    return Pairs(
        both=int((old & new).sum()),
        fixed=int((~old & new).sum()),
        broken=int((old & ~new).sum()),
        neither=int((~old & ~new).sum()),
    )


def mcnemar(fixed: int, broken: int) -> float:
    """The p-value of McNemar's exact test: two-sided, that either model is as often the better.

    McNemar 1947, with the binomial distribution in place of chi-squared; 1.0 without a difference.
    """
    from scipy.special import bdtr

    num = fixed + broken
    return min(1.0, 2 * float(bdtr(min(fixed, broken), num, 0.5))) if num else 1.0


def upper_bound(count: int, total: int, confidence: float = 0.95) -> float:
    """The one-sided upper bound of a share of which `count` of `total` examples were seen.

    Clopper and Pearson 1934: exact, so at least as often true as `confidence` says.
    """
    from scipy.special import betaincinv

    return 1.0 if count >= total else float(betaincinv(count + 1, total - count, confidence))


def needed_examples(limit: float, confidence: float = 0.95) -> int:
    """The fewest examples with which a bound can be below `limit`: none of them is broken then."""
    return math.ceil(math.log(1 - confidence) / math.log1p(-limit))
