"""Matrix factorisation: a vector for each user and each item, whose product is the score.

Source: Koren et al. 2009 (doi 10.1109/MC.2009.263), eq. 1 and 4. Terms that are equal for all items of a user (user
bias, the mean) change neither a ranking nor a softmax, so they are part of a rating, but not of a score.

B users, U all users, I items, K items of a user, D width.
"""

import torch
from torch import Tensor, nn

from bigmodel.nn.arguments import check_sizes
from bigmodel.nn.sequences import ItemScorer


class MatrixFactorization(ItemScorer):
    """Maps users [B], 0..U-1, to scores [B, I + 1] of all items.

    Args:
        num_users: users U.
        num_items: items I.
        width: channels D of a user and of an item.
        bias: add a bias per item, its popularity.
        user_bias: add a bias per user to ratings; for nets that are trained on ratings.
        init_std: standard deviation of vectors at the start.

    Raises:
        ValueError: a size below one.
    """

    def __init__(
        self,
        num_users: int,
        num_items: int,
        *,
        width: int = 64,
        bias: bool = True,
        user_bias: bool = False,
        init_std: float = 0.1,
    ) -> None:
        super().__init__(num_items, width, bias=bias)
        check_sizes(num_users=num_users)
        self.num_users = num_users
        self.init_std = init_std
        self.embed_users = nn.Embedding(num_users, width)
        self.user_bias = nn.Parameter(torch.zeros(num_users)) if user_bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise all weights, from torch's random state; biases start at zero."""
        nn.init.normal_(self.embed_users.weight, std=self.init_std)
        self.embed.reset_parameters(self.init_std)
        for each in (self.item_bias, self.user_bias):
            if each is not None:
                nn.init.zeros_(each)

    def features(self, users: Tensor) -> Tensor:
        """Vectors [..., D] of users [...], int64.

        Raises:
            ValueError: a user outside of the table (on a CPU; an accelerator reports it as a failed device assertion).
        """
        try:
            return self.embed_users(users)
        except IndexError as error:
            raise ValueError(
                f"users go from {int(users.min())} to {int(users.max())}, but this net has vectors for 0 to "
                f"{self.num_users - 1} only; for a new user take a net that reads histories"
            ) from error

    def ratings(self, users: Tensor, items: Tensor) -> Tensor:
        """Return ratings [B, K] of users [B] for items [B, K], as differences from the mean of all ratings."""
        ratings = (self.features(users)[:, None] * self.item_vectors(items)).sum(2)  # [B, 1, D] * [B, K, D] -> [B, K]
        if self.item_bias is not None:
            ratings = ratings + self.item_bias[items]
        return ratings if self.user_bias is None else ratings + self.user_bias[users][:, None]

    def forward(self, users: Tensor) -> Tensor:
        """Return scores [B, I + 1] of all items for users [B]."""
        return self.logits(self.features(users))
