"""A decoder-only transformer, from GPT-2 to Llama and Qwen3 by its arguments.

Sources: GPT-2, Radford et al. 2019 (pre-norm blocks, initialisation, tied head); RMSNorm, Zhang and Sennrich 2019
(arXiv 1910.07467); SwiGLU, Shazeer 2020 (arXiv 2002.05202), eq. 6.

B batch, T tokens, D width, M width of the MLP, V vocabulary.
"""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigmodel.nn.arguments import check_choice, check_probabilities, check_sizes
from bigmodel.nn.attention import NORM_EPS, AttentionKind, KVCache, LayerCache, Rotation, SelfAttention, rotary_angles

NormKind = Literal["layer", "rms"]
PositionKind = Literal["learned", "rotary"]
Activation = Literal["gelu", "gelu_tanh", "swiglu"]


def _norm(kind: NormKind, width: int, bias: bool) -> nn.Module:
    return nn.LayerNorm(width, NORM_EPS, bias=bias) if kind == "layer" else nn.RMSNorm(width, NORM_EPS)


class MLP(nn.Module):
    """[B, T, D] -> [B, T, D] through M hidden channels: act(x U) W, or with "swiglu" (silu(x G) * x U) W."""

    def __init__(self, width: int, hidden: int, activation: Activation, *, bias: bool) -> None:
        super().__init__()
        self.activation: Activation = activation
        self.gate = nn.Linear(width, hidden, bias=bias) if activation == "swiglu" else None
        self.up = nn.Linear(width, hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is not None:
            return self.down(F.silu(self.gate(x)) * self.up(x))
        return self.down(F.gelu(self.up(x), approximate="tanh" if self.activation == "gelu_tanh" else "none"))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): [B, T, D] -> [B, T, D]."""

    def __init__(
        self, attention_norm: nn.Module, attention: SelfAttention, mlp_norm: nn.Module, mlp: MLP, dropout: float
    ) -> None:
        super().__init__()
        self.attention_norm = attention_norm
        self.attention = attention
        self.mlp_norm = mlp_norm
        self.mlp = mlp
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, rotation: Rotation | None = None, cache: LayerCache | None = None) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), rotation, cache))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


def _check_heads(width: int, num_heads: int, num_kv_heads: int, positions: PositionKind) -> None:
    if width % num_heads:
        raise ValueError(
            f"width {width} is not divisible by num_heads {num_heads}; choose --model.net.width or "
            f"--model.net.num_heads so that it is (width {width // num_heads * num_heads or num_heads} would do)"
        )
    if num_heads % num_kv_heads:
        raise ValueError(
            f"num_heads {num_heads} is not divisible by num_kv_heads {num_kv_heads}; "
            f"choose a divisor of {num_heads} as --model.net.num_kv_heads"
        )
    head_size = width // num_heads
    if positions == "rotary" and head_size % 2:
        raise ValueError(
            f"rotary positions need an even head size, got width {width} / num_heads {num_heads} = {head_size}; "
            "choose --model.net.width or --model.net.num_heads"
        )


class GPT(nn.Module):
    """A decoder-only transformer: maps token ids [B, T] to logits [B, T, V] of each next token.

    It holds no buffers: build it under `torch.device("meta")`, then `to_empty(device=...)` and `reset_parameters()`.
    With a tied head, the output matrix is `embed.weight`, and there is no `head` in the state dict.

    Args:
        vocab_size: number of tokens V.
        context_length: maximum number of tokens it attends to.
        width: channels D of a token.
        depth: number of blocks.
        num_heads: query heads; each has width / num_heads channels.
        num_kv_heads: key/value heads, a divisor of num_heads (1 is multi-query); None for num_heads.
        mlp_width: hidden channels of the MLP; None for 4 * width; with swiglu, for 8/3 * width
            rounded up to a multiple of 64.
        norm: "layer" (LayerNorm) or "rms" (RMSNorm); epsilon 1e-5.
        positions: "learned" absolute embeddings or "rotary".
        rotary_base: the base of the rotary frequencies.
        activation: "gelu" (exact), "gelu_tanh" (its approximation, GPT-2's) or "swiglu" (Llama's).
        qk_norm: RMSNorm on each head's queries and keys, before the rotation (Qwen3's).
        tied_head: use the embedding as the output matrix.
        bias: biases in linears and LayerNorm.
        dropout: probability, on the embeddings, the attention weights and the output of each branch.
        init_std: standard deviation of weights at the start; of projections into the residual stream
            init_std / sqrt(2 * depth).
        attention: "sdpa", "explicit", or "auto" for the faster one by measurement (`attention.causal_attention`).

    Raises:
        ValueError: inconsistent sizes, or an unknown choice.
    """

    # Plan of tensor parallelism, see `bigmodel.parallel.tensor_parallel`.
    tensor_plan: ClassVar[dict[str, str]] = {
        "embed": "vocabulary",
        "head": "vocabulary",
        "blocks.*.attention_norm": "norm",
        "blocks.*.attention.qkv": "column",
        "blocks.*.attention.query_norm": "heads",
        "blocks.*.attention.key_norm": "heads",
        "blocks.*.attention.out": "row",
        "blocks.*.mlp_norm": "norm",
        "blocks.*.mlp.gate": "column",
        "blocks.*.mlp.up": "column",
        "blocks.*.mlp.down": "row",
    }

    def __init__(
        self,
        vocab_size: int,
        context_length: int,
        *,
        width: int = 384,
        depth: int = 6,
        num_heads: int = 6,
        num_kv_heads: int | None = None,
        mlp_width: int | None = None,
        norm: NormKind = "layer",
        positions: PositionKind = "learned",
        rotary_base: float = 10_000.0,
        activation: Activation = "gelu",
        qk_norm: bool = False,
        tied_head: bool = True,
        bias: bool = False,
        dropout: float = 0.0,
        init_std: float = 0.02,
        attention: AttentionKind = "auto",
    ) -> None:
        super().__init__()
        if num_kv_heads is None:
            num_kv_heads = num_heads
        if mlp_width is None:
            mlp_width = -(-8 * width // (3 * 64)) * 64 if activation == "swiglu" else 4 * width
        check_sizes(
            vocab_size=vocab_size, context_length=context_length, width=width, depth=depth, num_heads=num_heads,
            num_kv_heads=num_kv_heads, mlp_width=mlp_width,
        )  # fmt: skip
        check_choice("norm", norm, NormKind)
        check_choice("positions", positions, PositionKind)
        check_choice("activation", activation, Activation)
        check_choice("attention", attention, AttentionKind)
        _check_heads(width, num_heads, num_kv_heads, positions)
        check_probabilities(dropout=dropout)

        self.vocab_size, self.context_length = vocab_size, context_length
        self.num_kv_heads, self.head_size = num_kv_heads, width // num_heads
        self.rotary_base, self.init_std = rotary_base, init_std

        self.embed = nn.Embedding(vocab_size, width)
        self.embed_positions = nn.Embedding(context_length, width) if positions == "learned" else None
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(
                _norm(norm, width, bias),
                SelfAttention(
                    width, num_heads, num_kv_heads, qk_norm=qk_norm, bias=bias, dropout=dropout, kind=attention
                ),
                _norm(norm, width, bias),
                MLP(width, mlp_width, activation, bias=bias),
                dropout,
            )
            for _ in range(depth)
        )
        self.norm = _norm(norm, width, bias)
        self.head = None if tied_head else nn.Linear(width, vocab_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise all weights, from torch's random state."""
        residual_std = self.init_std / (2 * len(self.blocks)) ** 0.5
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                into_residual = name.endswith(("attention.out", "mlp.down"))
                nn.init.normal_(module.weight, std=residual_std if into_residual else self.init_std)
            elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
                nn.init.ones_(module.weight)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)

    def new_cache(self, batch_size: int) -> KVCache:
        """Return an empty cache for decoding `batch_size` sequences; dtype and device are those of the first keys and
        values.
        """
        return KVCache(batch_size, self.context_length, len(self.blocks))

    def features(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Return the input of the output layer.

        Args:
            tokens: ids [B, T], int64. With a cache they come after the tokens it holds, and are added to it.
            cache: from `new_cache`.

        Returns:
            [B, T, D], after the final norm.

        Raises:
            ValueError: more tokens, including cached ones, than the context length; another batch size than the
                cache's; an id outside the vocabulary (on a CPU; an accelerator reports it as a failed device
                assertion).
        """
        start = 0 if cache is None else cache.length
        self._check_tokens(tokens, start, cache)
        length = tokens.shape[1]
        try:
            x = self.embed(tokens)  # [B, T] -> [B, T, D]
        except IndexError as error:
            raise ValueError(
                f"token ids go from {int(tokens.min())} to {int(tokens.max())}, outside the vocabulary of "
                f"{self.vocab_size}; were the data made with another tokenizer?"
            ) from error
        rotation = None
        if self.embed_positions is None:
            rotation = rotary_angles(start, length, self.head_size, self.rotary_base, tokens.device)
        else:
            x = x + self.embed_positions(torch.arange(start, start + length, device=tokens.device))
        x = self.dropout(x)
        for i, block in enumerate(self.blocks):
            x = block(x, rotation, None if cache is None else cache.layers[i])
        return self.norm(x)

    def logits(self, features: Tensor) -> Tensor:
        """Map features [..., D] to logits [..., V]."""
        return F.linear(features, self.embed.weight) if self.head is None else self.head(features)

    def forward(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Return logits [B, T, V] of the token after each of tokens [B, T]; see `features`."""
        return self.logits(self.features(tokens, cache))

    def _check_tokens(self, tokens: Tensor, start: int, cache: KVCache | None) -> None:
        if tokens.ndim != 2:
            raise ValueError(f"tokens have shape {list(tokens.shape)}, but must be [batch, tokens]")
        if start + tokens.shape[1] > self.context_length:
            raise ValueError(
                f"{start + tokens.shape[1]} tokens ({start} of them cached) do not fit into the context of "
                f"{self.context_length}; shorten them, or train with a larger --data.context_length"
            )
        if cache is not None and tokens.shape[0] != cache.batch_size:
            raise ValueError(f"{tokens.shape[0]} sequences for a cache of {cache.batch_size}; make one of that size")
