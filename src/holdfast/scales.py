"""How a metric is read: what counts as a difference, as having learned, as intact; and how people are shown it.

All metrics are better the higher. An error such as the MSE of a denoiser is kept as 1 − error, so that nothing between
the task and the report needs a direction; only here does it become an error again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from holdfast.errors import unknown


@dataclass(frozen=True)
class Scale:
    """`metric`: its name in the records. `margin`: what may separate "no better than" from "better" (non-inferiority
    margin). `learns`: a model has learned once it is so much above chance. `error`: shown as the error 1 − value."""

    metric: str
    margin: float
    learns: float
    error: bool = False

    @property
    def name(self) -> str:
        """As people call it: `accuracy`, `MSE`."""
        return self.metric.removeprefix("1 − ") if self.error else self.metric

    @property
    def unit(self) -> str:
        """What differences are counted in, behind a number."""
        return f"of {self.counted}" if self.error else self.counted

    @property
    def counted(self) -> str:
        """The same where no number stands before it."""
        return self.name if self.error else "points"

    @property
    def titled(self) -> str:
        """The name with its unit, for the head of a column or an axis."""
        return self.name if self.error else f"{self.name} (%)"

    @property
    def fixed(self) -> str:
        """The name of a curve's value after k steps (SOPHON, §5.1.3)."""
        return f"{self.name}-k" if self.error else "ACC-k, %"

    def retention(self, before: float, after: float) -> float:
        """Intactness: metric after ÷ before; of an error, before ÷ after. 1: as good as before."""
        if self.error:
            return (1 - before) / (1 - after) if after < 1 else 1.0
        return after / before if before > 0 else 0.0

    def floor(self, before: float, tolerance: float) -> float:
        """The least that the metric may fall to: by a share `tolerance`; of an error, the error may rise by it."""
        return 1 - (1 - before) * (1 + tolerance) if self.error else before * (1 - tolerance)

    def plotted(self, value: float) -> float:
        """The number on an axis or in a table: per cent, or the error."""
        return 1 - value if self.error else 100 * value

    def width(self, deviation: float) -> float:
        """A deviation in the same unit."""
        return deviation if self.error else 100 * deviation

    def shown(self, value: float | None) -> str:
        """`0.873` → `87.3 %`; an error: `0.127`."""
        return "–" if value is None else self.number(value) + ("" if self.error else " %")

    def number(self, value: float) -> str:
        """The same without its unit."""
        return f"{self.plotted(value):.{self.digits}f}"

    def spread(self, deviation: float, digits: int | None = None) -> str:
        """A size, such as a deviation, without its unit."""
        return f"{self.width(deviation):.{self.digits if digits is None else digits}f}"

    def difference(self, value: float, digits: int | None = None) -> str:
        """A difference of two values with its sign, as of what is shown: an error's falls where the metric rises.
        `digits`: for percentage points."""
        signed = -value if self.error else value
        shown = self.digits if self.error or digits is None else digits
        return f"{self.width(signed):+.{shown}f}".replace("-", "−")

    def interval(self, limits: Sequence[float]) -> str:
        """An interval of differences, the lower end of what is shown first."""
        low, high = reversed(limits) if self.error else limits
        return f"{self.difference(low)} … {self.difference(high)}"

    def amount(self, value: float) -> str:
        """The size of a difference with its unit: `3.0 points`, `0.030 of MSE`."""
        return f"{self.spread(abs(value)).removesuffix('.0')} {self.unit}"

    @property
    def digits(self) -> int:
        """Behind the decimal point."""
        return 3 if self.error else 1


ACCURACY = Scale("accuracy", margin=0.02, learns=0.05)
MSE = Scale("1 − MSE", margin=0.005, learns=0.05, error=True)

SCALES = {s.metric: s for s in (ACCURACY, MSE)}


def scale_of(metric: str) -> Scale:
    """The scale of a metric by its name in the records."""
    if metric not in SCALES:
        raise unknown("metric", metric, SCALES)
    return SCALES[metric]
