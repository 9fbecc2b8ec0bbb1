"""The adversary that most defences are watched by, and ranked: fixed, and simulated on the defender's half."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from holdfast.defences.base import Given
from holdfast.domains import holdout
from holdfast.finetuning import FineTuning, Initialise
from holdfast.metrics import area, evaluation_steps
from holdfast.seeding import derive, generator
from holdfast.training import evaluate


class Prober:
    """A fixed adversary on a part of the defender's half that it does not train on: the whole model (default: by Adam
    at 1e-3), with the head kept or re-initialised; what the better of these reaches, averaged over evaluations along
    the way.

    The defence has seen these images: good enough to rank states, too kind to be a result.
    """

    def __init__(
        self,
        given: Given,
        steps: int,
        batch_size: int = 100,
        initialise: tuple[Initialise, ...] = ("head",),
        learner: nn.Module | None = None,
        optimiser: str = "adam",
        lr: float = 1e-3,
    ) -> None:
        self.given, self.initialise = given, initialise
        self.learner = given.learner() if learner is None else learner
        self.tuning = FineTuning(optimiser=optimiser, lr=lr, weight_decay=0.0, batch_size=batch_size, steps=steps)
        parts = holdout(given.restricted.labels, 0.3, generator(given.seed, "probe"))
        self.adapt, self.held_out = (given.restricted.subset(p) for p in parts)

    def __call__(self) -> float:
        """What the best of the adversaries reaches."""
        return max(self.probe(i) for i in self.initialise)

    def probe(self, initialise: Initialise) -> float:
        """Fine-tune a copy of the model, and average its metric along the way."""
        given, values = self.given, list[float]()

        def note(step: int, how: str) -> None:
            values.append(evaluate(self.learner, self.held_out, given.task, given.runtime)[0])

        tuning = replace(self.tuning, initialise=initialise)
        result = tuning.run_from(
            given.model.state_dict(),
            self.learner,
            self.adapt,
            given.task,
            given.architecture,
            given.classes,
            runtime=given.runtime,
            seed=derive(given.seed, "probe", initialise),
            steps=evaluation_steps(tuning.steps, 5),
            note=note,
        )
        # A state on which the probe overflows has only hidden its gradients: never to be selected for that.
        return 1.0 if result.diverged_at else area(values)
