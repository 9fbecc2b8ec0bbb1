"""Image sets from Parquet files and from the Hugging Face `datasets` library."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from holdfast.errors import UserError, one_line, require
from holdfast.imagesets import SPLIT_FOLDERS, Source, Split, numbered


def open_parquet(name: str) -> Source:
    """A Parquet file, or a folder of them, in the Hugging Face image layout (struct of `bytes`, `path`; `label`).

    Splits come from file names (`train*.parquet`, `test-00000-of-00001.parquet` …); a single file is all training data.
    """
    path = Path(name).expanduser()
    require(path.exists(), f"data not found: {path}")
    files = [path] if path.is_file() else parquet_files(path)
    require(bool(files), f"{path} holds no Parquet files")
    groups: dict[str, list[Path]] = {}
    for file in files:
        groups.setdefault(_split_of(file) if len(files) > 1 else "train", []).append(file)
    require("train" in groups, f"{path} has no train*.parquet (found {', '.join(f.name for f in files[:5])})")
    tables = {split: _read_tables(group) for split, group in groups.items()}
    names = _class_names(path, tables["train"])
    splits = {split: _table_split(table, f"{path}/{split}", len(names or ())) for split, table in tables.items()}
    classes = names or numbered(splits["train"])
    return Source(path.stem, classes, splits["train"], splits.get("validation"), splits.get("test"))


def parquet_files(path: Path) -> list[Path]:
    if not path.is_dir():
        return []
    return sorted(path.glob("*.parquet")) or sorted(path.glob("data/*.parquet"))


def holds_images(path: Path) -> bool:
    """Whether a folder's Parquet files have an image column; only their schema is read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = parquet_files(path)
    try:
        return bool(files) and _image_column(pq.read_schema(files[0])) is not None
    except (OSError, pa.ArrowException):
        return False


def _image_column(schema: Any) -> str | None:
    """The first column of bytes, or of structs with `bytes`."""
    import pyarrow as pa

    for field in schema:
        struct = pa.types.is_struct(field.type)
        if pa.types.is_binary(field.type) or (struct and field.type.get_field_index("bytes") >= 0):
            return str(field.name)
    return None


def _split_of(file: Path) -> str:
    for split, names in SPLIT_FOLDERS.items():
        if file.name.lower().startswith(names):
            return split
    raise UserError(f"cannot tell the split of {file.name}; expected train*, validation* or test*.parquet")


def _read_tables(files: Sequence[Path]) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables = []
    for file in files:
        try:
            tables.append(pq.read_table(file))
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"cannot read {file}: truncated, or not a Parquet file ({one_line(error, 120)})") from error
    return pa.concat_tables(tables)


def _features(table: Any) -> dict[str, Any]:
    meta = (table.schema.metadata or {}).get(b"huggingface")
    info = json.loads(meta) if meta else {}
    features = info.get("info", {}).get("features", {})
    return features if isinstance(features, dict) else {}


def _class_names(path: Path, table: Any) -> tuple[str, ...] | None:
    label = _features(table).get(_label_column(table, str(path)), {})
    if isinstance(label, dict) and label.get("names"):
        return tuple(label["names"])
    card = (path if path.is_dir() else path.parent) / "dataset.json"
    if card.is_file():
        names = json.loads(card.read_text()).get("classes")
        return tuple(names) if names else None
    return None


def _label_column(table: Any, where: str) -> str:
    columns = list(table.column_names)
    for name in ("label", "labels", "fine_label"):
        if name in columns:
            return name
    raise UserError(f"{where} has no column 'label' (found {', '.join(columns)}): expected images with labels")


def _table_split(table: Any, where: str, classes: int, follow_paths: bool = False) -> Split:
    """`follow_paths`: open the file that a row names instead of holding its bytes; only for tables that `datasets` made
    on this machine, never on the word of a Parquet file."""
    import pyarrow as pa

    label_column = _label_column(table, where)
    image_column = _image_column(table.schema)
    require(
        image_column is not None,
        f"{where} has no image column (a struct with 'bytes', or binary); found {', '.join(table.column_names)}",
    )
    require(table.num_rows > 0, f"{where} has no rows")
    require(
        pa.types.is_integer(table.schema.field(label_column).type),
        f"{where}: column '{label_column}' holds {table.schema.field(label_column).type}, but labels must be integers "
        "(0 … C−1, with class names in the metadata)",
    )
    labels = np.asarray(table[label_column].to_numpy(), dtype=np.int64)
    require(labels.min() >= 0, f"{where} has unlabelled rows (label −1)")
    require(not classes or labels.max() < classes, f"{where} has label {labels.max()}, but only {classes} class names")
    images = table[image_column]

    def open_row(i: int) -> Image.Image:
        value = images[i].as_py()
        data = value["bytes"] if isinstance(value, dict) else value
        if data is None and follow_paths and isinstance(value, dict) and value["path"]:
            return Image.open(value["path"])
        require(data is not None, f"row {i} of {where} holds a path but no image bytes")
        return Image.open(io.BytesIO(data))

    return Split(labels, open_row, lambda i: f"row {i} of {where}")


def open_hub(name: str) -> Source:
    """A data set of the Hugging Face Hub, or a local folder that `datasets` understands; `hf:NAME` or `hf:NAME/CONFIG`
    after `@`: `hf:cifar100@cifar100`."""
    import datasets

    dataset, _, config = name.partition("@")
    try:
        loaded = datasets.load_dataset(dataset, config or None)
    except Exception as error:  # the library raises dozens of kinds; to the user all mean "not loaded"
        raise UserError(f"cannot load the Hugging Face data set '{name}': {one_line(error, 160)}") from error
    splits: dict[str, Split] = {}
    classes: tuple[str, ...] | None = None
    for key, part in loaded.items():
        split = next((s for s, names in SPLIT_FOLDERS.items() if str(key).startswith(names)), None)
        if split is None:
            continue
        image = next((n for n, f in part.features.items() if isinstance(f, datasets.Image)), None)
        require(image is not None, f"'{name}' has no image column (found {', '.join(part.features)})")
        if split == "test" and _unlabelled(part):  # as ImageNet's: test data are then split off, or the validation's
            continue
        table = part.cast_column(image, datasets.Image(decode=False)).with_format("arrow")[:]
        label = _label_column(table, name)
        classes = classes or tuple(getattr(part.features[label], "names", None) or ())
        splits[split] = _table_split(table, f"{name}/{key}", len(classes), follow_paths=True)
    require("train" in splits, f"'{name}' has no training split (found {', '.join(map(str, loaded))})")
    classes = classes or numbered(splits["train"])
    return Source(dataset, classes, splits["train"], splits.get("validation"), splits.get("test"))


def _unlabelled(part: Any) -> bool:
    """Whether a split of `datasets` hides its labels (all −1)."""
    column = next((n for n in ("label", "labels", "fine_label") if n in part.column_names), None)
    return column is not None and len(part) > 0 and part[0][column] == -1
