"""Generating tokens one by one: greedy or sampled, with or without a cache of keys and values.

Sources: top-k, Fan et al. 2018 (arXiv 1805.04833); top-p, Holtzman et al. 2019 (arXiv 1904.09751).

B batch, T tokens, V vocabulary.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from bigmodel.data.stateless_rng import random_bits
from bigmodel.nn.accumulation import accumulable

Draw = Callable[[Tensor, int], Tensor]  # from probabilities [B, V], in the step of this number: ids [B]


@runtime_checkable
class Caches(Protocol):
    """A net that continues from a cache, which has a `length` in tokens and can `clear()`: `bigmodel.nn.GPT` is one."""

    def new_cache(self, batch_size: int) -> Any: ...

    def features(self, tokens: Tensor, cache: Any = None) -> Tensor:
        """[B, T] -> [B, T, D], adding the tokens to the cache."""

    def logits(self, features: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, V]."""


def generate(
    net: nn.Module,
    tokens: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: Collection[int] = (),
    seed: int | None = None,
    keys: Tensor | None = None,
    use_cache: bool = True,
) -> Iterator[Tensor]:
    """Continue each sequence of `tokens`, yielding one token per sequence as soon as it is known.

    The net reads a window of the latest tokens. Whenever this outgrows `net.context_length`, its last half
    (context_length // 2 tokens, at least one) is kept, read anew, and grows again; so the cost stays that of one
    position for most tokens. The rule is the same with and without a cache, and for a prompt that is too long.

    The net is in eval mode until the iterator is exhausted or closed; then each module gets its own mode back.

    Args:
        net: maps ids [B, T] to logits [B, T, V]. `context_length` (tokens) limits the window if the net has it, and
            `vocab_size` the prompt's ids. Without the methods of `Caches`, every step reads the whole window.
        tokens: the prompts [B, T], int64, on the net's device.
        max_new_tokens: at most so many steps.
        temperature: divides the logits; 0 takes the likeliest token, and the first of equals.
        top_k: sample among the k likeliest tokens (and those equal to the last of them).
        top_p: sample among the fewest likeliest tokens whose probabilities reach this sum, after top_k.
        stop_tokens: a sequence ends with any of these, and repeats it until all have ended.
        seed: of this call's own random generator; None for one that differs from call to call.
        keys: of the sequences [B] (`stateless_rng.sample_keys`), in place of a seed: what is drawn for each depends
            neither on the others nor on the device.
        use_cache: keep keys and values, if the net can.

    Returns:
        An iterator of ids [B], int64.

    Raises:
        ValueError: at the call, not at the first token, for arguments out of range.
    """
    if tokens.ndim != 2 or tokens.numel() == 0:
        raise ValueError(f"tokens have shape {list(tokens.shape)}, but need [batch, tokens], at least one of each")
    vocab_size = getattr(net, "vocab_size", None)
    if vocab_size is not None and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
        raise ValueError(
            f"token ids go from {int(tokens.min())} to {int(tokens.max())}, outside the vocabulary of {vocab_size}; "
            "was the prompt encoded with the tokenizer of the training data?"
        )
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, but must be at least 1; choose --max_new_tokens")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}, but must be 0 (greedy) or above; choose --temperature")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}, but must be at least 1, or null for all tokens; choose --top_k")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}, but must be in (0, 1], or null for all tokens; choose --top_p")

    draw = _by_seed(seed, tokens.device) if keys is None else partial(draw_by_keys, keys)
    cache = net.new_cache(len(tokens)) if use_cache and isinstance(net, Caches) else None
    return _generate(net, cache, tokens, max_new_tokens, temperature, top_k, top_p, frozenset(stop_tokens), draw)


def _generate(
    net: nn.Module,
    cache: Any,
    window: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    stop_tokens: frozenset[int],
    draw: Draw,
) -> Iterator[Tensor]:
    context_length = getattr(net, "context_length", None)
    stops = torch.tensor(sorted(stop_tokens), dtype=torch.int64, device=window.device)
    last: Tensor | None = None
    with _evaluating(net):
        for step in range(max_new_tokens):
            if context_length is not None and window.shape[1] > context_length:
                window = window[:, -max(1, context_length // 2) :]
                if cache is not None:
                    cache.clear()
            with torch.inference_mode():
                logits = _next_logits(net, window, cache)  # [B, V]
                token = _choose(logits, temperature, top_k, top_p, draw, step)  # [B]
            # A tensor made in inference mode could not be trained on; its copy, made outside, can.
            token = token.clone()
            if last is not None and len(stops):
                token = torch.where(torch.isin(last, stops), last, token)
            yield token
            if len(stops) and bool(torch.isin(token, stops).all()):
                return
            last = token
            window = torch.cat((window, token[:, None]), dim=1)  # [B, T] -> [B, T + 1]


@contextmanager
def _evaluating(net: nn.Module) -> Iterator[None]:
    """Eval mode, and afterwards the mode that each module had: a frozen part may have been in eval mode before."""
    training = [module for module in net.modules() if module.training]
    net.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _next_logits(net: nn.Module, window: Tensor, cache: Any) -> Tensor:
    """Logits [B, V] of the token after the window [B, T], of which the cache holds a beginning."""
    if not isinstance(net, Caches):
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
    """Ids [B]: where the cumulative probabilities of each row [V] pass a number that its key and the step give."""
    cumulative = accumulable(probabilities).cumsum(-1)
    # As many bits as follow the leading one: times the sum of all, the largest number stays below that sum.
    bits = 52 if cumulative.dtype == torch.float64 else 23
    uniform = (random_bits(keys, step, 1) >> 64 - bits & (1 << bits) - 1).to(
        cumulative.dtype
    ) * 2.0**-bits  # [B, 1], in [0, 1)
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).squeeze(-1)  # [B, 1] -> [B]


def _choose(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, draw: Draw, step: int
) -> Tensor:
    """One token id per row of logits [B, V]: [B]."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature  # largest at 0: no temperature overflows
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    if top_p is not None:
        logits = keep_top_p(logits, top_p)
    return draw(logits.softmax(dim=-1), step)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Logits [B, V] with -inf below each row's k-th largest; what equals the k-th largest stays."""
    smallest_kept = logits.topk(min(k, logits.shape[-1]), dim=-1).values[:, -1:]  # [B, 1]
    return logits.masked_fill(logits < smallest_kept, float("-inf"))


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Logits [B, V] with -inf but for the fewest likeliest tokens whose probabilities sum to at least p."""
    if p >= 1:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # the likeliest has 0 before it, and always stays
    return logits.masked_fill((before >= p).scatter(-1, order, before >= p), float("-inf"))
