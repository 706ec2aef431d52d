"""The LeNet of the published Fashion-MNIST results, as a timm model named `lenet`."""

from typing import Any

import torch
from timm.models import register_model
from torch import Tensor, nn


class LeNet(nn.Module):
    """Two 5x5 convolutions (20 and 50 channels) and two linear layers (500 units), for 28x28.

    Without normalisation, as the smoothing literature trains it: the mean is 0, the deviation 1.
    """

    def __init__(self, in_chans: int = 1, num_classes: int = 10):
        super().__init__()
        self.pretrained_cfg = {"mean": (0.0,) * in_chans, "std": (1.0,) * in_chans}
        # Pooling before the ReLU gives the same numbers for a quarter of its work.
        self.features = nn.Sequential(
            nn.Conv2d(in_chans, 20, 5),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Conv2d(20, 50, 5),
            nn.MaxPool2d(2),
            nn.ReLU(),
        )
        self.features.to(memory_format=torch.channels_last)  # half as fast again on CPUs
        self.hidden = nn.Linear(50 * 4 * 4, 500)
        self.head = nn.Linear(500, num_classes)

    def forward_features(self, pixels: Tensor) -> Tensor:
        """Map `(B, C, 28, 28)` to `(B, 50, 4, 4)`."""
        features: Tensor = self.features(pixels)
        return features

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Map `(B, 50, 4, 4)` to logits `(B, K)`, or to the `(B, 500)` before them."""
        pooled = torch.relu(self.hidden(features.flatten(1)))
        return pooled if pre_logits else self.head(pooled)

    def get_classifier(self) -> nn.Linear:
        """The classification head."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new, random head in place."""
        self.head = nn.Linear(self.head.in_features, num_classes)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits `(B, K)`."""
        return self.forward_head(self.forward_features(pixels))


@register_model
def lenet(pretrained: bool = False, **arguments: Any) -> LeNet:
    """Build a LeNet; timm passes what concerns its own pretrained weights as well."""
    if pretrained:
        raise ValueError("lenet has no pretrained weights")
    for key in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        arguments.pop(key, None)
    return LeNet(**arguments)
