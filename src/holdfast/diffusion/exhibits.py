"""What an audit of a diffusion model shows beside its curves: strips, samples, the error at every noise level, and how
far samples are from real images. One file a model, made once.

The models are those of the paper's figures: protected and clean as released, and the three of them after its default
attack with the audit's first seed.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from holdfast.attacks.attack import Attack
from holdfast.cells import Bench, CellSpec, End, Meter, follow, prepare, start
from holdfast.diffusion.denoisers import Denoiser
from holdfast.diffusion.denoising import Denoising, fixed_noise, grid
from holdfast.diffusion.distances import LEAST, NAMES, distance, inception_weights, require_torchmetrics
from holdfast.diffusion.sampling import sample_images, strips
from holdfast.domains import Domain, ImageData
from holdfast.errors import require
from holdfast.files import read_json, write_atomic, write_json
from holdfast.layers import evaluating
from holdfast.losses import noise_error
from holdfast.models import Architecture, State, load_state, state_of
from holdfast.progress import Reporter
from holdfast.runtime import Runtime
from holdfast.workers import run_all

SEED = 0  # of the audit: whose attack is shown
SHOWN = 8  # images a strip
STARTS = (22, 18, 14, 10, 5)  # steps of the sampler from which images are denoised: little noise to much
SAMPLES = 128  # for the distance; the first of them are shown
RELEASED = ("protected", "clean")
ATTACKED = ("protected", "clean", "scratch")
PLAN = tuple(("released", m) for m in RELEASED) + tuple(("attacked", m) for m in ATTACKED)

Decode = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Show:
    """What exhibits are made from. `decode`: from the model's normalisation to uint8 images (n, c, h, w)."""

    bench: Bench
    original: Domain | None
    decode: Decode

    @property
    def domains(self) -> dict[str, ImageData]:
        """The test data that are shown, by the domain's part in the run."""
        found = {"restricted": self.bench.restricted.test}
        return {**found, "original": self.original.test} if self.original else found


def check_exhibits(data: ImageData) -> None:
    """`UserError` where exhibits of restricted test images cannot be made: found before the audit, not after it."""
    require_torchmetrics()
    require(
        len(data) >= LEAST, f"an audit of a diffusion model needs {LEAST} restricted test images, but got {len(data)}"
    )


def marked(specs: Sequence[CellSpec], attack: Attack) -> list[CellSpec]:
    """The audit's cells, with those whose models at the end the exhibits show marked to be kept: none where the attack
    is searched, or changes the network; then what is shown is run apart."""
    plain = attack.search is None and not attack.edits and attack.tuning.train == "all"
    return [replace(s, keep=plain and s.seed == SEED and attack.name in s.names and not s.benign) for s in specs]


def keep_end(folder: Path, end: End) -> None:
    """Write a model that the exhibits will show."""
    write_atomic(end_path(folder, end.model), safetensors.torch.save({n: v.contiguous() for n, v in end.state.items()}))


def end_path(folder: Path, model: str) -> Path:
    """Where such a model lies until it has been shown."""
    return folder / "ends" / f"{model}.safetensors"


def make_exhibits(
    show: Show, attack: Attack, folder: Path, reporter: Reporter, jobs: int | None = None, ray: str | None = None
) -> None:
    """Write the exhibits that `folder` lacks. Of models that the audit has not kept, attacks are run anew, as its
    cells are (`workers.run_all`)."""
    _forget_others(folder, attack.name)
    left = [(how, m) for how, m in PLAN if not path_of(folder, how, m).exists()]
    if not left:
        shutil.rmtree(folder / "ends", ignore_errors=True)
        return
    bench, plain = show.bench, replace(attack, search=None)
    attacked = [m for how, m in left if how == "attacked"]
    there = [m for m in attacked if end_path(folder, m).exists()]
    specs = [
        CellSpec(m, plain.control() if m == "scratch" else plain, (plain.name,), (False,), SEED)
        for m in attacked
        if m not in there
    ]
    with reporter.bar("exhibits", len(PLAN), len(PLAN) - len(left)) as bar:

        def keep(how: str, name: str, model: nn.Module) -> None:
            if not isinstance(model, Denoiser):
                raise TypeError(f"expected a Denoiser, got {type(model).__name__}")
            write_atomic(path_of(folder, how, name), safetensors.torch.save(exhibit(model.eval(), show)))
            bar.advance(f"{name}, {how}")

        for name in (m for how, m in left if how == "released"):
            keep("released", name, _loaded(show, bench.architecture, bench.head_classes, bench.states[name]))
        for name in there:
            state = safetensors.torch.load_file(end_path(folder, name))
            keep("attacked", name, _loaded(show, bench.architecture, bench.restricted.classes, state))
        for end in run_all(end_of, bench, specs, jobs, ray) if specs else ():
            keep("attacked", end.model, _loaded(show, end.architecture, end.classes, end.state))
    shutil.rmtree(folder / "ends", ignore_errors=True)


def _forget_others(folder: Path, attack: str) -> None:
    """Note which attack is shown; what shows another one, of a smaller battery, is to be made anew."""
    note = folder / "attack.json"
    shown = read_json(note)["name"] if note.exists() else None
    if shown not in (None, attack):
        for model in ATTACKED:
            path_of(folder, "attacked", model).unlink(missing_ok=True)
    if shown != attack:
        write_json(note, {"name": attack})


def end_of(bench: Bench, spec: CellSpec) -> End:
    """Run one cell for the model at its end."""
    prepared = prepare(bench, spec.model, spec.attack, spec.seed)
    model = start(bench, prepared, spec.seed)
    follow(bench, Meter(prepared, spec.attack, bench.runtime, ()), model, spec.seed, lambda *_: None)
    return End(spec.model, state_of(model), prepared.released.architecture, prepared.ground.classes)


def _loaded(show: Show, architecture: Architecture, classes: int, state: State) -> nn.Module:
    model = show.bench.runtime.place(architecture.build(classes))
    load_state(model, state)
    return model


def path_of(folder: Path, how: str, model: str) -> Path:
    """Where an exhibit lies."""
    return folder / f"{how}-{model}.safetensors"


def read_exhibits(folder: Path) -> dict[tuple[str, str], dict[str, Tensor]]:
    """All exhibits of a folder, by (how, model); empty where they are not yet complete."""
    found: dict[tuple[str, str], dict[str, Tensor]] = {}
    if not all(path_of(folder, *one).exists() for one in PLAN):
        return found
    for file in sorted(folder.glob("*.safetensors")):
        how, _, model = file.stem.partition("-")
        found[how, model] = safetensors.torch.load_file(file)
    return found


def exhibit(model: Denoiser, show: Show) -> dict[str, Tensor]:
    """One model's exhibit: for each domain `…/levels` (error at each level of the grid), `…/images`, `…/noisy`,
    `…/denoised`; `samples`; `distance`, of samples to restricted test images."""
    runtime, found = show.bench.runtime, {}
    for name, data in show.domains.items():
        if model.conditional and int(data.labels.max()) >= model.classes:
            continue  # classes that this network cannot be told
        found[f"{name}/levels"] = level_errors(model, data, runtime)
        where = torch.arange(0, len(data), max(1, len(data) // SHOWN))[:SHOWN]
        images, labels = data.batch(where, runtime)
        noisy, clean = strips(model, images, labels, STARTS, runtime)
        found[f"{name}/images"] = show.decode(images.cpu())
        for what, pictures in (("noisy", noisy), ("denoised", clean)):
            found[f"{name}/{what}"] = torch.stack([show.decode(p) for p in pictures])
    data = show.bench.restricted.test
    samples = show.decode(sample_images(model, SAMPLES, tuple(data.images.shape[1:]), runtime))
    real = show.decode(data.batch(torch.arange(min(len(data), SAMPLES)), runtime)[0].cpu())
    found["distance"] = torch.tensor(distance(samples, real))
    found["inception"] = torch.tensor(inception_weights() is not None)
    found["samples"] = samples[: SHOWN * 4]
    return {n: v.contiguous() for n, v in found.items()}


@torch.no_grad()
def level_errors(model: Denoiser, data: ImageData, runtime: Runtime, most: int = 100) -> Tensor:
    """The MSE at each level of the fixed grid, (20,) float32, over the same first `most` images at every level."""
    chosen = torch.arange(0, len(data), max(1, len(data) // most))[:most]
    images, labels = data.batch(chosen, runtime)
    noise, errors = fixed_noise(0, images), []
    known = model.told(labels)
    with evaluating(model), runtime.autocast():
        for place in grid(len(model.reference)):
            steps = model.at_level(torch.full((len(images),), place, device=images.device))
            outputs = Denoising.compared(model, images, noise, steps, known, own=False)
            errors.append(noise_error(outputs).mean())
    return torch.stack(errors).cpu()


def distances_table(exhibits: Mapping[tuple[str, str], Mapping[str, Tensor]]) -> dict[str, Any]:
    """The distance of samples to restricted images, by how and model, and its name."""
    found: dict[str, dict[str, float]] = {}
    for (how, model), parts in exhibits.items():
        found.setdefault(how, {})[model] = float(parts["distance"])
    known = all(bool(parts["inception"]) for parts in exhibits.values())
    return {"distance": NAMES[known], "values": found}
