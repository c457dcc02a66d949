"""scripts/layout.py: its counts against nets that are made, its times against closed forms and a published mark."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bigmodel.nn import GPT

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("layout", ROOT / "scripts" / "layout.py")
layout = sys.modules["layout"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(layout)

LLAMA_8B = layout.Net(32, 4096, 32, 8, 14336, 128_256)


def words(*more):
    command = [sys.executable, "scripts/layout.py", *map(str, more)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_table_of_the_page_is_what_the_script_prints():
    printed = words().stdout
    assert len(printed.splitlines()) == 11
    assert printed in (ROOT / "scripts" / "README.md").read_text()


@pytest.mark.parametrize("net", [*layout.NETS.values(), LLAMA_8B])
def test_parameters_are_those_of_the_net(net):
    with torch.device("meta"):
        made = GPT(
            net.vocab_size, 4096, width=net.width, depth=net.depth, num_heads=net.num_heads, norm="rms",
            num_kv_heads=net.num_kv_heads, mlp_width=net.mlp_width, positions="rotary", activation="swiglu",
            tied_head=net.tied_head,
        )  # fmt: skip
    assert net.parameters == pytest.approx(sum(p.numel() for p in made.parameters()), rel=1e-3)


@pytest.mark.parametrize("num_kv_heads", [4, 1])
@pytest.mark.parametrize(("gated", "mlp_width"), [(True, 352), (False, 512)])
@pytest.mark.parametrize(("positions", "tolerance"), [("learned", 0.01), ("rotary", 0.08)])
def test_activations_are_those_that_autograd_keeps(num_kv_heads, gated, mlp_width, positions, tolerance):
    batch, tokens, width = 4, 64, 128

    def kept(depth):
        net = GPT(
            50, tokens, width=width, depth=depth, num_heads=4, num_kv_heads=num_kv_heads, mlp_width=mlp_width,
            positions=positions, activation="swiglu" if gated else "gelu", attention="sdpa",
        ).to(torch.bfloat16)  # fmt: skip
        weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
        storages = {}

        def pack(tensor):
            if tensor.untyped_storage().data_ptr() not in weights:
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = net(torch.zeros(batch, tokens, dtype=torch.long))
        del out
        return sum(storage.nbytes() for storage in storages.values())

    net = layout.Net(1, width, 4, num_kv_heads, mlp_width, 50, gated, rotary=positions == "rotary")
    assert (kept(3) - kept(1)) / 2 / (batch * tokens) == pytest.approx(net.activation(), rel=tolerance)


def test_without_dropout_a_gpt_keeps_the_34_bytes_of_korthikanti_but_for_its_two_masks():
    assert layout.Net(1, 64, 4, 4, 256, 10, gated=False, rotary=False).activation() == (34 - 2) * 64


def step(gpus, replicas, shards, tensor=1, micro=1, accumulation=1, checkpointed=0.0, each=False, hop=0.0):
    machine = layout.Machine(gpus, links=1.0, hop=hop)
    spread = layout.Layout(replicas, shards, tensor, micro, accumulation, checkpointed, each)
    return layout.estimate(LLAMA_8B, machine, spread, 4096)


def test_communication_of_a_step_against_closed_forms():
    P = LLAMA_8B.parameters
    assert step(8, 1, 8).communication == pytest.approx(7 / 8 * 8 * P / 450e9)
    assert step(8, 8, 1).communication == pytest.approx(7 / 8 * 8 * P / 450e9), "DDP moves as much"
    assert step(64, 1, 64).communication == pytest.approx(max(63 / 64 * 8 * P / 450e9, 7 / 8 * 8 * P / (8 * 50e9)))
    hybrid = 7 / 8 * 8 * P / 450e9 + 2 * 7 / 8 * 4 * (P / 8) / 50e9
    assert step(64, 8, 8).communication == pytest.approx(hybrid)
    again = step(8, 1, 8, accumulation=3, each=True).communication
    assert again == pytest.approx(3 * step(8, 1, 8).communication)
    assert step(8, 1, 8, accumulation=3).communication == pytest.approx(7 / 8 * (3 * 4 + 4) * P / 450e9)
    alone = step(2, 1, 1, tensor=2).communication
    assert alone == pytest.approx(32 * 4 * 2 * (1 / 2) * 2 * 4096 * 4096 / 450e9)
    slow = step(512, 1, 512, hop=1e-5).communication - step(512, 1, 512).communication
    assert slow == pytest.approx(3 * 33 * 511 * 1e-5)


def test_memory_of_states():
    P = LLAMA_8B.parameters
    assert step(8, 8, 1).state == 16 * P
    assert step(64, 1, 64).state == step(64, 1, 32, tensor=2).state == pytest.approx(16 * P / 64)
    assert step(64, 8, 8).state == pytest.approx(16 * P / 8)
    assert step(8, 1, 8, checkpointed=1.0).activations < step(8, 1, 8).activations / 4


@pytest.mark.parametrize(("gpus", "published"), [(8, 6667), (128, 6514)])
def test_published_marks(gpus, published):
    """Llama 3.1 8B, FSDP2 and compile on H100, context 8192, two sequences a GPU: torchtitan's benchmarks of 2024-12."""
    found = layout.estimate(LLAMA_8B, layout.Machine(gpus), layout.Layout(1, gpus, 1, 2, 1, 0.0, False), 8192)
    assert found.tokens_per_second / gpus == pytest.approx(published, rel=0.05)


@pytest.mark.parametrize(
    ("spread", "words_of_it"),
    [
        ((8, 1, 1, 4, 1, 0.0, False), "-c experiments/hardware/ddp.yaml"),
        (
            (2, 8, 1, 4, 2, 0.0, True),
            "hardware/fsdp.yaml --trainer.strategy.num_replicas 2 --trainer.strategy.reduce_each",
        ),
        (
            (2, 1, 8, 4, 1, 0.25, False),
            "hardware/tensor_parallel.yaml --trainer.strategy.num_replicas 2 --trainer.strategy.t",
        ),
        ((1, 8, 1, 4, 1, 0.25, False), "ActivationCheckpointing --callbacks.activation_checkpointing.every 4"),
    ],
)
def test_what_to_type(spread, words_of_it):
    flags = layout.Layout(*spread).flags()
    assert words_of_it in flags
    assert "--data.micro_batch_size 4" in flags


def test_ones_own_net():
    net = ["--depth", 12, "--width", 768, "--num_heads", 12, "--vocab_size", 50304, "--gelu", "--tied_head"]
    printed = words(*net, "--gpus", 1, "--batch_size", 8, "--context_length", 1024).stdout
    assert "0.12 B parameters, 8,192 tokens a step" in printed
    assert "--data.micro_batch_size 8" in printed
    result = words(*net, "--gpus", 12)
    assert result.returncode == 2
    assert "--gpus 12 is not a whole number of nodes of --gpus_per_node 8" in result.stderr
    assert "no layout fits" in words(*net, "--memory", 1e8).stderr
