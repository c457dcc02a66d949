"""Pretrained nets: transformers models of texts or images, and runs of bigmodel."""

from bigmodel.tasks.transfer_learning.backbones.base import Backbone, Modality, Pooling
from bigmodel.tasks.transfer_learning.backbones.factory import build_backbone, find_text_encoder, rebuild

__all__ = ["Backbone", "Modality", "Pooling", "build_backbone", "find_text_encoder", "rebuild"]
