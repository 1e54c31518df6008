"""Networks and images of the data folder that `--data` names.

The folder holds a `load.py` with MODELS, model(name), cifar(split), imagenet(name, size) and kws(); nothing else of the
folder is relied on. Test images are for the final figure only: whatever a method sees comes from the training split, or from
no image at all.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from arguments import Options
from torch import Tensor

from inc_clusterq.fingerprint import fingerprint
from inc_clusterq.inputs import InputSpec
from inc_clusterq.models import FloatModel, check_logits
from inc_clusterq.synthesis.clusterq import synthesise
from inc_clusterq.synthesis.settings import ClusterQSettings
from inc_clusterq.synthesis.store import cached_dataset

TRAINING_IMAGES = {"cifar": "train_first2048", "imagenet": "train500"}
TEST_IMAGES = {"cifar": "test_first5000", "imagenet": "val1300"}
UNSEEN = 512  # training images at most that judge outputs


@dataclass(frozen=True)
class Subject:
    """A network with the images that belong to it; all images are normalised as the network takes them."""

    model: FloatModel
    training: Tensor | None  # None: the folder has no training images for this network
    test_inputs: Tensor
    test_labels: Tensor
    training_split: str  # what is taken from where, in words
    test_split: str

    @property
    def splits(self) -> str:
        """Which images are used for what, where real ones calibrate."""
        return f"{self.training_split}, {self.test_split}" if self.training is not None else self.test_split


def load(options: Options, net: str) -> Subject:
    """Load a network and its images."""
    source = load_module(options.data)
    if net not in source.MODELS:
        sys.exit(f"{options.data / 'load.py'} has no network {net!r}; it has {', '.join(source.MODELS)}")
    module, normalise, size = source.model(net)
    if size is None:
        kind, training, (test, labels) = "kws", None, source.kws()
    elif size == 32:
        kind, training, (test, labels) = "cifar", source.cifar(TRAINING_IMAGES["cifar"])[0], source.cifar(TEST_IMAGES["cifar"])
    else:
        kind, training = "imagenet", source.imagenet(TRAINING_IMAGES["imagenet"], size)[0]
        test, labels = source.imagenet(TEST_IMAGES["imagenet"], size)
    test, labels = test[: options.limit], labels[: options.limit]
    spec = input_spec(normalise, test, is_image=size is not None)
    module = module.float().eval().requires_grad_(False)
    model = FloatModel(net, module, spec, check_logits(module, spec), fingerprint(module, spec))
    if kind == "kws":
        training_split, test_split = "", f"scored on {len(labels)} keyword recordings; there are no training recordings"
    else:
        training_split = f"real calibration images from {TRAINING_IMAGES[kind]}"
        test_split = f"scored on {len(labels)} images of {TEST_IMAGES[kind]}"
    real = None if training is None else normalise(training.float())
    return Subject(model, real, normalise(test.float()), labels, training_split, test_split)


def input_spec(normalise: Callable[[Tensor], Tensor], like: Tensor, *, is_image: bool) -> InputSpec:
    """Range and normalisation as the network's owner would state them.

    Images are bytes, and `normalise` is affine per channel, so two of its values give mean and deviation. Features that
    are not images have the range of their own file format, taken here as the extremes of what the file holds.
    """
    shape = tuple(like.shape[1:])
    if not is_image:
        return InputSpec(shape, float(like.min()), float(like.max()))
    black, white = (normalise(torch.full((1, shape[0], 1, 1), value)).flatten() for value in (0.0, 255.0))
    std = 255.0 / (white - black)
    mean = -black * std
    return InputSpec(shape, 0.0, 255.0, tuple(mean.tolist()), tuple(std.tolist()))


def real(training: Tensor, options: Options, seed: int) -> Tensor:
    """As many training images as were asked for, drawn with the seed."""
    return training[_drawn(training, seed)[: options.images]]


def unseen(training: Tensor | None, options: Options, seed: int) -> Tensor | None:
    """Training images that `real` leaves, at most UNSEEN; None where there are none."""
    if training is None or len(training) <= options.images:
        return None
    return training[_drawn(training, seed)[options.images :][:UNSEEN]]


def _drawn(training: Tensor, seed: int) -> Tensor:
    return torch.randperm(len(training), generator=torch.Generator().manual_seed(seed))


def synthetic(subject: Subject, options: Options, seed: int) -> Tensor:
    """The default synthesis at the preset's effort; with a workspace, a set that lies there is taken from it."""
    model, settings = subject.model, ClusterQSettings.model_validate(ClusterQSettings.PRESETS[options.preset])
    wanted: dict[str, Any] = {"num_classes": model.num_classes, "samples": options.images, "seed": seed}
    if options.workspace is None:
        return synthesise(model.module, model.input, settings, **wanted)[0]
    return cached_dataset(options.workspace, model.module, model.fingerprint, model.input, settings, **wanted).inputs


def load_module(folder: Path) -> Any:
    """The data folder's `load.py`."""
    spec = importlib.util.spec_from_file_location("load", folder / "load.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
