"""VGG: plain stacks of 3x3 convolutions.

Sources: Simonyan and Zisserman 2014 (arXiv 1409.1556), table 1, columns A, B, D and E; batch normalisation, Ioffe and
Szegedy 2015 (arXiv 1502.03167).

B batch, C channels, H and W pixels, D width of the features, K classes.
"""

from typing import Literal

from torch import Tensor, nn

from bigmodel.nn.arguments import check_choice, check_probabilities

ClassifierKind = Literal["auto", "linear", "mlp"]

_WIDTHS = (64, 128, 256, 512, 512)
_CONVOLUTIONS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}  # per stage
_POOLED_SIZE = 7  # pixels on a side that the paper's fully connected layers read
_HIDDEN_WIDTH = 4096


class VGG(nn.Module):
    """Five stages of 3x3 convolutions, each ended by max-pooling: maps images [B, C, H, W] to logits [B, K].

    Args:
        num_classes: number of classes K.
        in_channels: channels C of an image.
        image_size: pixels on a side, at least 32, because it is halved five times.
        depth: number of layers with weights as the paper counts: 11, 13, 16 or 19.
        batch_norm: batch normalisation after each convolution; without it the deeper ones hardly train.
        classifier: layers after the convolutions: "mlp" (the paper's: 7 x 7 positions into two layers of 4096),
            "linear" (the mean over positions into the classes), or "auto": "linear" for images up to 64 pixels.
        dropout: probability to drop a unit of the layers after the convolutions, or with "linear" a feature.

    Raises:
        ValueError: a depth or classifier that does not exist, an image too small, or a dropout outside [0, 1).
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        image_size: int,
        *,
        depth: int = 16,
        batch_norm: bool = True,
        classifier: ClassifierKind = "auto",
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        if depth not in _CONVOLUTIONS:
            raise ValueError(
                f"there is no VGG of depth {depth}: choose --model.net.depth {', '.join(map(str, _CONVOLUTIONS))}"
            )
        if image_size < 32:
            raise ValueError(
                f"images of {image_size} pixels are too small for VGG, which halves them five times: make them at least "
                "32 with --data.size, or choose another --model.net"
            )
        check_choice("classifier", classifier, ClassifierKind)
        check_probabilities(dropout=dropout)
        if classifier == "auto":
            classifier = "linear" if image_size <= 64 else "mlp"

        channels = in_channels
        self.stages = nn.ModuleList()
        for num_convolutions, width in zip(_CONVOLUTIONS[depth], _WIDTHS, strict=True):
            stage = nn.Sequential()
            for _ in range(num_convolutions):
                stage.append(nn.Conv2d(channels, width, 3, padding=1, bias=not batch_norm))
                if batch_norm:
                    stage.append(nn.BatchNorm2d(width))
                stage.append(nn.ReLU(inplace=True))
                channels = width
            self.stages.append(stage.append(nn.MaxPool2d(2)))
        self.pool = nn.AdaptiveAvgPool2d(1 if classifier == "linear" else _POOLED_SIZE)
        self.hidden = nn.Sequential()
        if classifier == "linear":
            self.hidden.append(nn.Dropout(dropout))
        else:
            channels *= _POOLED_SIZE**2
            for _ in range(2):
                self.hidden.extend([nn.Linear(channels, _HIDDEN_WIDTH), nn.ReLU(inplace=True), nn.Dropout(dropout)])
                channels = _HIDDEN_WIDTH
        self.head = nn.Linear(channels, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise all weights, from torch's random state."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
            if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def features(self, images: Tensor) -> Tensor:
        """Map images [B, C, H, W] to the input of the output layer [B, D]."""
        x = images
        for stage in self.stages:
            x = stage(x)
        x = self.pool(x).flatten(1)  # [B, 512, h, w] -> [B, 512 * pooled positions]
        return self.hidden(x)

    def logits(self, features: Tensor) -> Tensor:
        """Map features [..., D] to logits [..., K]."""
        return self.head(features)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, K] of images [B, C, H, W]."""
        return self.logits(self.features(images))
