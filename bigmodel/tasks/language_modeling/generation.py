"""Generation of tokens one by one: greedy or sampled, with or without a cache of keys and values.

Sources: top-k, Fan et al. 2018 (arXiv 1805.04833); top-p, Holtzman et al. 2019 (arXiv 1904.09751).

B batch, T tokens, V vocabulary.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from bigmodel.data.stateless_rng import random_bits
from bigmodel.nn.accumulation import accumulable

Draw = Callable[[Tensor, int], Tensor]  # maps probabilities [B, V] and a step number to ids [B]


@dataclass(frozen=True)
class Sampling:
    """Options of generation, checked.

    Args:
        max_new_tokens: maximum number of new tokens.
        temperature: divides the logits; 0: greedy decoding; of equal logits, the first token.
        top_k: sample from the k most likely tokens (and those equal to the last of them).
        top_p: sample from the smallest set of most likely tokens whose probabilities reach this sum, after top_k.

    Raises:
        ValueError: for values out of range.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}, but must be at least 1: set --max_new_tokens")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}, but must be 0 (greedy) or above: set --temperature")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}, but must be at least 1, or null for all tokens: set --top_k")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, but must be in (0, 1], or null for all tokens: set --top_p")

    def choose(self, logits: Tensor, draw: Draw, step: int) -> Tensor:
        """Choose a token id for each row of logits [B, V]: [B]."""
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        # The maximum is subtracted first, so that no temperature overflows.
        logits = (logits - logits.amax(dim=-1, keepdim=True)) / self.temperature
        if self.top_k is not None:
            logits = keep_top_k(logits, self.top_k)
        if self.top_p is not None:
            logits = keep_top_p(logits, self.top_p)
        return draw(logits.softmax(dim=-1), step)


@runtime_checkable
class SupportsCache(Protocol):
    """A net with a key-value cache, which has a `length` in tokens and can `clear()`; for example `bigmodel.nn.GPT`."""

    def new_cache(self, batch_size: int) -> Any: ...

    def features(self, tokens: Tensor, cache: Any = None) -> Tensor:
        """Map tokens [B, T] to features [B, T, D], and add the tokens to the cache."""

    def logits(self, features: Tensor) -> Tensor:
        """Map features [B, T, D] to logits [B, T, V]."""


def generate(
    net: nn.Module,
    tokens: Tensor,
    sampling: Sampling,
    *,
    stop_tokens: Collection[int] = (),
    seed: int | None = None,
    keys: Tensor | None = None,
    use_cache: bool = True,
) -> Iterator[Tensor]:
    """Continue each sequence of `tokens`, and yield one token per sequence at each step.

    The net reads a window of the latest tokens. When the window exceeds `net.context_length`, only its last half
    (context_length // 2 tokens, at least one) remains, is computed again, and grows again; so most tokens cost one
    position. The rule is the same with and without a cache, and for a prompt that is too long.

    The net is in eval mode until the iterator is exhausted or closed; then the mode of each module is restored.

    Args:
        net: maps ids [B, T] to logits [B, T, V]. `context_length` (tokens) limits the window if the net has it, and
            `vocab_size` the prompt's ids. Without the methods of `SupportsCache`, every step reads the whole window.
        tokens: the prompts [B, T], int64, on the net's device.
        sampling: number of steps, temperature, top-k and top-p.
        stop_tokens: a sequence ends with any of these, and repeats it until all have ended.
        seed: of the random generator of this call; None: a different one in each call.
        keys: of the sequences [B] (`stateless_rng.sample_keys`), instead of a seed: the draws of a sequence then depend
            neither on the other sequences nor on the device.
        use_cache: use a key-value cache, if the net has one.

    Returns:
        An iterator of ids [B], int64.

    Raises:
        ValueError: at the call, not at the first token, for tokens of another shape or out of range.
    """
    if tokens.ndim != 2 or tokens.numel() == 0:
        raise ValueError(f"tokens have shape {list(tokens.shape)}, but need [batch, tokens], at least one of each")
    vocab_size = getattr(net, "vocab_size", None)
    if vocab_size is not None and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
        raise ValueError(
            f"token ids go from {int(tokens.min())} to {int(tokens.max())}, outside the vocabulary of {vocab_size}; "
            "was the prompt encoded with the tokenizer of the training data?"
        )
    draw = _by_seed(seed, tokens.device) if keys is None else partial(draw_by_keys, keys)
    cache = net.new_cache(len(tokens)) if use_cache and isinstance(net, SupportsCache) else None
    return _generate(net, cache, tokens, sampling, frozenset(stop_tokens), draw)


def _generate(
    net: nn.Module, cache: Any, window: Tensor, sampling: Sampling, stop_tokens: frozenset[int], draw: Draw
) -> Iterator[Tensor]:
    context_length = getattr(net, "context_length", None)
    stops = torch.tensor(sorted(stop_tokens), dtype=torch.int64, device=window.device)
    last: Tensor | None = None
    with _eval_mode(net):
        for step in range(sampling.max_new_tokens):
            if context_length is not None and window.shape[1] > context_length:
                window = window[:, -max(1, context_length // 2) :]
                if cache is not None:
                    cache.clear()
            with torch.inference_mode():
                logits = _next_logits(net, window, cache)  # [B, V]
                token = sampling.choose(logits, draw, step)  # [B]
            # A tensor made in inference mode cannot be used in training; its copy, made outside, can.
            token = token.clone()
            if last is not None and len(stops):
                token = torch.where(torch.isin(last, stops), last, token)
            yield token
            if len(stops) and bool(torch.isin(token, stops).all()):
                return
            last = token
            window = torch.cat((window, token[:, None]), dim=1)  # [B, T] -> [B, T + 1]


@contextmanager
def _eval_mode(net: nn.Module) -> Iterator[None]:
    """Set eval mode, and restore the mode of each module afterwards: frozen modules may have been in eval mode before."""
    training = [module for module in net.modules() if module.training]
    net.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _next_logits(net: nn.Module, window: Tensor, cache: Any) -> Tensor:
    """Return the logits [B, V] of the token after the window [B, T]; the cache holds the beginning of the window."""
    if not isinstance(net, SupportsCache):
        return net(window)[:, -1]
    features = net.features(window if cache is None else window[:, cache.length :], cache)
    return net.logits(features[:, -1:])[:, 0]  # [B, 1, V] -> [B, V]


def _by_seed(seed: int | None, device: torch.device) -> Draw:
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return lambda probabilities, step: torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)


def draw_by_keys(keys: Tensor, probabilities: Tensor, step: int) -> Tensor:
    """Draw ids [B]: the first whose cumulative probability exceeds a uniform number of the row's key and the step."""
    cumulative = accumulable(probabilities).cumsum(-1)
    # As many bits as the fraction of a float has: times the total, the largest number stays below the total.
    bits = 52 if cumulative.dtype == torch.float64 else 23
    numbers = random_bits(keys, step, 1) >> 64 - bits & (1 << bits) - 1  # [B, 1]
    uniform = numbers.to(cumulative.dtype) * 2.0**-bits  # in [0, 1)
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).squeeze(-1)  # [B, 1] -> [B]


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Return logits [B, V] with -inf below the k-th largest of each row; ties with the k-th largest are kept."""
    smallest_kept = logits.topk(min(k, logits.shape[-1]), dim=-1).values[:, -1:]  # [B, 1]
    return logits.masked_fill(logits < smallest_kept, float("-inf"))


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Return logits [B, V] with -inf except for the smallest set of most likely tokens whose sum reaches p."""
    if p >= 1:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # 0 for the most likely token, which is therefore always kept
    return logits.masked_fill((before >= p).scatter(-1, order, before >= p), float("-inf"))
