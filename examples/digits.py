"""The embedded example: real handwritten digits, 8 x 8 pixels of 0 to 16, and a small residual CNN that reads them.

The 1,797 images are the test set of "Optical Recognition of Handwritten Digits" (UCI), as scikit-learn ships it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

SPLIT_SEED = 0
TRAIN, VALIDATION = 1077, 360  # the remaining 360 are the test part
LARGEST = 16.0
"""Highest raw pixel value; the model takes pixels divided by it."""


class Split(NamedTuple):
    """Inputs as the model takes them, (N, 1, 8, 8) in 0 to 1, and labels (N,) of three disjoint parts."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


class Residual(nn.Module):
    """Two 3 x 3 convolutions with BatchNorm; a strided block has a 1 x 1 convolution as its shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """x (N, inputs, H, W) -> (N, outputs, H / stride, W / stride)."""
        inner = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out: Tensor = self.relu(inner + self.shortcut(x))
        return out


class DigitsNet(nn.Module):
    """A stem, three stages of two residual blocks at 8 x 8, 4 x 4 and 2 x 2, the mean over space, a linear layer."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.stage1 = nn.Sequential(Residual(width, width, 1), Residual(width, width, 1))
        self.stage2 = nn.Sequential(Residual(width, 2 * width, 2), Residual(2 * width, 2 * width, 1))
        self.stage3 = nn.Sequential(Residual(2 * width, 4 * width, 2), Residual(4 * width, 4 * width, 1))
        self.classifier = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, 1, 8, 8) in 0 to 1 -> logits (N, 10)."""
        features = self.stage3(self.stage2(self.stage1(self.stem(x))))
        logits: Tensor = self.classifier(features.mean((2, 3)))
        return logits


def digits_net() -> nn.Module:
    """The architecture; `examples/digits.safetensors` holds its trained weights."""
    return DigitsNet()


def split() -> Split:
    """The fixed division of the 1,797 images into 1,077 for training, 360 for validation and 360 for the test."""
    from sklearn.datasets import load_digits  # here: the architecture alone does not need scikit-learn

    data = load_digits()
    inputs = torch.from_numpy(data.images).to(torch.float32).unsqueeze(1) / LARGEST
    labels = torch.from_numpy(data.target).to(torch.int64)
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(SPLIT_SEED))
    parts = order[:TRAIN], order[TRAIN : TRAIN + VALIDATION], order[TRAIN + VALIDATION :]
    return Split(*((inputs[part], labels[part]) for part in parts))


def validation() -> tuple[Tensor, Tensor]:
    """What trials are scored on."""
    return split().validation


def test() -> tuple[Tensor, Tensor]:
    """What neither training nor tuning sees."""
    return split().test
