"""Interface of a pretrained net: features of a batch, ordered layers, and a description that rebuilds it.

B rows, T tokens, D width, L layers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from bigmodel.tasks.transfer_learning.backbones.layers import LayerAssignment, remove_unused_modules
from bigmodel.tasks.transfer_learning.tokenization import TextEncoder

Modality = Literal["text", "images"]
Pooling = Literal["first", "mean", "last", "attention"]


class TextProbe(NamedTuple):
    """A batch of one row, to inspect a text net."""

    tokens: Tensor
    mask: Tensor
    segments: Tensor


class Images(NamedTuple):
    """Images of a batch, as an image net reads them: [B, C, S, S]."""

    images: Tensor


class Backbone(nn.Module, ABC):
    """A pretrained net without its head.

    Modules that its features do not depend on (heads, unused poolers) are removed, so that every remaining
    parameter has a gradient. A layer is a block, or a stage where a net has stages; both are found by running the net once.

    Attributes:
        modality: type of its input.
        width: D.
        pooling: recommended pooling of its tokens to one vector; None: it pools itself.
        text_encoder: its tokenizer; None if it reads images.
        num_layers: L.
        description: plain values, from which `rebuild` makes the same architecture without files.
    """

    modality: Modality
    width: int
    pooling: Pooling | None
    text_encoder: TextEncoder | None
    description: dict[str, Any]

    @abstractmethod
    def forward(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        """Return the features of a batch: [B, T, D] with the mask [B, T] of real tokens; or [B, D] and None."""

    @property
    def num_layers(self) -> int:
        return self._layers.count

    def layer_of(self, name: str) -> int:
        """Return the layer of a parameter: 0 in embeddings or stem, 1 to L in a layer, L + 1 after them.

        Args:
            name: as in `named_parameters()` of this backbone; adapters added later belong to the layer they are in.
        """
        return self._layers.of(name)

    def _find_parts(self, net: nn.Module, probe: TextProbe | Images) -> list[str]:
        """Find width and layers of the inner net, and remove unused modules; return the names of these.

        The last step of a constructor. If the net cannot read the probe, its error is raised.
        """
        training = self.training
        self.eval()
        self._layers = LayerAssignment(self, net)
        with torch.inference_mode(False), torch.enable_grad(), self._layers.watched():
            features, _ = self(probe)
        self.width = features.shape[-1]
        dropped = remove_unused_modules(self, features)
        self.train(training)
        return dropped

    @torch.no_grad()
    def _is_causal(self) -> bool:
        """True if the first token's feature does not depend on the second token. In evaluation mode only."""
        probe = probe_of("text", {}, next(self.parameters()).device)
        other = probe._replace(tokens=torch.tensor([[0, 1]]).to(probe[0].device))  # type: ignore[call-arg]
        return torch.allclose(self(probe)[0][:, 0], self(other)[0][:, 0], rtol=1e-4, atol=1e-6)


def probe_of(modality: Modality, data_sizes: Mapping[str, int], device: torch.device) -> TextProbe | Images:
    """Return one row like the data: two tokens, or an image of their size."""
    if modality == "text":
        tokens = torch.zeros(1, 2, dtype=torch.int64, device=device)
        return TextProbe(tokens, torch.ones_like(tokens, dtype=torch.bool), tokens)
    size = data_sizes["image_size"]
    return Images(torch.zeros(1, data_sizes["in_channels"], size, size, device=device))
