"""Networks that a user may have, each with something that stood in the way of its job once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional


class Odd(nn.Module):
    """Two convolutions and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Linear(8, 5)

    def end(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(x).mean((2, 3)))  # type: ignore[no-any-return]


class Frames(Odd):
    """Takes clips, and folds their frames into the batch."""

    def forward(self, x: Tensor) -> Tensor:
        frames = torch.relu(self.one(x.transpose(1, 2).flatten(0, 1)))
        return self.last(torch.relu(self.two(frames)).mean((2, 3)).view(-1, 4, 8).mean(1))  # type: ignore[no-any-return]


class Sequence(Odd):
    """Has the batch on the second axis behind its convolution, as recurrent networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.relu(self.one(x)).flatten(2).permute(2, 0, 1)
        return self.last(torch.relu(self.second(torch.relu(self.first(steps)))).mean(0))  # type: ignore[no-any-return]


class Upsampled(Odd):
    """Holds a layer that the host leaves in float."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.two(torch.relu(self.up(torch.relu(self.one(x))))))


class Centre(nn.Module):
    """Subtracts a mean that no checkpoint has."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x - self.mean  # type: ignore[operator]


class Centred(Odd):
    def __init__(self) -> None:
        super().__init__()
        self.centre = Centre()

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.two(torch.relu(self.one(self.centre(x)))))


class Preactivated(Odd):
    """Has a BatchNorm behind a convolution whose output the shortcut reads as well."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = normed(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        return self.end(x + self.two(torch.relu(self.norm(x))))


class Siamese(Odd):
    """Calls one backbone, with its BatchNorm, for two parts of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = normed(8)

    def backbone(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.one(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.two(self.backbone(x[:, :, :4]) - self.backbone(x[:, :, 4:])))


class Blurred(Odd):
    """Has a fixed filter in front of a BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("filter", torch.ones(8, 1, 3, 3) / 9)
        self.norm = normed(8)

    def forward(self, x: Tensor) -> Tensor:
        blurred = functional.conv2d(torch.relu(self.one(x)), self.filter, stride=2, groups=8)  # type: ignore[arg-type]
        return self.end(self.two(torch.relu(self.norm(blurred))))


class UpsampledInGroups(Odd):
    """Has a BatchNorm behind a transposed convolution in groups."""

    def __init__(self, groups: int, channels: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(8, channels, 2, stride=2, groups=groups)
        self.norm, self.two = normed(channels), nn.Conv2d(channels, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.two(torch.relu(self.norm(self.up(torch.relu(self.one(x)))))))


class Unremembered(Odd):
    """Has a BatchNorm that goes by the batch at hand."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.two(torch.relu(self.norm(self.one(x)))))


class Positioned(Odd):
    """Adds a tensor of its own to a feature map."""

    def __init__(self) -> None:
        super().__init__()
        self.middle, self.position = nn.Conv2d(8, 8, 3, padding=1), nn.Parameter(torch.rand(1, 8, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.two(torch.relu(self.middle(torch.relu(self.one(x))) + self.position)))


class Multiplied(Odd):
    """Has matrices of its own in place of linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.rand(8, 16) - 0.3), nn.Parameter(torch.rand(5, 16) - 0.5)
        self.offset = nn.Parameter(torch.rand(16))

    def forward(self, x: Tensor) -> Tensor:
        features = torch.relu(self.two(torch.relu(self.one(x)))).mean((2, 3))
        return torch.relu(torch.addmm(self.offset, features, self.first)) @ self.second.t()


class Gated(Odd):
    """Weighs its channels by a hard sigmoid written by hand, behind linear layers or a convolution."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.one(x))
        means = x.mean((2, 3), keepdim=True)
        gate = self.gate(means) if isinstance(self.gate, nn.Conv2d) else self.gate(means.flatten(1))[:, :, None, None]
        return self.end(self.two(x * functional.relu6(gate + 3) / 6))


class Shifted(Odd):
    """Adds numbers to what a BatchNorm behind a convolution gives, in place, and to its logits."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = normed(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.one(x))
        x += 0.5
        return 2 + self.end(self.two(torch.relu(x)))


class Reused(Odd):
    """Subtracts a layer's own bias from its output."""

    def forward(self, x: Tensor) -> Tensor:
        two = self.two(torch.relu(self.one(x)))
        assert self.two.bias is not None
        return self.end(two - 2 * self.two.bias[:, None, None])


class Recurrent(Odd):
    """Reads its feature maps with an LSTM, column by column, as networks for text and sound do."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8 * 8, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        maps = torch.relu(self.two(torch.relu(self.one(x))))
        return self.last(self.lstm(maps.permute(0, 3, 1, 2).flatten(2))[0][:, -1])  # type: ignore[no-any-return]


def normed(channels: int) -> nn.BatchNorm2d:
    """A BatchNorm that does something."""
    norm = nn.BatchNorm2d(channels)
    with torch.no_grad():
        for value in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
            assert value is not None
            value.copy_(torch.rand(channels) + 0.3)
    return norm


class Columns(Odd):
    """Ends in products with few inputs or few outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow, self.plain = nn.Linear(8, 32), nn.Linear(32, 8), nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.one(x)).mean((2, 3))
        return self.last(torch.relu(self.plain(torch.relu(self.narrow(torch.relu(self.wide(x)))))))  # type: ignore[no-any-return]


class Inception(Odd):
    """Concatenates what a layer gives with a pool of an earlier concatenation, so that all have one quantizer."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.middle, self.reduced = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 8, 3, stride=2, padding=1)
        self.behind = nn.Conv2d(24, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.one(x))
        x = torch.cat([functional.relu(self.left(x)), functional.relu(self.right(x))], 1)
        reduced = functional.relu(self.reduced(functional.relu(self.middle(x))))
        return self.end(self.behind(torch.cat([reduced, functional.max_pool2d(x, 2)], 1)))


class Twin(Odd):
    """Two layers with one weight and biases of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.three, self.four = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.four.weight = self.three.weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.three(torch.relu(self.one(x))))
        return self.end(self.two(torch.relu(self.four(x))))


class Normed(Odd):
    """Has its norms behind copies, in groups, and a limit of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.ConvTranspose2d(8, 8, 2, stride=2, groups=2), normed(8)
        self.groups = nn.GroupNorm(2, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x).clamp(max=1)
        x = torch.relu(self.norm(self.up(x)))
        return self.end(self.groups(self.two(x)))


class Shortcut(Odd):
    """Adds what is pooled, or what is concatenated, to what comes out of an activation function."""

    def __init__(self, activation: Callable[[Tensor], Tensor], shortcut: Callable[[Tensor], Tensor], channels: int = 8) -> None:
        super().__init__()
        self.activation, self.shortcut = activation, shortcut
        self.side, self.two = nn.Conv2d(8, channels, 3, padding=1), nn.Conv2d(channels, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.one(x))
        return self.end(self.two(self.activation(self.side(x)) + self.shortcut(x)))


class Averaged(Odd):
    """Takes averages of as many positions as there are where its size is rounded up."""

    def __init__(self, kernel: int, padding: int, *, counts_padding: bool = True) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(kernel, 2, padding, ceil_mode=True, count_include_pad=counts_padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.two(self.pool(functional.relu(self.one(x)))))


class TwiceNormed(Odd):
    """Has two BatchNorms in a row, and one without parameters behind a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = normed(8), normed(8)
        self.middle, self.plain = nn.Linear(8, 8), nn.BatchNorm1d(8, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.second(self.first(self.two(torch.relu(self.one(x)))))).mean((2, 3))
        return self.last(torch.relu(self.plain(self.middle(x))))  # type: ignore[no-any-return]


class Conditional(Odd):
    """Makes the kernels of a convolution from each image."""

    def __init__(self) -> None:
        super().__init__()
        self.routes, self.kernels = nn.Linear(8, 3), nn.Parameter(torch.randn(3, 8 * 8 * 9) / 8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.one(x))
        images, channels, height, width = x.shape
        kernels = (self.routes(x.mean((2, 3))).softmax(1) @ self.kernels).view(images * 8, channels, 3, 3)
        mixed = functional.conv2d(x.reshape(1, images * channels, height, width), kernels, padding=1, groups=images)
        return self.end(self.two(torch.relu(mixed.view(images, 8, height, width))))


class Brightest(Odd):
    """Ends in the largest value of each channel, and has a sum with a factor."""

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.one(x))
        x = torch.add(x, functional.relu(self.two(x)), alpha=0.5)
        return self.last(x.amax((2, 3)))  # type: ignore[no-any-return]


class DenselyJoined(Odd):
    """Concatenates all that there is so far, at first one tensor alone."""

    def __init__(self) -> None:
        super().__init__()
        self.three, self.four = nn.Conv2d(16, 8, 3, padding=1), nn.Conv2d(24, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        found = [functional.relu(self.one(x))]
        for layer in (self.two, self.three):
            found.append(functional.relu(layer(torch.cat(found, 1))))
        return self.end(self.four(torch.cat(found, 1)))


class Attentive(Odd):
    """Ends in a layer of a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.two(functional.relu(self.one(x))))
        return self.last(self.layer(x.flatten(2).transpose(1, 2)).mean(1))  # type: ignore[no-any-return]


class Counted(Odd):
    """Counts its calls."""

    calls: Tensor
    last_mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last_mean", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last_mean = x.mean()
        return self.end(self.two(torch.relu(self.one(x))))


class Unread(Odd):
    """Computes what nothing reads."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.one(x))
        self.two(x)
        return self.end(x)


class Limited(Odd):
    """Cuts a tensor that is quantized next, in a way of its own."""

    def __init__(self, limit: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.two(self.limit(self.one(x))))


LIMITS: dict[str, Callable[[Tensor], Tensor]] = {
    "from below": lambda x: x.clamp(min=0.1),
    "from above": lambda x: x.clamp(max=0.2),
    "far above what occurs": lambda x: functional.avg_pool2d(x, 2).clamp(0, 600),
    "of a pool": lambda x: functional.avg_pool2d(x, 2).clamp(-0.1, 0.3),
    "below zero, behind ReLU": lambda x: torch.relu(x).clamp(-3, -1),
    "zeros of a padding": lambda x: functional.pad(torch.relu(x), (0, 1, 0, 1)).clamp(0.3, 0.9),
    "above the zeros of a padding": lambda x: functional.pad(torch.relu(x), (0, 1, 0, 1)).clamp(min=0.3),
}
