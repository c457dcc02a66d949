"""Blocks are found; checkpointing and compiling them changes memory and time, and no result."""

import functools

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

from bigmodel.nn import CNN, GPT, MLP, ConvNeXt, ResNet, ViT
from bigmodel.nn.loss import cross_entropy_sum
from bigmodel.parallel import ActivationCheckpointing, Compile, compilation, find_blocks
from bigmodel.training.callbacks import GradientScaling, TrainingLog

SIZES = {"vocab_size": 32, "context_length": 16, "width": 16, "num_heads": 2}


class Task(LightningModule):
    """Next tokens with a GPT, or classes of images with any other net."""

    def __init__(self, make, loss_chunk_size=None) -> None:
        super().__init__()
        self.make, self.net, self.loss_chunk_size = make, None, loss_chunk_size
        self.losses = []

    def configure_model(self) -> None:
        if self.net is None:
            torch.manual_seed(0)
            self.net = self.make()

    def on_train_start(self):
        torch.manual_seed(1)

    def training_step(self, batch):
        x, y = batch
        loss, count = cross_entropy_sum(self.net.logits, self.net.features(x), y, self.loss_chunk_size)
        self.losses.append(loss.detach())
        return {"loss": loss, "count": count}

    def validation_step(self, batch):
        self.net(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class MadeAtOnce(Task):
    configure_model = LightningModule.configure_model

    def __init__(self, make) -> None:
        super().__init__(make)
        torch.manual_seed(0)
        self.net = make()


def data(kind):
    draw = torch.Generator().manual_seed(0)
    if kind is GPT:
        tokens = torch.randint(0, 32, (8, 17), generator=draw)
        return TensorDataset(tokens[:, :-1], tokens[:, 1:])
    return TensorDataset(torch.randn(8, 3, 8, 8, generator=draw), torch.randint(0, 4, (8,), generator=draw))


def fit(make, *callbacks, kind=GPT, task=None, steps=3):
    task = task or Task(make)
    loader = DataLoader(data(kind), batch_size=4)
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_steps=steps,
        enable_checkpointing=False, callbacks=[GradientScaling(), *callbacks], num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(task, loader, loader)
    return task


def same(a, b):
    assert [float(loss) for loss in a.losses] == [float(loss) for loss in b.losses]
    assert list(a.state_dict()) == list(b.state_dict())
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, b.state_dict()[name]), name


def dropping_gpt():
    return GPT(**SIZES, depth=3, dropout=0.2, attention="sdpa")


def resnet():
    return ResNet(4, 3, 8, blocks=(1, 1), widths=(4, 8), drop_path=0.3)


def names(net):
    return [name for name, _ in find_blocks(net)]


def test_blocks_are_found():
    assert names(GPT(**SIZES, depth=2)) == ["blocks.0", "blocks.1"]
    assert names(ViT(4, 3, 8, depth=2, width=8, num_heads=2)) == ["blocks.0", "blocks.1"]
    assert names(MLP(4, 3, 8, widths=(8, 8))) == ["blocks.0", "blocks.1"]
    assert names(resnet()) == ["stages.0", "stages.1"]
    assert names(ConvNeXt(4, 3, 8, depths=(1, 1), widths=(4, 8))) == ["stages.0", "stages.1"]
    assert names(CNN(4, 3, 8)) == ["stages.0", "stages.1", "stages.2"]
    assert names(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Sequential(nn.Linear(2, 2)))) == ["0", "2"]
    task = Task(None)
    task.student, task.teacher = nn.Sequential(nn.Linear(2, 2)), GPT(**SIZES, depth=2)
    assert names(task) == ["student.0", "teacher.blocks.0", "teacher.blocks.1"]


def test_blocks_of_a_hugging_face_model_are_what_it_does_not_split():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    assert names(LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))) == ["model.layers.0", "model.layers.1"]


@pytest.mark.parametrize(("make", "kind"), [(dropping_gpt, GPT), (resnet, ResNet)], ids=["gpt", "resnet"])
def test_checkpointing_changes_no_bit(make, kind):
    """Losses, weights and running statistics, with dropout and stochastic depth; names stay."""
    expected = fit(make, kind=kind)
    same(fit(make, ActivationCheckpointing(), kind=kind), expected)
    same(fit(make, ActivationCheckpointing(every=2), kind=kind, task=MadeAtOnce(make)), expected)


def test_checkpointing_is_undone_and_done_again():
    checkpointing, task = ActivationCheckpointing(only=["net.blocks.[12]"]), Task(dropping_gpt)
    seen = []

    class Look(ActivationCheckpointing):
        def on_train_start(self, trainer, pl_module):
            seen.append(["forward" in block.__dict__ for block in pl_module.net.blocks])

    look = Look(only=["net.blocks.2"])
    for _ in range(2):
        fit(None, checkpointing, look, task=task)
        assert not any("forward" in block.__dict__ for block in task.net.blocks)
        assert "configure_model" not in task.__dict__
    assert seen == [[False, True, True]] * 2


class Live(TorchDispatchMode):
    """The most bytes that were alive at once, of tensors made under it."""

    def __init__(self) -> None:
        super().__init__()
        self.storages, self.most = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves(args) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given:
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.storages = {key: kept for key, kept in self.storages.items() if not kept[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.storages.values()))
        return out


def most_bytes(depth, *callbacks):
    task = Task(lambda: GPT(**{**SIZES, "width": 32, "context_length": 64}, depth=depth, attention="sdpa"))
    trainer = Trainer(accelerator="cpu", logger=False, callbacks=list(callbacks), enable_checkpointing=False)
    for callback in callbacks:
        callback.setup(trainer, task, "fit")
    task.configure_model()
    tokens = torch.randint(0, 32, (8, 64))
    for parameter in task.parameters():
        parameter.grad = torch.zeros_like(parameter)  # only activations are to be counted
    with Live() as live:
        task.training_step((tokens, tokens))["loss"].backward()
    return live.most


def test_memory_is_that_of_the_blocks_inputs_and_one_block():
    one_input = 8 * 64 * 32 * 4  # B T D float32
    plain = (most_bytes(10) - most_bytes(2)) / 8
    checkpointed = (most_bytes(10, ActivationCheckpointing()) - most_bytes(2, ActivationCheckpointing())) / 8
    half = (most_bytes(10, ActivationCheckpointing(2)) - most_bytes(2, ActivationCheckpointing(2))) / 8
    assert checkpointed == pytest.approx(one_input, rel=0.02), "each further block costs its input"
    assert plain > 12 * checkpointed
    assert half == pytest.approx((plain + checkpointed) / 2, rel=0.02)


def test_what_is_computed_again_is_not_useful_work():
    def flops(*callbacks, chunk=None):
        log = TrainingLog()
        fit(None, *callbacks, log, task=Task(dropping_gpt, chunk), steps=1)
        return log._flops

    assert flops() == flops(ActivationCheckpointing()) == flops(chunk=16) == flops(ActivationCheckpointing(), chunk=16)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(16, 16)])
        self.blocks[0].register_buffer("calls", torch.zeros(()))
        self.blocks[0].forward = self.count
        self.head = nn.Linear(16, 32)

    def count(self, x):
        self.blocks[0].calls.add_(1)
        return nn.functional.linear(x, self.blocks[0].weight)

    def features(self, x):
        return self.blocks[0](nn.functional.one_hot(x % 16, 16).float())

    def logits(self, x):
        return self.head(x)

    def forward(self, x):
        return self.logits(self.features(x))


def test_what_cannot_be_checkpointed_is_refused():
    with pytest.raises(ValueError, match=r"Linear changes its buffer calls in the forward pass"):
        fit(Counting, ActivationCheckpointing())
    with pytest.raises(
        ValueError, match=r"only: 'blocks\.7' matches no block; they are net\.blocks\.0, net\.blocks\.1"
    ):
        fit(dropping_gpt, ActivationCheckpointing(only=["blocks.7"]))
    with pytest.raises(ValueError, match=r"Task has no blocks: .*--callbacks.compile null"):
        fit(lambda: nn.Linear(2, 2), Compile())
    with pytest.raises(ValueError, match=r"activation_checkpointing.every 0 must be at least 1"):
        ActivationCheckpointing(every=0)


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # dynamo looks there
def test_compiled_blocks_compute_the_same(monkeypatch, capsys):
    """With checkpointing too; by a backend that compiles quickly. How often and why is said at the end."""
    compile_block = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(compile_block, backend="aot_eager"))
    make = functools.partial(GPT, **SIZES, depth=2)
    expected = fit(make)
    compiled = fit(make, Compile(fullgraph=True))
    assert list(compiled.state_dict()) == list(expected.state_dict())
    torch.testing.assert_close(compiled.losses, expected.losses)
    printed = capsys.readouterr().out
    assert "compiled 2 graphs in " in printed, printed
    assert "1 of them recompiled, the last because of a failed guard: " in printed
    assert all(block._compiled_call_impl is None for block in compiled.net.blocks)
    both = fit(make, ActivationCheckpointing(), Compile(fullgraph=True))
    torch.testing.assert_close(both.losses, expected.losses)
    capsys.readouterr()
    images, expected = fit(resnet, ActivationCheckpointing(), Compile(), kind=ResNet), fit(resnet, kind=ResNet)
    torch.testing.assert_close(images.losses, expected.losses)
    torch.testing.assert_close(images.state_dict(), expected.state_dict())  # batches are counted once here too
    assert "compiled " in capsys.readouterr().out


@pytest.fixture
def _nothing_tried():
    compilation._check.cache_clear()
    yield
    compilation._check.cache_clear()


@pytest.mark.usefixtures("_nothing_tried")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # as inductor is imported
@pytest.mark.parametrize("cause", ["no compiler", "torch refuses"])
def test_compiling_where_torch_cannot_is_refused_before_the_first_step(cause, monkeypatch):
    message = r"torch\.compile needs a C\+\+ compiler.*there is no .*set --callbacks.compile null.*CXX"
    if cause == "no compiler":
        monkeypatch.setenv("PATH", "")
    else:
        message = r"torch\.compile fails for cpu .*Cannot find a working triton.*set --callbacks.compile null"

        def fails(graph, inputs):
            raise RuntimeError("Cannot find a working triton installation")

        monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend=fails))
        monkeypatch.setattr(compilation, "_check_compiler", lambda: None)
    task = Task(functools.partial(GPT, **SIZES, depth=2))
    with pytest.raises(ValueError, match=f"(?s)^--callbacks.compile: {message}"):
        fit(None, Compile(), task=task)
    assert not task.losses
