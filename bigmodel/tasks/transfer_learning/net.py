"""A pretrained net with a new head: backbone, pooling, dropout, one linear layer.

B samples, T tokens, D width, K outputs: classes, labels, or 1 for a number.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bigmodel.tasks.transfer_learning.backbones import Backbone
from bigmodel.tasks.transfer_learning.pooling import PoolingKind, make_pool

_INIT_STD = 0.02  # as the heads of BERT and of vision transformers


class TransferNet(nn.Module):
    """Maps a batch, of texts or of images, to logits [B, K].

    Args:
        backbone: gives features.
        num_classes: K.
        pooling: of tokens to one vector; auto: that of the backbone, the mean over an encoder's tokens, the last token
            of a causal net.
        dropout: probability, between the pooled features and the head.

    Raises:
        ValueError: a pooling that this backbone does not support.
    """

    def __init__(
        self, backbone: Backbone, num_classes: int, *, pooling: PoolingKind = "auto", dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.pool = make_pool(pooling, backbone)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(backbone.width, num_classes)
        nn.init.normal_(self.head.weight, std=_INIT_STD)
        nn.init.zeros_(self.head.bias)

    def features(self, batch: Any) -> Tensor:
        """Return pooled features [B, D], before dropout."""
        features, mask = self.backbone(batch)
        return features if self.pool is None else self.pool(features, mask)

    def logits(self, features: Tensor) -> Tensor:
        """Map features [..., D] to logits [..., K]."""
        return self.head(self.dropout(features))

    def forward(self, batch: Any) -> Tensor:
        """Return logits [B, K] of a batch."""
        return self.logits(self.features(batch))
