"""GRU4Rec: predicts each next item with a recurrent net over the previous items.

Source: Hidasi et al. 2015 (arXiv 1511.06939), eq. 1 to 4, with one embedding of items for input and output.

B sequences, T positions, I items, D width, S width of the state.
"""

import torch
from torch import Tensor, nn

from bigmodel.nn.arguments import check_probabilities, check_sizes
from bigmodel.nn.sequences import PADDING, ItemScorer, check_items


class GRULayer(nn.Module):
    """Dropout, then a gated recurrent unit: [B, T, width] -> [B, T, S], its states after each position.

    The dropout is not that of torch's GRU, whose random state on a GPU is separate from torch's: a resumed run
    would not repeat it.
    """

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.gru = nn.GRU(width, hidden, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.gru(self.dropout(x))
        return states


class GRU4Rec(ItemScorer):
    """Maps items [B, T], padded with 0 on the left, to scores [B, T, I + 1] of each next item.

    Weights have torch's initialisation, items are normal with `init_std`.

    Args:
        num_items: items I.
        max_length: maximum number of items it reads, the user's last ones.
        width: channels D of an item.
        hidden: channels S of a layer's state.
        depth: number of recurrent layers.
        dropout: probability, on the input of each layer and of the projection from S to D.
        init_std: standard deviation of item embeddings at the start.

    Raises:
        ValueError: a size below one, or an invalid probability.
    """

    def __init__(
        self,
        num_items: int,
        max_length: int,
        *,
        width: int = 64,
        hidden: int = 128,
        depth: int = 1,
        dropout: float = 0.2,
        init_std: float = 0.1,
    ) -> None:
        super().__init__(num_items, width)
        check_sizes(max_length=max_length, hidden=hidden, depth=depth)
        check_probabilities(dropout=dropout)
        self.max_length = max_length
        self.init_std = init_std
        self.blocks = nn.ModuleList(GRULayer(hidden if i else width, hidden, dropout) for i in range(depth))
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(hidden, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise all weights, from torch's random state."""
        self.embed.reset_parameters(self.init_std)
        for module in self.modules():
            if isinstance(module, nn.GRU | nn.Linear):
                module.reset_parameters()

    def features(self, items: Tensor, times: Tensor | None = None) -> Tensor:
        """Return the features that score the item after each position.

        Args:
            items: [B, T], int64, at most `max_length` positions; 0 for padding, on the left.
            times: not used.

        Returns:
            [B, T, D]; undefined but finite where there is padding.

        Raises:
            ValueError: too many positions, or an item number out of range.
        """
        check_items(items, self.max_length)
        # Padding would change the state. So sequences are rotated until padding comes after their items, and back.
        length = items.shape[1]
        num_padding = (items == PADDING).sum(dim=1, keepdim=True)  # [B, 1]
        positions = torch.arange(length, device=items.device)  # [T]
        x = self.embed(items.gather(1, (positions + num_padding) % length))  # [B, T] -> [B, T, D]
        for block in self.blocks:
            x = block(x)  # [B, T, S]
        x = self.out(self.dropout(x))  # [B, T, S] -> [B, T, D]
        back = (positions - num_padding) % length  # [B, T]
        return x.gather(1, back[..., None].expand_as(x))

    def forward(self, items: Tensor, times: Tensor | None = None) -> Tensor:
        """Return scores [B, T, I + 1] of the item after each of items [B, T]; see `features`."""
        return self.logits(self.features(items, times))
