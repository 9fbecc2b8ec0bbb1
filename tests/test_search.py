"""The attacker's search: which values are tried, what is chosen, what is given up, on which data."""

from __future__ import annotations

from dataclasses import replace

import optuna
import pytest
import torch

from holdfast.attacks.attack import Attack, Search
from holdfast.attacks.preparation import Heal
from holdfast.attacks.structure import LeakyActivations
from holdfast.cells import Bench, CellSpec, Ground, prepare
from holdfast.domains import Domain
from holdfast.finetuning import FineTuning
from holdfast.models import Architecture, State
from holdfast.runtime import Runtime
from holdfast.search import SEED, Lagging, Tries, resolved, run_search
from holdfast.tasks import Classification


@pytest.fixture
def bench(
    restricted: Domain, architecture: Architecture, clean_state: State, task: Classification, runtime: Runtime
) -> Bench:
    train = restricted.train.subset(torch.arange(0, len(restricted.train), 4))
    ground = Ground((train,), restricted.validation, restricted.test, 5)
    return Bench({"protected": clean_state, "clean": clean_state}, architecture, 5, ground, task, runtime, 16, 4, "p")


def spec(search: Search, model: str = "protected", **changes: object) -> CellSpec:
    tuning = FineTuning("head", optimiser="adam", lr=1e-3, weight_decay=0.0, steps=16, batch_size=50)
    return CellSpec(model, Attack("x", replace(tuning, **changes), search=search), ("x",), (False,), SEED)


def trial(lr: float, last: float, pruned: bool = False) -> dict[str, object]:
    return {"setting": {"lr": lr}, "steps": [0, 8, 16], "values": [0.2, last, last], "pruned": pruned}


class TestTries:
    def test_the_best_of_those_that_were_not_given_up(self) -> None:
        tries = Tries([trial(1e-3, 0.5), trial(1e-2, 0.8), trial(1e-1, 0.9, pruned=True)])
        assert tries.best() == tries.trials[1]
        assert Tries([trial(1e-3, 0.5, pruned=True)]).best() is None

    @pytest.mark.parametrize(
        ("finals", "beyond"),
        [
            ({1e-3: 0.5, 1e-2: 0.8, 1e-1: 0.6}, None),  # between
            ({1e-3: 0.5, 1e-2: 0.6, 1e-1: 0.8}, 1.0),  # the largest
            ({1e-3: 0.8, 1e-2: 0.6, 1e-1: 0.5}, 1e-4),  # the smallest
            ({1e-3: 0.5, 1e-2: 0.79, 1e-1: 0.8}, None),  # one between is as good
            ({1e-3: 0.2, 1e-2: 0.2, 1e-1: 0.22}, 1.0),  # nothing was learned: larger steps
        ],
    )
    def test_where_the_grid_ends(self, finals: dict[float, float], beyond: float | None) -> None:
        assert Tries([trial(lr, v) for lr, v in finals.items()]).at_edge(0.2) == beyond


class TestLagging:
    @staticmethod
    def gives_up(whole: list[float], value: float, step: int = 8) -> bool:
        study = optuna.create_study(direction="maximize", pruner=Lagging(chance=0.2, warm_up=4))
        for last in whole:
            done = study.ask()
            done.report(last, step)
            study.tell(done, last)
        given_up = study.ask()
        given_up.report(0.9, step)
        study.tell(given_up, state=optuna.trial.TrialState.PRUNED)  # does not count
        trial = study.ask()
        trial.report(value, step)
        return trial.should_prune()

    def test_nobody_lags_on_a_plateau_at_chance(self) -> None:
        assert not self.gives_up([0.22, 0.21], 0.1)

    @pytest.mark.parametrize(("lr", "lags"), [(1e-3, True), (1e-2, True), (1e-1, False), (1.0, False)])
    def test_a_rate_above_the_best_is_seen_to_its_end(self, lr: float, lags: bool) -> None:
        """Large steps take off late. The best whole run is at 0.01."""
        study = optuna.create_study(direction="maximize", pruner=Lagging(chance=0.2, warm_up=4))
        rates = {"lr": optuna.distributions.FloatDistribution(1e-5, 10, log=True)}
        for rate, last in ((1e-3, 0.5), (1e-2, 0.6), (1e-4, 0.3)):
            value = optuna.trial.create_trial(
                params={"lr": rate}, distributions=rates, values=[last], intermediate_values={8: last}
            )
            study.add_trial(value)
        study.enqueue_trial({"lr": lr})
        trial = study.ask(rates)
        trial.report(0.25, 8)
        assert trial.should_prune() == lags

    def test_more_than_the_margin_behind_a_median_that_has_learned(self) -> None:
        assert self.gives_up([0.6, 0.5], 0.52)
        assert not self.gives_up([0.6, 0.5], 0.535), "less than the margin behind the median 0.55"

    def test_not_early_and_not_with_one_to_compare_with(self) -> None:
        assert not self.gives_up([0.6, 0.5], 0.2, step=3)
        assert not self.gives_up([0.6], 0.2)


class TestSearch:
    def test_it_goes_on_beyond_the_edge(self, bench: Bench) -> None:
        found = run_search(bench, spec(Search(lr=(3e-4, 1e-3), extend=1)))
        assert [t["setting"]["lr"] for t in found.trials] == pytest.approx([3e-4, 1e-3, 1e-2])
        assert found.chosen["lr"] == pytest.approx(1e-2)
        assert found.edge, "1e-2 is the largest tried, and the extensions are used up"
        more = run_search(bench, spec(Search(lr=(1e-4, 1e-3, 1e-2), extend=3)))
        assert not more.edge
        assert more.chosen["lr"] in (1e-2, 1e-1)

    def test_where_nothing_can_be_learned_every_decade_is_tried(self, bench: Bench) -> None:
        """A constant model under a new head: chance at any rate, and that is known."""
        dead = {n: torch.zeros_like(v) if n.startswith("9.") else v for n, v in bench.states["clean"].items()}
        dead["10.weight"], dead["10.bias"] = torch.zeros_like(dead["10.weight"]), torch.full_like(dead["10.bias"], -1.0)
        given = replace(bench, states={**bench.states, "protected": dead})
        attack = replace(spec(Search(lr=(1e-1, 1.0), extend=1)).attack, tuning=FineTuning("head", "head", steps=8))
        found = run_search(given, replace(spec(Search()), attack=attack))
        assert [t["setting"]["lr"] for t in found.trials] == pytest.approx([0.1, 1.0, 10.0, 100.0, 1000.0])
        assert not found.edge
        short = replace(attack, search=Search(lr=(1e-1, 1.0), extend=0))
        assert run_search(given, replace(spec(Search()), attack=short)).edge, "nobody looked further"

    def test_laggards_are_given_up_and_what_it_cost_is_counted(self, bench: Bench) -> None:
        found = run_search(bench, spec(Search(lr=(1e-2, 3e-2, 1e-6), extend=0)))
        last = found.trials[-1]
        assert [t["pruned"] for t in found.trials] == [False, False, True]
        assert last["steps"][-1] < 16
        assert last["steps"][-1] >= 4, "never before a quarter of the budget"
        assert found.steps == 16 + 16 + last["steps"][-1]
        assert found.samples == 50 * found.steps
        assert found.flops > 0
        assert len(last["values"]) == len(last["steps"])

    def test_the_same_again(self, bench: Bench) -> None:
        search = Search(lr=(1e-3, 1e-2), extend=0, trials=4, optimiser=("momentum",), batch_size=(10,))
        first, second = (run_search(bench, spec(search)) for _ in range(2))
        assert first.trials == second.trials
        assert len(first.trials) == 6
        assert first.trials[0]["setting"] == {"lr": 1e-3, "optimiser": "adam", "batch_size": 50}
        assert {t["setting"]["batch_size"] for t in first.trials} == {10, 50}
        assert all(1e-3 <= t["setting"]["lr"] <= 1e-2 for t in first.trials)

    def test_an_edit_that_trains_is_made_and_paid_for_once(self, bench: Bench) -> None:
        heal = replace(bench, original=(bench.restricted.train[0],))
        plain = spec(Search(lr=(1e-3, 1e-2), extend=0))
        healed = replace(plain, attack=replace(plain.attack, edits=(Heal(),)))
        without, with_it = run_search(heal, plain), run_search(heal, healed)
        preparation = prepare(heal, "protected", healed.attack, SEED).means
        assert preparation.samples > 0
        assert with_it.samples == without.samples + preparation.samples
        assert with_it.flops == pytest.approx(without.flops + preparation.flops)

    def test_it_never_sees_test_data(self, bench: Bench) -> None:
        search = Search(lr=(1e-3, 1e-2), extend=0)
        other = replace(
            bench,
            restricted=replace(bench.restricted, test=bench.restricted.test.subset(torch.arange(3))),
        )
        assert run_search(bench, spec(search)).trials == run_search(other, spec(search)).trials

    def test_edits_can_be_searched(self, bench: Bench) -> None:
        search = Search(lr=(1e-2,), extend=0, trials=5, edits=((), (LeakyActivations(),)))
        found = run_search(bench, spec(search))
        assert {t["setting"]["edits"] for t in found.trials} == {"0: none", "1: leaky"}
        attack = spec(search).attack
        assert resolved(attack, {"lr": 0.5, "edits": "1: leaky"}).edits == (LeakyActivations(),)
        assert resolved(attack, {"lr": 0.5, "edits": "1: leaky"}).tuning.lr == 0.5
        assert resolved(attack, {"lr": 0.5, "edits": "1: leaky"}).search is None
        scratch = CellSpec("scratch", attack.control(), ("x",), (False,), SEED)
        assert len(run_search(bench, scratch).trials) == 6, "as many tries as the others have"
