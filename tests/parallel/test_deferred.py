"""Nets built without memory get the same weights, bit for bit, as nets built as usual with the same seed."""

import copy
import subprocess
import sys

import deferred as launched
import forked
import pytest
import torch
from outsider import MLP as OutsiderMLP
from torch import nn
from torch.nn.utils import parametrizations

from bigmodel.nn import GPT, HSTU, VGG, BERT4Rec, ConvNeXt, GRU4Rec, ResNet, SASRec, TwoTower, ViT
from bigmodel.parallel import deferred


class Everything(nn.Module):
    """What people do to parameters when they build a net."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.drawn = nn.Parameter(torch.randn(5))  # its draw follows one that is only recorded
        self.old_style = nn.Parameter(torch.Tensor(3, 3))
        nn.init.orthogonal_(self.old_style)
        self.padded = nn.Embedding(5, 3, padding_idx=0)  # fills a row
        self.recurrent = nn.LSTM(3, 4)
        self.cloned = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, batch_first=True), 2)
        late = nn.Parameter(torch.empty(6))
        self.late = late
        nn.init.normal_(late)
        self.weight_norm = parametrizations.weight_norm(nn.Linear(3, 3))  # reads its weight
        self.spectral_norm = parametrizations.spectral_norm(nn.Linear(3, 3))
        self.old_spectral_norm = nn.utils.spectral_norm(nn.Linear(3, 3))
        self.copied = nn.Linear(3, 4)
        self.copied.weight.data.copy_(self.linear.weight.data)
        self.cast = nn.Linear(3, 4).to(torch.bfloat16)
        self.image = nn.Conv2d(2, 2, 3)
        nn.init.dirac_(self.image.weight)
        self.image.to(memory_format=torch.channels_last)
        self.loaded = nn.Linear(3, 4)
        self.loaded.load_state_dict({"weight": torch.rand(4, 3), "bias": torch.arange(4.0)})
        self.replaced = nn.Linear(2, 2)
        self.replaced.weight.data = torch.rand(2, 2)
        self.twin = copy.deepcopy(self.linear)
        nn.init.normal_(self.linear.weight, generator=torch.Generator().manual_seed(4))
        self.computed = nn.Parameter(self.linear.weight.detach().mean(0))
        self.truncated = nn.Parameter(torch.empty(50))
        nn.init.trunc_normal_(self.truncated)
        self.mixed = nn.ParameterList([torch.randn(2), nn.Parameter(torch.empty(1).uniform_())])
        self.tied = nn.Linear(3, 4)
        self.tied.weight = self.copied.weight
        self.register_buffer("buffer", torch.rand(3))
        self.norm = nn.BatchNorm1d(7)


class WasParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        weight = self.linear.weight.data
        del self.linear.weight
        self.linear.register_buffer("weight", weight)


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, tie_word_embeddings=True, **sizes))


def bert():
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertModel(BertConfig(vocab_size=50, **sizes))


NETS = {
    "everything": Everything,
    "was_parameter": WasParameter,
    "gpt_tied": lambda: GPT(50, 16, width=32, depth=2, num_heads=2),
    "gpt_untied": lambda: GPT(50, 16, width=32, depth=2, num_heads=2, tied_head=False, norm="rms", bias=True),
    "vit": lambda: ViT(10, 3, 32, depth=2, width=48, positions="sincos", num_registers=2),
    "resnet": lambda: ResNet(10, 3, 32, depth=8),
    "narrow resnet": lambda: ResNet(10, 3, 32, blocks=(1, 1), widths=(4, 8)),
    "convnext": lambda: ConvNeXt(10, 3, 32, depths=(1, 2), widths=(8, 16)),
    "vgg": lambda: VGG(10, 3, 32, depth=11),
    "sasrec": lambda: SASRec(20, 8, width=16),
    "bert4rec": lambda: BERT4Rec(20, 8, width=16),
    "gru4rec": lambda: GRU4Rec(20, 8, width=16, hidden=24),
    "hstu": lambda: HSTU(20, 8, width=16),
    "two_tower": lambda: TwoTower(20, 8, width=16),
    "outsider": lambda: OutsiderMLP(4),
    "llama": llama,
    "bert": bert,
}


@pytest.mark.parametrize("name", NETS)
def test_the_weights_are_those_of_a_net_built_as_usual(name):
    torch.manual_seed(3)
    expected = NETS[name]()
    state = torch.get_rng_state()
    torch.manual_seed(3)
    with deferred() as log:
        net = NETS[name]()
    assert torch.equal(torch.get_rng_state(), state), "what is drawn afterwards is the same too"
    assert all(parameter.is_meta for parameter in net.parameters())
    assert not any(buffer.is_meta for buffer in net.buffers())
    log.materialize(net, "cpu")
    assert torch.equal(torch.get_rng_state(), state)
    assert [n for n, _ in net.named_parameters()] == [n for n, _ in expected.named_parameters()], "tied ones are tied"
    got, wanted = net.state_dict(), expected.state_dict()
    assert list(got) == list(wanted)
    for key, tensor in wanted.items():
        assert torch.equal(got[key], tensor), key
        assert (got[key].dtype, got[key].stride()) == (tensor.dtype, tensor.stride()), key


def test_a_dtype_changed_afterwards_rounds_what_was_drawn():
    torch.manual_seed(3)
    expected = nn.Linear(5, 6).to(torch.bfloat16)
    torch.manual_seed(3)
    with deferred() as log:
        net = nn.Linear(5, 6)
    net.weight.no_decay = True
    net.to(torch.bfloat16)
    log.materialize(net, "cpu")
    assert torch.equal(net.weight, expected.weight)
    assert net.weight.no_decay


def test_without_draws_pretrained_weights_are_there_and_the_rest_is_zero():
    pretrained = torch.rand(3, 3)
    state = torch.get_rng_state()
    with deferred(draw=False) as log:
        net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.LayerNorm(3))
        net[1].load_state_dict({"weight": pretrained, "bias": torch.ones(3)})
    assert torch.equal(torch.get_rng_state(), state)
    log.materialize(net, "cpu")
    assert torch.equal(net[1].weight, pretrained)
    assert net[0].weight.count_nonzero() == 0
    assert torch.equal(net[2].weight, torch.ones(3))


def test_building_holds_one_parameter_at_most():
    """Resident memory in a process of its own, of a net of 205 MB with parameters of at most 17 MB."""
    script = (
        "import torch\n"
        "from bigmodel.nn import GPT\n"
        "from bigmodel.parallel import deferred\n"
        "def resident():\n"
        "    with open('/proc/self/statm') as file: return int(file.read().split()[1]) * 4096 / 2**20\n"
        "sizes = dict(width=1024, depth=4, num_heads=8)\n"
        "before = resident()\n"
        "with deferred() as log: net = GPT(1000, 256, **sizes)\n"
        "held = resident() - before\n"
        "log.materialize(net, 'cpu')\n"
        "print(held, resident() - before)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    held, made = map(float, result.stdout.split())
    assert held < 40
    assert made > 180


def test_what_cannot_be_recorded_is_refused():
    with pytest.raises(ValueError, match=r"numpy\(\) of Linear.weight .*deferred_init false"), deferred():
        nn.Linear(2, 2).weight.detach().numpy()
    refused = pytest.raises(ValueError, match=r"_foreach_mul_ on Linear.weight .*deferred_init false")
    with refused, deferred(), torch.no_grad():
        torch._foreach_mul_(list(nn.Linear(2, 2).parameters()), 2.0)
    with pytest.raises(ValueError, match=r"LazyLinear.weight takes its shape from the first batch"), deferred():
        nn.LazyLinear(2)
    assert nn.Linear(2, 2).weight.device.type == "cpu", "all is as before"


def test_what_was_not_built_there_cannot_be_made():
    with torch.device("meta"):
        stranger = nn.Linear(2, 2)
    with deferred() as log:
        net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"parameter 2.weight \[2, 2\] was not built under deferred\(\)"):
        log.materialize(net.append(stranger), "cpu")
    net[0].weight = nn.Parameter(torch.empty(3, 2, device="meta"))
    with pytest.raises(ValueError, match=r"parameter 0.weight \[3, 2\] was \[2, 2\] when built"):
        log.materialize(net, "cpu")


def test_a_source_that_is_overwritten_is_noticed():
    source = torch.rand(2, 2)
    with deferred() as log:
        net = nn.Linear(2, 2)
        net.weight.data.copy_(source)
        source.zero_()
    with pytest.raises(ValueError, match="was overwritten before they were made"):
        log.materialize(net, "cpu")


def test_four_processes_make_their_parts():
    """FSDP2, and tensor parallelism with FSDP2: the parts put together are the net built as usual."""
    forked.run(launched.__file__, processes=4)
