"""Causal self-attention: rotary positions, grouped queries, query-key normalisation and a cache for decoding.

Sources: Vaswani et al. 2017 (arXiv 1706.03762), eq. 1; rotary positions, Su et al. 2021 (arXiv 2104.09864), eq. 34;
grouped queries, Ainslie et al. 2023 (arXiv 2305.13245); query-key normalisation, Henry et al. 2020 (arXiv 2010.04245).

B batch, T tokens of this call, S tokens attended to (cached ones and these), D width, H heads, G key/value heads,
R = H / G queries per key, K head size.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-5
AttentionKind = Literal["auto", "sdpa", "explicit"]
Rotation = tuple[Tensor, Tensor]


def rotary_angles(start: int, length: int, head_size: int, base: float, device: torch.device) -> Rotation:
    """Return cosine and sine, each [length, head_size / 2] in float32, of the angles of positions start, start + 1, ..."""
    frequencies = base ** (torch.arange(0, head_size, 2, dtype=torch.float32, device=device) / -head_size)
    positions = torch.arange(start, start + length, dtype=torch.float32, device=device)
    angles = torch.outer(positions, frequencies)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate each pair (x[i], x[i + K/2]) of x [B, H, T, K] by its angle. Llama's layout: halves, not neighbours."""
    cos, sin = rotation
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class LayerCache:
    """Keys and values of one layer, each [B, G, context_length, K], allocated at the first `append` and then reused."""

    def __init__(self, context_length: int) -> None:
        self.context_length = context_length
        self.length = 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values [B, G, T, K] of the next T tokens; return all that is stored, [B, G, S, K]."""
        if self.keys is None or self.values is None:
            batch_size, num_kv_heads, _, head_size = keys.shape
            # Allocated like the layer's tensors: this gives the right dtype under autocast, and device and heads under
            # sharding.
            self.keys = keys.new_empty(batch_size, num_kv_heads, self.context_length, head_size)
            self.values = torch.empty_like(self.keys)
        start, self.length = self.length, self.length + keys.shape[2]
        self.keys[:, :, start : self.length] = keys
        self.values[:, :, start : self.length] = values
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


class KVCache:
    """Key-value cache of a decoder: each new token costs a single position.

    Args:
        batch_size: sequences decoded in parallel.
        context_length: maximum number of tokens.
        depth: number of layers.
    """

    def __init__(self, batch_size: int, context_length: int, depth: int) -> None:
        self.batch_size = batch_size
        self.layers = [LayerCache(context_length) for _ in range(depth)]

    @property
    def length(self) -> int:
        """Number of tokens stored, per sequence."""
        return self.layers[0].length

    def clear(self) -> None:
        """Remove all tokens, without freeing memory."""
        for layer in self.layers:
            layer.length = 0


def _fastest_kind(query: Tensor, num_keys: int) -> AttentionKind:
    """ "explicit" on a CPU for up to 8 K keys in bfloat16 (512 at most, to bound its memory), 2 K in float32.

    Its weights cost memory traffic that grows with T, and products that grow with T * K. Forward and backward over
    4096 tokens of 384 channels, best of 25, ms on two cores with AVX-512 bfloat16, torch 2.13, sdpa / explicit:

    |  T  | bf16 K 32 |   K 64    |   K 128   | fp32 K 32 |   K 64    |   K 128   |
    |  64 |  46 /  8  |  26 /  5  |  18 /  5  |  19 /  17 |  15 / 14  |  13 / 12  |
    | 128 |  53 / 12  |  32 /  8  |  23 /  7  |  27 /  27 |  22 / 22  |  19 / 18  |
    | 256 |  46 / 34  |  33 / 13  |  28 / 10  |  40 /  76 |  34 / 37  |  32 / 31  |
    | 512 |  71 / 79  |  55 / 27  |  48 / 18  |  74 / 167 |  68 / 78  |  60 / 57  |
    """
    if query.device.type != "cpu":
        return "sdpa"
    head_size = query.shape[-1]
    most = min(8 * head_size, 512) if query.dtype == torch.bfloat16 else 2 * head_size
    return "explicit" if num_keys <= most else "sdpa"


def causal_attention(
    query: Tensor, keys: Tensor, values: Tensor, *, dropout: float = 0.0, kind: AttentionKind = "auto"
) -> Tensor:
    """Return softmax(q k' / sqrt(K)) v, where the T queries are the last T of the S positions; attention is causal.

    Args:
        query: [B, H, T, K].
        keys, values: [B, G, S, K]; query head h reads key head h // R.
        dropout: probability to drop an attention weight.
        kind: "sdpa" is torch's fused kernel; "explicit" materialises the weights [B, H, T, S], which a CPU's matrix
            units process faster as long as they are small; "auto" takes the faster one (`_fastest_kind`).
            In bfloat16 the explicit form rounds the scores, as unfused attention does; its softmax sums in float32.

    Returns:
        [B, H, T, K].
    """
    batch_size, num_heads, length, head_size = query.shape
    num_kv_heads, num_keys = keys.shape[1:3]
    if kind == "auto":
        kind = _fastest_kind(query, num_keys)

    if kind == "sdpa":
        mask = None
        if 1 < length < num_keys:
            mask = torch.ones(length, num_keys, dtype=torch.bool, device=query.device).tril(num_keys - length)
        return F.scaled_dot_product_attention(
            query, keys, values, mask, dropout, is_causal=length == num_keys, enable_gqa=num_kv_heads < num_heads
        )

    future = torch.full((length, num_keys), float("-inf"), dtype=query.dtype, device=query.device)
    future = future.triu(num_keys - length + 1).repeat(num_heads // num_kv_heads, 1)  # [R * T, S]
    # The R queries of a key head are stacked, so that keys and values are never repeated.
    query = query.reshape(batch_size * num_kv_heads, -1, head_size)  # [B, H, T, K] -> [B * G, R * T, K]
    keys = keys.reshape(batch_size * num_kv_heads, num_keys, head_size)  # [B, G, S, K] -> [B * G, S, K]
    values = values.reshape(batch_size * num_kv_heads, num_keys, head_size)
    scores = torch.baddbmm(future, query, keys.mT, alpha=head_size**-0.5)  # [B * G, R * T, S]
    weights = F.dropout(scores.softmax(dim=-1), dropout)
    return torch.bmm(weights, values).view(batch_size, num_heads, length, head_size)


def _in_own_dtype(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    """Compute norm(x) in the dtype of its weight: under autocast x is in a lower one."""
    return norm(x.to(norm.weight.dtype)).to(x.dtype)


class SelfAttention(nn.Module):
    """Causal self-attention over x [B, T, D]. The net that builds it checks the sizes.

    One projection makes queries, keys and values. Its rows go by key/value head, each with its R queries, its key and
    its value, so that tensor parallelism may cut it into contiguous pieces of whole heads.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        num_kv_heads: int,
        *,
        qk_norm: bool = False,
        bias: bool = False,
        dropout: float = 0.0,
        kind: AttentionKind = "auto",
    ) -> None:
        super().__init__()
        self.head_size = width // num_heads
        self.queries_per_key = num_heads // num_kv_heads
        self.dropout = dropout
        self.kind: AttentionKind = kind
        self.qkv = nn.Linear(width, (num_heads + 2 * num_kv_heads) * self.head_size, bias=bias)
        self.out = nn.Linear(width, width, bias=bias)
        self.query_norm = nn.RMSNorm(self.head_size, NORM_EPS) if qk_norm else None
        self.key_norm = nn.RMSNorm(self.head_size, NORM_EPS) if qk_norm else None

    def forward(self, x: Tensor, rotation: Rotation | None = None, cache: LayerCache | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]; with a cache, x are the tokens after those it holds, and are added to it."""
        groups = self.qkv(x).unflatten(-1, (-1, self.queries_per_key + 2, self.head_size))  # [B, T, G, R + 2, K]
        query, key, value = groups.split((self.queries_per_key, 1, 1), dim=3)
        query = query.flatten(2, 3).transpose(1, 2)  # [B, T, G, R, K] -> [B, H, T, K]
        key = key.squeeze(3).transpose(1, 2)  # [B, T, G, 1, K] -> [B, G, T, K]
        value = value.squeeze(3).transpose(1, 2)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = _in_own_dtype(self.query_norm, query), _in_own_dtype(self.key_norm, key)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        if cache is not None:
            key, value = cache.append(key, value)
        dropout = self.dropout if self.training else 0.0
        mixed = causal_attention(query, key, value, dropout=dropout, kind=self.kind)
        return self.out(mixed.transpose(1, 2).flatten(2))  # [B, H, T, K] -> [B, T, D]
