"""What all nets over sequences of items must hold: causality, padding that changes nothing, the row that stays zero."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigmodel.nn import HSTU, BERT4Rec, ESASRec, GRU4Rec, MatrixFactorization, SASRec, TwoTower
from bigmodel.nn.sequences import ItemScorer, attention_mask, masked_attention

NUM_ITEMS, MAX_LENGTH = 30, 12

LOOKS_BACK: dict[str, Any] = {
    "SASRec": (SASRec, {"num_heads": 2}),
    "SASRec explicit": (SASRec, {"attention": "explicit"}),
    "SASRec post": (SASRec, {"norm": "post"}),
    "ESASRec": (ESASRec, {}),
    "GRU4Rec": (GRU4Rec, {"depth": 2, "hidden": 24}),
    "HSTU": (HSTU, {}),
    "HSTU without times": (HSTU, {"num_time_buckets": 0}),
    "TwoTower": (TwoTower, {"recency_decay": 0.5}),
}
ALL = LOOKS_BACK | {"BERT4Rec": (BERT4Rec, {}), "BERT4Rec explicit": (BERT4Rec, {"attention": "explicit"})}
looks_back = pytest.mark.parametrize("name", LOOKS_BACK)
every_net = pytest.mark.parametrize("name", ALL)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def small(name: str, **options: Any) -> Any:
    net, own = ALL[name]
    return net(NUM_ITEMS, MAX_LENGTH, **{"width": 16, "init_std": 0.2} | own | options)


def histories(*lengths: int, width: int = MAX_LENGTH) -> tuple[Tensor, Tensor]:
    """Items and times [B, width] of sequences of these lengths, padded at the left; padding's times are arbitrary."""
    items = torch.randint(1, NUM_ITEMS + 1, (len(lengths), width))
    for row, length in zip(items, lengths, strict=True):
        row[: width - length] = 0
    times = 1_700_000_000 + torch.randint(1, 10**6, items.shape).cumsum(dim=1)
    return items, torch.where(items == 0, torch.randint(0, 10**12, items.shape), times)


@looks_back
def test_an_item_changes_nothing_before_it(name: str) -> None:
    net = small(name).eval()
    items, times = histories(12, 9)
    changed, later = items.clone(), times.clone()
    changed[:, 6] = changed[:, 6] % NUM_ITEMS + 1
    later[:, 6] += 5000
    before, after = net(items, times), net(changed, later)
    earlier = (items != 0)[:, :6]
    assert torch.equal(before[:, :6][earlier], after[:, :6][earlier])
    assert (before[:, 6:] != after[:, 6:]).any(dim=-1).all()


def test_bert4rec_sees_both_sides_of_a_mask() -> None:
    net = small("BERT4Rec").eval()
    items, _ = histories(12, 9)
    items[:, 6] = net.mask_item
    for t in (5, 7):
        changed = items.clone()
        changed[:, t] = changed[:, t] % NUM_ITEMS + 1
        assert (net(items)[:, 6] != net(changed)[:, 6]).any(dim=-1).all()


@every_net
def test_padding_is_never_attended_to(name: str) -> None:
    net = small(name).eval()
    items, times = histories(8, 5)
    clean = net.features(items, times)
    with torch.no_grad():
        net.embed.weight[0] = 1e3
        if hasattr(net, "embed_positions"):
            net.embed_positions.weight[:4] = -1e3  # those of padding in both sequences
    times[items == 0] = 7
    poisoned = net.features(items, times)
    assert torch.equal(clean[items != 0], poisoned[items != 0])


@every_net
def test_more_padding_changes_no_score(name: str) -> None:
    net = small(name).eval()
    items, times = histories(7, 3, 1, width=7)
    padded = F.pad(items, (5, 0)), F.pad(times, (5, 0), value=1)
    torch.testing.assert_close(net(*padded)[:, 5:][items != 0], net(items, times)[items != 0], rtol=0, atol=2e-6)


@every_net
def test_an_empty_history_is_finite_and_so_are_its_gradients(name: str) -> None:
    net = small(name)
    items, times = histories(12, 1, 0)
    net(items, times).square().sum().backward()
    assert net.features(items, times).isfinite().all()
    for key, parameter in net.named_parameters():
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.any(), key


@pytest.mark.parametrize("name", [*ALL, "MatrixFactorization"])
def test_the_row_of_padding_stays_zero(name: str) -> None:
    net = MatrixFactorization(8, NUM_ITEMS, width=16) if name == "MatrixFactorization" else small(name)
    inputs = (torch.arange(8),) if name == "MatrixFactorization" else histories(12, 4)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        features = net.features(*inputs)
        sampled = (features * net.item_vectors(torch.zeros(features.shape[:-1], dtype=torch.long))).sum()
        (net.logits(features).logsumexp(dim=-1).sum() + sampled).backward()  # a loss that does not leave padding out
        optimizer.step()
    for parameter in [net.embed.weight] + ([] if net.item_bias is None else [net.item_bias]):
        assert not parameter[0].any()
        assert not parameter.grad[0].any()
        assert parameter.grad[1:].any()
    assert net.item_vectors().shape == (NUM_ITEMS + 1, 16)


@every_net
def test_scores_are_products_with_item_vectors(name: str) -> None:
    net = small(name).eval()
    items, times = histories(12, 4)
    features, candidates = net.features(items, times), torch.tensor([3, 0, 30])
    if net.item_bias is not None:
        nn.init.normal_(net.item_bias)
    expected = torch.einsum("btd,nd->btn", features, net.item_vectors(candidates))
    if net.item_bias is not None:
        expected = expected + net.item_bias[candidates]
    torch.testing.assert_close(net(items, times)[..., candidates], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(net.item_vectors()[candidates], net.item_vectors(candidates), rtol=0, atol=1e-6)


@every_net
def test_dropout_is_torchs_own_and_acts_in_training_only(name: str) -> None:
    net = small(name, dropout=0.3)
    inputs = histories(12, 9)
    first = net(*inputs)
    state = torch.get_rng_state()
    second = net(*inputs)
    torch.set_rng_state(state)
    assert torch.equal(net(*inputs), second)
    assert not torch.equal(first, second)
    net.eval()
    assert torch.equal(net(*inputs), net(*inputs))


@every_net
def test_learns_what_follows(name: str) -> None:
    net = small(name, init_std=0.05, dropout=0.0)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.02)
    starts, steps = torch.randint(NUM_ITEMS, (32, 1)), torch.arange(MAX_LENGTH)
    items = (starts + 7 * steps) % NUM_ITEMS + 1  # each item has one successor
    items[:16, :6] = 0
    inputs, target = items[:, :-1], items[:, -1]
    times = 100 * steps[:-1].expand_as(inputs)
    for _ in range(100):
        logits = net(net.mask_last(inputs)) if "BERT" in name else net(inputs, times)
        loss = F.cross_entropy(logits[:, -1, 1:], target - 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


@every_net
def test_bfloat16_is_near(name: str) -> None:
    net = small(name).eval()
    items, times = histories(12, 5, 0)
    exact = net.features(items, times)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = net.features(items, times)
    assert rounded.isfinite().all()
    assert (rounded - exact)[items != 0].abs().mean() < 0.03 * exact[items != 0].abs().mean()


@every_net
def test_a_net_made_without_memory_becomes_a_real_one(name: str) -> None:
    with torch.device("meta"):
        net = small(name)
    assert not list(net.buffers())
    net.to_empty(device="cpu")
    real = small(name)
    for each in (net, real):
        torch.manual_seed(3)
        each.reset_parameters()
    for (key, parameter), other in zip(net.named_parameters(), real.parameters(), strict=True):
        assert torch.equal(parameter, other), key
    assert not net.embed.weight[0].any()
    assert net.embed.weight[1:].std().item() == pytest.approx(0.2, rel=0.1)


@pytest.mark.parametrize("causal", [True, False])
def test_attention_equals_a_loop_in_value_and_gradient(causal: bool) -> None:
    query, key, value = (torch.randn(2, 3, 7, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    direction = torch.randn_like(query)
    items = torch.tensor([[0, 0, 0, 5, 1, 2, 2], [1] * 7])
    expected = torch.zeros_like(query)
    for b in range(2):
        for t in range(7):
            seen = [s for s in range(t + 1 if causal else 7) if items[b, s]] if items[b, t] else [t]
            if not items[b, t] and not causal:
                seen = [s for s in range(7) if items[b, s]] + [t]
            for h in range(3):
                weights = (key[b, h, seen] @ query[b, h, t] / 2).softmax(dim=-1)
                expected[b, h, t] = weights @ value[b, h, seen]
    gradients = torch.autograd.grad(expected, (query, key, value), direction)
    mask = attention_mask(items, causal=causal)
    for kind in ("sdpa", "explicit", "auto"):
        output = masked_attention(query, key, value, mask, kind=kind)
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(torch.autograd.grad(output, (query, key, value), direction), gradients)


@pytest.mark.parametrize(
    ("dtype", "length", "dropout", "fused"),
    [
        (torch.float32, 50, 0.0, True),
        (torch.float32, 50, 0.1, False),
        (torch.float32, 513, 0.1, True),
        (torch.bfloat16, 50, 0.0, False),
    ],
)
def test_auto_takes_the_form_measured_faster(
    dtype: torch.dtype, length: int, dropout: float, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[bool] = []
    kernel = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args: (calls.append(True), kernel(*args))[1])
    x = torch.randn(1, 1, length, 8, dtype=dtype)
    masked_attention(x, x, x, attention_mask(torch.ones(1, length), causal=True), dropout=dropout)
    assert bool(calls) == fused


@every_net
def test_inputs_that_do_not_fit_are_refused(name: str) -> None:
    net = small(name)
    times = torch.zeros(1, 1, dtype=torch.long)
    with pytest.raises(ValueError, match=r"13 items do not fit into the net's max_length 12; .* --data.max_length"):
        net(*histories(13, width=13))
    with pytest.raises(ValueError, match=r"from 32 to 32, but must be in 1 to 30, or 0 for padding"):
        net(torch.tensor([[NUM_ITEMS + 2]]), times)
    for wrong in (torch.tensor([1, 2]), torch.ones(2, 0, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"must be \[sequences, positions\]"):
            net(wrong, times)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("SASRec", {"width": 10, "num_heads": 3}, "width 10 is not divisible by num_heads 3; choose --model.net.width"),
        ("BERT4Rec", {"width": 10, "num_heads": 3}, "width 10 is not divisible by num_heads 3"),
        ("SASRec", {"depth": 0}, "depth is 0.*--model.net.depth"),
        ("SASRec", {"norm": "none"}, "norm 'none' is none of pre, post"),
        ("ESASRec", {"attention": "flash"}, "auto, sdpa, explicit"),
        ("GRU4Rec", {"hidden": 0}, "hidden is 0"),
        ("HSTU", {"num_time_buckets": -1}, "num_time_buckets is -1"),
        ("HSTU", {"dropout": 1.0}, "dropout 1.0 is not in"),
        ("TwoTower", {"depth": -1}, "depth is -1"),
        ("TwoTower", {"recency_decay": 0.0}, "recency_decay is 0.0, but must be above 0"),
        ("TwoTower", {"temperature": 0.0}, "temperature is 0.0"),
    ],
)
def test_what_does_not_fit_together_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(name, **options)
    with pytest.raises(ValueError, match="num_items is 0"):
        ItemScorer(0, 8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_net
def test_on_a_gpu_as_on_a_cpu(name: str) -> None:
    net = small(name).eval()
    items, times = histories(12, 5, 1)
    expected = net(items, times)
    scores = net.cuda()(items.cuda(), times.cuda()).cpu()
    torch.testing.assert_close(scores[items != 0], expected[items != 0], atol=1e-3, rtol=1e-3)
