"""One small network for each kind of structure that a graph can have."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional


def conv(inputs: int, outputs: int, size: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False), nn.BatchNorm2d(outputs)
    )


class Classifier(nn.Module, ABC):
    """`stem`, then the layers of a subclass, then `fc` on the mean."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.fc = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc(self.features(functional.relu(self.stem(x))).mean((2, 3)))
        return result

    @abstractmethod
    def features(self, x: Tensor) -> Tensor:
        """Between stem and pooling."""


class Chain(Classifier):
    """One convolution after the other."""

    def __init__(self) -> None:
        super().__init__(16)
        self.a, self.b, self.c = conv(8, 8), conv(8, 16, stride=2), conv(16, 16)

    def features(self, x: Tensor) -> Tensor:
        for layer in (self.a, self.b, self.c):
            x = functional.relu(layer(x))
        return x


class Block(nn.Module):
    """ResNet-20's block; its padded shortcut has no weights and reads the unquantized tensor."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(inputs, outputs, stride=stride), conv(outputs, outputs)
        self.grown, self.stride = outputs - inputs, stride

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(functional.relu(self.conv1(x)))
        if self.grown:
            x = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.grown))
        return functional.relu(y + x)


class Rearranged(Chain):
    """Weights that lie in memory in another order than their axes have."""

    def __init__(self) -> None:
        super().__init__()
        self.to(memory_format=torch.channels_last)
        self.fc.weight = nn.Parameter(self.fc.weight.detach().t().contiguous().t())


class Residual(Classifier):
    """ResNet-20 with two blocks."""

    def __init__(self) -> None:
        super().__init__(16)
        self.one, self.two = Block(8, 8, 1), Block(8, 16, 2)

    def features(self, x: Tensor) -> Tensor:
        result: Tensor = self.two(self.one(x))
        return result


class Depthwise(Classifier):
    """Depthwise and pointwise, MobileNet-V1."""

    def __init__(self) -> None:
        super().__init__(16)
        self.dw1, self.pw1, self.dw2, self.pw2 = conv(8, 8, groups=8), conv(8, 8, 1), conv(8, 8, 3, 2, 8), conv(8, 16, 1)

    def features(self, x: Tensor) -> Tensor:
        for layer in (self.dw1, self.pw1, self.dw2, self.pw2):
            x = functional.relu6(layer(x))
        return x


class Grouped(Classifier):
    """A ResNeXt block with a convolution in its shortcut."""

    def __init__(self) -> None:
        super().__init__(16)
        self.reduce, self.grouped, self.expand, self.shortcut = (
            conv(8, 8, 1),
            conv(8, 8, 3, 2, 2),
            conv(8, 16, 1),
            conv(8, 16, 1, 2),
        )

    def features(self, x: Tensor) -> Tensor:
        y = self.expand(functional.relu(self.grouped(functional.relu(self.reduce(x)))))
        return functional.relu(y + self.shortcut(x))


class SqueezeExcite(Classifier):
    """A gate from the pooled tensor scales the tensor itself."""

    def __init__(self) -> None:
        super().__init__(8)
        self.a, self.down, self.up, self.b = conv(8, 8), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1), conv(8, 8)

    def features(self, x: Tensor) -> Tensor:
        x = functional.hardswish(self.a(x))
        gate = functional.hardsigmoid(self.up(functional.relu(self.down(functional.adaptive_avg_pool2d(x, 1)))))
        return functional.relu(self.b(x * gate))


class Concat(Classifier):
    """SqueezeNet's fire module twice; the host gives a concatenation's inputs and output one quantizer."""

    def __init__(self) -> None:
        super().__init__(16)
        self.s1, self.e1, self.e3 = conv(8, 4, 1), conv(4, 8, 1), conv(4, 8)
        self.s2, self.f1, self.f3 = conv(16, 4, 1), conv(4, 8, 1), conv(4, 8)

    def features(self, x: Tensor) -> Tensor:
        for squeeze, one, three in ((self.s1, self.e1, self.e3), (self.s2, self.f1, self.f3)):
            x = functional.relu(squeeze(x))
            x = torch.cat([functional.relu(one(x)), functional.relu(three(x))], 1)
        return x


class Shuffle(Classifier):
    """ShuffleNet's split and shuffle, which read the batch size."""

    def __init__(self) -> None:
        super().__init__(8)
        self.a, self.b = conv(4, 4), conv(4, 4)

    def features(self, x: Tensor) -> Tensor:
        for layer in (self.a, self.b):
            kept, changed = x.chunk(2, 1)
            x = torch.cat([kept, functional.relu(layer(changed))], 1)
            x = x.view(x.size(0), 2, 4, x.size(2), x.size(3)).transpose(1, 2).reshape(x.size(0), 8, x.size(2), x.size(3))
        return x


class InPlace(Classifier):
    """Every operator that can overwrites its input."""

    def __init__(self) -> None:
        super().__init__(8)
        self.a, self.b = conv(8, 8), conv(8, 8)

    def features(self, x: Tensor) -> Tensor:
        x.mul_(2.0)
        x += self.a(x)
        x = x.relu_()
        x *= torch.sigmoid(self.b(x))
        return x


class Tied(Classifier):
    """One convolution at two places."""

    def __init__(self) -> None:
        super().__init__(8)
        self.a = nn.Conv2d(8, 8, 3, padding=1)

    def features(self, x: Tensor) -> Tensor:
        return functional.relu(self.a(functional.relu(self.a(x))))


class Pooled(Classifier):
    """Max pools whose sizes round up, with and without padding, and hardswish."""

    def __init__(self) -> None:
        super().__init__(8)
        self.a, self.b, self.c = conv(8, 8), conv(8, 8), conv(8, 8)

    def features(self, x: Tensor) -> Tensor:
        x = functional.relu(self.a(functional.max_pool2d(x, 3, 2, ceil_mode=True)))  # 8 to 4, where rounding down gives 3
        x = functional.hardswish(self.b(functional.max_pool2d(x, 3, 1, 1, ceil_mode=True)))  # nothing to round
        x = functional.relu(self.c(x))
        return functional.max_pool2d(x, (3, 2), ceil_mode=True)  # two rows are missing


class Padded(Classifier):
    """Pads at the bottom and the right alone, as networks from TensorFlow do; once with something other than zero."""

    def __init__(self) -> None:
        super().__init__(8)
        self.a, self.b = (nn.Conv2d(8, 8, 3, 2, groups=groups) for groups in (8, 1))

    def features(self, x: Tensor) -> Tensor:
        x = functional.relu6(self.a(functional.pad(x, (0, 1, 0, 1))))
        return functional.relu6(self.b(functional.pad(x, (0, 1, 0, 1), value=0.5)))


class Transposed(Classifier):
    """Holds a convolution that the host leaves in float."""

    def __init__(self) -> None:
        super().__init__(8)
        self.a, self.up = conv(8, 8), nn.ConvTranspose2d(8, 8, 2, 2)

    def features(self, x: Tensor) -> Tensor:
        return functional.relu(self.up(functional.relu(self.a(x))))


class Beside(Classifier):
    """Adds a convolution and one that the host leaves in float."""

    def __init__(self) -> None:
        super().__init__(8)
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 8, 3, padding=1)

    def features(self, x: Tensor) -> Tensor:
        return functional.relu(self.b(functional.relu(self.a(x) + self.up(x))))


class Mirrored(Classifier):
    """Reads weights once more: by a convolution that the host leaves in float, and by their norms."""

    def __init__(self) -> None:
        super().__init__(8)
        self.a, self.b = nn.Conv2d(8, 8, 3, 2, 1), conv(8, 8)

    def features(self, x: Tensor) -> Tensor:
        y = functional.relu(self.a(x))
        y = functional.conv_transpose2d(y, self.a.weight, None, 2, 1, output_padding=1)
        return functional.relu(self.b(functional.relu(y)))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) - 0.5 * self.fc.weight.square().sum(1)


class Averaged(Classifier):
    """Means over parts of the image, overlapping, with padding, and of unequal size."""

    def __init__(self) -> None:
        super().__init__(8)
        self.a, self.b = conv(8, 8), conv(8, 8)

    def features(self, x: Tensor) -> Tensor:
        x = functional.relu(self.a(functional.avg_pool2d(x, 2)))
        x = functional.relu(self.b(functional.avg_pool2d(x, 3, 1, 1)))
        return functional.adaptive_avg_pool2d(x, 3)


class Scaled(Classifier):
    """Adds a share of a branch, on either side."""

    def __init__(self) -> None:
        super().__init__(8)
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def features(self, x: Tensor) -> Tensor:
        x = functional.relu(torch.add(x, self.a(x), alpha=0.2))
        return functional.relu(torch.add(self.b(x), x, alpha=0.2))


class Attentive(Classifier):
    """Products of feature maps between its layers; a tensor of its own added to one; a linear operator as wide as a
    convolution; a name that run times use."""

    def __init__(self) -> None:
        super().__init__(8)
        self.query, self.local_token_mix = nn.Conv2d(8, 8, 1), conv(8, 8)
        self.squeeze, self.excite = nn.Linear(8, 6), nn.Linear(6, 8)
        self.position = nn.Parameter(torch.rand(1, 8, 8, 8))

    def features(self, x: Tensor) -> Tensor:
        query = functional.relu(self.query(x) + self.position).flatten(2)
        x = functional.relu(self.local_token_mix(x))
        attention = torch.softmax(torch.matmul(query.transpose(1, 2), query), -1)
        x = torch.matmul(x.flatten(2), attention).view_as(x)
        pooled = x.mean((2, 3))
        pooled = pooled - pooled.mean(1, keepdim=True)
        gate = torch.sigmoid(self.excite(functional.relu(self.squeeze(pooled))))
        return x * gate[:, :, None, None]


class Worded(Classifier):
    """Says its padding in words; once it takes one more behind than in front."""

    def __init__(self) -> None:
        super().__init__(8)
        self.a = nn.Conv2d(8, 8, 3, padding="same", dilation=(2, 1))
        self.b, self.c = nn.Conv2d(8, 8, (3, 4), padding="same"), nn.Conv2d(8, 8, 2, 2, padding="valid")

    def features(self, x: Tensor) -> Tensor:
        for layer in (self.a, self.b, self.c):
            x = functional.relu(layer(x))
        return x


class Signal(nn.Module):
    """One-dimensional: pooled, residual and gated, padded, concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv1d(3, 8, 5, 2, 2, bias=False), nn.BatchNorm1d(8)
        self.a, self.b = nn.Conv1d(8, 8, 3, padding=2, dilation=2, groups=2), nn.Conv1d(8, 8, 4, padding="same")
        self.down, self.up = nn.Conv1d(8, 4, 1), nn.Conv1d(4, 8, 1)
        self.c, self.d = nn.Conv1d(8, 16, 3, 2), nn.Conv1d(8, 16, 1)
        self.fc = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool1d(functional.relu(self.norm(self.stem(x))), 3, 2, 1)
        y = self.b(functional.relu6(self.a(x)))
        gate = torch.sigmoid(self.up(functional.relu(self.down(y.mean(-1, keepdim=True)))))
        x = functional.relu(y * gate + x)
        x = torch.cat([functional.relu(self.c(functional.pad(x, (0, 1)))), functional.hardswish(self.d(x[:, :, ::2]))], 1)
        result: Tensor = self.fc(functional.adaptive_avg_pool1d(functional.avg_pool1d(x, 2), 1).flatten(1))
        return result


SIZES = {"signal": (48,)}  # of inputs that are not 8 x 8
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "chain": Chain,
    "rearranged": Rearranged,
    "residual": Residual,
    "depthwise": Depthwise,
    "grouped": Grouped,
    "squeeze_excite": SqueezeExcite,
    "concat": Concat,
    "shuffle": Shuffle,
    "in_place": InPlace,
    "tied": Tied,
    "pooled": Pooled,
    "padded": Padded,
    "transposed": Transposed,
    "beside": Beside,
    "mirrored": Mirrored,
    "averaged": Averaged,
    "scaled": Scaled,
    "attentive": Attentive,
    "worded": Worded,
    "signal": Signal,
}
