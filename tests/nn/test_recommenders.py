"""Each recommender against its paper's equations, written as loops over one sequence without padding, or a public model."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from bigmodel.nn import HSTU, BERT4Rec, ESASRec, GRU4Rec, MatrixFactorization, SASRec, TwoTower
from bigmodel.nn.hstu import time_buckets

NUM_ITEMS, MAX_LENGTH, WIDTH = 30, 12, 16
SIZES = {"num_items": NUM_ITEMS, "max_length": MAX_LENGTH, "width": WIDTH}
HISTORIES = [[5, 2, 9, 30, 2, 7, 1], [4, 4, 8], [17]]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@torch.no_grad()
def randomised(net: Any) -> Any:
    """In evaluation; also what starts at zero or one is drawn, so that nothing can be swapped or dropped unnoticed."""
    for parameter in net.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    net.embed.weight[0] = 0
    return net.eval()


def padded(histories: list[list[int]], width: int = 9) -> Tensor:
    return torch.tensor([[0] * (width - len(history)) + history for history in histories])


def norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    return (x - x.mean()) / (x.var(correction=0) + layer.eps).sqrt() * layer.weight + layer.bias


def attended(attention: Any, xs: list[Tensor], *, causal: bool) -> list[Tensor]:
    """softmax(q k' / sqrt(K)) v of each head, put side by side and mixed, position by position."""
    num_heads = attention.num_heads
    size = WIDTH // num_heads
    rows = attention.qkv.weight.view(num_heads, 3, size, WIDTH), attention.qkv.bias.view(num_heads, 3, size)
    outputs = []
    for i in range(len(xs)):
        heads = []
        for h in range(num_heads):
            (wq, wk, wv), (bq, bk, bv) = rows[0][h], rows[1][h]
            seen = range(i + 1) if causal else range(len(xs))
            scores = torch.stack([(wq @ xs[i] + bq) @ (wk @ xs[j] + bk) / math.sqrt(size) for j in seen])
            weights = scores.exp() / scores.exp().sum()
            heads.append(sum(w * (wv @ xs[j] + bv) for w, j in zip(weights, seen, strict=True)))
        outputs.append(attention.out.weight @ torch.cat(heads) + attention.out.bias)
    return outputs


def embedded(net: Any, history: list[int], scale: float) -> list[Tensor]:
    first = MAX_LENGTH - len(history)  # the last item has the last position
    return [scale * net.embed.weight[v] + net.embed_positions.weight[first + i] for i, v in enumerate(history)]


def branches(block: Any, xs: list[Tensor], *, causal: bool) -> list[Tensor]:
    if block.place == "pre":
        ys = attended(block.attention, [norm(block.attention_norm, x) for x in xs], causal=causal)
        xs = [x + y for x, y in zip(xs, ys, strict=True)]
        return [x + block.mlp(norm(block.mlp_norm, x)) for x in xs]
    ys = attended(block.attention, xs, causal=causal)
    xs = [norm(block.attention_norm, x + y) for x, y in zip(xs, ys, strict=True)]
    return [norm(block.mlp_norm, x + block.mlp(x)) for x in xs]


def assert_equal_to_loops(net: Any, by_loop: Any, atol: float = 1e-5, **inputs: Tensor) -> None:
    """Features of padded histories, and scores, equal those that `by_loop` makes of each history alone."""
    items = padded(HISTORIES)
    features, logits = net.features(items, **inputs), net(items, **inputs)
    for row, history in enumerate(HISTORIES):
        expected = torch.stack(by_loop(row, history))
        torch.testing.assert_close(features[row, -len(history) :], expected, atol=atol, rtol=1e-5)
        scores = torch.stack([net.embed.weight[i] @ expected[-1] for i in range(1, NUM_ITEMS + 1)])
        if net.item_bias is not None:
            scores = scores + net.item_bias[1:]
        torch.testing.assert_close(logits[row, -1, 1:], scores, atol=10 * atol, rtol=1e-5)


@pytest.mark.parametrize("place", ["pre", "post"])
@pytest.mark.parametrize("num_heads", [1, 2])
def test_sasrec_equals_its_equations(place: Any, num_heads: int) -> None:
    net = randomised(SASRec(**SIZES, num_heads=num_heads, norm=place))

    def by_loop(row: int, history: list[int]) -> list[Tensor]:
        xs = embedded(net, history, math.sqrt(WIDTH))
        for block in net.blocks:
            first, second = block.mlp[0], block.mlp[3]
            assert torch.equal(block.mlp(xs[0]), second((first.weight @ xs[0] + first.bias).clamp(min=0)))
            xs = branches(block, xs, causal=True)
        return [norm(net.norm, x) for x in xs] if place == "pre" else xs

    assert_equal_to_loops(net, by_loop)


def test_esasrec_equals_its_equations() -> None:
    net = randomised(ESASRec(**SIZES))

    def by_loop(row: int, history: list[int]) -> list[Tensor]:
        xs = embedded(net, history, math.sqrt(WIDTH))
        for block in net.blocks:
            ys = attended(block.attention, [norm(block.attention_norm, x) for x in xs], causal=True)
            for i, y in enumerate(ys):
                x = xs[i]
                x = x + y / (1 + (-(block.attention_gate.weight @ x + block.attention_gate.bias)).exp())
                n, mlp = norm(block.mlp_norm, x), block.mlp
                gate = mlp.gate.weight @ n
                y = mlp.down.weight @ (gate / (1 + (-gate).exp()) * (mlp.up.weight @ n))
                xs[i] = x + y / (1 + (-(block.mlp_gate.weight @ x + block.mlp_gate.bias)).exp())
        return [norm(net.norm, x) for x in xs]

    assert_equal_to_loops(net, by_loop)


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def test_bert4rec_equals_its_equations() -> None:
    net = randomised(BERT4Rec(**SIZES))

    def by_loop(row: int, history: list[int]) -> list[Tensor]:
        xs = [norm(net.embed_norm, x) for x in embedded(net, history, 1.0)]
        for block in net.blocks:
            up, down = block.mlp.up, block.mlp.down
            expected = down.weight @ gelu(up.weight @ xs[0] + up.bias) + down.bias
            torch.testing.assert_close(block.mlp(xs[0]), expected)
            xs = branches(block, xs, causal=False)
        return [gelu(net.head.weight @ x + net.head.bias) for x in xs]

    assert_equal_to_loops(net, by_loop)


def test_bert4rec_equals_transformers_bert() -> None:
    net = randomised(BERT4Rec(**SIZES))
    model = BertModel(
        BertConfig(
            vocab_size=NUM_ITEMS + 2, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, hidden_act="gelu",
            intermediate_size=4 * WIDTH, max_position_embeddings=MAX_LENGTH, type_vocab_size=1, layer_norm_eps=1e-5,
        ),
        add_pooling_layer=False,
    ).eval()  # fmt: skip
    state = {
        "embeddings.word_embeddings.weight": net.embed.weight,
        "embeddings.position_embeddings.weight": net.embed_positions.weight,
        "embeddings.token_type_embeddings.weight": torch.zeros(1, WIDTH),
        "embeddings.LayerNorm.weight": net.embed_norm.weight,
        "embeddings.LayerNorm.bias": net.embed_norm.bias,
    }
    for i, block in enumerate(net.blocks):
        for kind in ("weight", "bias"):
            fused = getattr(block.attention.qkv, kind).unflatten(0, (2, 3, -1))  # [H, 3, K, ...]
            parts = {name: fused[:, j].flatten(0, 1) for j, name in enumerate(("query", "key", "value"))}
            state |= {f"encoder.layer.{i}.attention.self.{name}.{kind}": part for name, part in parts.items()}
            for theirs, ours in {
                "attention.output.dense": block.attention.out,
                "attention.output.LayerNorm": block.attention_norm,
                "intermediate.dense": block.mlp.up,
                "output.dense": block.mlp.down,
                "output.LayerNorm": block.mlp_norm,
            }.items():
                state[f"encoder.layer.{i}.{theirs}.{kind}"] = getattr(ours, kind)
    model.load_state_dict(state)

    items = net.mask_last(padded(HISTORIES))
    assert items.shape == (3, 10)
    assert (items[:, -1] == net.mask_item).all()
    positions = torch.arange(MAX_LENGTH - 10, MAX_LENGTH).expand_as(items)
    hidden = model(items, attention_mask=(items != 0).long(), position_ids=positions).last_hidden_state
    expected = nn.functional.gelu(net.head(hidden))
    torch.testing.assert_close(net.features(items)[items != 0], expected[items != 0], atol=1e-5, rtol=1e-5)


def test_a_mask_takes_the_place_of_the_oldest_item_where_there_is_no_more() -> None:
    net = BERT4Rec(**SIZES)
    full = torch.arange(1, MAX_LENGTH + 1)[None]
    assert net.mask_last(full).tolist() == [[*range(2, MAX_LENGTH + 1), NUM_ITEMS + 1]]
    assert net.mask_last(full[:, :3]).tolist() == [[1, 2, 3, NUM_ITEMS + 1]]


@pytest.mark.parametrize("depth", [1, 3])
def test_gru4rec_equals_torchs_gru_without_padding(depth: int) -> None:
    net = randomised(GRU4Rec(**SIZES, hidden=24, depth=depth))
    gru = nn.GRU(WIDTH, 24, num_layers=depth)
    gru.load_state_dict(
        {
            f"{name[:-1]}{i}": value
            for i, block in enumerate(net.blocks)
            for name, value in block.gru.state_dict().items()
        }
    )

    def by_loop(row: int, history: list[int]) -> list[Tensor]:
        states, _ = gru(net.embed.weight[history])
        return [net.out.weight @ state + net.out.bias for state in states]

    assert_equal_to_loops(net, by_loop)


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def plain_norm(x: Tensor) -> Tensor:
    return (x - x.mean()) / (x.var(correction=0) + 1e-6).sqrt()


@pytest.mark.parametrize("num_buckets", [72, 30, 0])
def test_hstu_equals_its_equations(num_buckets: int) -> None:
    net = randomised(HSTU(**SIZES, num_time_buckets=num_buckets))
    times = 1_700_000_000 + torch.randint(1, 10**6, (3, 9)).cumsum(dim=1)
    times[:, -2] = times[:, -3]  # two at the same time

    def by_loop(row: int, history: list[int]) -> list[Tensor]:
        xs = [math.sqrt(WIDTH) * net.embed.weight[v] for v in history]
        when = times[row, -len(history) :].tolist()
        for block in net.blocks:
            u, v, q, k = (silu(torch.stack([w @ plain_norm(x) for x in xs])) for w in block.uvqk.weight.chunk(4))
            outputs = []
            for i, x in enumerate(xs):
                heads = []
                for h in range(2):
                    part = slice(8 * h, 8 * h + 8)
                    total = torch.zeros(8)
                    for j in range(i + 1):
                        score = q[i, part] @ k[j, part] + block.position_bias[i - j]
                        if num_buckets:
                            bucket = int(math.log(max(1, when[i] - when[j])) / 0.301)
                            score = score + block.time_bias[min(bucket, num_buckets - 1)]
                        total = total + silu(score) / MAX_LENGTH * v[j, part]
                    heads.append(total)
                outputs.append(x + block.out(plain_norm(torch.cat(heads)) * u[i]))
            xs = outputs
        return [(x - x.mean()) / (x.var(correction=0) + 1e-6).sqrt() * net.norm.weight + net.norm.bias for x in xs]

    assert_equal_to_loops(net, by_loop, times=times)


def test_buckets_of_time() -> None:
    seconds = [0, 1, 2, 60, 86_400, 61 * 365 * 86_400]
    start = 1_700_000_000
    expected = [0, 0, 2, 13, 37, 71]  # floor(ln(max(1, seconds)) / 0.301)
    assert time_buckets(start + torch.tensor([seconds]), 100)[0, 0].tolist() == expected
    assert time_buckets(start + torch.tensor([seconds]), 100)[0, :, 0].tolist() == expected
    assert time_buckets(start + torch.tensor([seconds]), 20)[0, 0].tolist() == [min(b, 19) for b in expected]


def test_gradients_of_the_buckets_of_time_and_distance() -> None:
    net = randomised(HSTU(NUM_ITEMS, 6, width=4, depth=1, num_time_buckets=8)).double()
    items, times = torch.tensor([[0, 3, 4, 3], [1, 2, 9, 30]]), torch.tensor([[0, 50, 50, 53], [0, 1, 4, 9]])
    (block,) = net.blocks

    def features(time_bias: Tensor, position_bias: Tensor) -> Tensor:
        biases = {"blocks.0.time_bias": time_bias, "blocks.0.position_bias": position_bias}
        forward = torch.func.functional_call(net, biases, (items, times))
        return forward[items != 0]

    assert torch.autograd.gradcheck(features, (block.time_bias, block.position_bias))
    features(block.time_bias, block.position_bias).square().sum().backward()
    # Differences of 0, 1, 3, 4, 5, 8, 9: nothing lies 2 seconds apart, nor more than 3 positions.
    assert block.time_bias.grad.nonzero().flatten().tolist() == [0, 3, 4, 5, 6, 7]
    assert block.position_bias.grad.nonzero().flatten().tolist() == [0, 1, 2, 3]


def test_hstu_asks_for_the_times_of_all_items() -> None:
    net = HSTU(**SIZES)
    with pytest.raises(ValueError, match="got none; give them, or train"):
        net(padded(HISTORIES))
    with pytest.raises(ValueError, match=r"times have shape \[3, 8\], but items have \[3, 9\]"):
        net(padded(HISTORIES), torch.zeros(3, 8, dtype=torch.long))


@pytest.mark.parametrize(("depth", "decay"), [(0, 1.0), (2, 0.7)])
def test_two_towers_score_by_cosine(depth: int, decay: float) -> None:
    net = randomised(TwoTower(**SIZES, depth=depth, recency_decay=decay))
    items = padded(HISTORIES)
    features, logits = net.features(items), net(items)

    def tower(layers: Any, x: Tensor) -> Tensor:
        for layer in layers:
            x = x + (layer.weight @ x + layer.bias).clamp(min=0)
        return x / x.square().sum().sqrt()

    for row, history in enumerate(HISTORIES):
        for t in range(len(history)):
            weights = [decay ** (t - j) for j in range(t + 1)]
            mean = sum(w * net.embed.weight[v] for w, v in zip(weights, history, strict=False)) / sum(weights)
            user = tower(net.user_tower.layers, mean)
            place = t - len(history)
            torch.testing.assert_close(features[row, place] / net.log_scale.exp(), user, atol=1e-5, rtol=1e-5)
            vectors = [tower(net.item_tower.layers, net.embed.weight[i]) for i in range(1, NUM_ITEMS + 1)]
            cosines = torch.stack([user @ vector for vector in vectors])
            torch.testing.assert_close(logits[row, place, 1:], cosines * net.log_scale.exp(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
def test_matrix_factorization_is_a_product(bias: bool) -> None:
    net = randomised(MatrixFactorization(num_users=4, num_items=NUM_ITEMS, width=WIDTH, bias=bias))
    users = torch.tensor([3, 0, 3])
    scores = net(users)
    for b, user in enumerate(users.tolist()):
        for item in range(1, NUM_ITEMS + 1):
            expected = sum(net.embed_users.weight[user] * net.embed.weight[item])
            if bias:
                expected = expected + net.item_bias[item]
            torch.testing.assert_close(scores[b, item], expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="from 1 to 4, but this net has vectors for 0 to 3 only"):
        net(torch.tensor([1, 4]))
