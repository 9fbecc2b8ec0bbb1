"""A bundle is what is released: safetensors weights, `config.json`, a model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from holdfast.errors import UserError, require
from holdfast.files import read_json, sha256_file, write_atomic, write_json
from holdfast.models import Architecture, State, load_weights, save_weights
from holdfast.packaging import PIPELINE, UNET_FILE, factory_argument, find_weights, our_names, packaging
from holdfast.scales import scale_of

CONFIG, CARD = "config.json", "README.md"


@dataclass(frozen=True)
class Bundle:
    """Weights with what is needed to build their model. `classes` are the original domain's."""

    state: State
    architecture: Architecture
    classes: tuple[str, ...]
    details: Mapping[str, Any]

    def save(self, folder: Path, card: str) -> None:
        """Write weights, card, config, and what the model's library needs (`packaging`). The config comes last: a
        folder with a config is whole."""
        layout = packaging(self.architecture)
        save_weights(folder / layout.weights, layout.named(self.state))
        layout.extras(folder, self.architecture, len(self.classes))
        write_atomic(folder / CARD, card)
        write_json(folder / CONFIG, self._config(sha256_file(folder / layout.weights)))

    def _config(self, digest: str) -> dict[str, Any]:
        arch = self.architecture
        return {
            "architecture": arch.name,
            **packaging(arch).config(arch, self.classes),
            "holdfast": {
                "schema": 1,
                "size": arch.size,
                "channels": arch.channels,
                "mean": list(arch.mean),
                "std": list(arch.std),
                "options": {
                    **arch.options,
                    **({"source": "."} if arch.options.get("source") else {}),
                },  # no path of ours
                "classes": list(self.classes),
                "weights_sha256": digest,
                **self.details,
            },
        }


def is_pipeline(folder: Path) -> bool:
    """Whether a folder holds a pipeline of diffusers with a U-Net."""
    return (folder / PIPELINE).is_file() and find_weights(folder).is_file()


def is_bundle(folder: Path) -> bool:
    """Whether a folder holds a whole bundle. The first pipelines too had a `config.json`, with weights beside it."""
    weights = find_weights(folder)
    return (folder / CONFIG).is_file() and weights.is_file() and weights != folder / UNET_FILE


def read_weights(path: str, architecture: Architecture) -> State:
    """Weights from a file, from a bundle's folder, whose hash is then checked, or from a pipeline's."""
    folder = Path(path).expanduser()
    if is_bundle(folder):
        return load_bundle(folder, architecture).state
    file = find_weights(folder) if folder.is_dir() else folder
    require(
        not folder.is_dir() or is_pipeline(folder),
        f"{folder} is no whole bundle (expected {CONFIG} and {packaging(architecture).weights}); for weights alone, "
        "name the file",
    )
    return our_names(load_weights(file), architecture)


def load_bundle(folder: Path, architecture: Architecture | None = None) -> Bundle:
    """Read a bundle, its own or anybody's, without running code from it.

    The weights are checked against the hash in the config. A model that is built by a user's own factory is not
    imported on a stranger's word: give its `architecture`. Raises `UserError`.
    """
    config = read_json(folder / CONFIG)
    found = config.get("holdfast") if isinstance(config, dict) else None
    if not isinstance(found, dict):
        raise UserError(f"{folder / CONFIG} is not the config of a holdfast bundle")
    file = find_weights(folder)
    state = load_weights(file)
    require(
        sha256_file(file) == found.get("weights_sha256"),
        f"{file} does not match the hash in {CONFIG}: it was changed or torn after it was written",
    )
    try:
        name = str(config["architecture"])
        own = Architecture(
            name,
            int(found["size"]),
            int(found["channels"]),
            tuple(found["mean"]),
            tuple(found["std"]),
            dict(found["options"]),
        )
        classes = tuple(map(str, found["classes"]))
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{folder / CONFIG} is incomplete: {error!r}") from error
    if architecture is not None:
        own = replace(own, name=architecture.name, factory=architecture.factory)
    require(
        architecture is not None or not factory_argument(own),
        f"{folder} needs the model factory '{own.name}', which nothing in a bundle may import: give your own, "
        "load_model(folder, Architecture(…, factory=…)) or --set model.name=package.module:factory",
    )
    if own.options.get("source"):  # its other parts lie beside it
        own = replace(own, options={**own.options, "source": str(folder)})
    return Bundle(our_names(state, own), own, classes, found)


def model_card(
    name: str, bundle: Bundle, original: str, restricted: Sequence[str], defence: str, summary: Mapping[str, Any] | None
) -> str:
    """The model card in Markdown, with the audit's figures where there is an audit."""
    arch = bundle.architecture
    layout = packaging(arch)
    lines = [
        "---",
        f"library_name: {layout.library}",
        f"pipeline_tag: {layout.tag}",
        "tags: [holdfast, non-fine-tunable]",
        "---",
        f"# {name}",
        "",
        f"`{arch.name}` for {len(bundle.classes)} classes ({', '.join(bundle.classes[:20])}), input "
        f"{arch.channels}×{arch.size}×{arch.size}, {_claim(bundle, defence)}",
        "",
        f"- Original domain: `{original}`",
        f"- Restricted domain: `{', '.join(restricted)}`",
        "",
        "## Audit",
        "",
    ]
    if summary is None:
        lines += ["Not audited yet: no claim is made.", ""]
    else:
        lines += _audit_lines(summary)
    lines += [
        "## Use",
        "",
        "```python",
        *layout.usage(arch),
        "```",
        "",
    ]
    return "\n".join(lines)


def _claim(bundle: Bundle, defence: str) -> str:
    """What was done to the weights; `released` is 0 where the defence found nothing to release."""
    if bundle.details.get("released") == 0:
        return (
            f"**not protected**: {defence} found nothing better within its tolerance on the original domain, and these "
            "are the weights as they were."
        )
    return f"protected with **{defence}** against fine-tuning to a restricted domain."


def _audit_lines(summary: Mapping[str, Any]) -> list[str]:
    restricted, intact = summary["restricted"], summary["intactness"]
    worst = restricted["worst_case"]
    scale = scale_of(restricted["metric"])
    kept = f"{scale.shown(intact['before'])} → {scale.shown(intact['after'])}" if intact else "not measured"
    failing = "; ".join(f"{c['name']} ({c['message']})" for c in summary["checks"] if not c["passed"])
    return [
        f"Verdict: **{summary['verdict']}**. Original {scale.name}: {kept}.",
        "",
        *([f"**Checks of the audit that fail:** {failing}.", ""] if failing else []),
        f"Worst case on the restricted domain (chance {scale.shown(restricted['chance'])}): the protected model "
        f"reaches {scale.shown(worst['protected']['final'])} under `{worst['protected']['attack']}`; the "
        f"unprotected one {scale.shown(worst['clean']['final'])}, a model from scratch "
        f"{scale.shown(worst['scratch']['final'])}.",
        "",
    ]
