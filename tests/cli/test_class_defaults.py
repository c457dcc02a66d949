"""A class in place of a signature's default class has its own defaults, unless they are given."""

import inspect
import json

import pytest
import torch
import yaml
from outsider import TabularRegression

from bigmodel.cli.class_defaults import fill_class_defaults

TASK = "outsider.TabularRegression"


def optimizer_of(bm, *flags):
    config = yaml.safe_load(bm("fit", *flags, "--print_config"))
    return config["model"]["init_args"]["optimizer"]


@pytest.mark.parametrize("name", ["Adam", "RMSprop", "SGD", "NAdam", "Adagrad", "Adamax", "Muon"])
def test_an_optimizer_has_the_defaults_of_its_signature(bm, name):
    block = {"model": {"class_path": TASK, "init_args": {"optimizer": f"torch.optim.{name}"}}}
    fill_class_defaults(block)
    parameters = inspect.signature(getattr(torch.optim, name)).parameters
    given = block["model"]["init_args"]["optimizer"]["init_args"]
    assert {"lr", "weight_decay"} <= given.keys() <= parameters.keys()
    assert given == json.loads(json.dumps({key: parameters[key].default for key in given}))
    resolved = optimizer_of(bm, "--model.optimizer", f"torch.optim.{name}")["init_args"]
    assert {key: resolved[key] for key in given} == given


def test_given_arguments_and_the_default_class_stay_as_they_are(bm):
    adam = optimizer_of(bm, "--model.optimizer", "torch.optim.Adam", "--model.optimizer.weight_decay", "0.25")
    assert adam["init_args"]["weight_decay"] == 0.25
    default = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.5}}
    block = {"class_path": TASK, "init_args": {"optimizer": dict(default)}}
    fill_class_defaults(block)
    assert block["init_args"]["optimizer"] == default
    assert inspect.signature(TabularRegression).parameters["optimizer"].default is torch.optim.AdamW


def test_nets_have_their_own_sizes(bm):
    block = {
        "class_path": "bigmodel.tasks.recommendation.SequentialRecommendation",
        "init_args": {"net": {"class_path": "bigmodel.nn.GRU4Rec", "init_args": {"width": 32}}},
    }
    fill_class_defaults(block)
    net = block["init_args"]["net"]["init_args"]
    assert (net["width"], net["depth"], net["init_std"]) == (32, 1, 0.1)
    assert "num_items" not in net, "required: it comes from the data"
