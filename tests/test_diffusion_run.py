"""The whole chain on diffusion models: pixels and latents, from a pipeline's folder to a pipeline's folder."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from holdfast.attacks.attack import Attack, Search
from holdfast.cells import CellSpec
from holdfast.defences.base import Given
from holdfast.defences.registry import DEFENCES
from holdfast.diffusion import exhibits
from holdfast.diffusion.distances import distance
from holdfast.diffusion.exhibits import read_exhibits
from holdfast.diffusion.pipelines import resolved
from holdfast.errors import UserError
from holdfast.finetuning import FineTuning
from holdfast.inputs import Inputs
from holdfast.models import Architecture
from holdfast.pipeline import run
from holdfast.recipes import parse_recipe

diffusers = pytest.importorskip("diffusers")

TINY = {"block_out_channels": [8, 16], "norm_num_groups": 4, "attention_head_dim": 4}
SOPHON = {
    "name": "sophon",
    "inner_initialise": ["keep"],
    "adversaries": 1,
    "inner_steps": 2,
    "inner_lr": [1e-3],
    "inner_batch_size": [8],
    "iterations": 2,
    "check_every": 1,
    "probe_steps": 2,
    "ntr_batch_size": 8,
    "tolerance": 0.9,
}
RECIPE = {
    "name": "tiny",
    "task": "denoising",
    "original": {"data": "digits[0-4]", "per_class": 20, "test_per_class": 8},
    "restricted": {"data": "digits[7]", "per_class": 60, "test_per_class": 20, "adversary": 20},
    "model": {"name": "unet2d", "size": 8, "channels": 1, "options": {"unet": TINY}},
    "pretrain": {"steps": 30, "batch_size": 16, "lr": 2e-3, "ema": 0.9},
    "defence": SOPHON,
    "audit": {
        "battery": "own",
        "steps": 4,
        "seeds": 1,
        "evaluations": 2,
        "attacks": [
            {"name": "direct+all", "tuning": {"batch_size": 8}},
            {"name": "averaged", "tuning": {"batch_size": 8, "ema": 0.9, "optimiser": "adam", "lr": 1e-3}},
            {"name": "adapters", "tuning": {"batch_size": 8, "train": "lora", "rank": 2}},
            {"name": "target", "tuning": {"batch_size": 8}, "edits": ["another-target"]},
        ],
    },
    "runtime": {"jobs": 1, "precision": "float32", "device": "cpu", "threads": 1},
}


@pytest.fixture(scope="module", autouse=True)
def _few_samples() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("holdfast.diffusion.exhibits.SAMPLES", 8)
        patch.setattr("holdfast.diffusion.exhibits.STARTS", (23, 20))
        yield


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("diffusion") / "run"
    run(parse_recipe(RECIPE), out, quiet=True)
    return out


def test_summary_and_report_speak_of_mse(done) -> None:
    summary = json.loads((done / "summary.json").read_text())
    assert summary["restricted"]["metric"] == "1 − MSE"
    assert summary["restricted"]["chance"] == 0.0
    before, after = (1 - summary["intactness"][n] for n in ("before", "after"))
    assert summary["intactness"]["ratio"] == pytest.approx(before / after, rel=1e-6)
    page, text = (done / "report.html").read_text(), (done / "report.md").read_text()
    assert "protected − scratch (MSE, 95 %)" in text
    assert "− scratch, 95 % (MSE)" in page
    for said in (page, text):
        assert "MSE-k" in said
        assert "1 − MSE" not in said
        assert " points" not in said
        assert "in of MSE" not in said
        assert "(of MSE" not in said
    assert f"{1 - summary['restricted']['worst_case']['protected']['final']:.3f}" in text


def test_the_bundle_samples_images(done) -> None:
    pipeline = diffusers.DDPMPipeline.from_pretrained(done / "bundle", local_files_only=True)
    images = pipeline(batch_size=2, num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 8, 8, 1)
    card = (done / "bundle" / "README.md").read_text()
    assert "library_name: diffusers" in card
    assert "unconditional-image-generation" in card


def tiny_stable_diffusion(folder: Path) -> None:
    """A text-to-image pipeline of random weights: 32×32 images, 4×16×16 latents."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    words = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "a": 3}
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(words))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=6)
    config = CLIPTextConfig(
        vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=6, bos_token_id=0, eos_token_id=1, projection_dim=16,
    )  # fmt: skip
    unet = diffusers.UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        norm_num_groups=4, attention_head_dim=4, cross_attention_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(config), tokenizer=tokenizer, unet=unet,
        scheduler=diffusers.PNDMScheduler(skip_prk_steps=True), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder / "pipeline")  # fmt: skip


def test_a_latent_model_from_folder_to_folder(tmp_path) -> None:
    tiny_stable_diffusion(tmp_path / "sd")
    source = tmp_path / "sd" / "pipeline"
    recipe = {
        **RECIPE,
        "model": {"name": f"diffusers:{source}", "size": 32},
        "weights": "diffusers",
        "defence": {**SOPHON, "suppression": "mse", "alpha": 1e-2},  # DoS would only improve random weights
        "audit": {**RECIPE["audit"], "attacks": RECIPE["audit"]["attacks"][:1]},
    }
    summary = run(parse_recipe(recipe), tmp_path / "run", quiet=True)
    assert summary["restricted"]["attacks"][0]["name"] == "direct+all"
    name = f"diffusers:{source}"
    assert resolved(Architecture(name)).size == 32
    larger = resolved(Architecture(name, 48))
    assert (larger.size, tuple(larger.example().shape)) == (48, (1, 4, 24, 24))
    with pytest.raises(UserError, match="must be a multiple of 2 for this VAE"):
        resolved(Architecture(name, 33))
    bundle = tmp_path / "run" / "bundle"
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(bundle, safety_checker=None, local_files_only=True)
    assert pipeline("a", num_inference_steps=2, output_type="np").images.shape == (1, 32, 32, 3)
    ours, theirs = (
        diffusers.UNet2DConditionModel.from_pretrained(f, subfolder="unet").state_dict() for f in (bundle, source)
    )
    assert ours.keys() == theirs.keys()
    assert any(not torch.equal(ours[n], theirs[n]) for n in ours), "protected"
    scheduler, index = Path("scheduler", "scheduler_config.json"), "model_index.json"
    assert all((bundle / n).read_text() == (source / n).read_text() for n in (scheduler, index)), "all else is theirs"


def test_the_identity_is_failed(done, tmp_path) -> None:
    """The negative control: the unprotected model under an attack that trains it."""
    attack = {"name": "adam", "tuning": {"batch_size": 8, "optimiser": "adam", "lr": 2e-3}}
    recipe = {
        **RECIPE,
        "weights": str(done / "clean"),
        "defence": "identity",
        "audit": {**RECIPE["audit"], "steps": 10, "attacks": [attack]},
    }
    found = run(parse_recipe(recipe), tmp_path / "run", quiet=True)
    worst = found["restricted"]["worst_case"]
    assert found["verdict"] == "failed"
    assert worst["protected"]["final"] == worst["clean"]["final"] > worst["scratch"]["final"]
    assert found["intactness"]["ratio"] == 1


def test_exhibits(done) -> None:
    """Five models; the error at each level is the task's own, averaged; nothing is made a second time."""
    files = sorted((done / "exhibits").iterdir())
    assert [f.stem for f in files] == [
        "attack", "attacked-clean", "attacked-protected", "attacked-scratch", "released-clean", "released-protected"
    ]  # fmt: skip
    shown = read_exhibits(done / "exhibits")
    first = shown["released", "clean"]
    assert first["restricted/levels"].shape == (20,)
    assert first["restricted/noisy"].shape == first["restricted/denoised"].shape == (2, 8, 1, 8, 8)
    torch.testing.assert_close(first["original/noisy"], shown["released", "protected"]["original/noisy"])
    assert {p.name for p in (done / "figures").glob("s*.png")} >= {
        "strips-restricted.png", "strips-original.png", "samples.png"
    }  # fmt: skip
    before = [f.stat().st_mtime_ns for f in files]
    run(parse_recipe(RECIPE), done, resume=True, quiet=True)
    assert [f.stat().st_mtime_ns for f in files] == before
    assert "random features" in (done / "report.md").read_text()


def test_models_that_the_audit_kept_are_those_that_an_attack_makes_anew(done, tmp_path, monkeypatch) -> None:
    """The audit hands on its models after the default attack; without them the same attack is run again."""
    kept = read_exhibits(done / "exhibits")
    again = tmp_path / "again"
    shutil.copytree(done, again)
    (again / "exhibits" / "attack.json").write_text('{"name": "another"}')  # of a battery before
    trained = []
    real = exhibits.end_of
    monkeypatch.setattr(exhibits, "end_of", lambda bench, spec: trained.append(spec.model) or real(bench, spec))
    run(parse_recipe(RECIPE), again, resume=True, quiet=True)
    assert sorted(trained) == ["clean", "protected", "scratch"]
    for key, parts in read_exhibits(again / "exhibits").items():
        assert all(torch.equal(v, kept[key][n]) for n, v in parts.items()), key


def test_only_models_that_are_shown_are_kept() -> None:
    plain, searched = Attack("a", FineTuning(steps=2)), Attack("b", FineTuning(steps=2), search=Search())
    specs = [
        CellSpec(m, a, (a.name,), (False,), s) for m in ("clean", "scratch") for a in (plain, searched) for s in (0, 1)
    ]
    assert [(s.model, s.attack.name, s.seed) for s in exhibits.marked(specs, plain) if s.keep] == [
        ("clean", "a", 0), ("scratch", "a", 0)
    ]  # fmt: skip
    assert not any(s.keep for s in exhibits.marked(specs, searched))
    adapters = Attack("a", FineTuning(steps=2, train="lora"))
    assert not any(s.keep for s in exhibits.marked(specs, adapters))


def test_the_distance_tells_images_apart() -> None:
    """Around 0 for two draws of one distribution, above it for another, the larger the further."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(0, 256, (192, 1, 16, 16), generator=generator, dtype=torch.uint8)
    same, half, tenth = (distance(draws[:96], draws[96:] // d) for d in (1, 2, 10))
    assert abs(same) < 1e-3
    assert 1e-3 < half < tenth
    with pytest.raises(UserError, match="at least 4 images"):
        distance(draws[:3], draws)


class TestDefences:
    def given(self) -> Given:
        inputs = Inputs(parse_recipe(RECIPE))
        return inputs.given(inputs.architecture.build(5, seed=2))

    @pytest.mark.parametrize("name", [n for n in DEFENCES if n not in ("sophon", "lockout", "identity")])
    def test_those_that_need_labels_refuse_in_one_line(self, name) -> None:
        with pytest.raises(UserError, match="needs labels; for the task denoising there are sophon, lockout, and ntp"):
            DEFENCES[name]().check(self.given())

    def test_lockout_wants_one_answer_to_all_restricted_images(self) -> None:
        """Every depth but what knows the timestep alone; DoS beside the collapse; Fisher's ratio alone needs labels."""
        given, lockout = self.given(), DEFENCES["lockout"]
        spec = lockout(close=2, iterations=2, steps=2, batch_size=8, check_every=1, answer=1.0, probe_steps=2)
        engine = spec.prepare(given)
        assert not any("time_emb" in name for name in engine.places.depths)
        assert len(engine.places.depths) > 30
        losses = engine.iterate(1, 1.0)
        assert all(map(math.isfinite, losses.values()))
        assert losses["answer"] > 0
        assert spec.measure(given, given.restricted).keys() == {"leak, restricted", "leak, original"}
        for term in ("fisher", "mmd"):
            with pytest.raises(UserError, match="needs labels"):
                lockout(**{term: 1.0}).check(given)

    def test_sophon_says_that_there_is_no_head(self) -> None:
        with pytest.raises(UserError, match=r"set defence.inner_initialise to \[keep\]"):
            DEFENCES["sophon"]().check(self.given())

    def test_pruning_without_labels(self) -> None:
        """NTP with MMD on the lowest resolution's features: the mask holds, the restricted error is a loss."""
        given = self.given()
        spec = DEFENCES["ntp"](
            regulariser="mmd", gamma=1.0, bound=1.0, sparsity=0.5, iterations=1, steps=2, retrain=1, batch_size=8,
            probe_steps=1, tolerance=0.9, check_every=1,
        )  # fmt: skip
        engine = spec.prepare(given)
        losses = [engine.iterate(i, 1.0) for i in (1, 2)]
        assert losses[1]["sparsity"] == pytest.approx(0.5, abs=0.01)
        assert 0 < losses[0]["restricted loss"] < 3
        assert -10 <= losses[0]["mmd"] <= 0, "minus MMD², by five kernels"


def test_constant_memory_in_k() -> None:
    """No graph outlives its inner step: the tensors that autograd keeps at K = 6 are those at K = 2."""
    given = TestDefences().given()
    kept = {steps: _most_saved(given, steps) for steps in (2, 6)}
    assert kept[6] == kept[2] > 0


def _most_saved(given: Given, steps: int) -> int:
    alive: list[int] = []
    most = 0

    class Saved:
        def __init__(self, tensor: torch.Tensor) -> None:
            nonlocal most
            self.tensor = tensor
            alive.append(1)
            most = max(most, len(alive))

        def __del__(self) -> None:
            alive.pop()

    spec = DEFENCES["sophon"](
        inner_initialise=("keep",), adversaries=1, inner_steps=steps, inner_batch_size=(8,), ntr_batch_size=8
    )
    engine = spec.prepare(given)
    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        engine.suppress(1, 0, 1.0)
    return most
