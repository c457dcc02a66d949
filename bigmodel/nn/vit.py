"""The vision transformer: an image as a sequence of patches.

Sources: Dosovitskiy et al. 2020 (arXiv 2010.11929), eq. 1-4; registers, Darcet et al. 2023 (arXiv 2309.16588); fixed
positions in two dimensions, Chen et al. 2021 (arXiv 2104.02057).

B batch, C channels, H and W pixels, P patches on a side, N = P * P patches, R registers, T tokens: the class token if there
is one, N patches, R registers; D width, A heads, S = D / A head size, K classes.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigmodel.nn.arguments import check_choice, check_images, check_probabilities, check_sizes
from bigmodel.nn.drop_path import DropPath, linear_rates
from bigmodel.nn.layer_scale import LayerScale
from bigmodel.nn.transformer import MLP

PoolKind = Literal["class", "mean"]
PositionKind = Literal["learned", "sincos"]

_INIT_STD = 0.02
_NORM_EPS = 1e-6


class SelfAttention(nn.Module):
    """Each token attends to all: [B, T, D] -> [B, T, D].

    One projection makes queries, keys and values; its rows go by head, each with its query, key and value, so that it
    may be cut into contiguous pieces of whole heads.
    """

    def __init__(self, width: int, num_heads: int, *, qkv_bias: bool, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (self.num_heads, 3, -1))  # [B, T, 3 D] -> [B, T, A, 3, S]
        query, key, value = heads.transpose(1, 2).unbind(dim=3)  # each [B, A, T, S]
        mixed = F.scaled_dot_product_attention(
            query, key, value, dropout_p=self.dropout if self.training else 0.0
        )  # [B, A, T, S]
        return self.out(mixed.transpose(1, 2).flatten(2))  # [B, A, T, S] -> [B, T, D]


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): [B, T, D] -> [B, T, D]. A `layer_scale` scales both branches."""

    def __init__(
        self,
        attention: SelfAttention,
        mlp: MLP,
        width: int,
        *,
        layer_scale: float | None,
        drop_path: float,
        dropout: float,
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, _NORM_EPS)
        self.attention = attention
        self.mlp_norm = nn.LayerNorm(width, _NORM_EPS)
        self.mlp = mlp
        self.dropout = nn.Dropout(dropout)
        self.drop_path = DropPath(drop_path)
        self.attention_scale = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)
        self.mlp_scale = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attention_scale(self.dropout(self.attention(self.attention_norm(x)))))
        return x + self.drop_path(self.mlp_scale(self.dropout(self.mlp(self.mlp_norm(x)))))


def _check_divisible(image_size: int, patch_size: int, width: int, num_heads: int, positions: PositionKind) -> None:
    if image_size % patch_size:
        divisors = [size for size in range(1, image_size + 1) if image_size % size == 0]
        raise ValueError(
            f"images of {image_size} pixels cannot be cut into patches of {patch_size}; choose a divisor as "
            f"--model.net.patch_size ({', '.join(map(str, divisors))}), or another size of images"
        )
    if width % num_heads:
        raise ValueError(
            f"width {width} is not divisible by num_heads {num_heads}; choose --model.net.width or "
            "--model.net.num_heads so that it is"
        )
    if positions == "sincos" and width % 4:
        raise ValueError(
            f"width {width} is not divisible by 4, which sincos positions need; choose --model.net.width, or "
            "--model.net.positions learned"
        )


class ViT(nn.Module):
    """A vision transformer: maps images [B, C, H, W] to logits [B, K]. The defaults make ViT-Ti; ViT-S has width 384
    and 6 heads, ViT-B width 768 and 12 heads, ViT-L width 1024, depth 24 and 16 heads.

    Args:
        num_classes: number of classes K.
        in_channels: channels C of an image.
        image_size: pixels on a side, a multiple of patch_size.
        patch_size: pixels on a side of a patch; null: 16, or 4 for images up to 64 pixels.
        width: channels D of a token.
        depth: number of blocks.
        num_heads: heads A; each has width / num_heads channels.
        mlp_ratio: hidden channels of a block's MLP, per channel.
        pool: pooling of the last layer: "class", the output of an extra token, or "mean", the mean of the patches.
        positions: "learned" embeddings, or "sincos", fixed sines and cosines of row and column.
        num_registers: extra tokens whose outputs are unused; they absorb artifacts of the patches' features.
        layer_scale: initial value of the learned scales of all branches, for example 1e-5 for deep nets; null: none.
        qkv_bias: biases of queries, keys and values.
        drop_path: probability to skip a branch (stochastic depth) in the last block, rising from 0 in the first.
        dropout: probability, on the embeddings, the attention weights and the output of each branch.

    Raises:
        ValueError: inconsistent sizes, or an unknown choice.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        image_size: int,
        *,
        patch_size: int | None = None,
        width: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
        pool: PoolKind = "class",
        positions: PositionKind = "learned",
        num_registers: int = 0,
        layer_scale: float | None = None,
        qkv_bias: bool = True,
        drop_path: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if patch_size is None:
            patch_size = 4 if image_size <= 64 else 16
        mlp_width = round(mlp_ratio * width)
        check_sizes(patch_size=patch_size, width=width, depth=depth, num_heads=num_heads, mlp_ratio=mlp_width)
        check_choice("pool", pool, PoolKind)
        check_choice("positions", positions, PositionKind)
        check_probabilities(dropout=dropout)
        _check_divisible(image_size, patch_size, width, num_heads, positions)
        if num_registers < 0:
            raise ValueError(
                f"num_registers is {num_registers}, but must be at least 0; choose --model.net.num_registers"
            )

        self.in_channels, self.image_size = in_channels, image_size
        self.pool: PoolKind = pool
        self.num_patches = (image_size // patch_size) ** 2

        self.patch_embedding = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)
        self.class_token = nn.Parameter(torch.empty(width)) if pool == "class" else None
        num_positions = self.num_patches + (pool == "class")
        if positions == "learned":
            self.positions = nn.Parameter(torch.empty(num_positions, width))
        else:
            self.register_buffer("positions", torch.empty(num_positions, width), persistent=False)
        self.registers = nn.Parameter(torch.empty(num_registers, width)) if num_registers else None
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(
                SelfAttention(width, num_heads, qkv_bias=qkv_bias, dropout=dropout),
                MLP(width, mlp_width, "gelu", bias=True),
                width,
                layer_scale=layer_scale,
                drop_path=rate,
                dropout=dropout,
            )
            for rate in linear_rates(drop_path, depth)
        )
        self.norm = nn.LayerNorm(width, _NORM_EPS)
        self.head = nn.Linear(width, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise all weights, from torch's random state."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                _draw(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm | LayerScale):
                module.reset_parameters()
        for tokens in (self.class_token, self.registers):
            if tokens is not None:
                _draw(tokens)
        if isinstance(self.positions, nn.Parameter):
            _draw(self.positions)
        else:
            grid = sincos_positions(round(self.num_patches**0.5), self.norm.normalized_shape[0])
            self.positions.zero_()  # the class token, if there is one, has no position
            self.positions[-self.num_patches :] = grid.to(self.positions)

    def features(self, images: Tensor) -> Tensor:
        """Map images [B, C, H, W] to features [B, D], after the final norm."""
        check_images(images, self.in_channels, self.image_size)
        x = self.patch_embedding(images).flatten(2).transpose(1, 2)  # [B, D, P, P] -> [B, N, D]
        if self.class_token is not None:
            x = torch.cat((self.class_token.expand(len(x), 1, -1).to(x.dtype), x), dim=1)  # [B, 1 + N, D]
        x = x + self.positions
        if self.registers is not None:
            x = torch.cat((x, self.registers.expand(len(x), -1, -1).to(x.dtype)), dim=1)  # [B, T, D]
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        # The norm acts on each token separately: only pooled tokens need it.
        if self.pool == "class":
            return self.norm(x[:, 0])
        return self.norm(x[:, : self.num_patches]).mean(dim=1)

    def logits(self, features: Tensor) -> Tensor:
        """Map features [..., D] to logits [..., K]."""
        return self.head(features)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, K] of images [B, C, H, W]."""
        return self.logits(self.features(images))


def sincos_positions(num_patches: int, width: int, base: float = 10_000.0) -> Tensor:
    """Return fixed positions of a square of patches, row by row.

    Args:
        num_patches: on a side, P.
        width: channels D, a multiple of 4.
        base: the ratio of the slowest wavelength to the fastest, nearly.

    Returns:
        [P * P, D] in float32: a quarter of the channels each for sine and cosine of the column, sine and cosine of the
        row, at frequencies base^(-4 i / D).
    """
    frequencies = base ** (torch.arange(0, width, 4, dtype=torch.float32) / -width)  # [D / 4]
    angles = torch.outer(torch.arange(num_patches, dtype=torch.float32), frequencies)  # [P, D / 4]
    waves = torch.cat((angles.sin(), angles.cos()), dim=1)  # [P, D / 2]
    columns = waves.expand(num_patches, -1, -1)  # [P, P, D / 2]
    return torch.cat((columns, columns.transpose(0, 1)), dim=2).flatten(0, 1)  # [P, P, D] -> [P * P, D]


def _draw(weight: Tensor) -> None:
    nn.init.trunc_normal_(weight, std=_INIT_STD, a=-2 * _INIT_STD, b=2 * _INIT_STD)
