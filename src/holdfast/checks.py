"""Is this audit to be believed? Each check is one line; one that fails stands at the top of the report and forbids the
verdict *held*."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from holdfast.metrics import LEARNS

ENOUGH_SEEDS = 3


@dataclass(frozen=True)
class Check:
    """A name, whether it passed, and what was seen."""

    name: str
    passed: bool
    message: str

    def as_dict(self) -> dict[str, Any]:
        """For `summary.json`."""
        return asdict(self)


def run_checks(
    attacks: Sequence[dict[str, Any]], seeds: int, chance: float, diverged: Sequence[str], intactness: bool
) -> list[Check]:
    """Checks over the summary's list of attacks, the number of seeds, and what diverged (`attack (model)`)."""
    best_clean = max(a["clean"][-1] for a in attacks)
    best_scratch = max(a["scratch"][-1] for a in attacks)
    idle = [a["name"] for a in attacks if a["clean"][-1] - chance < LEARNS]
    spread = "one seed has no spread" if seeds == 1 else "their interval is wide"
    return [
        Check(
            "the clean model learns",
            best_clean - chance >= LEARNS,
            f"best {best_clean:.3f}, chance {chance:.3f}"
            + (f"; says nothing, as it does not train the clean model either: {', '.join(idle)}" if idle else ""),
        ),
        Check(
            "the model from scratch learns",
            best_scratch - chance >= LEARNS,
            f"best {best_scratch:.3f}, chance {chance:.3f}",
        ),
        Check(
            "pre-training helps the attacker",
            any(a["clean_ahead"] for a in attacks),
            "the clean model is more than 2 points ahead of scratch along the way under some attack"
            if any(a["clean_ahead"] for a in attacks)
            else "the clean model is nowhere better than scratch: there is nothing to protect in this pair",
        ),
        Check(
            "enough seeds",
            seeds >= ENOUGH_SEEDS,
            f"{seeds} of at least {ENOUGH_SEEDS}" + ("" if seeds >= ENOUGH_SEEDS else f": {spread}"),
        ),
        Check(
            "no attack diverged",
            not diverged,
            "all losses stayed finite" if not diverged else f"not finite under: {', '.join(sorted(set(diverged)))}",
        ),
        Check(
            "intactness was measured",
            intactness,
            "on original test data" if intactness else "no original domain was given",
        ),
    ]
