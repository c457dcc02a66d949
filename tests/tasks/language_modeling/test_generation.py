"""Generation against brute force: the filters, the frequencies, the cache, the sliding window, the stops."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bigmodel.data.stateless_rng import sample_keys
from bigmodel.nn import GPT
from bigmodel.tasks.language_modeling.generation import Sampling, draw_by_keys, generate, keep_top_k, keep_top_p

V, C = 20, 16


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def small(**options: Any) -> GPT:
    return GPT(V, C, **{"width": 32, "depth": 2, "num_heads": 4, "init_std": 0.3, "tied_head": False} | options)


def start(net: nn.Module, tokens: Tensor, **options: Any) -> Iterator[Tensor]:
    sampling = {key: options.pop(key) for key in ("max_new_tokens", "temperature", "top_k", "top_p") if key in options}
    return generate(net, tokens, Sampling(**sampling), **options)


def run(net: nn.Module, tokens: Tensor, **options: Any) -> Tensor:
    """All new tokens, [B, steps]."""
    return torch.stack(list(start(net, tokens, **options)), dim=1)


class Constant(nn.Module):
    """The same logits [V] after every token; offers nothing but `forward`."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.table = logits

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table.expand(*tokens.shape, -1)


class CountsUp(nn.Module):
    """Always the next integer, modulo V; remembers the longest window that it was given."""

    longest = 0

    def forward(self, tokens: Tensor) -> Tensor:
        self.longest = max(self.longest, tokens.shape[1])
        return nn.functional.one_hot((tokens + 1) % V, V).float()


def greedy_by_hand(net: GPT, tokens: Tensor, steps: int) -> Tensor:
    window, chosen = tokens, []
    for _ in range(steps):
        if window.shape[1] > C:
            window = window[:, -C // 2 :]
        chosen.append(net(window)[:, -1].argmax(-1))
        window = torch.cat((window, chosen[-1][:, None]), dim=1)
    return torch.stack(chosen, dim=1)


@pytest.mark.parametrize(
    "options", [{}, {"positions": "rotary", "norm": "rms", "activation": "swiglu", "num_kv_heads": 2}]
)
@pytest.mark.parametrize("prompt_length", [1, 5, C, C + 9])
def test_greedy_is_the_same_with_and_without_cache_beyond_the_context(
    options: dict[str, Any], prompt_length: int
) -> None:
    net = small(**options)
    tokens = torch.randint(V, (3, prompt_length))
    expected = greedy_by_hand(net, tokens, 3 * C)
    assert len(expected.unique()) > 4  # not stuck on a single token, which would prove little
    for use_cache in (True, False):
        assert torch.equal(run(net, tokens, max_new_tokens=3 * C, temperature=0, use_cache=use_cache), expected)


def test_sampling_with_a_seed_is_the_same_with_and_without_cache() -> None:
    net, tokens = small(), torch.randint(V, (2, 3))
    options: dict[str, Any] = {"max_new_tokens": 30, "temperature": 0.8, "top_k": 10, "top_p": 0.9}
    first = run(net, tokens, seed=1, **options)
    assert torch.equal(first, run(net, tokens, seed=1, **options))
    assert torch.equal(first, run(net, tokens, seed=1, use_cache=False, **options))
    assert not torch.equal(first, run(net, tokens, seed=2, **options))
    assert not torch.equal(run(net, tokens, **options), run(net, tokens, **options))


def test_a_net_with_forward_only() -> None:
    net = CountsUp()
    tokens = torch.tensor([[3, 4], [17, 18]])
    assert run(net, tokens, max_new_tokens=3, temperature=0).tolist() == [[5, 6, 7], [19, 0, 1]]
    assert net.longest == 4
    net.context_length = 3  # type: ignore[assignment]
    net.longest = 0
    assert run(net, tokens, max_new_tokens=9, temperature=0)[0].tolist() == list(range(5, 14))
    assert net.longest == 3


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampled_frequencies_are_the_probabilities(temperature: float) -> None:
    logits, n = torch.randn(V), 40_000
    chosen = run(
        Constant(logits), torch.zeros(n, 1, dtype=torch.int64), max_new_tokens=1, temperature=temperature, seed=0
    )
    p = (logits / temperature).softmax(-1)
    z = (chosen.flatten().bincount(minlength=V) - n * p) / (n * p * (1 - p)).sqrt()
    assert z.abs().max() < 4


def test_filtered_frequencies() -> None:
    p, n = torch.tensor([0.4, 0.3, 0.2, 0.1]), 40_000
    tokens = torch.zeros(n, 1, dtype=torch.int64)
    for options, expected in (
        ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_p": 0.75}, [4 / 9, 3 / 9, 2 / 9, 0]),
        ({"top_k": 3, "top_p": 0.5}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_k": 1}, [1, 0, 0, 0]),
        ({"top_p": 0.01}, [1, 0, 0, 0]),
    ):
        chosen = run(Constant(p.log()), tokens, max_new_tokens=1, seed=0, **options)
        frequencies = chosen.flatten().bincount(minlength=4) / n
        torch.testing.assert_close(frequencies, torch.tensor(expected, dtype=torch.float32), atol=0.01, rtol=0)


def test_a_vanishing_temperature_is_greedy() -> None:
    logits = torch.randn(V)
    assert (
        run(Constant(logits), torch.zeros(1, 1, dtype=torch.int64), max_new_tokens=5, temperature=1e-40)
        .eq(logits.argmax())
        .all()
    )


def test_what_is_drawn_by_keys_depends_on_neither_the_others_nor_the_order() -> None:
    net, tokens, keys = small(), torch.randint(V, (6, 3)), sample_keys(1, 2, torch.arange(6))
    options: dict[str, Any] = {"max_new_tokens": 2 * C, "top_k": 15}
    whole = run(net, tokens, keys=keys, **options)
    for rows in ([4], [5, 0, 2]):
        assert torch.equal(run(net, tokens[rows], keys=keys[rows], **options), whole[rows])
    assert len({tuple(row) for row in run(net, tokens[:1].expand(6, -1), keys=keys, **options).tolist()}) == 6


def test_frequencies_of_what_is_drawn_by_keys() -> None:
    """Over sequences and over steps; what has no probability is never drawn."""
    p = torch.tensor([0.0, 0.4, 0.0, 0.3, 0.2999, 0.0001, 0.0])
    for rows, steps in ((40_000, 1), (4, 10_000)):
        keys, n = sample_keys(0, 0, torch.arange(rows)), rows * steps
        chosen = torch.stack([draw_by_keys(keys, p.expand(rows, -1), step) for step in range(steps)])
        counts = chosen.flatten().bincount(minlength=len(p))
        assert (counts[p == 0] == 0).all()
        z = (counts - n * p)[p > 0] / (n * p * (1 - p)).sqrt()[p > 0]
        assert z.abs().max() < 4


def kept(filtered: Tensor) -> list[set[int]]:
    return [set(row.isfinite().nonzero().flatten().tolist()) for row in filtered]


@pytest.mark.parametrize("k", [1, 2, 7, V, V + 5])
def test_top_k_equals_its_definition(k: int) -> None:
    logits = torch.randn(50, V, dtype=torch.float64)
    expected = [set(sorted(range(V), key=lambda i: -row[i])[:k]) for row in logits.tolist()]
    filtered = keep_top_k(logits, k)
    assert kept(filtered) == expected
    assert torch.equal(filtered[filtered.isfinite()], logits[filtered.isfinite()])


def test_top_k_keeps_what_equals_the_last_kept() -> None:
    assert kept(keep_top_k(torch.tensor([[1.0, 3.0, 2.0, 2.0]]), 2)) == [{1, 2, 3}]


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 1.0])
def test_top_p_equals_its_definition(p: float) -> None:
    logits = 2 * torch.randn(50, V, dtype=torch.float64)
    expected = []
    for row in logits.softmax(-1).tolist():
        nucleus: set[int] = set()
        for i in sorted(range(V), key=lambda i: -row[i]):
            if sum(row[j] for j in nucleus) >= p:
                break
            nucleus.add(i)
        expected.append(nucleus if p < 1 else set(range(V)))
    assert kept(keep_top_p(logits, p)) == expected


def test_top_p_stops_where_the_sum_is_reached_exactly_and_takes_the_first_of_equals() -> None:
    assert kept(keep_top_p(torch.zeros(1, 4), 0.5)) == [{0, 1}]


def test_finished_sequences_repeat_their_stop_until_all_have_stopped() -> None:
    tokens = torch.tensor([[1], [4], [2]])
    assert run(CountsUp(), tokens, max_new_tokens=50, temperature=0, stop_tokens={5, 7}).tolist() == [
        [2, 3, 4, 5],
        [5, 5, 5, 5],
        [3, 4, 5, 5],
    ]
    assert run(CountsUp(), tokens, max_new_tokens=2, temperature=0, stop_tokens={5}).shape == (3, 2)


def test_modes_and_random_state_are_restored_and_tokens_may_be_trained_on() -> None:
    net = small(dropout=0.5)
    net.blocks[0].eval()
    modes = [module.training for module in net.modules()]
    state = torch.get_rng_state()
    steps = generate(net, torch.zeros(1, 1, dtype=torch.int64), Sampling(5))
    token = next(steps)
    assert not any(module.training for module in net.modules())
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    steps.close()  # type: ignore[attr-defined]
    assert [module.training for module in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    net(token[:, None]).sum().backward()
    assert net.embed.weight.grad is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"tokens": torch.zeros(1, 0, dtype=torch.int64)}, r"shape \[1, 0\]"),
        ({"tokens": torch.zeros(4, dtype=torch.int64)}, r"shape \[4\]"),
        ({"tokens": torch.tensor([[0, V]])}, "from 0 to 20, outside the vocabulary of 20"),
        ({"tokens": torch.tensor([[-1, 0]])}, "from -1 to 0"),
    ],
)
def test_bad_arguments_are_refused_at_the_call(options: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"tokens": torch.zeros(1, 1, dtype=torch.int64), "max_new_tokens": 5} | options
    with pytest.raises(ValueError, match=message):
        start(small(), arguments.pop("tokens"), **arguments)


def test_the_cache_spares_all_but_the_new_position() -> None:
    net = small()
    read: list[int] = []
    net.norm.register_forward_hook(lambda module, args, output: read.append(output.shape[1]))
    tokens = torch.zeros(1, 5, dtype=torch.int64)
    run(net, tokens, max_new_tokens=20)
    assert read == [5] + 11 * [1] + [C // 2] + 7 * [1]
    read.clear()
    run(net, tokens, max_new_tokens=20, use_cache=False)
    assert read == [*range(5, C + 1), *range(C // 2, C)]
