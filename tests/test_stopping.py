"""SIGTERM waits for the step at hand, and is never forgotten."""

import pytest

from holdfast import stopping
from holdfast.stopping import Terminated, unfinished


@pytest.fixture(autouse=True)
def _nobody_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(stopping._state, "asked", False)


def test_at_once_where_nothing_is_unfinished() -> None:
    with pytest.raises(Terminated):
        stopping._terminate()


def test_between_two_steps_after_saving() -> None:
    done: list[str] = []

    def work() -> None:
        with unfinished() as between_steps:
            stopping._terminate()
            done.append("step")
            between_steps(lambda: done.append("saved"))
            done.append("never")

    with pytest.raises(Terminated):
        work()
    assert done == ["step", "saved"]


def test_within_an_inner_block_it_waits_for_the_outer_one() -> None:
    done: list[str] = []

    def work() -> None:
        with unfinished() as between_steps:
            with unfinished():
                stopping._terminate()
            done.append("inner")
            between_steps(lambda: done.append("saved"))

    with pytest.raises(Terminated):
        work()
    assert done == ["inner", "saved"]


def test_one_that_comes_after_the_last_step_is_due_at_the_end() -> None:
    done: list[str] = []

    def work() -> None:
        with unfinished() as between_steps:
            between_steps(lambda: done.append("never"))
            stopping._terminate()
            done.append("last save")
        done.append("audit")

    with pytest.raises(Terminated):
        work()
    assert done == ["last save"]


def test_one_processs_wish_is_everyones_and_nobody_leaves_before_all_have_saved() -> None:
    told: list[bool] = []

    def agreed(flag: bool) -> bool:
        told.append(flag)
        return True

    with pytest.raises(Terminated), unfinished(agreed) as between_steps:
        between_steps(lambda: told.append(False))
    assert told == [False, False, True]  # nobody asked here; saved; met again
    assert stopping.terminated()
