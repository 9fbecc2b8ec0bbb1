"""Checks on the audit: each fails when it should, and forbids the verdict held."""

from __future__ import annotations

from dataclasses import replace

import pytest

from holdfast.attacks.attack import Search
from holdfast.checks import weaker
from holdfast.finetuning import FineTuning
from holdfast.metrics import log_area
from holdfast.report.words import conclusion, weaknesses
from holdfast.summary import summarise
from test_report import ADAM, COST, CURVES, about, records, search

HELD = {"direct+all": CURVES["direct+all"]}
DIRECT = about(FineTuning(steps=20))


def failing(rows, searches=(), **facts) -> list[str]:
    s = summarise(rows, 0.1, COST, searches, facts)
    assert (s["verdict"] == "held") == all(c["passed"] for c in s["checks"])
    return [c["name"] for c in s["checks"] if not c["passed"]]


def curves(**more):
    """`direct+all`, held, and others named by what the three models reach in the end."""
    found = dict(HELD)
    for name, (protected, clean, scratch) in more.items():
        ends = {"protected": protected, "clean": clean, "scratch": scratch}
        found[name] = {m: (0.1, v, v) for m, v in ends.items()}
    return found


def test_a_sound_audit_passes_them_all() -> None:
    assert failing(records(3, HELD)) == []


def test_a_defence_that_found_nothing() -> None:
    name = "the defence found a state to release"
    assert failing(records(3, HELD), released=0) == [name]
    assert failing(records(3, HELD), released=7) == []
    s = summarise(records(3, HELD), 0.1, COST, (), {"released": 0})
    s["protection"] = {"released": 0}
    assert "is the model as it was." in " ".join(conclusion(s))


def test_one_seed_cannot_tell() -> None:
    s = summarise(records(1, curves(x=(0.9, 0.9, 0.3))), 0.1, COST)
    said = " ".join(weaknesses(s, {}, "own-v2"))
    assert "this audit cannot tell" in said
    assert "The furthest ahead at the end is x: +60.0 points." in said


def test_a_learning_rate_at_the_edge() -> None:
    name = "no best learning rate at the grid's edge"
    assert failing(records(3, HELD), [search("protected", 0.2, edge=True)]) == [name]
    assert failing(records(3, HELD), [search("clean", 0.2, edge=True)]) == [], "it flatters nobody"
    s = summarise(records(3, HELD), 0.1, COST, [search("clean", 0.2, edge=True)])
    assert "at the edge for the controls: clean: initFC+all" in {c["name"]: c["message"] for c in s["checks"]}[name]


def test_dead_gradients_that_no_edit_tried_to_revive() -> None:
    name = "no gradient is dead unless an edit could revive it"
    rows = [replace(r, dead=r.model == "protected" and r.attack == "direct+all") for r in records(3, HELD)]
    assert failing(rows) == [name]
    with_edit = [
        replace(r, dead=r.model == "protected" and r.attack == "direct+all")
        for r in records(3, curves(leaky=(0.2, 0.8, 0.5)))
    ]
    facts = {"direct+all": DIRECT, "leaky": about(ADAM, "leaky")}
    assert failing(with_edit, attacks=facts) == []
    message = {c["name"]: c["message"] for c in summarise(with_edit, 0.1, COST, (), {"attacks": facts})["checks"]}[name]
    assert "under direct+all; leaky, which revives, takes it to 20.5 %" in message


def test_a_reviving_edit_that_is_dead_itself_revives_nothing() -> None:
    rows = [replace(r, dead=r.model == "protected") for r in records(3, curves(leaky=(0.2, 0.8, 0.5)))]
    facts = {"direct+all": DIRECT, "leaky": about(ADAM, "leaky")}
    assert failing(rows, attacks=facts) == ["no gradient is dead unless an edit could revive it"]


def test_an_edge_where_the_clean_model_does_not_learn_either_says_nothing() -> None:
    idle = search("clean", 0.1)
    assert failing(records(3, HELD), [search("protected", 0.1, edge=True), idle]) == []


class TestOrder:
    def test_what_is_weaker(self) -> None:
        swept = about(ADAM, search=Search(lr=(1e-3, 1e-2)))
        assert weaker(about(ADAM), swept)
        assert not weaker(swept, about(ADAM))
        assert not weaker(about(replace(ADAM, lr=1e-5)), swept), "not among its learning rates"
        assert weaker(about(ADAM), about(replace(ADAM, steps=80)))
        assert weaker(about(ADAM, fraction=0.5), about(ADAM))
        assert not weaker(about(ADAM, "leaky"), about(replace(ADAM, steps=80)))
        assert not weaker(about(ADAM), about(ADAM))
        assert not weaker(None, about(ADAM))
        assert not weaker(about(ADAM, fraction=0.5), about(replace(ADAM, optimiser="sgd")))

    def test_it_must_not_win(self) -> None:
        rows = records(3, curves(plain=(0.4, 0.9, 0.5), swept=(0.2, 0.9, 0.5)))
        facts = {"direct+all": DIRECT, "plain": about(ADAM), "swept": about(ADAM, search=Search(lr=(1e-3, 1e-2)))}
        assert failing(rows, attacks=facts) == ["no weaker attack beats a stronger one"]
        rows = records(3, curves(plain=(0.2, 0.9, 0.5), swept=(0.21, 0.9, 0.5)))
        assert failing(rows, attacks=facts) == []


def test_attacks_the_defence_has_not_seen() -> None:
    rows = [replace(r, simulated=True) for r in records(3, HELD)]
    assert failing(rows) == ["some attacks were not simulated by the defence"]


def test_attacks_that_need_a_library_that_is_not_there() -> None:
    why = {"initFC+LoRA": "needs peft: pip install 'holdfast[lora]'"}
    assert failing(records(3, HELD), left_out=why) == ["nothing was left out for want of a library"]
    assert failing(records(3, HELD), left_out={"regrown": "no pruned weights"}) == []


class TestMeasures:
    def test_area_over_a_logarithm_by_hand(self) -> None:
        # ln 0.1 → ln 1 is 2.302585; gaps 0.2 and 0.1 average to 0.15
        assert log_area([0.1, 1], [0.5, 0.7], [0.3, 0.6]) == pytest.approx(2.302585 * 0.15)
        assert log_area([0.1, 0.5, 1], [0.2] * 3, [0.3] * 3) == pytest.approx(-0.2302585)

    def test_slc_auc_from_records(self) -> None:
        rows = []
        for name, images, protected, scratch in (("all", 100, 0.7, 0.6), ("tenth", 10, 0.5, 0.3)):
            found = records(
                3,
                {name: {"protected": (0.1, 0.1, protected), "clean": (0.1, 0.1, 0.9), "scratch": (0.1, 0.1, scratch)}},
            )
            rows += [replace(r, images=images) for r in found if r.attack == name or name == "all"]
        facts = {"all": about(ADAM), "tenth": about(ADAM, fraction=0.1)}
        slc = summarise(rows, 0.1, COST, (), {"attacks": facts})["restricted"]["slc"]
        assert slc["images"] == [10, 100]
        assert slc["fractions"] == [0.1, 1.0]
        assert slc["auc"]["protected"]["mean"] == pytest.approx(2.302585 * 0.15, abs=1e-5)
        assert slc["auc"]["clean"]["mean"] == pytest.approx(2.302585 * (0.6 + 0.3) / 2, abs=1e-5)
        assert slc["auc"]["protected"]["interval"] == pytest.approx([2.302585 * 0.15] * 2, abs=1e-4)

    def test_slc_auc_of_a_second_attack_stands_beside(self) -> None:
        ends = {"protected": (0.1, 0.1, 0.7), "clean": (0.1, 0.1, 0.9), "scratch": (0.1, 0.1, 0.6)}
        kept = FineTuning.named("initFC+all", keep_zeros=True)
        rows = []
        for name, images in (("all", 100), ("half", 50), ("tenth", 10), ("masked", 100), ("masked tenth", 10)):
            rows += [replace(r, images=images) for r in records(3, {name: ends}) if r.attack == name or not rows]
        facts = {"all": about(ADAM), "half": about(ADAM, fraction=0.5), "tenth": about(ADAM, fraction=0.1)}
        facts |= {"masked": about(kept), "masked tenth": about(kept, fraction=0.1)}
        found = summarise(rows, 0.1, COST, (), {"attacks": facts})["restricted"]
        assert (found["slc"]["attack"], found["slc"]["images"]) == ("all", [10, 50, 100])
        assert [(s["attack"], s["images"]) for s in found["slc_others"]] == [("masked", [10, 100])]

    def test_cost_in_samples_and_flops_counts_what_edits_spent(self) -> None:
        """Steps 0, 10, 20 of 5 images: protected reaches 0.48 at 9.5 of its steps, scratch at 19."""
        ends = {"protected": (0.1, 0.5, 0.8), "clean": (0.1, 0.8, 0.9), "scratch": (0.1, 0.3, 0.5)}
        rows = [
            replace(r, samples=5 * r.step + 40 * (r.model != "scratch"), flops=1e6 * r.step)
            for r in records(2, {"x": ends})
        ]
        attack = summarise(rows, 0.1, COST)["restricted"]["attacks"][0]
        ours = 10 * (0.485 - 0.1) / 0.405
        theirs = 10 + 10 * (0.4825 - 0.3025) / 0.2
        assert attack["cost_ratio"] == pytest.approx(ours / theirs, rel=0.02)
        assert attack["cost_ratio_samples"] == pytest.approx((5 * ours + 40) / (5 * theirs), rel=0.02)
        assert attack["cost_ratio_flops"] == pytest.approx(attack["cost_ratio"])

    def test_what_undid_it(self) -> None:
        facts = {"direct+all": DIRECT, "plain": about(ADAM), "edited": about(ADAM, "rebalance", "leaky")}

        def found(rows):
            return summarise(rows, 0.1, COST, (), {"attacks": facts})

        s = found(records(3, curves(plain=(0.2, 0.8, 0.5), edited=(0.7, 0.9, 0.5))))
        assert s["restricted"]["undone"]["edits"] == ["rebalance", "leaky"]
        assert s["restricted"]["undone"]["gain"] == pytest.approx(0.4), "0.5, less 0.1 that it gives the clean model"
        said = " ".join(conclusion(s))
        assert "What undoes it: rebalance and leaky. edited does 40 points better" in said
        assert "the clean model: 70.5 %, where it takes a model from scratch to 50.5 %." in said
        assert "edited: 20 points better than scratch, needs weights only" in " ".join(weaknesses(s, {}, "quick-v3"))
        everyone = found(records(3, curves(plain=(0.2, 0.4, 0.5), edited=(0.7, 0.9, 0.5))))
        assert everyone["restricted"]["undone"] is None, "it helps everyone"
        other = found(records(3, curves(plain=(0.2, 0.8, 0.5), edited=(0.7, 0.8, 0.5), best=(0.8, 0.8, 0.5))))
        assert other["restricted"]["undone"] is None, "something else is 10 points stronger"

    def test_the_search_is_paid_for(self) -> None:
        s = summarise(records(3, HELD), 0.1, COST, [search("protected", 0.2), search("protected", 0.3, name="y")])
        assert s["search"]["protected"] == {
            "tries": 6, "given_up": 2, "steps": 100, "samples": 2000, "flops": 2e9, "seconds": 2.0,
        }  # fmt: skip


def test_a_clean_model_whose_best_attacks_are_not_ahead_of_scratchs() -> None:
    """Ahead under one attack that serves scratch badly shows no use of pre-training: the best is what counts."""
    name = "pre-training helps the attacker"
    rows = records(3, curves(strong=(0.2, 0.8, 0.8)))
    assert failing(rows) == [name]
    message = {c["name"]: c["message"] for c in summarise(rows, 0.1, COST)["checks"]}[name]
    assert "ahead under 1 of 2 attacks" in message
