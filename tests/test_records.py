"""Records: whole cells or none, whatever happened to the file."""

import json
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest

from holdfast.errors import UserError
from holdfast.files import RunFolder, write_atomic
from holdfast.records import Record, RecordFile, curves, provenance, source_revision

ONE = Record("protected", "direct+all", 0, 0, 4, "test", "accuracy", 0.5, 1.2, 0, 0.1, False, False, "abc")


def cell(model: str = "protected", seed: int = 0) -> list[Record]:
    return [
        replace(ONE, model=model, seed=seed, step=step, split=split, value=step / 10)
        for step in (0, 2, 4)
        for split in ("validation", "test")
    ]


def test_round_trip_and_one_json_object_a_line(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "records.jsonl")
    file.append(cell())
    lines = (tmp_path / "records.jsonl").read_text().splitlines()
    assert len(lines) == 6
    assert list(json.loads(lines[0])) == [f.name for f in fields(Record)]
    assert file.read() == cell()
    assert curves(file.read(), "protected", "direct+all", "test") == ([0, 2, 4], [0], [[0, 0.2, 0.4]])


@pytest.mark.parametrize("cut", [1, 40, 200, 700])
def test_a_torn_cell_is_dropped_and_the_rest_stands(tmp_path: Path, cut: int) -> None:
    file = RecordFile(tmp_path / "records.jsonl")
    file.append(cell())
    whole = file.path.read_bytes()
    file.append(cell("clean"))
    file.path.write_bytes(file.path.read_bytes()[:-cut])
    assert file.recover() == {("protected", "direct+all", 0)}
    assert file.path.read_bytes() == whole


def test_recovery_leaves_a_whole_file_alone(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "records.jsonl")
    file.append(cell())
    stamp = file.path.stat().st_mtime_ns
    assert len(file.recover()) == 1
    assert file.path.stat().st_mtime_ns == stamp


def test_a_line_that_is_no_record(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "records.jsonl")
    file.path.write_text(json.dumps({**asdict(ONE), "speed": 1}) + "\n")
    with pytest.raises(UserError, match="line 1: not a record"):
        file.read()


def test_incomplete_curves_are_refused() -> None:
    with pytest.raises(UserError, match="incomplete"):
        curves([*cell(), *cell(seed=1)[:-1]], "protected", "direct+all", "test")


def test_provenance_names_versions_revision_and_hardware(runtime) -> None:
    facts = provenance(runtime, {"run_seed": 3})
    assert {"torch", "timm", "holdfast"} <= facts["versions"].keys()
    assert facts["hardware"]["precision"] == "float32"
    assert facts["run_seed"] == 3
    assert source_revision()


def test_a_folder_belongs_to_one_run(tmp_path: Path) -> None:
    mine, other = {"recipe": {"name": "a", "seed": 1}}, {"recipe": {"name": "b", "seed": 2}}
    folder = RunFolder(tmp_path / "run")
    for _ in range(2):
        with folder.claim(mine):
            pass
    before = folder.manifest.read_bytes()
    with pytest.raises(UserError, match=r"belongs to another run .'a'") as caught:
        folder.claim(other).__enter__()
    assert "; seed was 1, is 2, name was a, is b)" in str(caught.value)
    skd = {"recipe": {"name": "a", "seed": 1, "defence": {"name": "skd", "target": -1}, "notes": "x" * 50}}
    with pytest.raises(UserError) as caught:
        folder.claim(skd).__enter__()
    assert f"; defence.name was absent, is skd, notes was absent, is {'x' * 39}…)" in str(caught.value)
    assert folder.manifest.read_bytes() == before
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").touch()
    with pytest.raises(UserError, match="is not empty"):
        RunFolder(tmp_path / "photos").claim(mine).__enter__()
    assert [p.name for p in (tmp_path / "photos").iterdir()] == ["holiday.jpg"]
    with pytest.raises(UserError, match="is a file"):
        RunFolder(tmp_path / "photos" / "holiday.jpg").claim(mine).__enter__()


def test_two_processes_cannot_share_a_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with folder.lock(), pytest.raises(UserError, match="in use by another"), RunFolder(tmp_path / "run").lock():
        pass
    with folder.lock():
        pass


def test_a_refused_write_leaves_the_old_file(tmp_path: Path, monkeypatch) -> None:
    import errno
    import os

    path = tmp_path / "x.json"
    write_atomic(path, "old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*x\.json: No space left on device"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
