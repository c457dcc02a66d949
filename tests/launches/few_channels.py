"""`python few_channels.py CASES`: gradients of a net of few channels on images in channels_last, step by step, against
those of its copy in float64, which oneDNN has no part in."""

import copy
import sys
from functools import partial

import torch
from torch import nn

from bigmodel.nn import ResNet
from bigmodel.run import set_sizes
from bigmodel.tasks.image_classification import ImageClassification
from bigmodel.tasks.image_classification.batch import ImageBatch

IMAGES = ((32, 8), (64, 8), (128, 2))  # pixels on a side, images
STATISTICS = ([0.5] * 3, [0.25] * 3)


def batch(pixels, count):
    images = torch.randint(0, 256, (count, pixels, pixels, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    assert images.is_contiguous(memory_format=torch.channels_last)
    numbers = torch.arange(count)
    return ImageBatch(images=images, targets=numbers % 2, index=numbers, key=numbers, weight=torch.ones(count))


def image_task(net):
    task = ImageClassification(net=net, mean=STATISTICS[0], std=STATISTICS[1])
    set_sizes(task, {"num_classes": 2, "in_channels": 3, "image_size": 32})
    task.configure_model()
    return task, lambda task, data: task.training_step(data)["loss"]


def transformers_config():
    from transformers import ResNetConfig

    return ResNetConfig(
        embedding_size=4, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", downsample_in_first_stage=True
    )


def published():
    from transformers import ResNetForImageClassification

    from bigmodel.tasks.image_classification.hugging_face import Classifier

    model = ResNetForImageClassification(transformers_config())
    return image_task(lambda **sizes: Classifier(model, None, None))


def backbone():
    from transformers import ResNetModel

    from bigmodel.tasks.transfer_learning.backbones.hf_vision import HuggingFaceImages

    sizes = {"in_channels": 3, "image_size": 32}
    net = HuggingFaceImages(ResNetModel(transformers_config()), STATISTICS, sizes)
    return net, lambda net, data: net(data)[0].square().sum()


CASES = {
    "image_task": lambda: image_task(partial(ResNet, blocks=(1, 1, 1), widths=(4, 8, 12), stem="cifar")),
    "published": published,
    "backbone": backbone,
}


def main(case):
    torch.manual_seed(0)
    torch.set_num_threads(2)
    module, loss_of = CASES[case]()
    with torch.no_grad():
        for parameter in module.parameters():  # also what starts at zero
            parameter.add_(0.1 * torch.randn_like(parameter))
    convolutions = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    assert any(m.kernel_size == (1, 1) and m.stride == (2, 2) and m.in_channels == 4 for m in convolutions)
    exact = copy.deepcopy(module).double()
    for pixels, count in IMAGES:
        for _ in range(3):
            data = batch(pixels, count)
            for each in (module, exact):
                each.zero_grad()
                loss_of(each, data).backward()
            for (name, ours), theirs in zip(module.named_parameters(), exact.parameters(), strict=True):
                error = (ours.grad - theirs.grad).abs().max() / theirs.grad.abs().max().clamp(min=1e-2)
                assert error < 1e-2, (
                    f"{case}, {pixels} pixels: the gradient of {name} is off by {error:.2g} of its size"
                )
            with torch.no_grad():
                for ours, theirs in zip(module.parameters(), exact.parameters(), strict=True):
                    ours.sub_(1e-3 * ours.grad)
                    theirs.copy_(ours)
    print(f"{case}: the same", flush=True)


if __name__ == "__main__":
    for case in sys.argv[1:]:
        main(case)
