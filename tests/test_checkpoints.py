"""Checkpoints: whole or absent, the last two kept, damage passed over."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast.checkpoints import Checkpoint, Clock, digest, read_checkpoint
from holdfast.distributed import Group
from holdfast.errors import UserError
from holdfast.workplace import Workplace


def value(step: int) -> dict:
    return {"step": step, "model": {"w": torch.full((2, 3), float(step)), "n": torch.tensor(step)}, "done": [1.5, None]}


def saved(folder: Path, *steps: int) -> Checkpoint:
    checkpoint = Checkpoint(folder / "checkpoint.pt", "mine", resume=True)
    for step in steps:
        checkpoint.save(value(step))
    return checkpoint


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, 1, 2, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.previous.pt", "checkpoint.pt"]
    assert [read_checkpoint(p)["step"] for p in (checkpoint.previous, checkpoint.path)] == [2, 3]
    found = checkpoint.load()
    assert found is not None
    assert found["step"] == 3
    assert torch.equal(found["model"]["w"], torch.full((2, 3), 3.0))
    assert Checkpoint(checkpoint.path, "mine").load() is None  # not asked to go on
    assert Checkpoint(tmp_path / "none.pt", "mine", resume=True).load() is None


@pytest.mark.parametrize("damage", ["torn", "empty", "another value"])
def test_a_damaged_one_is_passed_over_in_one_line(tmp_path: Path, damage: str) -> None:
    checkpoint, said = saved(tmp_path, 1, 2), []
    if damage == "another value":  # whole as a file, and not what was saved
        content = torch.load(checkpoint.path, weights_only=True)
        content["model"]["w"][1, 2] += 1e-6
        torch.save(content, checkpoint.path)
    else:
        content = checkpoint.path.read_bytes()
        checkpoint.path.write_bytes(content[: len(content) // 2 if damage == "torn" else 0])
    again = Checkpoint(checkpoint.path, "mine", True, said.append)
    found = again.load()
    assert found is not None
    assert found["step"] == 1
    assert len(said) == 1
    assert "checkpoint.pt" in said[0]
    assert "going on from the checkpoint before it" in said[0]
    again.save(value(2))  # what is good must not make room for what is damaged
    assert [read_checkpoint(p)["step"] for p in (checkpoint.previous, checkpoint.path)] == [1, 2]


def test_where_all_is_damaged_nothing_is_made_up(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, 1, 2)
    for path in (checkpoint.path, checkpoint.previous):
        path.write_bytes(b"torn")
    with pytest.raises(UserError, match=r"cannot read .*checkpoint\.pt"):
        checkpoint.load()


def test_another_runs_is_refused(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, 1)
    with pytest.raises(UserError, match="checkpoint of another run"):
        Checkpoint(checkpoint.path, "yours", resume=True).load()


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_crash_at_any_rename_leaves_a_whole_one(tmp_path: Path, monkeypatch, at: int) -> None:
    """The first rename finishes the new file, the second makes room, the third puts it into its place."""
    checkpoint = saved(tmp_path, 1, 2)
    replace, count = os.replace, [0]

    class Killed(BaseException):
        pass

    def dying(*paths) -> None:
        count[0] += 1
        if count[0] == at:
            raise Killed
        replace(*paths)

    monkeypatch.setattr(os, "replace", dying)
    with pytest.raises(Killed):
        checkpoint.save(value(3))
    monkeypatch.undo()
    found = checkpoint.load()
    assert found is not None
    assert found["step"] == 2
    checkpoint.save(value(3))
    assert read_checkpoint(checkpoint.path)["step"] == 3


def test_a_full_disk_leaves_what_was(tmp_path: Path, monkeypatch) -> None:
    checkpoint = saved(tmp_path, 1, 2)

    def full(*_) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"No space left on device; what was written before is intact"):
        checkpoint.save(value(3))
    assert [read_checkpoint(p)["step"] for p in (checkpoint.previous, checkpoint.path)] == [1, 2]
    assert len(list(tmp_path.iterdir())) == 2


def test_the_hash_sees_every_bit() -> None:
    a = {"x": torch.tensor([0.0, 1.0]), "y": (1, "two", None)}
    assert digest(a) == digest({"x": torch.tensor([0.0, 1.0]), "y": (1, "two", None)})
    others = [
        {**a, "x": torch.tensor([-0.0, 1.0])},
        {**a, "x": torch.tensor([[0.0, 1.0]])},
        {**a, "x": torch.tensor([0.0, 1.0], dtype=torch.float64)},
        {**a, "y": (1, "two", 0)},
        {**a, "z": 1},
    ]
    assert len({digest(v) for v in [a, *others]}) == 6
    picture = torch.rand(2, 3, 4, 4)
    assert digest(picture) == digest(picture.to(memory_format=torch.channels_last))


def test_what_kill_left_of_a_file_goes_with_the_next_save(tmp_path: Path) -> None:
    mine, others = tmp_path / ".checkpoint.new.pt.ab12", tmp_path / ".checkpoint-1-of-2.new.pt.ab12"
    for torn in (mine, others):
        torn.write_bytes(b"half")
    Checkpoint(tmp_path / "checkpoint.pt").save({"iteration": 1})
    assert not mine.exists()
    assert others.exists()


class TestClock:
    def test_saving_takes_no_more_than_its_share(self, monkeypatch: pytest.MonkeyPatch) -> None:
        now = [0.0]
        monkeypatch.setattr("holdfast.checkpoints.time.monotonic", lambda: now[0])
        clock = Clock(20)
        now[0] = 20.5
        assert clock.due()
        clock.save(lambda: now.__setitem__(0, now[0] + 3))
        now[0] += 59
        assert not clock.due()
        now[0] += 2  # 3 seconds are a twentieth of 60
        assert clock.due()
        clock.save(lambda: None)
        now[0] += 21
        assert clock.due()

    def test_after_every_step(self, monkeypatch: pytest.MonkeyPatch) -> None:
        now = [0.0]
        monkeypatch.setattr("holdfast.checkpoints.time.monotonic", lambda: now[0])
        clock = Clock(0)
        clock.save(lambda: now.__setitem__(0, now[0] + 3))
        now[0] += 0.01
        assert clock.due()


class Shards:
    """The second of two processes' view of a workplace: what the other one has is told."""

    def __init__(self, folder: Path, other: int) -> None:
        class Pair(Group):
            def agreed(self, find: Any) -> Any:
                return find()

            def any(self, flag: bool) -> bool:
                return flag

            def least(self, number: int) -> int:
                return min(number, other)

        self.place = Workplace(folder, resume=True, group=Pair(1, 2), sharded=True)
        self.kept = self.place.checkpoint("x")

    def load(self) -> Any:
        return self.place.load(self.kept)


class TestShards:
    def test_stopped_between_two_processes_saving_time_and_again(self, tmp_path: Path) -> None:
        """This process saves, the other one never gets to it: the common iteration stays."""
        first = Shards(tmp_path, 1).kept
        assert first is not None
        first.save({"iteration": 1})
        first.save({"iteration": 2})
        for _ in range(3):
            shards = Shards(tmp_path, 1)
            assert shards.load()["iteration"] == 1
            assert shards.kept is not None
            shards.kept.save({"iteration": 2})

    def test_another_number_of_processes_is_refused(self, tmp_path: Path) -> None:
        Checkpoint(tmp_path / "checkpoint-1-of-8.pt", "x").save({"iteration": 1})
        shards = Shards(tmp_path, 1)
        assert shards.place.begun()
        with pytest.raises(UserError, match=r"holds checkpoint-1-of-8.pt, of a run with another number of processes"):
            shards.load()
        alone = Workplace(tmp_path, resume=True)
        with pytest.raises(UserError, match="resume it as it was begun"):
            alone.load(alone.checkpoint("x"))
        assert Workplace(tmp_path).load(None) is None  # begun anew
