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
    with pytest.raises(Terminated), unfinished() as between_steps:
        stopping._terminate()
        done.append("step")
        between_steps(lambda: done.append("saved"))
        done.append("never")
    assert done == ["step", "saved"]


def test_one_that_comes_after_the_last_step_is_due_at_the_end_of_the_outermost_block() -> None:
    done: list[str] = []
    with pytest.raises(Terminated), unfinished() as between_steps:
        with unfinished() as inner:
            inner(lambda: done.append("never"))
            stopping._terminate()
        done.append("inner")
        between_steps(lambda: done.append("saved"))
    assert done == ["inner", "saved"]
    stopping._state["asked"] = False
    with pytest.raises(Terminated), unfinished() as between_steps:
        between_steps(lambda: done.append("never"))
        stopping._terminate()
        done.append("last save")
    assert done[-1] == "last save"


def test_one_processs_wish_is_everyones_and_nobody_leaves_before_all_have_saved() -> None:
    told: list[bool] = []

    def agreed(flag: bool) -> bool:
        told.append(flag)
        return True

    with pytest.raises(Terminated), unfinished(agreed) as between_steps:
        between_steps(lambda: told.append(False))
    assert told == [False, False, True]  # nobody asked here; saved; met again
    assert stopping.terminated()
