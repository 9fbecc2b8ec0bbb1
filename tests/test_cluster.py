"""Ray clusters of several machines: one that hangs, one that is lost, thousands of pieces; each result once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from holdfast import cluster
from holdfast.cluster import _first_results, run_on_cluster
from holdfast.errors import UserError


@dataclass
class Timetable:
    """A Ray whose pieces take the seconds that a table says, first or second time; None: for ever."""

    takes: list[list[float | None]]
    slots: int = 10**6
    now: float = 0.0
    ends: dict[int, float | None] = field(default_factory=dict)
    numbers: list[int] = field(default_factory=list)
    most: int = 0
    lost: tuple[int, ...] = ()
    cancelled: list[int] = field(default_factory=list)

    def start(self, number: int) -> int:
        seconds = self.takes[number][self.numbers.count(number)]
        self.ends[len(self.numbers)] = None if seconds is None else self.now + seconds
        self.numbers.append(number)
        return len(self.numbers) - 1

    def wait(self, flying: list[int], num_returns: int, timeout: float) -> tuple[list[int], list[int]]:
        assert num_returns == 1
        self.most = max(self.most, len(flying))
        ends = [(end, ref) for ref in flying if (end := self.ends[ref]) is not None and end <= self.now + timeout]
        if not ends:
            self.now += timeout
            return [], flying
        end, first = min(ends)
        self.now = max(self.now, end)
        return [first], [r for r in flying if r != first]

    class exceptions:
        """Ray's, by its names."""

        RayError = RuntimeError
        RayTaskError = ZeroDivisionError

    def get(self, ref: int) -> tuple[float, str]:
        number = self.numbers[ref]
        if ref in self.lost:
            raise self.exceptions.RayError("lost for good")
        return float(self.takes[number][0] or 1.0), f"{number}"

    def cancel(self, ref: int, force: bool) -> None:
        assert force
        self.cancelled.append(ref)


class TestFirstResults:
    def test_each_once_and_never_too_many_at_a_time(self) -> None:
        table = Timetable([[float(i % 7)] for i in range(5000)])
        found = list(_first_results(table, table.start, range(5000)))
        assert sorted(map(int, found)) == list(range(5000))
        assert table.most == cluster.WINDOW
        assert len(table.numbers) == 5000

    def test_what_hangs_is_started_again_once(self) -> None:
        table = Timetable([[1.0], [None, 2.0], [30.0], [None, 5.0]])
        found = list(_first_results(table, table.start, range(4)))
        assert found == ["0", "2", "1", "3"]
        assert table.numbers == [0, 1, 2, 3, 1, 3]
        assert table.cancelled == [1, 3]
        assert table.now == 30 + 90 + 5  # three times the longest is more than a minute

    def test_the_first_of_two_results_counts(self) -> None:
        table = Timetable([[1.0], [100.0, 500.0]])
        assert list(_first_results(table, table.start, range(2))) == ["0", "1"]
        assert table.now == 100  # it was slow, and not lost
        assert table.cancelled == [2]

    def test_where_one_of_two_is_lost_for_good_the_other_counts(self) -> None:
        table = Timetable([[1.0], [100.0, 50.0]], lost=(1,))
        assert list(_first_results(table, table.start, range(2))) == ["0", "1"]
        assert table.now == 1 + 60 + 50
        table = Timetable([[1.0], [20.0]], lost=(1,))
        with pytest.raises(RuntimeError, match="lost for good"):
            list(_first_results(table, table.start, range(2)))

    def test_nobody_is_impatient_before_anything_has_come(self) -> None:
        table = Timetable([[1000.0], [1001.0]])
        assert list(_first_results(table, table.start, range(2))) == ["0", "1"]
        assert table.numbers == [0, 1]


class Watcher(threading.Thread):
    """Does something as soon as a worker of the given parent (any, if none) is busy with a piece."""

    def __init__(self, parent: int | None, act: Callable[[int], Any]) -> None:
        super().__init__(daemon=True)
        self.parent, self.act = parent, act
        self.seen: int | None = None

    def run(self) -> None:
        deadline = time.monotonic() + 90
        while self.seen is None and time.monotonic() < deadline:
            for entry in Path("/proc").iterdir():
                if entry.name.isdigit() and self.busy(entry):
                    self.seen = int(entry.name)
                    self.act(self.seen)
                    break
            time.sleep(0.02)

    def busy(self, entry: Path) -> bool:
        try:
            title = (entry / "cmdline").read_bytes()
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            return False
        return title.startswith(b"ray::holdfast_cell") and self.parent in (None, parent)


@pytest.fixture(scope="module")
def machines() -> Iterator[Any]:
    """A Ray of two "machines" with a core each."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster.leave()  # another test's

    both = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    both.add_node(num_cpus=1)
    yield both
    cluster.leave()
    both.shutdown()


def slow_square(shared: int, number: int) -> int:
    """Long enough to be caught at it."""
    time.sleep(0.3)
    return shared * number * number


def raises(shared: int, number: int) -> int:
    """As a cell with bad input does."""
    raise UserError(f"{shared} and {number} do not agree")


def pickled_here(work: Callable[[int, int], int]) -> Callable[[int, int], int]:
    """Workers cannot import this file; pickled by value they need not."""
    import ray

    ray.cloudpickle.register_pickle_by_value(__import__(__name__))
    return work


def test_a_cluster_without_what_the_cells_need(machines: Any) -> None:
    with pytest.raises(UserError, match=r"run on a GPU, and the Ray cluster .* has none; set runtime.device: cpu"):
        list(run_on_cluster(machines.address, slow_square, 2, [3], gpus=0.25))


class TestTwoMachines:
    """In this order: the second machine is there until the last test."""

    def test_an_error_of_the_work_is_passed_on(self, machines: Any) -> None:
        with pytest.raises(UserError, match="2 and 3 do not agree"):
            list(run_on_cluster(machines.address, pickled_here(raises), 2, [3]))

    def test_a_worker_that_hangs(self, machines: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cluster, "PATIENCE", 2.0)
        watcher = Watcher(None, lambda process: os.kill(process, signal.SIGSTOP))
        work = pickled_here(slow_square)
        results = run_on_cluster(machines.address, work, 2, range(12))
        found = [next(results)]
        watcher.start()
        found += results
        assert watcher.seen is not None, "no worker was seen at work"
        assert sorted(found) == [2 * i * i for i in range(12)]

    def test_a_machine_that_is_lost(self, machines: Any) -> None:
        (second,) = machines.worker_nodes
        raylet = second.all_processes["raylet"][0].process.pid
        watcher = Watcher(raylet, lambda _: machines.remove_node(second, allow_graceful=False))
        watcher.start()
        found = list(run_on_cluster(machines.address, pickled_here(slow_square), 3, range(40)))
        assert watcher.seen is not None, "the second machine was not seen at work"
        assert sorted(found) == [3 * i * i for i in range(40)]
