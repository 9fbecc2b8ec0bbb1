"""Mean, sample deviation, t-intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

CONFIDENCE = 0.95


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean."""
    return float(np.mean(values))


def deviation(values: Sequence[float]) -> float:
    """Sample standard deviation (n − 1 in the denominator); 0 for one value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def spread(values: Sequence[float], within: float | None = None) -> list[float | None]:
    """Mean, and the sample deviation over protections (`within`: over audit seeds, for one protection)."""
    return [mean(values), deviation(values) if len(values) > 1 else within]


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Student's t-interval at 95 % for the mean: m ± t_{n−1}·s/√n. None for fewer than two values: one seed has no
    spread, and none is made up."""
    if len(values) < 2:
        return None
    from scipy import special  # slow to import, and a command that only reports an error needs none of it

    half = float(special.stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2)) * deviation(values) / math.sqrt(len(values))
    return mean(values) - half, mean(values) + half


def limits_of(values: Sequence[float]) -> list[float] | None:
    """`interval` as JSON holds it."""
    found = interval(values)
    return list(found) if found else None


def paired(first: Sequence[float], second: Sequence[float]) -> list[float]:
    """first − second, seed by seed."""
    return [a - b for a, b in zip(first, second, strict=True)]
