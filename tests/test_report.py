"""The report: what it says follows from the records; the page is looked at in a real headless Chromium."""

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from holdfast.attacks.attack import Attack
from holdfast.attacks.batteries import BATTERIES
from holdfast.audit import BENIGN, AuditFiles
from holdfast.checks import HELPS
from holdfast.errors import UserError
from holdfast.files import read_json, write_json
from holdfast.finetuning import FineTuning
from holdfast.inputs import attack_facts
from holdfast.intactness import ORIGINAL
from holdfast.records import Record, RecordFile, SearchRecord
from holdfast.report.words import conclusion, cost, headlines, percent, ratio
from holdfast.report.write import write_report
from holdfast.summary import summarise

STEPS = (0, 10, 20)
BASE = Record("clean", "direct+all", 0, 0, 20, "test", "accuracy", 0.1, 1.0, 0, 1.0, False, False, "p", images=100)
CURVES = {  # attack → model → values, before a little noise for each seed
    "direct+all": {"protected": (0.0, 0.1, 0.2), "clean": (0.1, 0.7, 0.8), "scratch": (0.1, 0.3, 0.5)},
    "initFC+all · adam 1e-3": {"protected": (0.1, 0.7, 0.8), "clean": (0.1, 0.8, 0.9), "scratch": (0.1, 0.5, 0.7)},
    "initFC+FC": {"protected": (0.1, 0.1, 0.1), "clean": (0.1, 0.1, 0.12), "scratch": (0.1, 0.3, 0.5)},
}
HALF = "initFC+all · adam 1e-3 · 50% of data"


def records(seeds: int = 3, curves=None) -> list[Record]:
    found = [
        replace(BASE, model=m, attack=ORIGINAL, last_step=0, split=s, value=v)
        for m, v in (("clean", 0.9), ("protected", 0.88))
        for s in ("validation", "test")
    ]
    for seed in range(seeds):
        for attack, models in (curves or CURVES).items():
            for model, values in models.items():
                for step, value in zip(STEPS, values, strict=True):
                    for split in ("validation", "test"):
                        shifted = min(1.0, value + 0.005 * seed * (step > 0))
                        found.append(
                            replace(BASE, model=model, attack=attack, seed=seed, step=step, split=split, value=shifted)
                        )
    return found


def about(tuning: FineTuning, *edits: str, **changes: object) -> dict[str, object]:
    """What is known of an attack, as `provenance.json` keeps it."""
    attack = Attack("x", tuning, edits, **changes)  # type: ignore[arg-type]
    return attack_facts(attack)


ADAM = FineTuning("head", optimiser="adam", lr=1e-3, steps=20)
ABOUT = {
    "direct+all": about(FineTuning(steps=20)),
    "initFC+all · adam 1e-3": about(ADAM),
    "initFC+FC": about(FineTuning("head", "head", steps=20), "rebalance"),
    HALF: about(ADAM, fraction=0.5),
}


def search(model: str, last: float, edge: bool = False, name: str = "initFC+all · adam 1e-3") -> SearchRecord:
    """A search of three tries, of which one was given up."""
    tries = [
        {"setting": {"lr": 1e-3}, "steps": [0, 10, 20], "values": [0.1, 0.3, last], "pruned": False},
        {"setting": {"lr": 1e-2}, "steps": [0, 10, 20], "values": [0.1, 0.2, last - 0.1], "pruned": False},
        {"setting": {"lr": 1e-4}, "steps": [0, 10], "values": [0.1, 0.1], "pruned": True},
    ]
    return SearchRecord(model, [name], tries, {"lr": 1e-3}, edge, 50, 1000, 1e9, 1.0, "p")


COST = {"protect_seconds": 1.0, "audit_seconds": 2.0, "peak_memory_mb": 3.0}


def test_summary_by_hand() -> None:
    s = summarise(records(), 0.1, COST)
    assert s["verdict"] == "partial"
    assert s["intactness"] == {"metric": "accuracy", "before": 0.9, "after": 0.88, "ratio": pytest.approx(0.88 / 0.9)}
    assert s["restricted"]["worst"] == "initFC+all · adam 1e-3"
    worst, default, idle = s["restricted"]["attacks"]
    assert (default["name"], default["verdict"]) == ("direct+all", "held")
    assert default["recovery"] == pytest.approx((0.205 - 0.1) / (0.805 - 0.1))
    assert default["cost_ratio"] is None
    assert default["interval"] == pytest.approx([-0.3, -0.3])
    # The envelopes after step 0: 0.7, 0.8 protected and 0.5, 0.7 from scratch.
    assert s["restricted"]["worst_case"]["interval_along"] == pytest.approx([0.15, 0.15])
    # scratch ends at 0.705; less 2 points 0.685: it arrives at step 18.95 of …, protected at 9.xx
    assert worst["cost_ratio"] == pytest.approx((10 * (0.685 - 0.1) / 0.605) / (10 + 10 * (0.685 - 0.505) / 0.2))
    assert (idle["verdict"], idle["recovery"]) == ("inconclusive", None)
    assert all(c["passed"] for c in s["checks"])


def test_a_failing_check_forbids_held() -> None:
    curves = {"direct+all": CURVES["direct+all"]}
    assert summarise(records(3, curves), 0.1, COST)["verdict"] == "held"
    two = summarise(records(2, curves), 0.1, COST)
    assert two["verdict"] == "partial"
    assert [c["name"] for c in two["checks"] if not c["passed"]] == ["enough seeds"]


def test_an_audit_that_teaches_nobody_anything_proves_nothing() -> None:
    flat = {"direct+all": dict.fromkeys(("protected", "clean", "scratch"), (0.1, 0.1, 0.1))}
    s = summarise(records(3, flat), 0.1, COST)
    assert s["verdict"] != "held"
    assert conclusion(s)[0].startswith("This audit shows nothing")
    failing = {c["name"] for c in s["checks"] if not c["passed"]}
    assert {"the clean model learns", "the model from scratch learns", HELPS} <= failing


def test_a_pair_on_which_pre_training_is_worth_nothing_shows_nothing() -> None:
    level = {"direct+all": {"protected": (0.1, 0.5, 0.7), "clean": (0.1, 0.6, 0.8), "scratch": (0.1, 0.6, 0.8)}}
    s = summarise(records(3, level), 0.1, COST)
    assert HELPS in {c["name"] for c in s["checks"] if not c["passed"]}
    assert conclusion(s)[0].endswith("hardly more than training from scratch: the pair tells nothing.")
    assert "tells nothing" not in conclusion(summarise(records(), 0.1, COST))[0]


def test_a_cost_ratio_is_of_one_attack() -> None:
    s = summarise(records(), 0.1, COST)
    lead = s["restricted"]["attacks"][0]
    assert headlines(s)[-1].startswith(f"cost ratio   {cost(lead)}   (under {lead['name']}: steps to reach")
    assert cost({**lead, "scratch_learns": False}) == "scratch does not learn by it"


def test_divergence_is_flagged() -> None:
    s = summarise(records(), 0.1, COST)
    assert {c["name"]: c["passed"] for c in s["checks"]}["no attack diverged"]
    broken = [replace(r, diverged=r.model == "clean" and r.attack == "initFC+FC") for r in records()]
    failing = [c for c in summarise(broken, 0.1, COST)["checks"] if not c["passed"]]
    assert [c["message"] for c in failing] == ["not finite under: initFC+FC (clean)"]


def test_a_spoilt_model_is_called_spoilt_whatever_the_verdict() -> None:
    curves = {"direct+all": CURVES["direct+all"]}
    rows = [replace(r, value=0.2) if (r.attack, r.model) == (ORIGINAL, "protected") else r for r in records(3, curves)]
    s = summarise(rows, 0.1, COST)
    assert s["verdict"] == "held"
    assert "own ability is lost: 90.0 % → 20.0 %" in " ".join(conclusion(s))
    assert "ability is lost" not in " ".join(conclusion(summarise(records(3, curves), 0.1, COST)))


def test_where_it_stands_between_what_it_cost_and_what_it_left() -> None:
    s = summarise(records(3, {"direct+all": CURVES["direct+all"]}), 0.1, COST)
    worst = s["restricted"]["worst_case"]
    worst["protected"] |= {"along_the_way": 0.42, "final": 0.55}
    worst["clean"] |= {"along_the_way": 0.70, "final": 0.80}
    worst["scratch"] |= {"along_the_way": 0.40, "final": 0.60}
    s["intactness"] |= {"ratio": 0.97, "before": 0.9, "after": 0.873}
    said = " ".join(conclusion({**s, "protection": {"tolerance": 0.02, "released": 3}}))
    kept = "intactness 0.970 (90.0 % → 87.3 % on the original domain; the tolerance is 2.0 % on validation data)."
    assert kept in said
    ahead = "unprotected +30.0 along the way, +20.0 at the end; protected +2.0 along the way, −5.0 at the end."
    assert f"Ahead of scratch, each at its best, in points: {ahead}" in said
    assert "87.3 % on the original domain)." in " ".join(conclusion(s)), "somebody else's checkpoint: no tolerance"
    s["restricted"]["metric"] = "1 − MSE"
    ahead = "unprotected −0.300 along the way, −0.200 at the end; protected −0.020 along the way, +0.050 at the end."
    assert f"Beside scratch (below 0 is ahead), each at its best, in MSE: {ahead}" in " ".join(conclusion(s))


def test_what_the_guard_took_back_is_said() -> None:
    s = summarise(records(3, {"direct+all": CURVES["direct+all"]}), 0.1, COST)

    def said(**protection: object) -> str:
        found = " ".join(conclusion({**s, "protection": {"tolerance": 0.02, "released": 7, **protection}}))
        return next((p for p in found.split(". ") if "strength" in p), "")

    start = "To keep within the tolerance the defence was down to 0.1 of its strength in what was released"
    assert said(strength=0.1, attempts=[]) == start
    ended = ", after 3 attempts that did not end within it, at 1, 0.45 and 0.16"
    assert said(strength=0.1, attempts=[1.0, 0.45, 0.16]) == start + ended
    assert said(strength=0.1, attempts=[1.0]).endswith("after an attempt that did not end within it, at 1")
    assert said(strength=1.0, attempts=[]) == said(strength=None) == said(strength=0.1, released=0) == ""


def test_a_lead_that_survives_shuffling_is_no_knowledge() -> None:
    name = "shuffled → initFC+all"
    curves = {**CURVES, name: {"protected": (0.1, 0.5, 0.7), "clean": (0.1, 0.6, 0.8), "scratch": (0.1, 0.4, 0.6)}}
    facts = {"attacks": {**ABOUT, name: about(ADAM, "shuffle")}}
    s = summarise(records(3, curves), 0.1, COST, facts=facts)
    # (0.6 + 0.8)/2 and (0.5 + 0.7)/2; scratch (0.4 + 0.6)/2 under the same, though (0.5 + 0.7)/2 under another.
    assert s["restricted"]["shuffled"] == {"clean": pytest.approx(0.2), "protected": pytest.approx(0.1)}
    other = "shuffled → initFC+all · momentum"  # better on test data alone: not the one that is chosen
    twice = [replace(r, attack=other) for r in records(3, curves) if r.attack == name]
    twice = [replace(r, value=r.value + (0.2 if r.split == "test" else -0.1) * (r.step > 0)) for r in twice]
    both = {"attacks": {**facts["attacks"], other: about(FineTuning("head", steps=20), "shuffle")}}
    chosen = summarise(records(3, curves) + twice, 0.1, COST, facts=both)["restricted"]["shuffled"]
    assert chosen == {"clean": pytest.approx(0.2), "protected": pytest.approx(0.1)}
    assert s["restricted"]["undone"] is None
    curves[name]["protected"] = (0.1, 0.9, 0.95)
    assert summarise(records(3, curves), 0.1, COST, facts=facts)["restricted"]["undone"] is None, "he starts anew"
    said = " ".join(conclusion(s))
    assert "the unprotected weights are +20.0 points beside scratch along the way, the protected ones +10.0" in said
    assert summarise(records(), 0.1, COST, facts={"attacks": ABOUT})["restricted"]["shuffled"] is None


def test_a_weaker_audit_of_the_same_weights_is_judged_by_its_own_attacks() -> None:
    """The three attacks of `paper-default` are held, one of the eleven of `quick` is not."""
    names = [a.name for a in BATTERIES["quick"].attacks]
    curves = dict.fromkeys(names, CURVES["direct+all"]) | {"initFC+all · adam swept": CURVES["initFC+all · adam 1e-3"]}
    facts = {"battery": "quick-v3", "left_out": {}}
    searches = [search("protected", 0.2, edge=True, name="initFC+all · momentum swept")]
    s = summarise(records(3, curves), 0.1, COST, searches, facts)
    weak, strong = s["restricted"]["strengths"]
    assert (weak["battery"], weak["attacks"], weak["verdict"], weak["failing"]) == ("paper-default-v1", 3, "held", [])
    assert weak["worst_case"]["protected"]["final"] == pytest.approx(0.205)
    assert (strong["battery"], strong["attacks"], strong["verdict"]) == ("quick-v3", 11, s["verdict"])
    assert strong["failing"] == ["no best learning rate at the grid's edge"], "a check of its own searches alone"
    assert strong["worst_case"] == s["restricted"]["worst_case"]
    assert s["verdict"] == "partial"
    assert "otherwise: paper-default-v1 alone says held." in " ".join(conclusion(s))
    own = dict.fromkeys(["mine"], CURVES["initFC+all · adam 1e-3"]) | dict.fromkeys(names, CURVES["direct+all"])
    parts = summarise(records(3, own), 0.1, COST, (), facts)["restricted"]["strengths"]
    found = [(p["battery"], p["attacks"], p["verdict"]) for p in parts]
    assert found == [
        ("paper-default-v1", 3, "held"),
        ("quick-v3", 11, "held"),
        ("quick-v3 and the recipe's own", 12, "partial"),
    ]
    for unknown in ("quick-v2", "own-v1", ""):  # what an older one held is not known here
        assert summarise(records(3, curves), 0.1, COST, (), {"battery": unknown})["restricted"]["strengths"] == []


def test_the_worst_case_is_chosen_on_validation_data() -> None:
    rows = [
        replace(r, value=0.95) if (r.attack, r.model, r.split, r.step) == ("direct+all", "protected", "test", 20) else r
        for r in records()
    ]
    assert summarise(rows, 0.1, COST)["restricted"]["worst"] == "initFC+all · adam 1e-3"


def test_numbers_as_people_read_them() -> None:
    assert (percent(0.8734), percent(None), ratio(None), ratio(0.5)) == ("87.3 %", "–", "not reached", "0.50")


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A run's folder with made-up records, and its report."""
    rows = records(2)  # two seeds: one check fails and must lead the page
    rows += [replace(r, attack=BENIGN) for r in rows if r.attack == "direct+all"]
    RecordFile(tmp_path / "records.jsonl").append(rows)
    RecordFile(tmp_path / "records.jsonl").append(
        [replace(r, attack=HALF, images=50) for r in rows if r.attack == "initFC+all · adam 1e-3"]
    )
    AuditFiles(tmp_path).searches.append([search("protected", 0.6), search("scratch", 0.5)])
    recipe = {
        "name": "a <b>bold</b> name",
        "description": "d",
        "model": {"name": "small_conv", "size": 8, "channels": 1},
        "defence": {"name": "sophon", "tolerance": 0.03},
        "audit": {"steps": 20},
    }
    domain = {"data": "digits", "classes": ["0", "1"], "train": 1, "validation": 1, "test": 1}
    restricted = {**domain, "chance": 0.1, "defender": 1, "adversary": 1}
    hardware = {"device": "cpu", "cpu": "x", "cores": 2, "precision": "bf16", "channels_last": True}
    facts = {
        "run_seed": 0,
        "audit_seeds": [0, 1],
        "battery": "quick",
        "original": domain,
        "restricted": restricted,
        "hardware": hardware,
        "python": "3",
        "versions": {"torch": "2"},
        "revision": "abc",
        "weights_sha256": {"clean": "0" * 64, "protected": "1" * 64},
        "attacks": ABOUT,
        "left_out": {"regrown → initFC+all": "no pruned weights", "a": "no data", "b": "no data"},
        "benign": {"data": "third", "chance": 0.2},
    }
    write_json(tmp_path / "run.json", {"schema": 1, "fingerprint": "f", "recipe": recipe})
    write_json(tmp_path / "provenance.json", {"p": facts})
    checks = [{"iteration": 10.0 * i, "original": 0.9, "restricted": 0.8 - 0.1 * i} for i in range(3)]
    checks.append({"iteration": 30.0, "original": 0.5, "rolled_back": 1.0})
    history = {"seconds": 5.0, "peak_memory_mb": 100.0, "rollbacks": 1, "checks": checks}
    history["measured"] = {"clean": {"leak, restricted": 0.5072}, "protected": {"leak, restricted": 0.1234}}
    write_json(tmp_path / "protection" / "history.json", history)
    write_report(tmp_path)
    return tmp_path


def test_the_page_stands_alone_and_leads_with_what_matters(written: Path) -> None:
    page = (written / "report.html").read_text()
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)
    assert "http" not in re.sub(r"base64,[^\"]+", "", page)
    assert "<b>bold</b>" not in page
    titles = ("Checks of this audit that fail", "Verdict:", "Worst case", "What would break this", "Learning curves")
    order = [page.index(t) for t in titles]
    assert order == sorted(order)
    assert page.count("data:image/png;base64,") == 9
    markdown = (written / "report.md").read_text()
    assert "| initFC+all · adam 1e-3 | scratch | 10.0 ± 0.0 | 50.2 ± 0.4 | 70.2 ± 0.4 |" in markdown
    assert "Leak, restricted: 12.3 % (before: 50.7 %)." in markdown
    for text in (page, markdown):  # a reason that several attacks share is said once
        assert "regrown → initFC+all (no pruned weights); a, b (no data)." in text
    for name in ("curves", "attack-3-direct-all", "protection", "worst-case", "heat-seeds", "heat-rates", "slc"):
        assert (written / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_an_audit_on_its_way_to_a_larger_one_has_no_report(written: Path, tmp_path: Path) -> None:
    folder = tmp_path / "grown"
    shutil.copytree(written, folder)
    before = (folder / "report.md").read_text()
    known = read_json(folder / "provenance.json")
    cells = {
        "another attack": ({"attacks": {**ABOUT, "later": ABOUT["direct+all"]}}, 6),  # three models, two seeds
        "another seed": ({"audit_seeds": [0, 1, 2]}, 3 * (len(ABOUT) + 1)),  # the third domain's too
        "probes": ({"probes": ["probe · input of body.3"]}, 6),
    }
    for facts, missing in cells.values():
        write_json(folder / "provenance.json", {**known, "q": {**known["p"], **facts}})
        with pytest.raises(UserError, match=f"unfinished: {missing} of .* results are missing; continue"):
            write_report(folder)
    assert (folder / "report.md").read_text() == before
    write_json(folder / "provenance.json", known)
    write_report(folder)
    assert (folder / "report.md").read_text() == before


CHROMIUM = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
PROBE = """<script>
addEventListener("load", () => {
  const wide = [...document.querySelectorAll("main *")].filter(
    e => !e.closest(".scroll") && e.getBoundingClientRect().right > innerWidth + 1).length;
  const images = [...document.images], whole = images.filter(i => i.naturalWidth > 300).length;
  document.title = `width=${innerWidth} scroll=${document.documentElement.scrollWidth} wide=${wide} `
    + `images=${whole}/${images.length}`;
});
</script>"""


def render(folder: Path, tmp_path: Path, script: str, width: int) -> str:
    """The page as a real browser leaves it after `script` has run in it."""
    probe = folder / "probe.html"
    probe.write_text((folder / "report.html").read_text().replace("</body>", script + "</body>"))
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900", "--dump-dom", probe.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1280, 500])
def test_the_page_fits_desktop_and_phone(written: Path, tmp_path: Path, width: int) -> None:
    dom = render(written, tmp_path, PROBE, width)
    found = re.search(r"<title>width=(\d+) scroll=(\d+) wide=(\d+) images=(\d+)/(\d+)</title>", dom)
    assert found, dom[:300]
    inner, scroll, wide, whole, images = map(int, found.groups())
    assert scroll <= inner
    assert wide == 0
    assert whole == images == 9


FILTER = """<script>
addEventListener("load", () => {
  const rows = () => [...document.querySelectorAll("#attacks tbody tr")]
    .filter(r => !r.hidden).map(r => r.cells[0].textContent);
  const type = (id, value) => {
    const field = document.getElementById(id);
    field.value = value;
    field.dispatchEvent(new Event("input"));
  };
  const found = [rows().length];
  type("filter-name", "INITfc"); found.push(rows().length);
  type("filter-verdict", "inconclusive"); found.push(rows().join("|"));
  type("filter-name", ""); type("filter-verdict", "");
  const button = document.querySelectorAll("button.sort")[1];
  button.click(); found.push(rows()[0]); button.click(); found.push(rows()[0]);
  document.title = found.join(";") + ";" + document.getElementById("filter-count").textContent;
});
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_filter_and_sort_in_the_page(written: Path, tmp_path: Path) -> None:
    dom = render(written, tmp_path, FILTER, 1280)
    found = re.search(r"<title>(.*?)</title>", dom)
    assert found, dom[:300]
    assert found[1].split(";") == ["4", "3", "initFC+FC", "initFC+all · adam 1e-3", "initFC+FC", "4 of 4 attacks"]
