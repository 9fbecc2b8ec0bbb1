"""Bad input on the command line: one line, exit code 2, no traceback, nothing half-written."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from commands import Command
from holdfast.cli import LISTS, main

COMMANDS = ["run", "pretrain", "protect", "audit", "report", "demo", "list"]


def cli(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["holdfast", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        main()
    captured = capsys.readouterr()
    return int(exit_.value.code or 0), captured.out, captured.err


def one_error_line(code: int, err: str) -> str:
    lines = [line for line in err.strip().splitlines() if not line.startswith(("pretrain:", "protect:"))]
    assert code == 2, err
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_reads_well(command, capsys, monkeypatch) -> None:
    code, out, _ = cli(capsys, monkeypatch, command, "--help")
    assert code == 0
    assert "--help" in out
    if command not in ("list",):
        assert "--out" in out


@pytest.mark.parametrize("what", LISTS)
def test_lists(what, capsys, monkeypatch) -> None:
    code, out, _ = cli(capsys, monkeypatch, "list", what, "--json")
    assert code == 0
    found = json.loads(out)
    known = {
        "defences": "sophon",
        "attacks": "initFC+all",
        "edits": "rebalance",
        "batteries": "quick",
        "domains": "digits",
        "models": "caformer_m36",
        "recipes": "sophon/mnist-usps",
    }
    assert known[what] in found
    code, plain, _ = cli(capsys, monkeypatch, "list", what)
    assert len(plain.splitlines()) == len(found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nowhere.yaml", "--out", "o"], "recipe not found: nowhere.yaml"),
        (["run"], "Missing argument 'RECIPE'"),
        (["run", "demo"], "Missing option '--out'"),
        (["rum"], "No such command 'rum'"),
        (["list", "attack"], "unknown list 'attack' (did you mean 'attacks'?)"),
        (["run", "demo", "--out", "o", "--preset", "huge"], "unknown preset of demo.yaml 'huge'"),
        (["run", "demo", "--out", "o", "--set", "defence.alhpa=1"], "unknown key 'defence.alhpa'"),
        (["run", "demo", "--out", "o", "--set", "defence.alpha=-1"], "alpha must lie in (0, 1]"),
        (["run", "demo", "--out", "o", "--set", "seed"], "--set expects key=value"),
        (["run", "demo", "--out", "o", "--set", "original=digits[3]"], "has one class"),
        (["run", "demo", "--out", "o", "--set", "restricted.data=digits[4-9]"], "head and classes do not agree"),
        (["run", "demo", "--out", "o", "--set", "restricted.data=digits[4,6-9]"], "4 of digits is both kept"),
        (["run", "demo", "--out", "o", "--set", "restricted.data=parquet:none.parquet"], "data not found"),
        (["run", "demo", "--out", "o", "--set", "weights=none.safetensors"], "weights not found"),
        (["run", "demo", "--out", "o", "--set", "model.name=smal_conv"], "unknown model 'smal_conv'"),
        (["run", "demo", "--out", "o", "--set", "runtime.device=cuda:7"], "device"),
        (["run", "demo", "--out", "o", "--set", "restricted.adversary=100000"], "adversary's images must number"),
        (["audit", "--out", "o", "--protected", "p.safetensors"], "audit needs a RECIPE"),
        (["audit", "demo", "--out", "o", "--protected", "p.safetensors"], "--protected needs --clean"),
        (["report", "--out", "o"], "folder not found: o"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(arguments, message, capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = cli(capsys, monkeypatch, *arguments)
    assert message in one_error_line(code, err)
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_weights_file(capsys, monkeypatch, tmp_path, recipe_file) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"\x80\x00\x00\x00\x00\x00\x00\x00{")
    out = tmp_path / "o"
    code, _, err = cli(
        capsys, monkeypatch, "run", recipe_file, "--out", out, "--set", f"weights={tmp_path / 'w.safetensors'}"
    )
    assert "truncated, or not safetensors" in one_error_line(code, err)
    assert not out.exists()


def test_weights_with_another_head(capsys, monkeypatch, tmp_path, recipe_file, architecture) -> None:
    from holdfast.models import save_weights, state_of

    save_weights(tmp_path / "w.safetensors", state_of(architecture.build(7)))
    arguments = ["run", recipe_file, "--out", tmp_path / "o", "--set", f"weights={tmp_path / 'w.safetensors'}"]
    code, _, err = cli(capsys, monkeypatch, *arguments)
    assert "does the number of classes agree" in one_error_line(code, err)


def test_a_folder_that_is_not_ours_is_left_alone(capsys, monkeypatch, tmp_path, recipe_file) -> None:
    out = tmp_path / "o"
    out.mkdir()
    (out / "thesis.tex").write_text("x")
    code, _, err = cli(capsys, monkeypatch, "run", recipe_file, "--out", out)
    assert "is not empty" in one_error_line(code, err)
    assert sorted(p.name for p in out.iterdir() if p.name != ".lock") == ["thesis.tex"]


def test_stages_one_by_one(capsys, monkeypatch, tmp_path, recipe_file) -> None:
    out = tmp_path / "o"
    arguments = [recipe_file, "--out", out, "--quiet"]
    code, text, err = cli(capsys, monkeypatch, "pretrain", *arguments)
    assert (code, err) == (0, "")
    assert (out / "clean" / "model.safetensors").exists()
    code, _, err = cli(capsys, monkeypatch, "report", "--out", out)
    assert "holds no audit" in one_error_line(code, err)
    code, text, _ = cli(capsys, monkeypatch, "protect", *arguments)
    assert code == 0
    assert "protected model" in text
    assert "Not audited yet" in (out / "bundle" / "README.md").read_text()
    code, text, _ = cli(capsys, monkeypatch, "audit", *arguments)
    assert code == 0
    assert "worst case" in text
    assert "Verdict" in (out / "bundle" / "README.md").read_text()


def test_a_disk_that_is_full(tmp_path: Path, recipe_file: Path) -> None:
    """Writes fail for real (the process may not write more than 40 kB into a file): one line, and what was there
    before is whole; with space again, --resume finishes."""
    out = tmp_path / "o"
    raw = yaml.safe_load(recipe_file.read_text())
    raw["model"]["options"]["width"] = 32  # weights of 370 kB
    recipe_file.write_text(yaml.safe_dump(raw))
    arguments = ["run", recipe_file, "--out", out, "--resume"]
    code, _, err = Command(*arguments, file_size=40_000).finish()
    assert "cannot write" in one_error_line(code, err)
    assert "Traceback" not in err
    assert not list(out.rglob("*.safetensors"))
    assert [p for p in out.rglob(".*") if p.name != ".lock"] == []
    code, _, err = Command(*arguments).finish()
    assert code == 0, err
    assert (out / "report.html").exists()


def test_version(capsys, monkeypatch) -> None:
    code, out, _ = cli(capsys, monkeypatch, "--version")
    assert (code, out.strip()) == (0, "holdfast 0.1.0")
