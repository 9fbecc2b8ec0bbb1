"""Intactness: breaches go back, optimisers included; the best state within tolerance is what is released."""

import io
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from holdfast.attempts import another, between, weakened
from holdfast.errors import UserError
from holdfast.files import load_torch
from holdfast.guard import Guard, run_guarded
from holdfast.progress import Reporter
from holdfast.workplace import Workplace


class Bench:
    """A one-parameter model whose metrics are read off its weight."""

    def __init__(self, moves: list[float], seen: list[tuple[int, float, float]] | None = None) -> None:
        self.model = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.model.weight)
        self.optimiser = torch.optim.Adam(self.model.parameters(), 0.1)
        self.moves, self.seen = moves, seen if seen is not None else []

    def iterate(self, i: int, strength: float) -> dict[str, float]:
        self.seen.append((i, strength, self.weight()))
        self.model.weight.grad = torch.ones(1, 1)
        self.optimiser.step()  # so that the optimiser has a state to restore
        with torch.no_grad():
            self.model.weight.copy_(torch.tensor([[self.weight_before(i) + self.moves[i - 1] * strength]]))
        return {"loss": 1.0 if math.isfinite(self.moves[i - 1]) else math.nan}

    def weight_before(self, i: int) -> float:
        return self.seen[-1][2]

    def weight(self) -> float:
        return self.model.weight.item()

    def run(
        self,
        tolerance: float = 0.1,
        every: int = 1,
        workplace: Workplace | None = None,
        identity: str = "x",
        iterate=None,
        may_fail: tuple[str, ...] = (),
        settle=lambda i: None,
    ):
        return run_guarded(
            self.model,
            {"adam": self.optimiser},
            iterate or self.iterate,
            iterations=len(self.moves),
            guard=Guard(tolerance, every),
            original=lambda: 1 - self.weight(),
            restricted=lambda: 0.5 - self.weight(),
            identity=identity,
            workplace=workplace or Workplace(),
            settle=settle,
            may_fail=may_fail,
        )


def test_the_best_state_within_tolerance_is_released_not_the_last() -> None:
    bench = Bench([0.05, 0.03, -0.06])
    history = bench.run()
    assert bench.weight() == pytest.approx(0.08)
    assert history.rollbacks == 0
    assert [c["restricted"] for c in history.checks] == pytest.approx([0.5, 0.45, 0.42, 0.48])


def test_a_breach_goes_back_and_weakens_suppression() -> None:
    bench = Bench([0.05, 0.2, 0.02])
    history = bench.run()
    assert history.rollbacks == 1
    assert [s for _, s, _ in bench.seen] == [1, 1, 0.5]
    assert bench.seen[2][2] == pytest.approx(0.05)  # the third iteration started from the last good state
    assert bench.weight() == pytest.approx(0.06)
    assert bench.optimiser.state_dict()["state"][0]["step"].item() == 2  # one of three steps was undone


def test_a_state_is_settled_before_it_is_measured_and_only_then() -> None:
    bench, settled = Bench([0.05, 0.02, math.nan, 0.01, 0.01]), []

    def settle(i: int) -> None:
        settled.append(i)
        with torch.no_grad():
            bench.model.weight.add_(0.001)

    history = bench.run(every=2, settle=settle)
    assert settled == [2, 4, 5], "checks are due at 2, 4 and the end; a broken state is not measured"
    assert history.checks[1]["original"] == pytest.approx(1 - 0.071)
    assert bench.weight() == pytest.approx(0.071 + 0.5 * 0.01 + 0.001 + 0.625 * 0.01 + 0.001)


def test_nan_goes_back_at_once_even_between_checks() -> None:
    bench = Bench([0.01, math.nan, 0.01, 0.01])
    history = bench.run(every=4)
    assert history.rollbacks == 1
    assert bench.seen[2][2] == 0  # the last good state was the start
    assert math.isfinite(bench.weight())


def test_a_loss_that_may_fail_says_nothing_about_the_model() -> None:
    bench = Bench([0.01, 0.02, 0.03])

    def iterate(i: int, strength: float) -> dict[str, float]:
        return {**bench.iterate(i, strength), "fts": math.nan}

    history = bench.run(iterate=iterate, may_fail=("fts",))
    assert (history.rollbacks, history.silent) == (0, 3)
    assert bench.weight() == pytest.approx(0.06)
    assert bench.run(iterate=iterate, may_fail=("other",)).rollbacks == 3


def test_a_defence_that_never_stays_within_tolerance_releases_the_unprotected_model() -> None:
    bench = Bench([5.0, 5.0, 5.0])
    assert bench.run().rollbacks == 3
    assert bench.weight() == 0


def test_suppression_recovers_after_good_checks() -> None:
    bench = Bench([0.5, 0.001, 0.001, 0.001, 0.001])
    bench.run()
    assert [s for _, s, _ in bench.seen] == pytest.approx([1, 0.5, 0.625, 0.78125, 0.9765625])


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_resuming_from_any_checkpoint_is_the_run_undisturbed(tmp_path: Path, stop: int) -> None:
    moves = [0.05, 0.2, 0.02, -0.01, 0.03]
    whole = Bench(moves)
    expected = whole.run()

    class Killed(Exception):
        pass

    first = Bench(moves)
    iterate = first.iterate

    def dying(i: int, strength: float):
        if i == stop + 1:
            raise Killed
        return iterate(i, strength)

    first.iterate = dying
    place = Workplace(tmp_path, save_every_seconds=-1)
    with pytest.raises(Killed):
        first.run(workplace=place)
    second = Bench(moves, seen=list(first.seen))
    history = second.run(workplace=Workplace(tmp_path, resume=True, save_every_seconds=-1))
    assert second.seen == whole.seen
    assert second.weight() == whole.weight()
    assert history.checks == expected.checks
    assert second.optimiser.state_dict()["state"][0]["exp_avg"] == whole.optimiser.state_dict()["state"][0]["exp_avg"]


def test_the_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    Bench([0.01]).run(workplace=Workplace(tmp_path))
    assert load_torch(tmp_path / "checkpoint.pt")["iteration"] == 1
    with pytest.raises(UserError, match="checkpoint of another run"):
        Bench([0.01]).run(workplace=Workplace(tmp_path, resume=True), identity="y")
    (tmp_path / "checkpoint.pt").write_bytes(b"torn")
    with pytest.raises(UserError, match="cannot read"):
        Bench([0.01]).run(workplace=Workplace(tmp_path, resume=True))


def test_curves_are_written_for_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    Bench([0.01, 0.02]).run(workplace=Workplace(tmp_path))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {"protect/original", "protect/restricted", "protect/loss"} <= set(events.Tags()["scalars"])
    assert [e.step for e in events.Scalars("protect/original")] == [1, 2]


class TestPhases:
    """original = 1 − weight, tolerance 0.1: a weight above 0.1 is a breach."""

    @staticmethod
    def run(moves: list[float], phases: list[str], select: str = "lowest"):
        bench = Bench(moves)
        history = run_guarded(
            bench.model,
            {"adam": bench.optimiser},
            bench.iterate,
            iterations=len(moves),
            guard=Guard(0.1, 1),
            original=lambda: 1 - bench.weight(),
            restricted=lambda: 0.5 - bench.weight(),
            identity="x",
            workplace=Workplace(),
            phase=lambda i: phases[i - 1],
            select=select,
        )
        return bench, history

    def test_a_free_phase_records_only(self) -> None:
        bench, history = self.run([0.5, -0.45, 0.0], ["free", "free", "candidate"])
        assert history.rollbacks == 0
        assert [c["original"] for c in history.checks] == pytest.approx([1, 0.5, 0.95, 0.95])
        assert history.released == 3
        assert bench.weight() == pytest.approx(0.05)

    def test_a_guarded_state_is_kept_within_tolerance_but_never_released(self) -> None:
        bench, history = self.run([0.08, 0.5, -0.02], ["guarded", "guarded", "candidate"])
        assert history.rollbacks == 1
        assert history.released == 3, "iteration 1 scores lower, but is none to be released"
        assert bench.weight() == pytest.approx(0.07), "0.08, and half of the move after the breach"

    def test_there_is_no_way_back_into_an_earlier_phase(self) -> None:
        bench, history = self.run([0.05, 0.3, -0.6], ["guarded", "candidate", "candidate"])
        assert history.rollbacks == 0, "the breach of iteration 2 has no good state of its own phase"
        assert [s for _, s, _ in bench.seen] == [1, 1, 0.5], "but suppression is weakened"
        assert bench.weight() == pytest.approx(0.05)
        assert history.released == 3

    def test_except_from_a_nan(self) -> None:
        bench, history = self.run([0.05, math.nan, 0.01], ["guarded", "candidate", "candidate"])
        assert history.rollbacks == 1
        assert bench.weight() == pytest.approx(0.055)

    def test_the_last_candidate_within_tolerance(self) -> None:
        bench, history = self.run([0.05, -0.04, 0.5], ["candidate"] * 3, select="last")
        assert history.released == 2
        assert bench.weight() == pytest.approx(0.01)
        assert self.run([0.05, -0.04, 0.5], ["candidate"] * 3)[1].released == 1


def test_a_log_has_each_line_once() -> None:
    stream = io.StringIO()
    with Reporter(stream=stream).bar("work", 3) as bar:
        bar.every = 0.0
        bar.update(2, "begun")
        bar.update(3, "ended")
    assert stream.getvalue().splitlines() == ["work: 2/3 · begun", "work: 3/3 · ended"]
    with Reporter(stream=stream).bar("more", 3) as bar:
        bar.update(2, lambda: "asked at the end")
    assert stream.getvalue().splitlines()[2:] == ["more: 2/3 · asked at the end"]


class TestAttempts:
    """original = 1 − weight, tolerance 0.1; where the end is outside, all is done again from the beginning."""

    @staticmethod
    def run(moves: list[float], attempts: int, bench: Bench | None = None, workplace=None):
        bench = bench or Bench(moves)
        history = run_guarded(
            bench.model,
            {"adam": bench.optimiser},
            bench.iterate,
            iterations=len(moves),
            guard=Guard(0.1, 1, attempts=attempts),
            original=lambda: 1 - bench.weight(),
            restricted=lambda: 0.5 - bench.weight(),
            identity="x",
            workplace=workplace or Workplace(),
            phase=lambda i: "free" if i <= 1 else "candidate",
            select="last",
        )
        return bench, history

    def test_all_is_done_again_weaker_by_what_the_breach_says(self) -> None:
        bench, history = self.run([0.01, 0.12, 0.17], attempts=2)
        # 0.30 lost where 0.1 may be: 0.9·0.1/0.3 of the strength, and from the beginning.
        assert [(i, round(s, 6)) for i, s, _ in bench.seen] == [(1, 1), (2, 1), (3, 1), (1, 0.3), (2, 0.3), (3, 0.3)]
        assert bench.seen[3][2] == 0
        assert bench.weight() == pytest.approx(0.3 * 0.30)
        assert [c["iteration"] for c in history.checks] == [0, 1, 2, 3, 4, 5, 6]
        assert (history.released, history.rollbacks, history.attempts) == (6, 1, [1.0])
        assert bench.optimiser.state_dict()["state"][0]["step"].item() == 3, "three of six steps were undone"

    def test_what_the_beginning_lost_for_good_is_had_weaker(self) -> None:
        """A tolerance that the last iterations, however weak, could not come back to."""
        bench, history = self.run([0.2, 0.0, 0.0], attempts=2)
        assert history.released == 6
        assert bench.weight() == pytest.approx(0.45 * 0.2)

    def test_nothing_is_done_again_where_the_end_is_within_tolerance(self) -> None:
        bench, history = self.run([0.2, 0.02, -0.15], attempts=4)
        assert [(i, s) for i, s, _ in bench.seen] == [(1, 1), (2, 1), (3, 1)], "a breach on the way weakens nothing"
        assert (history.released, history.rollbacks, history.attempts) == (3, 0, [])

    def test_good_checks_do_not_strengthen_beyond_the_attempt(self) -> None:
        bench, _ = self.run([0.0, 0.0, 0.0, 0.3], attempts=2)
        assert [s for _, s, _ in bench.seen] == pytest.approx([1, 1, 1, 1]), "a candidate: nothing again"
        bench, _ = self.run([0.0, 0.3, 0.0, 0.0], attempts=2)
        assert [s for _, s, _ in bench.seen] == pytest.approx([1, 1, 1, 1, 0.3, 0.3, 0.3, 0.3])

    def test_weaker_than_what_it_began_with(self) -> None:
        """A NaN on the way halves it for a while; the attempt is still one at the strength that it began with."""
        bench, history = self.run([0.01, math.nan, 0.24], attempts=2)
        # Back to 0.01 and at half strength 0.01 + 0.12 at the end: 0.9·0.1/0.13 of the whole.
        assert [round(s, 6) for _, s, _ in bench.seen[:3]] == [1, 1, 0.5]
        assert bench.seen[3][1] == pytest.approx(0.09 / 0.13)
        assert history.attempts == [1.0]

    def test_a_last_check_that_broke_counts_once(self) -> None:
        bench, history = self.run([0.01, 0.0, math.nan], attempts=2)
        assert (history.released, history.rollbacks) == (2, 1), "there was a candidate before it"
        bench, history = self.run([0.01, 0.3, math.nan], attempts=2)
        assert history.rollbacks == sum("rolled_back" in c for c in history.checks)
        assert bench.seen[3][:2] == (1, 0.5), "half of the strength of what broke"

    def test_nothing_is_done_again_at_the_weakest(self) -> None:
        """A fall that has nothing to do with the strength."""
        bench, history = self.run([0.0, 0.0], attempts=99, bench=self.falling(lambda _: 0.5))
        tried = [s for i, s, _ in bench.seen if i == 1]
        assert len(tried) < 20, "at the weakest there is no further attempt"
        assert tried == sorted(set(tried), reverse=True)
        assert tried[-1] == 1e-3
        assert history.released == 0

    def test_attempts_end(self) -> None:
        bench, history = self.run([0.2, 0.9, 0.9], attempts=2)
        assert [s for _, s, _ in bench.seen] == pytest.approx([1, 1, 1, 0.045, 0.045, 0.045])
        assert history.released == 6
        bench, history = self.run([0.3, 0.0, 0.0], attempts=1)
        assert [s for _, s, _ in bench.seen] == pytest.approx([1, 1, 0.5]), (
            "the last attempt, of which nothing is to be kept back, is weakened at every check"
        )
        assert (history.released, bench.weight()) == (0, 0)

    @pytest.mark.parametrize("stop", [1, 2, 3, 4, 5, 6])
    def test_resuming_is_the_run_undisturbed(self, tmp_path: Path, stop: int) -> None:
        moves = [0.01, 0.12, 0.17]
        whole, expected = self.run(moves, attempts=2)
        first = Bench(moves)
        first.iterate = self._dying(first, stop)
        if stop < 6:
            with pytest.raises(InterruptedError):
                self.run(moves, 2, bench=first, workplace=Workplace(tmp_path, save_every_seconds=-1))
        else:
            self.run(moves, 2, bench=first, workplace=Workplace(tmp_path, save_every_seconds=-1))
        second = Bench(moves, seen=list(first.seen))
        _, history = self.run(moves, 2, bench=second, workplace=Workplace(tmp_path, resume=True))
        assert second.seen == whole.seen
        assert second.weight() == whole.weight()
        assert (history.checks, history.released) == (expected.checks, expected.released)

    @staticmethod
    def falling(fall, iterations: int = 2) -> Bench:
        """Ends `fall(strength)` below where it began, whatever has happened before."""
        bench = Bench([0.0] * iterations)
        iterate = bench.iterate

        def falls(i: int, strength: float) -> dict[str, float]:
            found = iterate(i, strength)
            with torch.no_grad():
                bench.model.weight.fill_(fall(strength))
            return found

        bench.iterate = falls
        return bench

    def test_one_that_used_little_of_the_tolerance_is_followed_by_a_stronger_one(self) -> None:
        bench, history = self.run([0.0, 0.0], 4, bench=self.falling(lambda s: 0.3 * s**2))
        tried = [s for i, s, _ in bench.seen if i == 1]
        # 0.9·0.1/0.3 of it loses 0.027; then by the logarithm: (0.09 − 0.027)/(0.3 − 0.027) of the way to 1, …
        second = 0.3 * (1 / 0.3) ** (0.063 / 0.273)
        third = second * (1 / second) ** 0.2  # … and no less than a fifth of it
        assert tried == pytest.approx([1, 0.3, second, third])
        assert bench.weight() == pytest.approx(0.3 * third**2, rel=1e-4)
        assert (history.released, history.attempts) == (8, [1.0])

    def test_a_stronger_one_that_ends_outside_is_not_released(self) -> None:
        bench, history = self.run([0.0, 0.0], 9, bench=self.falling(lambda s: 0.02 if s < 0.35 else 0.3))
        tried = [s for i, s, _ in bench.seen if i == 1]
        assert tried == pytest.approx([1, 0.3, 0.3 * (1 / 0.3) ** 0.25]), "between 0.3 and 0.405 there is no room"
        assert bench.weight() == pytest.approx(0.02)
        assert history.released == 4
        assert history.attempts == pytest.approx([1.0, tried[2]])
        assert [s for i, s, _ in bench.seen if i == 2] == pytest.approx(tried), "it is not weakened on the way"

    def test_one_that_was_weakened_on_the_way_says_nothing_of_what_it_began_with(self) -> None:
        bench = self.falling(lambda s: 0.3 * s**2)
        falls = bench.iterate
        bench.iterate = lambda i, s: {"loss": math.nan} if falls(i, s) and len(bench.seen) == 3 else {"loss": 1.0}
        self.run([0.0, 0.0], 3, bench=bench)
        tried = [(i, s) for i, s, _ in bench.seen]
        assert tried[:4] == [(1, 1), (2, 1), (1, pytest.approx(0.3)), (2, pytest.approx(0.15))]
        kept = 0.3 * 0.15**2  # and so a stronger one, from 0.15 on, not from 0.3
        assert tried[4] == (1, pytest.approx(0.15 * (1 / 0.15) ** ((0.09 - kept) / (0.3 - kept))))

    def test_the_last_attempt_is_not_weakened_on_the_way_where_one_before_was_within(self) -> None:
        """So what the tolerance leaves unused is tried at one strength, and what was found is not lost by it."""
        bench, history = self.run([0.0, 0.0, 0.0], 3, bench=self.falling(lambda s: 0.02 if s < 0.35 else 0.3, 3))
        assert [s for i, s, _ in bench.seen if i == 1] == pytest.approx([1, 0.3, 0.3 * (1 / 0.3) ** 0.25])
        assert len({s for _, s, _ in bench.seen[6:]}) == 1
        assert history.released == 6

    def test_an_attempt_that_is_done_early_ends_there(self) -> None:
        bench = Bench([0.01, 0.3, 0.0, 0.0])
        history = run_guarded(
            bench.model,
            {"adam": bench.optimiser},
            bench.iterate,
            iterations=4,
            guard=Guard(0.1, 3, attempts=2),
            original=lambda: 1 - bench.weight(),
            restricted=lambda: 0.0,
            identity="x",
            workplace=Workplace(),
            done=lambda i: i == 2,
            select="last",
        )
        assert [(i, round(s, 6)) for i, s, _ in bench.seen] == [(1, 1), (2, 1), (1, 0.290323), (2, 0.290323)]
        assert (history.released, bench.weight()) == (4, pytest.approx(0.09))

    def test_a_checkpoint_made_before_there_were_attempts_has_them(self, tmp_path: Path) -> None:
        moves = [0.01, 0.12, 0.17]
        first = Bench(moves)
        first.iterate = self._dying(first, 1)
        place = Workplace(tmp_path, save_every_seconds=-1)
        with pytest.raises(InterruptedError):
            self.run(moves, 1, bench=first, workplace=place)
        second = Bench(moves, seen=list(first.seen))
        _, history = self.run(moves, 2, bench=second, workplace=Workplace(tmp_path, resume=True))
        assert (history.released, history.attempts) == (6, [1.0])
        assert second.weight() == pytest.approx(0.09)

    @staticmethod
    def _dying(bench: Bench, after: int):
        iterate = bench.iterate

        def dying(i: int, strength: float):
            if len(bench.seen) == after:
                raise InterruptedError
            return iterate(i, strength)

        return dying


class TestAnother:
    def test_weaker_until_one_is_within(self) -> None:
        assert another([(1.0, 0.06)], 0.02, 1e-3) == pytest.approx(0.3)
        assert another([(1.0, math.nan)], 0.02, 1e-3) == 0.5
        assert another([(1.0, 60.0)], 0.02, 1e-3) == 1e-3
        assert another([(1.0, 60.0), (1e-3, 1.0)], 0.02, 1e-3) is None

    def test_full_strength_within_is_all_there_is(self) -> None:
        assert another([(1.0, -0.1)], 0.02, 1e-3) is None

    def test_stronger_where_little_of_the_tolerance_was_used(self) -> None:
        assert another([(1.0, 0.06), (0.3, 0.01)], 0.02, 1e-3) is None, "half of it"
        assert another([(1.0, 0.06), (0.3, 0.009)], 0.02, 1e-3) == pytest.approx(0.3 * (1 / 0.3) ** 0.2)
        tries = [(1.0, 0.06), (0.1, -0.01), (0.4, 0.03)]
        assert another(tries, 0.02, 1e-3) == pytest.approx(0.1 * 4 ** (0.028 / 0.04))
        assert another([*tries, (0.3, 0.0)], 0.02, 1e-3) is None, "0.3 and 0.4 are too near"

    def test_between_by_hand(self) -> None:
        assert between((0.1, 0.0), (0.4, 0.036), 0.02) == pytest.approx(0.2)
        assert between((0.1, 0.0), (0.4, 9.0), 0.02) == pytest.approx(0.1 * 4**0.2)
        assert between((0.1, -9.0), (0.4, 0.021), 0.02) == pytest.approx(0.1 * 4**0.8)
        assert between((0.1, 0.0), (0.4, math.nan), 0.02) == pytest.approx(0.2)


class TestWeakened:
    def test_by_one_attempt(self) -> None:
        assert weakened([(1.0, 0.06)], 0.02) == pytest.approx(0.9 / 3)
        assert weakened([(0.5, 0.06)], 0.02) == pytest.approx(0.45 / 3)

    @pytest.mark.parametrize(
        ("before", "power"),
        [
            (0.045, 0.585),  # half the strength, two thirds of the fall: log 1.5 ÷ log 2
            (0.038, 0.341),  # log 1.2667 ÷ log 2
            (0.035, 0.25),  # log 1.1667 ÷ log 2 = 0.22
            (0.09, 1.0),  # log 3 ÷ log 2 = 1.58
            (0.03, 0.25),  # nothing was gained
        ],
    )
    def test_by_two(self, before: float, power: float) -> None:
        found = weakened([(1.0, before), (0.5, 0.03)], 0.02)
        assert found == pytest.approx(0.5 * 0.6 ** (1 / power), rel=1e-3)

    def test_after_one_that_broke(self) -> None:
        assert weakened([(0.3, math.nan)], 0.02) == 0.15
        assert weakened([(1.0, math.nan), (0.5, 0.06)], 0.02) == pytest.approx(0.15), "as after one"
        assert weakened([(1.0, 0.12), (0.8, math.nan), (0.5, 0.06)], 0.02) == pytest.approx(0.15), "as after two"

    def test_nothing_may_be_lost(self) -> None:
        assert weakened([(1.0, 0.01)], 0.0) == 0
