"""Fine-tuning methods and penalties on small nets, against closed forms and scikit-learn."""

import sys

import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from bigmodel.tasks.transfer_learning import (
    BiasOnly,
    FullFineTuning,
    GradualUnfreezing,
    KNNProbe,
    L1Penalty,
    L2SPPenalty,
    LinearProbe,
    LoRA,
    param_groups,
)
from bigmodel.tasks.transfer_learning.methods import find_method, knn_probe
from bigmodel.tasks.transfer_learning.methods.base import eval_frozen_modules
from bigmodel.training.optimizers import configure


class SmallBackbone(nn.Module):
    """A backbone [B, 3, 6, 6] -> [B, 8]: a stem, three layers, a norm after them."""

    modality = "images"
    num_layers = 3
    width = 8

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.ReLU()) for _ in range(3)]
        )
        self.norm = nn.LayerNorm(8)

    def layer_of(self, name):
        return {"stem": 0, "norm": 4}.get(name.split(".")[0]) if "blocks" not in name else int(name.split(".")[1]) + 1

    def forward(self, images):
        features = self.stem(images).mean((2, 3))
        for block in self.blocks:
            features = features + block(features)
        return self.norm(features)


class Net(nn.Module):
    def __init__(self, backbone=None):
        super().__init__()
        self.backbone, self.pool, self.dropout = backbone or SmallBackbone(), None, nn.Dropout(0.1)
        self.head = nn.Linear(8, 3)

    def forward(self, images):
        return self.head(self.dropout(self.backbone(images)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = Net()
    for module in net.modules():  # statistics that say something
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return net


def copied(net):
    return {name: value.clone() for name, value in net.state_dict().items()}


def changed(net, before):
    return {name for name, value in net.state_dict().items() if name in before and not torch.equal(value, before[name])}


def trained_for(net, method, steps=3):
    """Names of the parameters and buffers that training changes."""
    method.wrap(net, "single_label_classification")
    net.train()
    eval_frozen_modules(net.backbone)
    optimizer = torch.optim.AdamW([parameter for _, parameter in method.trainable(net)], lr=0.1)
    before = copied(net)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(net(torch.randn(8, 3, 6, 6)), torch.randint(0, 3, (8,))).backward()
        optimizer.step()
    return changed(net, before)


HEAD = {"head.weight", "head.bias"}


@pytest.mark.parametrize(
    ("method", "moves"),
    [
        (LinearProbe(), lambda name: False),
        (BiasOnly(), lambda name: name.endswith("bias")),
        (LoRA(rank=2), lambda name: ".lora_" in name),
        (GradualUnfreezing(), lambda name: False),  # at the start
        (FullFineTuning(), lambda name: True),
    ],
)
def test_frozen_weights_and_statistics_are_unchanged(net, method, moves):
    moved = trained_for(net, method)
    assert moved == HEAD | {name for name in net.backbone.state_dict(prefix="backbone.") if moves(name)}
    frozen = type(method) in (LinearProbe, GradualUnfreezing)
    assert any(part.training for part in net.backbone.modules()) != frozen, "dropout stays on where something trains"


def test_gradual_stages_and_steps(net):
    method = GradualUnfreezing(at=[2, 4], layers_at_once=2)
    method.wrap(net, "single_label_classification")
    names = [name for name, _ in method.trainable(net)]
    assert sorted(names) == sorted(name for name, _ in net.named_parameters())
    method = GradualUnfreezing(at=[0.25, 0.5])
    method.wrap(net := Net(), "single_label_classification")
    assert {name.split(".")[2] for name, _ in method.trainable(net) if "blocks" in name} == {"1", "2"}
    assert method.stage_steps(num_steps=10) == [3, 5]
    with pytest.raises(ValueError, match=r"--trainer\.max_steps or"):
        method.stage_steps(num_steps=-1)
    with pytest.raises(ValueError, match=r"must rise"):
        GradualUnfreezing(at=[5, 3]).stage_steps(10)
    with pytest.raises(ValueError, match=r"--model.method.at has 5 entries; .* accepts at most 4"):
        GradualUnfreezing(at=[1, 2, 3, 4, 5]).wrap(Net(), "single_label_classification")
    default = GradualUnfreezing()
    default.wrap(Net(), "single_label_classification")
    assert default.stage_steps(80) == [10, 20, 30, 40]


def test_layer_decay_and_no_weight_decay_of_vectors(net):
    layers = param_groups.layer_groups(net, net.parameters(), 0.5, by_layer=False)
    built = configure(
        None,
        lambda given: torch.optim.AdamW(given, lr=0.8, weight_decay=0.1),
        None,
        param_groups.parameter_groups(layers),
    )
    rates = {}
    for group in built["optimizer"].param_groups:
        for parameter in group["params"]:
            assert id(parameter) not in rates
            rates[id(parameter)] = group["lr"]
            assert group["weight_decay"] == (0.1 if parameter.ndim >= 2 else 0)
    assert len(rates) == len(list(net.parameters()))
    for name, parameter in net.named_parameters():
        layer = net.backbone.layer_of(name.removeprefix("backbone.")) if "backbone" in name else None
        assert rates[id(parameter)] == pytest.approx(0.8 * (1 if layer is None else 0.5 ** (3 + 1 - layer))), name
    alike = param_groups.layer_groups(net, net.parameters(), 1.0, by_layer=False)
    assert [layer.name for layer in alike] == ["head", "backbone"]


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "loha", "lokr"])
def test_adapters_are_zero_at_the_start_and_merge(net, kind):
    images, names = torch.randn(4, 3, 6, 6), list(net.state_dict())
    net.eval()
    start = net(images)
    method = LoRA(rank=2, kind=kind)
    method.wrap(net, "single_label_classification")
    torch.testing.assert_close(net.eval()(images), start, rtol=0, atol=1e-6)
    adapters = {name for name, _ in method.trainable(net)} - HEAD
    assert adapters
    assert not adapters & set(names)
    optimizer = torch.optim.SGD([parameter for _, parameter in method.trainable(net)], lr=0.5)
    for _ in range(3):
        F.cross_entropy(net(images), torch.tensor([0, 1, 2, 0])).backward()
        optimizer.step()
    apart = net.eval()(images)
    assert (apart - start).abs().max() > 1e-2
    method.merge(net)
    assert list(net.state_dict()) == names
    torch.testing.assert_close(net(images), apart, rtol=0, atol=1e-5)


def test_targets_of_adapters(net, monkeypatch):
    LoRA(targets=["stem.0", "1.0"]).wrap(net, "single_label_classification")
    assert {name.split(".lora_A")[0] for name in net.state_dict() if "lora_A" in name} == {
        "backbone.stem.0", "backbone.blocks.1.0",
    }  # fmt: skip
    with pytest.raises(
        ValueError,
        match=r"--model.method.targets 'query' matches no layer of the backbone; accepted are stem.0, blocks.0.0",
    ):
        LoRA(targets=["query"]).wrap(Net(), "single_label_classification")
    images = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(
        ValueError, match=r"no linear layers; set --model.method.targets to other layers; accepted are 0"
    ):
        LoRA().wrap(Net(images), "single_label_classification")
    with pytest.raises(ValueError, match="bias_only: this backbone has no biases; accepted are full"):
        BiasOnly().wrap(Net(nn.Linear(8, 8, bias=False)), "single_label_classification")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"pip install 'bigmodel\[transfer\]'"):
        LoRA().wrap(Net(), "single_label_classification")


def neighbors(features, targets, k=5, problem_type="single_label_classification", num_classes=3):
    head = knn_probe.Neighbors(k, 0.1, problem_type, num_classes, 0, features.shape[1])
    head.fit(features, targets)
    return head


def test_neighbors_equal_scikit_learn_in_any_blocks(monkeypatch):
    torch.manual_seed(0)
    features, targets, queries = torch.randn(50, 8), torch.randint(0, 3, (50,)), torch.randn(9, 8)
    reference = KNeighborsClassifier(
        5, metric="cosine", weights=lambda distances: torch.tensor((1 - distances) / 0.1).exp().numpy()
    )
    reference.fit(features.numpy(), targets.numpy())
    expected = torch.from_numpy(reference.predict_proba(queries.numpy())).float()
    for block in (7, 50, 1000):
        monkeypatch.setattr(knn_probe, "_BLOCK", block)
        head = neighbors(features, targets)
        torch.testing.assert_close(head(queries).softmax(-1), expected, rtol=1e-4, atol=1e-5)


def test_neighbors_exclude_the_sample_itself():
    torch.manual_seed(0)
    features, numbers = torch.randn(30, 4), torch.arange(30)
    head = neighbors(features, numbers % 3)
    similarity, which = head.nearest(features, numbers)
    assert not (which == numbers[:, None]).any()
    cosine = F.normalize(features, dim=-1) @ F.normalize(features, dim=-1).T
    cosine.fill_diagonal_(float("-inf"))
    torch.testing.assert_close(similarity, cosine.sort(descending=True).values[:, :5])
    assert (head.nearest(features)[1][:, 0] == numbers).all(), "another split's samples are not left out"
    # Told by one's own label alone, all would be right.
    lonely = neighbors(torch.eye(4), torch.tensor([0, 1, 2, 2]), k=1)
    assert (lonely(torch.eye(4)).argmax(-1) == torch.tensor([0, 1, 2, 2])).all()
    assert not (lonely(torch.eye(4), torch.arange(4)).argmax(-1)[:2] == torch.tensor([0, 1])).any()


def test_neighbors_multi_label_and_regression():
    features = torch.eye(4)
    numbers = neighbors(features, torch.tensor([1.0, 2.0, 3.0, 4.0]), k=1, problem_type="regression", num_classes=1)
    torch.testing.assert_close(numbers(features), torch.tensor([[1.0], [2.0], [3.0], [4.0]]))
    labels = torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]])
    head = neighbors(features, labels, k=1, problem_type="multi_label_classification")
    torch.testing.assert_close(head(features).sigmoid(), labels, rtol=0, atol=1e-5)


def test_penalties_equal_their_closed_forms(net):
    pretrained = dict(net.backbone.named_parameters())
    origin = copied(net)
    penalty = L2SPPenalty(strength=0.3, head_strength=0.2)
    penalty.start(pretrained, dict(net.named_parameters()))
    identity = penalty.identity()
    for parameter in net.parameters():
        parameter.data += torch.randn_like(parameter)
    way = sum(float((p.detach() - origin[f"backbone.{name}"]).square().sum()) for name, p in pretrained.items())
    assert penalty.identity() == identity, "the starting point stays where it was"
    value = penalty()
    assert value.item() == pytest.approx(0.15 * way + 0.1 * net.head.weight.square().sum().item(), rel=1e-5)
    value.backward()
    grad = net.backbone.norm.weight.grad
    torch.testing.assert_close(grad, 0.3 * (net.backbone.norm.weight - origin["backbone.norm.weight"]).detach())
    assert net.head.bias.grad is None
    moved = L2SPPenalty()
    moved.start(pretrained, dict(net.named_parameters()))
    assert moved.identity() != identity

    least = L1Penalty(0.5)
    least.start(pretrained, {"weight": net.head.weight, "bias": net.head.bias})
    assert least().item() == pytest.approx(0.5 * net.head.weight.abs().sum().item(), rel=1e-6)
    with pytest.raises(ValueError, match=r"set --model\.penalty null"):
        least.start(pretrained, {"bias": net.head.bias})
    with pytest.raises(ValueError, match=r"this method trains none of them: set --model.method to full"):
        L2SPPenalty().start(pretrained, {"head.weight": net.head.weight})


def test_find_method_and_invalid_settings():
    assert type(find_method("knn_probe")) is KNNProbe
    assert find_method(method := LoRA(rank=3)) is method
    with pytest.raises(ValueError, match=r"--model.method loar: accepted are full, linear_probe"):
        find_method("loar")
    for wrong in (
        lambda: LoRA(rank=0),
        lambda: KNNProbe(k=0),
        lambda: GradualUnfreezing(at=[0]),
        lambda: L1Penalty(-1),
    ):
        with pytest.raises(ValueError, match="--model"):
            wrong()
