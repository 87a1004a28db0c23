"""Hugging Face data sets (`datasets`, an extra): what a spec means, and its images as bytes by number.

| after `hf:` or `hf-stream:` | data set |
|---|---|
| `ylecun/mnist`, `user/name:config` | of the Hub |
| `path/to/folder` | what `Dataset.save_to_disk` wrote, or a folder that `load_dataset` understands |
| `imagefolder:DIR`, `parquet:DIR`, `webdataset:shards-{000..127}.tar` | files: a folder, a pattern or an address |
"""

from pathlib import Path
from types import ModuleType
from typing import Any

from training.data.tars import expand_braces

# builders of `datasets` that read files of these kinds; any other "name:rest" is a data set and its configuration
BUILDERS = frozenset(("arrow", "imagefolder", "parquet", "webdataset"))


def load_hub_dataset(spec: str, split: str, *, streaming: bool) -> Any:
    """A `datasets.Dataset`, or `IterableDataset` when streaming.

    Args:
        spec: See the table above.
        split: Which split.
        streaming: Read while training instead of downloading first.

    Raises:
        ValueError: If `datasets` is not installed, or cannot find or read the data set.
    """
    datasets = _import_datasets()
    name, _, rest = spec.partition(":")
    saved = Path(spec) / "state.json", Path(spec) / "dataset_dict.json"
    try:
        if any(path.exists() for path in saved):
            stored = datasets.load_from_disk(spec)
            if isinstance(stored, datasets.DatasetDict):
                found = stored[split]
            elif (found := stored).split not in (None, split):
                raise ValueError(f"it was saved as the split {found.split} alone: say so")
            return found.to_iterable_dataset(num_shards=len(found.cache_files)) if streaming else found
        options: dict[str, Any] = {"split": split, "streaming": streaming}
        if name not in BUILDERS:
            return datasets.load_dataset(name, rest or None, **options)
        if Path(rest).is_dir():
            return datasets.load_dataset(name, data_dir=rest, **options)
        return datasets.load_dataset(name, data_files={split: expand_braces(rest)}, **options)
    except IndexError as error:  # what the webdataset builder makes of a pattern that matches nothing
        raise ValueError(f"{spec}: no such file") from error
    except (ValueError, KeyError, OSError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{spec}, split {split}: {error}") from error


def _import_datasets() -> ModuleType:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ValueError("hf: and hf-stream: need pip install -e '.[datasets]'") from error
    return datasets


def without_decoding(dataset: Any, spec: str, column: str | None) -> tuple[Any, str]:
    """Make a data set give images as it stores them, so that broken ones can be skipped.

    Args:
        dataset: What `load_hub_dataset` gives.
        spec: Its name, for messages.
        column: The image column; None: the only one.

    Returns:
        The data set, and the name of its image column.

    Raises:
        ValueError: If it has no image column, or several and none is chosen.
    """
    datasets = _import_datasets()
    features = dataset.features or {}
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if column is None and len(images) != 1:
        which = f"several image columns, choose one: {', '.join(images)}" if images else "no image column"
        raise ValueError(f"{spec} has {which} (columns: {', '.join(features) or 'unknown'})")
    chosen = column or images[0]
    if features and chosen not in images:
        raise ValueError(f"{spec}: {chosen} is no image column; these are: {', '.join(images) or 'none'}")
    return dataset.cast_column(chosen, datasets.Image(decode=False)), chosen


def image_bytes(value: dict[str, Any] | None) -> bytes:
    """The encoded image of an undecoded `datasets.Image` value; empty, and so broken, where a row has none."""
    if not value:
        return b""
    if value["bytes"] is not None:
        return bytes(value["bytes"])
    import fsspec  # comes with datasets; opens local paths, hf://, https:// and members of archives alike

    with fsspec.open(value["path"], "rb") as file:
        return bytes(file.read())


class HubReader:
    """The images of a map-style data set; an image is called `<class>/<row>`, or `<row>` where rows have no class.

    Args:
        spec: What stands behind `hf:`.
        split: Which split.
        column: The image column; None: the only one.
        label_column: The column of classes; None: the only one, or none where there are several.

    Raises:
        ValueError: If the data set cannot be read, its image column is not clear or the chosen column holds no classes.
    """

    def __init__(self, spec: str, split: str, column: str | None, label_column: str | None = None) -> None:
        datasets = _import_datasets()
        rows, chosen = without_decoding(load_hub_dataset(spec, split, streaming=False), spec, column)
        labelled = [name for name, feature in rows.features.items() if isinstance(feature, datasets.ClassLabel)]
        if label_column is not None and label_column not in labelled:
            known = ", ".join(labelled) or "none"
            raise ValueError(f"{spec}: {label_column} is no column of classes; these are: {known}")
        self.spec, self.all_labelled = spec, labelled
        labelled = [label_column] if label_column else labelled
        self.classes: list[str] = rows.features[labelled[0]].names if len(labelled) == 1 else []
        labels = rows[labelled[0]] if self.classes else []
        self._labels: list[int] = [-1 if label is None else label for label in labels]
        self.rows, self.column = rows.select_columns([chosen]), chosen

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def labels(self) -> list[int]:
        """Label of every row.

        Raises:
            ValueError: If the data set has no column of classes, or several.
        """
        if not self._labels:
            which = f"several columns of classes, choose one: {', '.join(self.all_labelled)}"
            raise ValueError(f"hf:{self.spec} has {which if self.all_labelled else 'no column of classes'}")
        return self._labels

    def name(self, index: int) -> str:
        """Class and row."""
        labelled = self._labels and self._labels[index] >= 0  # a test set that keeps its labels secret says -1
        folder = f"{self.classes[self._labels[index]].replace('/', '_')}/" if labelled else ""
        return f"{folder}{index:08d}"

    def read(self, index: int) -> bytes:
        """The row's image."""
        return image_bytes(self.rows[index][self.column])
