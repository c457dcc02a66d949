"""Products in float8, emulated: training stays close to bf16, and the checkpoint knows nothing of it."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bigmodel.nn import GPT
from bigmodel.nn.loss import cross_entropy_sum
from bigmodel.parallel import ActivationCheckpointing, Float8, deferred
from bigmodel.training.callbacks import GradientScaling, TrainingLog

pytestmark = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="float8 is an extra")


class Task(LightningModule):
    def __init__(self, width=32) -> None:
        super().__init__()
        self.net, self.width, self.losses, self.kinds = None, width, [], set()

    def configure_model(self) -> None:
        if self.net is None:
            torch.manual_seed(0)
            self.net = GPT(vocab_size=32, context_length=16, width=self.width, depth=2, num_heads=2)

    def training_step(self, batch):
        self.kinds = {type(module).__name__ for module in self.net.blocks.modules()}
        loss, count = cross_entropy_sum(self.net.logits, self.net.features(batch[0]), batch[1])
        self.losses.append(loss.detach() / count)
        return {"loss": loss, "count": count}

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def fit(*callbacks, task=None, precision="32-true", **options):
    task = task or Task()
    start = torch.randint(0, 32, (64, 1), generator=torch.Generator().manual_seed(0))
    tokens = (start + 3 * torch.arange(17)) % 32  # each token says which the next is
    loader = DataLoader(TensorDataset(tokens[:, :-1], tokens[:, 1:]), batch_size=16)
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_epochs=10,
        enable_checkpointing=False, callbacks=[GradientScaling(), *callbacks], precision=precision, **options,
    )  # fmt: skip
    trainer.fit(task, loader)
    return task


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_it_trains_like_bf16(recipe, capsys):
    logs = TrainingLog(), TrainingLog()
    bf16 = fit(logs[0], precision="bf16-mixed")
    task = fit(Float8(recipe, emulate=True), logs[1])
    assert logs[0]._flops == logs[1]._flops, "the products are as many"
    assert "float8: 8 linear layers\n" in capsys.readouterr().out
    assert "Float8Linear" in task.kinds
    assert not torch.equal(torch.stack(task.losses), torch.stack(fit().losses)), "it does round"
    assert task.losses[-1] < 0.5 * task.losses[0]
    torch.testing.assert_close(torch.stack(task.losses[:20]), torch.stack(bf16.losses[:20]).float(), rtol=0.03, atol=0)
    assert task.losses[-1] == pytest.approx(float(bf16.losses[-1]), rel=0.1)


def test_the_checkpoint_loads_without_torchao(tmp_path):
    task = fit(Float8(emulate=True), ActivationCheckpointing())
    assert {type(module) for module in task.net.blocks.modules()} >= {nn.Linear}, "ordinary layers again"
    assert not any("Float8" in type(module).__name__ for module in task.modules())
    torch.save(task.net.state_dict(), tmp_path / "weights.pt")
    script = (
        "import sys, torch; from bigmodel.nn import GPT; sys.modules['torchao'] = None\n"
        "net = GPT(vocab_size=32, context_length=16, width=32, depth=2, num_heads=2)\n"
        "net.load_state_dict(torch.load('weights.pt', weights_only=True))"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, env=os.environ)
    again = fit(Float8(only=["*.mlp.*"], skip=["*.1.*"], emulate=True), task=task)
    assert len(again.losses) == 80
    assert "Float8Linear" in again.kinds


def test_it_converts_nets_without_memory():
    """What a sharding strategy does: the net is built and converted under `deferred`, and made later."""
    expected = Task()
    expected.configure_model()
    task, float8 = Task(), Float8(emulate=True)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    float8.setup(trainer, task, "fit")
    with deferred() as log:
        task.configure_model()
    assert all(parameter.is_meta for parameter in task.parameters())
    log.materialize(task, "cpu")
    assert sum(type(module).__name__ == "Float8Linear" for module in task.modules()) == 8
    got = task.state_dict()
    assert list(got) == list(expected.state_dict())
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.state_dict().items())


def test_what_cannot_be_is_refused(monkeypatch):
    with pytest.raises(
        ValueError, match=r"capability 8.9 .* not a device of type cpu: .*--callbacks.float8.emulate true"
    ):
        fit(Float8())
    with pytest.raises(ValueError, match=r"none of the 8 linear layers .* multiples of 16"):
        fit(Float8(emulate=True), task=Task(width=20))
    with pytest.raises(ValueError, match=r"only: 'x' matches none of net.blocks.0.attention.qkv, "):
        fit(Float8(only=["x"], emulate=True))
    with pytest.raises(ValueError, match=r"recipe 'rows' must be tensorwise or rowwise"):
        Float8("rows")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'bigmodel\[float8\]'"):
        Float8()
