"""The whole chain: its contract, its controls, its resumption, as a user runs it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import yaml

import holdfast
from commands import Command
from holdfast.bundle import load_bundle
from holdfast.checkpoints import read_checkpoint
from holdfast.errors import UserError
from holdfast.models import load_weights, save_weights
from holdfast.pipeline import run
from holdfast.recipes import load_recipe, parse_recipe
from holdfast.records import RecordFile
from test_cli import cli

FILES = ["bundle/README.md", "bundle/config.json", "bundle/model.safetensors", "records.jsonl"]
FILES += ["summary.json", "report.html", "report.md", "figures/curves.png", "figures/protection.png"]


def values(folder: Path) -> list[tuple[object, ...]]:
    """What was measured, without times."""
    records = RecordFile(folder / "records.jsonl").read()
    return sorted((r.model, r.attack, r.seed, r.step, r.split, r.value, r.loss) for r in records)


def untimed(value: Any) -> Any:
    """A summary without seconds, memory, and what follows from them."""
    if isinstance(value, dict):
        return {k: untimed(v) for k, v in value.items() if k != "cost" and "seconds" not in k and "memory" not in k}
    return [untimed(v) for v in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo-like run that really learns, made once: SOPHON on digits."""
    out = tmp_path_factory.mktemp("finished") / "run"
    recipe = {
        "name": "small demo",
        "original": "digits[0-4]",
        "restricted": {"data": "digits[5-9]", "adversary": 100},
        "model": {"name": "small_conv", "size": 8, "channels": 1, "options": {"width": 16}},
        "pretrain": {"steps": 200, "lr": 0.003},
        "defence": {
            "adversaries": 1,
            "inner_steps": 10,
            "inner_batch_size": [50],
            "inner_lr": [0.0001, 0.001],
            "iterations": 60,
            "alpha": 0.001,
            "ntr_loops": 3,
            "ntr_batch_size": 60,
            "probe_steps": 10,
        },
        "audit": {"battery": "quick", "steps": 80, "seeds": 2, "evaluations": 5},
        "runtime": {"precision": "float32"},
    }
    path = out.parent / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "holdfast", "run", str(path), "--out", str(out)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    text, err = done.stdout, done.stderr
    assert done.returncode == 0, err
    assert str(out / "report.html") in text
    assert all(word in text for word in ("verdict", "intactness", "worst case", "cost ratio"))
    return out


class TestContract:
    def test_the_files_are_there(self, finished: Path) -> None:
        assert [f for f in FILES if not (finished / f).is_file()] == []

    def test_summary_has_the_schema_that_others_build_on(self, finished: Path) -> None:
        s = json.loads((finished / "summary.json").read_text())
        assert s["schema"] == 1
        assert s["verdict"] in ("held", "partial", "failed")
        assert {"metric", "before", "after", "ratio", "classes", "corruptions", "calibration"} == s["intactness"].keys()
        assert len(s["intactness"]["classes"]) == 5
        r = s["restricted"]
        assert {"metric", "chance", "worst", "attacks"} <= r.keys()
        assert r["attacks"][0]["name"] == r["worst"]
        for attack in r["attacks"]:
            assert {"name", "simulated", "steps", "protected", "clean", "scratch"} <= attack.keys()
            assert {"recovery", "cost_ratio", "interval"} <= attack.keys()
            for model in ("protected", "clean", "scratch"):
                assert len(attack[model]) == len(attack["steps"])
                assert all(0 <= v <= 1 for v in attack[model])
            assert attack["steps"] == [0, 5, 10, 20, 40, 80]
        assert s["cost"].keys() == {"protect_seconds", "audit_seconds", "peak_memory_mb"}
        assert all(v > 0 for v in s["cost"].values())
        assert all({"name", "passed", "message"} == c.keys() for c in s["checks"])

    def test_the_summary_is_what_the_records_say(self, finished: Path) -> None:
        s = json.loads((finished / "summary.json").read_text())
        rows = [json.loads(line) for line in (finished / "records.jsonl").read_text().splitlines()]
        attack = s["restricted"]["attacks"][2]
        last = [
            r["value"]
            for r in rows
            if (r["model"], r["attack"], r["step"], r["split"]) == ("clean", attack["name"], 80, "test")
        ]
        assert len(last) == 2
        assert attack["clean"][-1] == pytest.approx(sum(last) / 2)

    def test_positive_control_the_attack_succeeds_on_the_clean_model(self, finished: Path) -> None:
        s = json.loads((finished / "summary.json").read_text())
        assert s["restricted"]["worst_case"]["clean"]["final"] > 0.9
        assert s["restricted"]["worst_case"]["scratch"]["final"] > 0.8

    def test_intactness_and_the_papers_attack(self, finished: Path) -> None:
        s = json.loads((finished / "summary.json").read_text())
        assert s["intactness"]["ratio"] >= 0.95
        default = next(a for a in s["restricted"]["attacks"] if a["name"] == "direct+all")
        assert default["protected"][-1] < min(default["clean"][-1], default["scratch"][-1])

    def test_the_report_says_what_stronger_attacks_do(self, finished: Path) -> None:
        for name in ("report.md", "report.html"):
            text = (finished / name).read_text()
            assert "Resisting that attack alone shows little" in text
            assert "worse than both controls" in text
            assert "not held: " in text

    def test_the_bundle_loads_and_is_the_protected_model(self, finished: Path) -> None:
        bundle = load_bundle(finished / "bundle")
        model = holdfast.load_model(finished / "bundle")
        assert bundle.classes == ("0", "1", "2", "3", "4")
        assert model(bundle.architecture.example()).shape == (1, 5)
        clean = load_weights(finished / "clean")
        assert any(not torch.equal(clean[k], v) for k, v in bundle.state.items())
        card = (finished / "bundle" / "README.md").read_text()
        assert "Verdict:" in card
        assert card.startswith("---\n")

    def test_a_bundle_that_was_tampered_with_is_refused(self, finished: Path, tmp_path: Path) -> None:
        import shutil

        shutil.copytree(finished / "bundle", tmp_path / "b")
        state = load_weights(tmp_path / "b")
        state["0.weight"] += 1
        save_weights(tmp_path / "b" / "model.safetensors", state)
        with pytest.raises(UserError, match="does not match the hash"):
            load_bundle(tmp_path / "b")
        config = json.loads((finished / "bundle" / "config.json").read_text())
        config["architecture"] = "os:system"
        (tmp_path / "b" / "config.json").write_text(json.dumps(config))
        save_weights(tmp_path / "b" / "model.safetensors", load_weights(finished / "bundle"))
        with pytest.raises(UserError, match="needs the model factory"):
            load_bundle(tmp_path / "b")

    def test_a_finished_run_is_not_run_again(self, finished: Path, capsys, monkeypatch) -> None:
        recipe = finished.parent / "recipe.yaml"
        before = (finished / "records.jsonl").read_bytes()
        code, _, err = cli(capsys, monkeypatch, "run", recipe, "--out", finished)
        assert (code, "add --resume" in err) == (2, True)
        code, out, _ = cli(capsys, monkeypatch, "run", recipe, "--out", finished, "--resume")
        assert code == 0
        assert "report" in out
        assert (finished / "records.jsonl").read_bytes() == before

    def test_another_recipe_in_the_same_folder_is_refused(self, finished: Path, capsys, monkeypatch) -> None:
        before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
        arguments = ["--out", finished, "--set", "seed=9", "--resume"]
        code, _, err = cli(capsys, monkeypatch, "run", finished.parent / "recipe.yaml", *arguments)
        assert code == 2
        assert "belongs to another run" in err
        assert "; seed was 0, is 9)" in err
        assert {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()} == before

    def test_report_is_made_anew_from_records_alone(self, finished: Path, capsys, monkeypatch) -> None:
        summary = (finished / "summary.json").read_text()
        (finished / "summary.json").unlink()
        code, _, _ = cli(capsys, monkeypatch, "report", "--out", finished)
        assert code == 0
        assert (finished / "summary.json").read_text() == summary

    def test_somebody_elses_checkpoint(self, finished: Path, tmp_path: Path, capsys, monkeypatch) -> None:
        arguments = ["--protected", finished / "bundle" / "model.safetensors", "--clean", finished / "clean"]
        arguments += ["--model", "small_conv", "--size", 8, "--restricted", "digits[5-9]"]
        arguments += ["--set", "model.channels=1", "--set", "model.options.width=16", "--set", "audit.steps=20"]
        arguments += ["--set", "audit.battery=paper-default", "--set", "audit.seeds=2", "--set", "runtime.jobs=1"]
        code, out, err = cli(capsys, monkeypatch, "audit", *arguments, "--out", tmp_path / "theirs")
        assert code == 0, err
        assert "not measured" in out
        s = json.loads((tmp_path / "theirs" / "summary.json").read_text())
        assert s["intactness"] is None
        assert s["verdict"] != "held"
        assert not any(a["simulated"] for a in s["restricted"]["attacks"])
        more = ["--protected", finished / "bundle", "--clean", finished / "clean", "--restricted", "digits[5-9]"]
        more += ["--original", "digits[0-4]", "--set", "audit={battery: paper-default, steps: 20, seeds: 2}"]
        code, _, err = cli(capsys, monkeypatch, "audit", *more, "--set", "runtime.jobs=1", "--out", tmp_path / "both")
        assert code == 0, err
        s = json.loads((tmp_path / "both" / "summary.json").read_text())
        assert s["intactness"]["ratio"] > 0.9


class TestResume:
    """`kill -9` at any moment, then --resume: the same weights, bit for bit, and the same records."""

    @pytest.fixture(scope="class")
    @staticmethod
    def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp("undisturbed")
        recipe = {
            "name": "tiny",
            "original": {"data": "digits[0-4]", "per_class": 60, "test_per_class": 20},
            "restricted": {"data": "digits[5-9]", "per_class": 60, "test_per_class": 20},
            "model": {"name": "small_conv", "size": 8, "channels": 1, "options": {"width": 8}},
            "pretrain": {"steps": 150, "batch_size": 50, "lr": 0.005},
            "defence": {
                "adversaries": 1,
                "inner_steps": 4,
                "inner_batch_size": [20],
                "iterations": 60,
                "check_every": 3,
                "ntr_batch_size": 30,
                "probe_steps": 4,
                "tolerance": 0.2,
            },
            "audit": {"battery": "paper-default", "steps": 30, "seeds": 2, "evaluations": 3},
            "runtime": {"precision": "float32", "jobs": 1},
        }
        (folder / "r.yaml").write_text(yaml.safe_dump(recipe))
        code, _, err = Command("run", folder / "r.yaml", "--out", folder / "run").finish()
        assert code == 0, err
        return folder / "r.yaml", folder / "run"

    @pytest.mark.parametrize("stage", ["pretraining", "protection", "records.jsonl"])
    def test_killed_and_resumed(self, undisturbed: tuple[Path, Path], tmp_path: Path, stage: str) -> None:
        recipe, expected = undisturbed
        out = tmp_path / "run"
        eager = {"HOLDFAST_SAVE_SECONDS": "0.01"}
        command = Command("run", recipe, "--out", out, **eager)
        deadline = time.monotonic() + 120
        marker = out / stage if stage.endswith("jsonl") else out / stage / "checkpoint.pt"
        while not marker.exists() and command.running() and time.monotonic() < deadline:
            time.sleep(0.005)
        command.send(signal.SIGKILL)
        assert command.finish()[0] == -signal.SIGKILL
        assert marker.exists()
        assert not (out / "summary.json").exists()
        code, _, err = Command("run", recipe, "--out", out, "--resume", **eager).finish()
        assert code == 0, err
        for part in ("clean", "bundle"):
            ours, theirs = load_weights(out / part), load_weights(expected / part)
            assert all(torch.equal(ours[k], theirs[k]) for k in theirs), part
        assert values(out) == values(expected)

    def test_more_audit_seeds_are_added_to_those_that_are_there(
        self, undisturbed: tuple[Path, Path], tmp_path: Path, capsys, monkeypatch
    ) -> None:
        recipe, expected = undisturbed
        out = tmp_path / "run"
        shutil.copytree(expected, out)
        before = {f: (out / f).read_bytes() for f in ("run.json", "records.jsonl", "bundle/model.safetensors")}
        call = (capsys, monkeypatch, "run", str(recipe), "--out", str(out), "--set")
        for more in (("audit.seeds=3",), ("audit.seeds=1", "--resume")):
            code, _, err = cli(*call, *more)
            assert code == 2
            assert f"audit.seeds was 2, is {more[0][-1]}" in err
        assert {f: (out / f).read_bytes() for f in before} == before
        code, _, err = cli(*call, "audit.seeds=3", "--resume")
        assert code == 0, err
        assert (out / "records.jsonl").read_bytes().startswith(before["records.jsonl"])
        assert (out / "bundle" / "model.safetensors").read_bytes() == before["bundle/model.safetensors"]
        found = values(out)
        assert [v for v in found if v[2] < 2] == values(expected)
        assert len([v for v in found if v[2] == 2]) == len([v for v in found if v[2] == 1])
        assert "audit seeds 0, 1, 2;" in (out / "report.html").read_text()
        code, _, err = cli(*call, "audit.seeds=3", "--resume")
        assert code == 0, err

    def test_a_larger_battery_adds_what_the_smaller_one_had_not(
        self, undisturbed: tuple[Path, Path], tmp_path: Path, capsys, monkeypatch
    ) -> None:
        """Searches and from-scratch runs that attacks of both share are taken over: the end is that of a fresh run."""
        recipe, expected = undisturbed
        out = tmp_path / "run"
        shutil.copytree(expected, out)
        before = (out / "records.jsonl").read_bytes()
        call = (capsys, monkeypatch, "run", str(recipe), "--out", str(out), "--set")
        for more in (("audit.battery=quick",), ("audit.battery=slc", "--resume")):
            code, _, err = cli(*call, *more)
            assert code == 2
            assert f"audit.battery was paper-default, is {more[0].partition('=')[2]}" in err
        assert (out / "records.jsonl").read_bytes() == before
        code, _, err = cli(*call, "audit.battery=quick", "--resume")
        assert code == 0, err
        assert (out / "records.jsonl").read_bytes().startswith(before)
        fresh = tmp_path / "fresh"
        code, _, err = cli(capsys, monkeypatch, "run", recipe, "--out", fresh, "--set", "audit.battery=quick")
        assert code == 0, err
        assert values(out) == values(fresh)
        found = [json.loads((f / "summary.json").read_text()) for f in (out, fresh)]
        assert [s["battery"] for s in found[0]["restricted"]["strengths"]] == ["paper-default-v1", "quick-v3"]
        assert untimed(found[0]) == untimed(found[1])

    def test_stopped_on_the_way_to_a_larger_battery_it_has_no_report(
        self, undisturbed: tuple[Path, Path], tmp_path: Path, capsys, monkeypatch
    ) -> None:
        recipe, expected = undisturbed
        out = tmp_path / "run"
        shutil.copytree(expected, out)
        page = (out / "report.md").read_text()
        with monkeypatch.context() as stopped:
            stopped.setattr("holdfast.pipeline.run_audit", Mock(side_effect=KeyboardInterrupt))
            code, _, _ = cli(
                capsys, monkeypatch, "run", recipe, "--out", out, "--set", "audit.battery=quick", "--resume"
            )
            assert code == 130
        code, _, err = cli(capsys, monkeypatch, "report", "--out", out)
        assert code == 2
        assert "error: the audit (quick-v3, 2 seeds) is unfinished: " in err
        assert (out / "report.md").read_text() == page

    def test_a_battery_beside_the_recipe_s_own_attacks(self, undisturbed: tuple[Path, Path], tmp_path: Path) -> None:
        """One search serves the recipe's own attack and, later, the battery's with the same control."""
        raw = yaml.safe_load(undisturbed[0].read_text())
        tuning = {"initialise": "head", "optimiser": "adam", "lr": 1e-3, "weight_decay": 0.0}
        own = {"name": "mine", "tuning": tuning, "edits": [{"name": "noise"}], "search": {}}
        raw["audit"] = {"battery": "own", "steps": 8, "seeds": 1, "evaluations": 2, "attacks": [own]}
        found = []
        for name, batteries in (("grown", ("own", "quick")), ("fresh", ("quick",))):
            for battery in batteries:
                raw["audit"]["battery"] = battery
                found.append(run(parse_recipe(raw), tmp_path / name, resume=True, quiet=True))
        assert found[0]["restricted"]["worst"] == "mine"
        assert untimed(found[1]) == untimed(found[2])
        lines = [(tmp_path / f / "searches.jsonl").read_text().count("\n") for f in ("grown", "fresh")]
        assert lines[0] == lines[1]

    def test_who_measured_is_not_who_came_last_and_measured_nothing(
        self, undisturbed: tuple[Path, Path], tmp_path: Path, capsys, monkeypatch
    ) -> None:
        out = tmp_path / "run"
        shutil.copytree(undisturbed[1], out)
        ((name, entry),) = json.loads((out / "provenance.json").read_text()).items()
        later = {**entry, "revision": "a-later-source", "left_out": {"regrown": "no zeros"}}
        (out / "provenance.json").write_text(json.dumps({name: entry, "later": later}))
        assert cli(capsys, monkeypatch, "report", "--out", str(out))[0] == 0
        page = (out / "report.html").read_text()
        assert f"source {entry['revision']}<" in page
        assert "a-later-source" not in page
        assert "regrown (no zeros)" in page, "what is audited is what the last one says"

    def test_a_battery_that_has_changed_since(self, undisturbed: tuple[Path, Path], tmp_path: Path, capsys) -> None:
        out = tmp_path / "run"
        shutil.copytree(undisturbed[1], out)
        known = json.loads((out / "provenance.json").read_text())
        for entry in known.values():
            entry["battery"] = "paper-default-v0"
        (out / "provenance.json").write_text(json.dumps(known))
        with pytest.raises(UserError, match="paper-default-v0, whose attacks are not all in paper-default-v1"):
            run(load_recipe(undisturbed[0]), out, resume=True, quiet=True)

    def test_terminated_after_the_step_at_hand(self, undisturbed: tuple[Path, Path], tmp_path: Path) -> None:
        """SIGTERM saves what no timer has saved, and the run goes on from there to the same end."""
        recipe, expected = undisturbed
        out = tmp_path / "run"
        command = Command("run", recipe, "--out", out, HOLDFAST_SAVE_SECONDS="1000")
        while not (out / "protection" / "tensorboard").exists() and command.running():
            time.sleep(0.005)
        command.send(signal.SIGTERM)
        code, _, err = command.finish(timeout=60)
        assert code == 143
        assert "--resume goes on from the last saved state" in err
        assert "Traceback" not in err
        assert 0 < read_checkpoint(out / "protection" / "checkpoint.pt")["iteration"] < 60
        code, _, err = Command("run", recipe, "--out", out, "--resume").finish()
        assert code == 0, err
        ours, theirs = load_weights(out / "bundle"), load_weights(expected / "bundle")
        assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
        assert values(out) == values(expected)

    def test_interrupted_politely(self, undisturbed: tuple[Path, Path], tmp_path: Path) -> None:
        recipe, _ = undisturbed
        command = Command("run", recipe, "--out", tmp_path / "run", HOLDFAST_SAVE_SECONDS="0.01")
        while not (tmp_path / "run" / "protection" / "checkpoint.pt").exists() and command.running():
            time.sleep(0.01)
        command.send(signal.SIGINT)
        code, _, err = command.finish(timeout=60)
        assert code == 130
        assert "--resume goes on from the last saved state" in err
        assert "Traceback" not in err
