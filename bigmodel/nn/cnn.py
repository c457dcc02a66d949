"""A small convolutional net for small images.

Sources: LeCun et al. 1998 for the idea; batch normalisation, Ioffe and Szegedy 2015 (arXiv 1502.03167); the mean over
positions at the end, Lin et al. 2013 (arXiv 1312.4400).

B batch, C channels, H and W pixels, D width of the last stage, K classes.
"""

import math

from torch import Tensor, nn

from bigmodel.nn.arguments import check_sizes


class CNN(nn.Module):
    """Stages of 3x3 convolutions with batch normalisation and ReLU: maps images [B, C, H, W] to logits [B, K].

    Three stages, one more for each doubling of the image over 32 pixels. Each but the first begins with max-pooling
    that halves the image, and has twice the width.

    Args:
        num_classes: number of classes K.
        in_channels: channels C of an image.
        image_size: pixels on a side, made for 8 to 64.
        width: channels of the first stage; multiples of 16 are fastest on a CPU.
        depth: convolutions in each stage.

    Raises:
        ValueError: a width or depth below one.
    """

    def __init__(self, num_classes: int, in_channels: int, image_size: int, *, width: int = 16, depth: int = 3) -> None:
        super().__init__()
        check_sizes(width=width, depth=depth)
        channels = in_channels
        self.stages = nn.ModuleList()
        for i in range(3 + max(0, math.ceil(math.log2(image_size / 32)))):
            stage = nn.Sequential(*[nn.MaxPool2d(2)] if i > 0 else [])
            for _ in range(depth):
                stage.append(nn.Conv2d(channels, width * 2**i, 3, padding=1, bias=False))
                stage.append(nn.BatchNorm2d(width * 2**i))
                stage.append(nn.ReLU(inplace=True))
                channels = width * 2**i
            self.stages.append(stage)
        self.head = nn.Linear(channels, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise all weights, from torch's random state."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d | nn.Linear):
                module.reset_parameters()

    def features(self, images: Tensor) -> Tensor:
        """Map images [B, C, H, W] to features [B, D], the mean over the last stage's positions."""
        x = images
        for stage in self.stages:
            x = stage(x)
        return x.mean(dim=(2, 3))  # [B, D, h, w] -> [B, D]

    def logits(self, features: Tensor) -> Tensor:
        """Map features [..., D] to logits [..., K]."""
        return self.head(features)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, K] of images [B, C, H, W]."""
        return self.logits(self.features(images))
