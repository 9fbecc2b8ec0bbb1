"""The strength of another attempt at a protection, by how far the original metric fell in those before."""

from __future__ import annotations

import math
from collections.abc import Sequence

AIM = 0.9  # of what the original metric may lose: where another attempt should end
ENOUGH = 0.5  # of it: an attempt that uses so much is as strong as it need be
APART = 1.5  # times stronger, what ended outside: closer ones leave nothing to try between

Try = tuple[float, float]  # a strength, and the fall of the original metric that it ended with: NaN where it broke


def another(tries: Sequence[Try], allowed: float, weakest: float) -> float | None:
    """Strength for another attempt after `tries`, in order; None where none is worth its time.

    Weaker, as long as all ended with more than the `allowed` fall; then, where the strongest that ended within it used
    less than half of it, one between that and the weakest that did not: so a tolerance is a number that is used.
    """
    inside = [t for t in tries if t[1] <= allowed]
    outside = [t for t in tries if not t[1] <= allowed]
    if not inside:
        return max(weakest, weakened(outside, allowed)) if outside[-1][0] > weakest else None
    if not outside:
        return None
    below, above = max(inside), min(outside, key=lambda t: t[0])
    if below[1] >= ENOUGH * allowed or above[0] < APART * below[0]:
        return None
    return between(below, above, allowed)


def weakened(tries: Sequence[Try], allowed: float) -> float:
    """Strength for another attempt, after `tries`, each of which fell by more than `allowed`. A fall is taken to grow
    as strengthᵖ, with p between a quarter and one: by the last two attempts, or one where there has been but one. Those
    that broke say nothing of it; after one that did: half of its strength."""
    strength, fall = tries[-1]
    if not math.isfinite(fall):
        return strength / 2
    power, measured = 1.0, [t for t in tries if math.isfinite(t[1])]
    if len(measured) > 1:
        stronger, further = measured[-2]
        comparable = further > fall > 0 and stronger > strength
        power = math.log(further / fall) / math.log(stronger / strength) if comparable else 0.25
    return strength * math.pow(AIM * allowed / fall, 1 / min(1.0, max(0.25, power)))


def between(below: Try, above: Try, allowed: float) -> float:
    """Strength between one that ended within `allowed` and a greater one that did not: a fall is taken to grow as the
    logarithm of the strength. No nearer to either than a fifth of the way; half of it, where the greater one broke."""
    (low, kept), (high, lost) = below, above
    share = (AIM * allowed - kept) / (lost - kept) if math.isfinite(lost) else 0.5
    return low * math.pow(high / low, min(0.8, max(0.2, share)))
