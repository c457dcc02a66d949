"""Datasets of Hugging Face's `datasets`: saved to a folder, or from the hub. Their Arrow files are read in place."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HUB = "hf://"


def is_saved(folder: str) -> bool:
    """True if the folder was written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    names = os.listdir(folder)
    return "dataset_dict.json" in names or {"state.json", "dataset_info.json"} <= set(names)


def saved_files(folder: str) -> dict[str, list[str]]:
    """Return the files of each split of a saved dataset, without the package `datasets`.

    Raises:
        ValueError: if one of its metadata files is missing or damaged.
    """
    try:
        if os.path.exists(os.path.join(folder, "dataset_dict.json")):
            names = json.loads(Path(folder, "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
            return {name: _files_of(os.path.join(folder, name)) for name in names}
        return {os.path.basename(os.path.abspath(folder)): _files_of(folder)}
    except (OSError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"--data.path {folder}: not a complete dataset of Hugging Face: {error}") from error


def _files_of(folder: str) -> list[str]:
    state = json.loads(Path(folder, "state.json").read_text(encoding="utf-8"))
    return [os.path.join(folder, file["filename"]) for file in state["_data_files"]]


def load_hub(path: str, instead: str) -> Any:
    """Return the splits of a dataset of the hub by name, cached by `datasets` ($HF_HOME).

    Args:
        path: hf://owner/name, or hf://owner/name:configuration.
        instead: an alternative without network access, for messages.

    Raises:
        ValueError: if `datasets` is not installed, or the dataset cannot be loaded.
    """
    if find_spec("datasets") is None:
        raise ValueError(f"--data.path {path} needs the package datasets: pip install 'bigmodel[hub]'")
    import datasets

    name, _, configuration = path.removeprefix(HUB).strip("/").partition(":")
    try:
        return datasets.load_dataset(name, configuration or None)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise ValueError(
            f"--data.path {path}: the dataset {name} cannot be loaded from the hub: {error}. Without network access, set"
            f" --data.path to {instead}"
        ) from error


def hub_files(path: str, instead: str) -> dict[str, list[str]]:
    """Return the files of each split of a dataset of the hub; see `load_hub`."""
    return {split: [file["filename"] for file in data.cache_files] for split, data in load_hub(path, instead).items()}
