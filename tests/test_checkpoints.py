"""Checkpoints: whole or absent, the last two kept, damage passed over."""

import errno
import os
from pathlib import Path

import pytest
import torch

from holdfast.checkpoints import Checkpoint, digest, read_checkpoint
from holdfast.errors import UserError


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
