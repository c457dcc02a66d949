"""The transformer against the public models it covers, and the properties that any decoder must have."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from bigmodel.nn import GPT
from bigmodel.nn.transformer import Activation

V, C = 50, 32
LLAMA = {
    "norm": "rms", "positions": "rotary", "activation": "swiglu", "num_kv_heads": 2, "tied_head": False,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def small(**options: Any) -> GPT:
    return GPT(V, C, **{"width": 32, "depth": 2, "num_heads": 4, "init_std": 0.2} | options)


def ids(batch_size: int = 2, length: int = C) -> Tensor:
    return torch.randint(V, (batch_size, length))


def fuse(query: Tensor, key: Tensor, value: Tensor, num_kv_heads: int) -> Tensor:
    """Rows of three projections [H * K, ...], [G * K, ...], [G * K, ...] in the order of the fused one."""
    return torch.cat([x.unflatten(0, (num_kv_heads, -1)) for x in (query, key, value)], dim=1).flatten(0, 1)


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Also what starts at zero or one, so that nothing can be swapped or dropped unnoticed."""
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))


def copy_gpt2(net: GPT, model: GPT2LMHeadModel) -> None:
    source = model.state_dict()
    state = {
        "embed.weight": source["transformer.wte.weight"],
        "embed_positions.weight": source["transformer.wpe.weight"],
    }
    for kind in ("weight", "bias"):
        state[f"norm.{kind}"] = source[f"transformer.ln_f.{kind}"]
        for i in range(len(net.blocks)):
            old, new = f"transformer.h.{i}", f"blocks.{i}"
            state[f"{new}.attention_norm.{kind}"] = source[f"{old}.ln_1.{kind}"]
            state[f"{new}.mlp_norm.{kind}"] = source[f"{old}.ln_2.{kind}"]
            query, key, value = source[f"{old}.attn.c_attn.{kind}"].t().chunk(3)  # stored [D, 3 D]
            state[f"{new}.attention.qkv.{kind}"] = fuse(query, key, value, 4)
            state[f"{new}.attention.out.{kind}"] = source[f"{old}.attn.c_proj.{kind}"].t()
            state[f"{new}.mlp.up.{kind}"] = source[f"{old}.mlp.c_fc.{kind}"].t()
            state[f"{new}.mlp.down.{kind}"] = source[f"{old}.mlp.c_proj.{kind}"].t()
    net.load_state_dict(state)


def copy_llama(net: GPT, model: nn.Module) -> None:
    source = model.state_dict()
    state = {
        "embed.weight": source["model.embed_tokens.weight"],
        "norm.weight": source["model.norm.weight"],
        "head.weight": source["lm_head.weight"],
    }
    for i in range(len(net.blocks)):
        old, new = f"model.layers.{i}", f"blocks.{i}"
        state[f"{new}.attention_norm.weight"] = source[f"{old}.input_layernorm.weight"]
        state[f"{new}.mlp_norm.weight"] = source[f"{old}.post_attention_layernorm.weight"]
        query, key, value = (source[f"{old}.self_attn.{x}_proj.weight"] for x in "qkv")
        state[f"{new}.attention.qkv.weight"] = fuse(query, key, value, 2)
        state[f"{new}.attention.out.weight"] = source[f"{old}.self_attn.o_proj.weight"]
        for name in ("gate", "up", "down"):
            state[f"{new}.mlp.{name}.weight"] = source[f"{old}.mlp.{name}_proj.weight"]
        if f"{old}.self_attn.q_norm.weight" in source:
            state[f"{new}.attention.query_norm.weight"] = source[f"{old}.self_attn.q_norm.weight"]
            state[f"{new}.attention.key_norm.weight"] = source[f"{old}.self_attn.k_norm.weight"]
    net.load_state_dict(state)


def test_equals_gpt2() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=V, n_positions=C, n_embd=32, n_layer=2, n_head=4)).eval()
    randomise(model)
    net = small(activation="gelu_tanh", bias=True).eval()
    copy_gpt2(net, model)
    tokens = ids()
    torch.testing.assert_close(net(tokens), model(tokens).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("qk_norm", [False, True], ids=["llama", "qwen3"])
def test_equals_llama_and_qwen3(qk_norm: bool) -> None:
    sizes = {
        "vocab_size": V, "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": C, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    }  # fmt: skip
    model = Qwen3ForCausalLM(Qwen3Config(**sizes)) if qk_norm else LlamaForCausalLM(LlamaConfig(**sizes))
    randomise(model.eval())
    net = small(**LLAMA, rotary_base=500.0, qk_norm=qk_norm).eval()
    copy_llama(net, model)
    tokens = ids()
    torch.testing.assert_close(net(tokens), model(tokens).logits, atol=1e-5, rtol=1e-5)


VARIANTS = {
    "gpt2": {"bias": True},
    "llama": LLAMA,
    "qwen3": LLAMA | {"qk_norm": True},
    "multi-query": {"num_kv_heads": 1},
}
variants = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)


@variants
@pytest.mark.parametrize("kind", ["sdpa", "explicit"])
def test_no_token_sees_a_later_one(options: dict[str, Any], kind: str) -> None:
    net = small(**options, attention=kind).eval()
    tokens = ids()
    changed = tokens.clone()
    changed[:, 20] = (changed[:, 20] + 1) % V
    before, after = net(tokens), net(changed)
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.equal(before[:, 20:], after[:, 20:])


def test_dropout_acts_in_training_only() -> None:
    net, tokens = small(dropout=0.5), ids()
    dropped: list[float] = []  # fractions: of the embeddings, and of what each branch of the first block adds
    net.blocks[0].register_forward_pre_hook(lambda module, args: dropped.append((args[0] == 0).float().mean().item()))
    net.get_submodule("blocks.0.dropout").register_forward_hook(
        lambda module, args, y: dropped.append((y == 0).float().mean().item())
    )
    assert not torch.equal(net(tokens), net(tokens))
    assert dropped == pytest.approx([0.5] * 6, abs=0.06)
    net.eval()
    assert torch.equal(net(tokens), net(tokens))


@variants
def test_cached_steps_equal_the_whole(options: dict[str, Any]) -> None:
    net = small(**options).eval()
    tokens = ids()
    cache = net.new_cache(len(tokens))
    pieces = [net(piece, cache) for piece in tokens.split([10, 1, 1, 7, 13], dim=1)]
    assert cache.length == C
    torch.testing.assert_close(torch.cat(pieces, dim=1), net(tokens), atol=1e-5, rtol=1e-5)
    cache.clear()
    torch.testing.assert_close(net(tokens[:, :3], cache), pieces[0][:, :3], atol=1e-5, rtol=1e-5)


def test_cache_under_autocast_takes_its_dtype() -> None:
    net, tokens = small(**LLAMA, qk_norm=True).eval(), ids()
    cache = net.new_cache(len(tokens))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        pieces = [net(piece, cache) for piece in tokens.split([30, 1, 1], dim=1)]
        whole = net(tokens)
    assert cache.layers[0].keys is not None
    assert cache.layers[0].keys.dtype == torch.bfloat16
    assert (torch.cat(pieces, dim=1) - whole).abs().mean() < 0.02 * whole.abs().mean()


@pytest.mark.parametrize("depth", [1, 8])
def test_initial_standard_deviations(depth: int) -> None:
    net = GPT(512, 64, width=128, depth=depth, num_heads=4, activation="swiglu", bias=True, tied_head=False)
    for name, parameter in net.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            expected = 0.02 / math.sqrt(2 * depth) if name.endswith(("out.weight", "down.weight")) else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.05), name
            assert abs(parameter.mean().item()) < 0.05 * expected, name


def test_a_new_net_predicts_almost_evenly() -> None:
    net, tokens = GPT(V, C, width=32, depth=2, num_heads=4), ids(16)
    loss = nn.functional.cross_entropy(net(tokens).flatten(0, 1), ids(16).flatten())
    assert loss.item() == pytest.approx(math.log(V), abs=0.05)


def test_a_net_made_without_memory_becomes_a_real_one() -> None:
    with torch.device("meta"):
        net = small(**LLAMA, bias=True)
    assert all(parameter.is_meta for parameter in net.parameters())
    assert not list(net.buffers())
    net.to_empty(device="cpu")
    real = small(**LLAMA, bias=True)
    for each in (net, real):
        torch.manual_seed(3)
        each.reset_parameters()
    tokens = ids()
    assert torch.equal(net(tokens), real(tokens))


def test_state_dict_names() -> None:
    assert list(GPT(V, C, width=32, depth=1, num_heads=4).state_dict()) == [
        "embed.weight",
        "embed_positions.weight",
        "blocks.0.attention_norm.weight",
        "blocks.0.attention.qkv.weight",
        "blocks.0.attention.out.weight",
        "blocks.0.mlp_norm.weight",
        "blocks.0.mlp.up.weight",
        "blocks.0.mlp.down.weight",
        "norm.weight",
    ]


@pytest.mark.parametrize(
    ("width", "activation", "hidden"), [(96, "gelu", 384), (96, "swiglu", 256), (4096, "swiglu", 10944)]
)
def test_default_mlp_widths(width: int, activation: Activation, hidden: int) -> None:
    with torch.device("meta"):
        net = GPT(V, C, width=width, depth=1, num_heads=4, activation=activation)
    assert net.state_dict()["blocks.0.mlp.up.weight"].shape == (hidden, width)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@variants
def test_on_a_gpu_as_on_a_cpu(options: dict[str, Any]) -> None:
    net, tokens = small(**options).eval(), ids()
    expected = net(tokens)
    net.cuda()
    torch.testing.assert_close(net(tokens.cuda()).cpu(), expected, atol=1e-3, rtol=1e-3)
    cache = net.new_cache(len(tokens))
    with torch.autocast("cuda", torch.bfloat16):
        pieces = [net(piece, cache).float().cpu() for piece in tokens.cuda().split([10, 1, 21], dim=1)]
    assert (torch.cat(pieces, dim=1) - expected).abs().mean() < 0.05 * expected.abs().mean()


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_tokens_that_do_not_fit_are_refused(positions: str) -> None:
    net = small(positions=positions)
    with pytest.raises(ValueError, match=r"33 tokens .* context of 32"):
        net(ids(2, C + 1))
    cache = net.new_cache(2)
    net(ids(2, 30), cache)
    with pytest.raises(ValueError, match=r"33 tokens \(30 of them cached\)"):
        net(ids(2, 3), cache)
    with pytest.raises(ValueError, match="3 sequences for a cache of 2"):
        net(ids(3, 1), cache)
    with pytest.raises(ValueError, match="from 0 to 50, outside the vocabulary of 50"):
        net(torch.tensor([[0, V]]))
    with pytest.raises(ValueError, match="must be \\[batch, tokens\\]"):
        net(torch.tensor([1, 2]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 100, "num_heads": 6}, "width 100 is not divisible by num_heads 6; choose --model.net.width"),
        ({"num_kv_heads": 3}, "num_heads 4 is not divisible by num_kv_heads 3"),
        ({"width": 12, "positions": "rotary"}, "even head size"),
        ({"depth": 0}, "depth is 0.*--model.net.depth"),
        ({"dropout": 1.0}, "dropout 1.0"),
        ({"norm": "batch"}, "norm 'batch' is none of layer, rms"),
        ({"positions": "none"}, "learned, rotary"),
        ({"activation": "relu"}, "gelu, gelu_tanh, swiglu"),
        ({"attention": "flash"}, "auto, sdpa, explicit"),
    ],
)
def test_what_does_not_fit_together_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**options)
