"""A bundle is what is released: safetensors weights, `config.json`, a model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from holdfast.errors import UserError, require
from holdfast.files import read_json, sha256_file, write_atomic, write_json
from holdfast.models import Architecture, State, load_weights, save_weights

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"


@dataclass(frozen=True)
class Bundle:
    """Weights with what is needed to build their model. `classes` are the original domain's."""

    state: State
    architecture: Architecture
    classes: tuple[str, ...]
    details: Mapping[str, Any]

    def save(self, folder: Path, card: str) -> None:
        """Write the three files. The weights come before the config: a folder with a config is whole.

        `config.json` has timm's keys too, so `timm.create_model("local-dir:FOLDER")` loads a protected timm model.
        """
        save_weights(folder / WEIGHTS, self.state)
        write_atomic(folder / CARD, card)
        write_json(folder / CONFIG, self._config(sha256_file(folder / WEIGHTS)))

    def _config(self, digest: str) -> dict[str, Any]:
        arch = self.architecture
        mean, std = (list(v) * (arch.channels if len(v) == 1 else 1) for v in (arch.mean, arch.std))
        return {
            "architecture": arch.name,
            "num_classes": len(self.classes),
            "model_args": {**_model_args(arch)},
            "pretrained_cfg": {
                "num_classes": len(self.classes),
                "input_size": [arch.channels, arch.size, arch.size],
                "mean": mean,
                "std": std,
                "fixed_input_size": _fixed_size(arch),
                "label_names": list(self.classes),
            },
            "holdfast": {
                "schema": 1,
                "size": arch.size,
                "channels": arch.channels,
                "mean": list(arch.mean),
                "std": list(arch.std),
                "options": dict(arch.options),
                "classes": list(self.classes),
                "weights_sha256": digest,
                **self.details,
            },
        }


def _model_args(arch: Architecture) -> dict[str, Any]:
    """What `timm.create_model` needs beside the number of classes; for a vision transformer its input size too."""
    size = {"img_size": arch.size} if _fixed_size(arch) else {}
    return {"in_chans": arch.channels, **size, **arch.options} if _of_timm(arch) else {}


def _of_timm(arch: Architecture) -> bool:
    if arch.factory is not None or arch.name == "small_conv" or ":" in arch.name:
        return False  # without timm, which takes seconds to import
    import timm

    return bool(timm.is_model(arch.name))


def _own(arch: Architecture) -> str:
    """The argument that `load_model` needs for a network that only its author can build."""
    known = arch.name == "small_conv" or _of_timm(arch)
    return "" if known else f", holdfast.Architecture({arch.name!r}, {arch.size}, {arch.channels}, factory=...)"


def _fixed_size(arch: Architecture) -> bool:
    if not _of_timm(arch):
        return False
    import timm

    config = timm.get_pretrained_cfg(arch.name)
    return bool(config is not None and config.fixed_input_size)


def is_bundle(folder: Path) -> bool:
    """Whether a folder holds a whole bundle."""
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def read_weights(path: str, architecture: Architecture) -> State:
    """Weights from a file, or from a bundle's folder, whose hash is then checked."""
    folder = Path(path).expanduser()
    require(
        not folder.is_dir() or is_bundle(folder),
        f"{folder} is no whole bundle (expected {CONFIG} and {WEIGHTS}); for weights alone, name the file",
    )
    return load_bundle(folder, architecture).state if is_bundle(folder) else load_weights(folder)


def load_bundle(folder: Path, architecture: Architecture | None = None) -> Bundle:
    """Read a bundle, its own or anybody's, without running code from it.

    The weights are checked against the hash in the config. A model that is built by a user's own factory is not
    imported on a stranger's word: give its `architecture`. Raises `UserError`.
    """
    config = read_json(folder / CONFIG)
    found = config.get("holdfast") if isinstance(config, dict) else None
    if not isinstance(found, dict):
        raise UserError(f"{folder / CONFIG} is not the config of a holdfast bundle")
    state = load_weights(folder / WEIGHTS)
    require(
        sha256_file(folder / WEIGHTS) == found.get("weights_sha256"),
        f"{folder / WEIGHTS} does not match the hash in {CONFIG}: it was changed or torn after it was written",
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
        architecture is not None or not _own(own),
        f"{folder} needs the model factory '{own.name}', which nothing in a bundle may import: give your own, "
        "load_model(folder, Architecture(…, factory=…)) or --set model.name=package.module:factory",
    )
    return Bundle(state, own, classes, found)


def model_card(
    name: str, bundle: Bundle, original: str, restricted: Sequence[str], defence: str, summary: Mapping[str, Any] | None
) -> str:
    """The model card in Markdown, with the audit's figures where there is an audit."""
    arch = bundle.architecture
    library = "timm" if _of_timm(arch) else "holdfast"
    lines = [
        "---",
        f"library_name: {library}",
        "pipeline_tag: image-classification",
        "tags: [holdfast, non-fine-tunable]",
        "---",
        f"# {name}",
        "",
        f"`{arch.name}` for {len(bundle.classes)} classes ({', '.join(bundle.classes[:20])}), input "
        f"{arch.channels}×{arch.size}×{arch.size}, protected with **{defence}** against fine-tuning to a restricted "
        "domain.",
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
        *(
            ["import timm", 'model = timm.create_model("local-dir:bundle", pretrained=True)']
            if library == "timm"
            else ["import holdfast", f'model = holdfast.load_model("bundle"{_own(arch)})']
        ),
        "```",
        "",
    ]
    return "\n".join(lines)


def _audit_lines(summary: Mapping[str, Any]) -> list[str]:
    restricted, intact = summary["restricted"], summary["intactness"]
    worst = restricted["worst_case"]
    kept = f"{intact['before']:.1%} → {intact['after']:.1%}" if intact else "not measured"
    failing = "; ".join(f"{c['name']} ({c['message']})" for c in summary["checks"] if not c["passed"])
    return [
        f"Verdict: **{summary['verdict']}**. Original {restricted['metric']}: {kept}.",
        "",
        *([f"**Checks of the audit that fail:** {failing}.", ""] if failing else []),
        f"Worst case on the restricted domain (chance {restricted['chance']:.1%}): the protected model reaches "
        f"{worst['protected']['final']:.1%} under `{worst['protected']['attack']}`; the unprotected one "
        f"{worst['clean']['final']:.1%}, a model from scratch {worst['scratch']['final']:.1%}.",
        "",
    ]
