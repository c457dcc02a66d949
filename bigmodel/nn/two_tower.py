"""Two-tower net: one tower encodes a user's history, the other an item, and the score is their cosine.

Sources: Yi et al. 2019 (doi 10.1145/3298689.3346996), eq. 1 and section 4, for normalised towers, a temperature, and sampled
softmax; Covington et al. 2016 (doi 10.1145/2959100.2959190), section 3, for a user as the mean of the items in the history,
whose embeddings are shared. Here more recent items may weigh more, and towers are residual.

B sequences, T positions, I items, D width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigmodel.nn.arguments import check_probabilities, check_sizes
from bigmodel.nn.sequences import PADDING, ItemScorer, check_items, draw_weights


class Tower(nn.Module):
    """Hidden layers, each x + dropout(relu(W x + b)), then normalised to length 1: [..., D] -> [..., D]."""

    def __init__(self, width: int, depth: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + self.dropout(F.relu(layer(x)))
        return F.normalize(x, dim=-1)


class TwoTower(ItemScorer):
    """Maps items [B, T], padded with 0 on the left, to scores [B, T, I + 1] of each next item.

    A score is the cosine of a user and an item over a learned temperature. A user is the mean of the items so far,
    so that the net can recommend to new users; the vectors of items do not depend on the user, so that
    they can be stored in an index for nearest neighbours.

    Args:
        num_items: items I.
        max_length: maximum number of items in the mean, the user's last ones.
        width: channels D of an item, of towers and of their vectors.
        depth: hidden layers of each tower; 0: the mean and the embeddings themselves.
        recency_decay: weight of an item in the mean, for each item that was chosen after it; 1: the plain mean.
        temperature: at the start, above 0.
        dropout: probability, on embeddings and hidden channels.
        init_std: standard deviation of weights at the start.

    Raises:
        ValueError: a size below one, or a number outside of its range.
    """

    def __init__(
        self,
        num_items: int,
        max_length: int,
        *,
        width: int = 64,
        depth: int = 1,
        recency_decay: float = 1.0,
        temperature: float = 0.1,
        dropout: float = 0.2,
        init_std: float = 0.06,
    ) -> None:
        super().__init__(num_items, width)
        check_sizes(max_length=max_length)
        check_probabilities(dropout=dropout)
        if depth < 0:
            raise ValueError(f"depth is {depth}, but must be at least 0; choose --model.net.depth")
        if not 0 < recency_decay <= 1:
            raise ValueError(
                f"recency_decay is {recency_decay}, but must be above 0 and at most 1; choose --model.net.recency_decay"
            )
        if temperature <= 0:
            raise ValueError(f"temperature is {temperature}, but must be above 0; choose --model.net.temperature")
        self.max_length = max_length
        self.recency_decay, self.temperature, self.init_std = recency_decay, temperature, init_std
        self.dropout = nn.Dropout(dropout)
        self.user_tower = Tower(width, depth, dropout)
        self.item_tower = Tower(width, depth, dropout)
        self.log_scale = nn.Parameter(torch.empty(1))  # -log(temperature)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise all weights, from torch's random state."""
        draw_weights(self, self.init_std)
        nn.init.constant_(self.log_scale, -math.log(self.temperature))

    def item_vectors(self, items: Tensor | None = None) -> Tensor:
        """Return vectors [..., D] of items [...], of length 1; without items the table [I + 1, D]. Those of padding are
        zero.
        """
        vectors = super().item_vectors(items)
        there = torch.arange(len(vectors), device=vectors.device) if items is None else items
        return self.item_tower(self.dropout(vectors)) * (there != PADDING)[..., None]

    def features(self, items: Tensor, times: Tensor | None = None) -> Tensor:
        """Return the features that score the item after each position.

        Args:
            items: [B, T], int64, at most `max_length` positions; 0 for padding, on the left.
            times: not used.

        Returns:
            [B, T, D], of length 1 / temperature; undefined but finite where there is padding.

        Raises:
            ValueError: too many positions, or an item number out of range.
        """
        check_items(items, self.max_length)
        positions = torch.arange(items.shape[1], device=items.device)
        distances = positions[:, None] - positions  # [T, T]
        weights = self.recency_decay ** distances.clamp(min=0) * (distances >= 0)
        weights = weights * (items != PADDING)[:, None]  # [B, T, T]
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1)  # an item's own weight; 0 / 1 at padding
        x = weights @ self.dropout(self.embed(items))  # [B, T] -> [B, T, D]
        return self.user_tower(x) * self.log_scale.exp()

    def forward(self, items: Tensor, times: Tensor | None = None) -> Tensor:
        """Return scores [B, T, I + 1] of the item after each of items [B, T]; see `features`."""
        return self.logits(self.features(items, times))
