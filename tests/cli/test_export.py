"""Exported weights equal those of `bigmodel.load`, in a file that safetensors reads."""

import json
from pathlib import Path

import torch
from outsider import MLP, TabularRegression
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import bigmodel

FIT_FLAGS = ["--trainer.max_epochs", "2"]


class Awkward(nn.Module):
    """Maps [B, num_features] to [B]; a tied tensor, a convolution in channels_last, and two views of one memory."""

    def __init__(self, num_features):
        super().__init__()
        self.net = MLP(num_features, width=4)
        self.again = nn.Linear(num_features, 4)
        self.again.weight = self.net.layers[0].weight
        self.conv = nn.Conv2d(3, 2, 3).to(memory_format=torch.channels_last)
        both = torch.arange(6.0)
        self.register_buffer("low", both[:3])
        self.register_buffer("high", both[3:])

    def forward(self, features):
        return self.net(features) + 0 * (self.again(features).sum() + self.conv.weight.sum())


class AwkwardRegression(TabularRegression):
    __module__ = "outsider"  # what a run names must be of an installed task's package

    def __init__(self) -> None:
        super().__init__(Awkward)


def run_directory():
    (record,) = Path("runs").glob("**/run.json")
    return record.parent


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def same(exported, net):
    weights = net.state_dict()
    return exported.keys() == weights.keys() and all(torch.equal(exported[name], weights[name]) for name in weights)


def test_what_is_exported_is_what_load_gives(bm):
    bm("fit", "--callbacks.ema", "bigmodel.training.callbacks.EMA", "--callbacks.ema.decay", 0.5)
    run = run_directory()
    out = bm("export", "last")
    (best,) = run.glob("*.safetensors")
    assert (
        f"wrote {best}: EMA of the weights of {best.stem}.ckpt, 129 parameters, {best.stat().st_size / 1e3:.3g} kB"
        in out
    )
    (plain := Path("plain")).touch()
    assert best.stat().st_mode == plain.stat().st_mode, "as any other file of this person"
    exported = load_file(best)
    assert same(exported, bigmodel.load(run).net)
    assert not same(exported, bigmodel.load(run, ema=False).net)
    facts = metadata(best)
    assert facts.pop("format") == "pt"
    facts = {key: json.loads(value) for key, value in facts.items()}
    assert facts["class_path"] == "outsider.module.MLP"
    assert facts["sizes"] == {"num_features": 2}
    assert facts["version"] == bigmodel.__version__
    assert facts["model"]["init_args"]["net"]["init_args"]["width"] == 32
    assert (facts["average"], facts["tied"], facts["checkpoint"]) == ("EMA", {}, f"{best.stem}.ckpt")

    bm("export", run, "--checkpoint", "last", "--output", "weights.safetensors")
    assert same(load_file("weights.safetensors"), bigmodel.load(run, "last").net)
    assert not list(Path().glob("**/*.partial"))


def test_tied_tensors_stand_there_once_and_every_tensor_is_contiguous(bm, monkeypatch):
    monkeypatch.setattr("outsider.AwkwardRegression", AwkwardRegression, raising=False)
    monkeypatch.setattr("outsider.module.AwkwardRegression", AwkwardRegression, raising=False)
    bm("fit", "--model", "outsider.AwkwardRegression")
    bm("export", "last", "--output", "weights.safetensors")
    exported, net = load_file("weights.safetensors"), bigmodel.load("last").net
    assert json.loads(metadata("weights.safetensors")["tied"]) == {"again.weight": "net.layers.0.weight"}
    assert not net.conv.weight.is_contiguous()
    assert same(exported | {"again.weight": exported["net.layers.0.weight"]}, net)
    assert all(tensor.is_contiguous() for tensor in exported.values())


def test_errors_and_existing_files(bm):
    bm("fit")
    Path("there.safetensors").write_text("mine")
    assert "there.safetensors exists" in bm("export", "last", "--output", "there.safetensors", fails=True)
    assert Path("there.safetensors").read_text() == "mine"
    assert "no flag --chekpoint; `bigmodel export` accepts --checkpoint" in bm(
        "export", "last", "--chekpoint", "best", fails=True
    )
    assert "there is no folder nowhere" in bm("export", "last", "--output", "nowhere/a.safetensors", fails=True)
    assert "name one run" in bm("export", fails=True)
    assert "has no checkpoint first" in bm("export", "last", "--checkpoint", "first", fails=True)
    assert "--output FILE" in bm("export", "--help")


class MergedRegression(TabularRegression):
    """A task that merges its net for export."""

    __module__ = "outsider"

    def merged_model(self):
        return self.net.layers


def test_a_task_may_define_the_exported_net(bm, monkeypatch):
    monkeypatch.setattr("outsider.MergedRegression", MergedRegression, raising=False)
    monkeypatch.setattr("outsider.module.MergedRegression", MergedRegression, raising=False)
    bm("fit", "--model", "outsider.MergedRegression")
    bm("export", "last", "--output", "weights.safetensors")
    assert same(load_file("weights.safetensors"), bigmodel.load("last").net.layers)
    assert json.loads(metadata("weights.safetensors")["class_path"]) == "torch.nn.modules.container.Sequential"
