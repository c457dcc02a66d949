"""Schedules against torch's own and closed forms; parameter groups; settings that win when resuming."""

import functools
import math

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from bigmodel import optim


def rates(schedule, total):
    return [schedule(step, total) for step in range(total)]


def torch_rates(make, total):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer)
    out = []
    for _ in range(total):
        out.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return out


@pytest.mark.parametrize(
    ("schedule", "reference"),
    [
        (optim.Constant(), lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0)),
        (optim.Linear(final=0.1), lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.1, total_iters=20)),
        (optim.Cosine(final=0.1), lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 20, eta_min=0.1)),
        (optim.Exponential(final=0.01), lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.01 ** (1 / 20))),
        (optim.Step(milestones=(0.5, 0.75)), lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [10, 15], 0.1)),
    ],
)
def test_schedules_agree_with_torch(schedule, reference):
    assert rates(schedule, 20) == pytest.approx(torch_rates(reference, 20), abs=1e-9)


@pytest.mark.parametrize("kind", [optim.Constant, optim.Linear, optim.Cosine, optim.Exponential, optim.Step])
def test_warmup_comes_before_any_of_them(kind):
    assert rates(kind(warmup_steps=4), 24)[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates(kind(warmup_steps=4), 24)[4:] == rates(kind(), 20)


def test_warmup_stable_decay():
    assert rates(optim.WarmupStableDecay(2, final=0.0, decay=0.5), 10) == [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]


def test_schedules_hold_their_end_and_refuse_nonsense():
    assert optim.Cosine(final=0.2)(50, 20) == pytest.approx(0.2)
    with pytest.raises(ValueError, match=r"final 1.5"):
        optim.Cosine(final=1.5)
    with pytest.raises(ValueError, match="warmup_steps -1"):
        optim.Linear(warmup_steps=-1)
    with pytest.raises(ValueError, match="never reached"):
        optim.Exponential(final=0.0)


def test_decay_acts_on_matrices_and_each_parameter_stands_once():
    tied = nn.Linear(3, 3)
    net = nn.ModuleDict({"a": tied, "b": tied, "norm": nn.LayerNorm(3), "embed": nn.Embedding(5, 3)})
    net["embed"].weight.requires_grad = False
    decayed, exempt = optim.parameter_groups(net)
    assert [p is tied.weight for p in decayed["params"]] == [True]
    assert {id(p) for p in exempt["params"]} == {id(tied.bias), id(net["norm"].weight), id(net["norm"].bias)}
    assert exempt["weight_decay"] == 0.0


def attached(**trainer_options):
    module = LightningModule()
    module.layer = nn.Linear(2, 2)
    module.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, **trainer_options)
    return module


def test_explicit_settings_win_when_a_state_is_loaded():
    module = attached(max_steps=10)
    old = optim.configure(module, functools.partial(torch.optim.AdamW, lr=1.0, weight_decay=0.1), optim.Linear())
    for _ in range(5):
        module.layer(torch.ones(2)).sum().backward()
        old["optimizer"].step()
        old["lr_scheduler"]["scheduler"].step()
    new = optim.configure(module, functools.partial(torch.optim.AdamW, lr=0.5, weight_decay=0.3), optim.Linear())
    new["optimizer"].load_state_dict(old["optimizer"].state_dict())
    new["lr_scheduler"]["scheduler"].load_state_dict(old["lr_scheduler"]["scheduler"].state_dict())
    matrices, vectors = new["optimizer"].param_groups
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.3, 0.0)
    assert matrices["lr"] == pytest.approx(0.5 * 0.5)  # the new rate, half way
    state = new["optimizer"].state[module.layer.weight]
    assert torch.equal(state["exp_avg"], old["optimizer"].state[module.layer.weight]["exp_avg"])
    new["optimizer"].step()
    new["lr_scheduler"]["scheduler"].step()
    assert matrices["lr"] == pytest.approx(0.5 * 0.4)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "NAdam", "Adafactor", "Rprop"])
def test_any_optimizer_of_torch_takes_the_groups(name):
    module = attached(max_steps=10)
    built = optim.configure(module, functools.partial(getattr(torch.optim, name), lr=0.01))["optimizer"]
    module.layer(torch.ones(2)).square().sum().backward()
    before = module.layer.weight.detach().clone()
    built.step()
    assert not torch.equal(before, module.layer.weight)
    assert all(math.isfinite(value) for value in module.layer.weight.flatten().tolist())


def test_a_schedule_that_ends_needs_an_end():
    module = attached(max_epochs=-1)
    with pytest.raises(ValueError, match=r"the run has no end: set --trainer.max_steps"):
        optim.configure(module, torch.optim.AdamW, optim.Cosine())
    for parameter in module.parameters():
        parameter.requires_grad = False
    with pytest.raises(ValueError, match="no trainable parameter"):
        optim.configure(module, torch.optim.AdamW)
