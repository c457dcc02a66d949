"""A wrapped task is treated like the task itself."""

import functools
import inspect

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

from bigmodel import protocols
from bigmodel.tasks.distillation.task_wrapper import TaskWrapper
from bigmodel.tasks.image_classification import ImageClassification
from bigmodel.tasks.language_modeling import LanguageModeling
from bigmodel.tasks.recommendation import SequentialRecommendation
from bigmodel.tasks.transfer_learning import TransferLearning

HOOKS = [
    name
    for name, _ in inspect.getmembers(LightningModule, inspect.isfunction)
    if not name.startswith("_") and name not in dir(nn.Module) and name != "setup"  # defined by the wrapper
]
PROTOCOLS = [  # whose members are methods
    protocols.SupportsLogits, protocols.SupportsPredict, protocols.SupportsGenerate, protocols.SupportsCorpusGeneration,
    protocols.SupportsOnPolicySampling, protocols.SupportsExport, protocols.SupportsFromPretrained,
]  # fmt: skip


def decorated(step):
    @functools.wraps(step)
    def call(*args):
        return step(*args)

    return call


class Plain(LightningModule):
    """An ordinary LightningModule, which logs a metric and has hyperparameters."""

    def __init__(self, width=4):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 1))
        self.loss = MeanMetric()
        self.register_buffer("scale", torch.ones(()))
        self.epochs = 0

    def training_step(self, batch, batch_idx):
        loss = self.net(self.scale * batch[0]).square().mean()
        self.log("train/loss", loss)
        return loss

    @decorated
    def validation_step(self, batch, batch_idx):
        self.loss(self.net(batch[0]).square().mean())
        self.log("val/loss", self.loss)

    def on_train_epoch_end(self):
        self.epochs += 1
        self.log("epochs", float(self.epochs))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.1)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["epochs"] = self.epochs


@pytest.mark.parametrize(
    "make", [ImageClassification, LanguageModeling, SequentialRecommendation, lambda: TransferLearning("bert"), Plain]
)
def test_hooks_and_protocols_are_those_of_the_task(make):
    task, wrapped = make(), TaskWrapper(make())
    assert len(HOOKS) > 50
    for name in HOOKS:
        assert is_overridden(name, wrapped) == is_overridden(name, task), name
    for name in ("training_step", "validation_step", "test_step", "predict_step"):
        has_index = [is_param_in_hook_signature(getattr(module, name), "batch_idx") for module in (wrapped, task)]
        assert has_index[0] == has_index[1], name
    for kind in PROTOCOLS:
        assert isinstance(wrapped, kind) == isinstance(task, kind), kind
    assert list(wrapped.state_dict()) == list(task.state_dict())
    with pytest.raises(AttributeError, match=f"'{type(task).__name__}' object has no attribute 'missing'"):
        wrapped.missing  # noqa: B018


def test_a_run_is_that_of_the_task(tmp_path):
    results = []
    for name in ("plain", "wrapped"):
        torch.manual_seed(0)
        task = Plain()
        data = DataLoader(TensorDataset(torch.randn(16, 3)), 4)
        trainer = Trainer(
            max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(task if name == "plain" else TaskWrapper(task), data, data)
        trainer.save_checkpoint(tmp_path / f"{name}.ckpt")
        module = trainer.lightning_module
        named = [*module.named_parameters(), *module.named_buffers()]
        content = torch.load(tmp_path / f"{name}.ckpt")
        assert content["hyper_parameters"] == {"width": 4}
        tensors = content["state_dict"], content["optimizer_states"][0]["state"], trainer.callback_metrics
        results.append((*tensors, content["epochs"], [name for name, _ in named]))
    assert results[0][-1] == results[1][-1]
    torch.testing.assert_close(results[1][:-1], results[0][:-1], rtol=0, atol=0)
    assert results[1][2].keys() == {"train/loss", "val/loss", "epochs"}
    restored = TaskWrapper(Plain())
    restored.load_state_dict(results[0][0])
    torch.testing.assert_close(dict(restored.student.state_dict()), results[0][0], rtol=0, atol=0)
