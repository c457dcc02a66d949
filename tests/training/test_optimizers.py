"""Schedules against torch's own and closed forms; parameter groups; settings that win when resuming."""

import functools
import math
import sys

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from bigmodel.training import optimizers, schedules


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
        (schedules.Constant(), lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0)),
        (schedules.Linear(final=0.1), lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.1, total_iters=20)),
        (schedules.Cosine(final=0.1), lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 20, eta_min=0.1)),
        (schedules.Exponential(final=0.01), lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.01 ** (1 / 20))),
        (schedules.Step(milestones=(0.5, 0.75)), lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [10, 15], 0.1)),
    ],
)
def test_schedules_agree_with_torch(schedule, reference):
    assert rates(schedule, 20) == pytest.approx(torch_rates(reference, 20), abs=1e-9)


@pytest.mark.parametrize(
    "kind", [schedules.Constant, schedules.Linear, schedules.Cosine, schedules.Exponential, schedules.Step]
)
def test_warmup_comes_before_any_of_them(kind):
    assert rates(kind(warmup_steps=4), 24)[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates(kind(warmup_steps=4), 24)[4:] == rates(kind(), 20)


def test_warmup_stable_decay():
    assert rates(schedules.WarmupStableDecay(2, final=0.0, decay=0.5), 10) == [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]


def test_schedules_hold_their_end_and_refuse_nonsense():
    assert schedules.Cosine(final=0.2)(50, 20) == pytest.approx(0.2)
    with pytest.raises(ValueError, match=r"final 1.5"):
        schedules.Cosine(final=1.5)
    with pytest.raises(ValueError, match="warmup_steps -1"):
        schedules.Linear(warmup_steps=-1)
    with pytest.raises(ValueError, match=r"--model.schedule.final 0"):
        schedules.Exponential(final=0.0)


def test_decay_acts_on_matrices_and_each_parameter_stands_once():
    tied = nn.Linear(3, 3)
    net = nn.ModuleDict({"a": tied, "b": tied, "norm": nn.LayerNorm(3), "embed": nn.Embedding(5, 3)})
    net["embed"].weight.requires_grad = False
    decayed, exempt = optimizers.parameter_groups(net)
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
    old = optimizers.configure(
        module, functools.partial(torch.optim.AdamW, lr=1.0, weight_decay=0.1), schedules.Linear()
    )
    for _ in range(5):
        module.layer(torch.ones(2)).sum().backward()
        old["optimizer"].step()
        old["lr_scheduler"]["scheduler"].step()
    new = optimizers.configure(
        module, functools.partial(torch.optim.AdamW, lr=0.5, weight_decay=0.3), schedules.Linear()
    )
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
    built = optimizers.configure(module, functools.partial(getattr(torch.optim, name), lr=0.01))["optimizer"]
    module.layer(torch.ones(2)).square().sum().backward()
    before = module.layer.weight.detach().clone()
    built.step()
    assert not torch.equal(before, module.layer.weight)
    assert all(math.isfinite(value) for value in module.layer.weight.flatten().tolist())


def test_a_schedule_that_ends_needs_an_end():
    module = attached(max_epochs=-1)
    with pytest.raises(ValueError, match=r"needs a run of limited length: set --trainer.max_steps"):
        optimizers.configure(module, torch.optim.AdamW, schedules.Cosine())
    for parameter in module.parameters():
        parameter.requires_grad = False
    with pytest.raises(ValueError, match="no trainable parameter"):
        optimizers.configure(module, torch.optim.AdamW)


@pytest.fixture
def sharded(tmp_path):
    """Makes a parameter sharded over this one process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    return lambda values: nn.Parameter(distribute_tensor(values.clone(), mesh, [Shard(0)]))


def stepped(parameters, optimizer):
    """The parameters after three steps, and the optimizer of `configure`."""
    module = LightningModule()
    module.weight, module.bias = parameters
    made = optimizers.configure(module, optimizer)["optimizer"]
    for step in range(3):
        for p in parameters:
            grad = torch.linspace(-1, 1 + step, p.numel()).view(p.shape)
            p.grad = distribute_tensor(grad, p.device_mesh, p.placements) if isinstance(p, DTensor) else grad
        made.step()
    return [p.full_tensor() if isinstance(p, DTensor) else p for p in parameters], made


WEIGHTS = torch.linspace(-2, 2, 12).view(4, 3), torch.ones(3)
SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1)
ADAMW = functools.partial(torch.optim.AdamW, lr=0.1)


@pytest.mark.parametrize(("make", "fused"), [(SGD, False), (ADAMW, True)], ids=["SGD", "AdamW"])
def test_fused_is_kept_for_sharded_parameters_where_torch_has_it(make, fused, sharded, capsys):
    values, made = stepped([sharded(w) for w in WEIGHTS], functools.partial(make, fused=True))
    assert [bool(group["fused"]) for group in made.param_groups] == [fused] * 2
    expected, _ = stepped([nn.Parameter(w.clone()) for w in WEIGHTS], make)
    torch.testing.assert_close(values, expected)
    said = capsys.readouterr().out
    if fused:
        assert not said
    else:
        assert said.count("\n") == 1
        assert "fused true: torch" in said
        assert "no fused SGD for sharded parameters in float32 on cpu; the ordinary one is used" in said


@pytest.mark.parametrize("make", [SGD, ADAMW], ids=["SGD", "AdamW"])
def test_fused_is_dropped_where_the_device_lacks_it(make, monkeypatch, capsys):
    given = functools.partial(make, fused=True)
    _, kept = stepped([nn.Parameter(w.clone()) for w in WEIGHTS], given)
    assert all(group["fused"] for group in kept.param_groups)
    assert not capsys.readouterr().out
    inside = sys.modules["torch.optim.optimizer"]  # torch.optim hides it
    monkeypatch.setattr(inside, "_get_fused_kernels_supported_devices", lambda: ["cuda"])
    values, made = stepped([nn.Parameter(w.clone()) for w in WEIGHTS], given)
    expected, plain = stepped([nn.Parameter(w.clone()) for w in WEIGHTS], make)
    assert all(torch.equal(a, b) for a, b in zip(values, expected, strict=True))
    assert f"no fused {type(made).__name__} for parameters in float32 on cpu" in capsys.readouterr().out
    # A checkpoint of a fused optimizer is read, and its setting is not.
    made.load_state_dict(kept.state_dict())
    assert not any(group["fused"] for group in made.param_groups)
    made.step()
    assert not getattr(made, "_step_supports_amp_scaling", False)
    assert made.defaults.keys() == plain.defaults.keys()
