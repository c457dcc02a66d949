"""A multilayer perceptron on the pixels: the simplest net, to compare others with.

B batch, C channels, H and W pixels, D width of the last hidden layer, K classes.
"""

from torch import Tensor, nn

from bigmodel.nn.arguments import check_images, check_probabilities, check_sizes


class MLP(nn.Module):
    """Fully connected layers with ReLU on the flattened pixels: maps images [B, C, H, W] to logits [B, K].

    Args:
        num_classes: number of classes K.
        in_channels: channels C of an image.
        image_size: pixels on a side.
        widths: units of each hidden layer; none makes it multinomial logistic regression.
        dropout: probability to drop a hidden unit.

    Raises:
        ValueError: a width below one, or a dropout outside [0, 1).
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        image_size: int,
        *,
        widths: tuple[int, ...] = (256, 256),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_sizes(widths=min(widths, default=1))
        check_probabilities(dropout=dropout)
        self.in_channels, self.image_size = in_channels, image_size
        width = in_channels * image_size**2
        self.blocks = nn.ModuleList()
        for hidden in widths:
            self.blocks.append(nn.Sequential(nn.Linear(width, hidden), nn.ReLU(inplace=True), nn.Dropout(dropout)))
            width = hidden
        self.head = nn.Linear(width, num_classes)

    def reset_parameters(self) -> None:
        """Initialise all weights, from torch's random state: torch's own initialisation of linear layers."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()

    def features(self, images: Tensor) -> Tensor:
        """Map images [B, C, H, W] to the input of the output layer [B, D]."""
        check_images(images, self.in_channels, self.image_size)
        x = images.flatten(1)  # [B, C, H, W] -> [B, C * H * W]
        for block in self.blocks:
            x = block(x)
        return x

    def logits(self, features: Tensor) -> Tensor:
        """Map features [..., D] to logits [..., K]."""
        return self.head(features)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, K] of images [B, C, H, W]."""
        return self.logits(self.features(images))
