"""`ClusterQDataLoader`: a calibration data loader that needs no data, in place of a user's own.

It yields (input, label) batches as Neural Compressor's loaders do, and `loader.calibrate` is a `run_fn` of its 3.x API.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from inc_clusterq.fingerprint import fingerprint
from inc_clusterq.inputs import MOST_PER_BATCH, InputSpec
from inc_clusterq.models import read_output
from inc_clusterq.progress import SILENT, Progress
from inc_clusterq.synthesis.dataset import SyntheticDataset
from inc_clusterq.synthesis.refine import random_samples
from inc_clusterq.synthesis.settings import ClusterQSettings
from inc_clusterq.synthesis.statistics import batch_norms
from inc_clusterq.synthesis.store import build_dataset, cached_dataset

logger = logging.getLogger(__name__)


@dataclass
class _Shared:
    """The set, once made; all copies of a loader hold the same one."""

    dataset: SyntheticDataset | None = None


class ClusterQDataLoader:
    """Batches of a ClusterQ set of `sampling_size` inputs for `model`, made when they are first asked for.

    `model` is the trained float network, before any quantization, BatchNorm not folded; `input` says what it takes.
    `settings` sets the effort (default: the preset `balanced`). With `cache_dir` the set is kept there and found again for
    the same model, input, settings, size and seed; it is memory-mapped then. A model that does not return class logits is
    served by its BatchNorm statistics alone. What is wrong with the model is said at once, by ModelError.
    """

    def __init__(
        self,
        model: nn.Module,
        input: InputSpec,  # the host's word for it
        *,
        sampling_size: int = 256,
        batch_size: int = 32,
        seed: int = 1978,
        settings: ClusterQSettings | None = None,
        cache_dir: Path | None = None,
        progress: Progress = SILENT,
    ) -> None:
        for name, value in (("sampling_size", sampling_size), ("batch_size", batch_size)):
            if not _is_whole(value) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1")
        if not _is_whole(seed) or not 0 <= seed < 2**32:
            raise ValueError(f"seed is {seed!r}; it must be a whole number from 0 to {2**32 - 1}")
        if settings is not None and not isinstance(settings, ClusterQSettings):
            raise ValueError(
                f"settings is {settings!r}; it must be a ClusterQSettings, such as "
                "ClusterQSettings(**ClusterQSettings.PRESETS['fast'])"
            )
        if batch_size > MOST_PER_BATCH:
            raise ValueError(f"batch_size is {batch_size}; it must be at most {MOST_PER_BATCH}")
        batch_norms(model)
        output = read_output(model, input)
        if output.problem:
            logger.warning(
                "%s, not class logits: the set is matched to the BatchNorm statistics alone, and labels are -1", output.problem
            )
        self.num_classes = output.num_classes
        self.model = model
        self.input = input
        self.sampling_size = int(sampling_size)
        self.batch_size = int(batch_size)
        self.seed = int(seed)
        self.settings = settings if settings is not None else ClusterQSettings()
        self.cache_dir = cache_dir
        self.progress = progress
        self._shared = _Shared()

    @property
    def dataset(self) -> SyntheticDataset:
        """The whole set."""
        if self._shared.dataset is None:
            self._shared.dataset = self._make()
        return self._shared.dataset

    @property
    def example_inputs(self) -> tuple[Tensor]:
        """A batch of two random inputs of the right shape, for the host's export; it does not wait for the synthesis."""
        return (random_samples(self.input, 2, torch.Generator().manual_seed(self.seed)),)

    @property
    def dynamic_shapes(self) -> tuple[dict[int, Any]]:
        """A free batch dimension, for the host's export: the last batch may be short, and users bring other sizes."""
        return ({0: torch.export.Dim("batch", min=1, max=MOST_PER_BATCH)},)

    def calibrate(self, model: nn.Module) -> None:
        """Run every batch through `model` without gradients: the host's `run_fn`."""
        anchor = next(chain(model.parameters(), model.buffers()), None)
        with torch.no_grad():
            for inputs, _ in self:
                model(inputs if anchor is None else inputs.to(anchor.device))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.dataset.batches(self.batch_size)

    def __len__(self) -> int:
        return -(-self.sampling_size // self.batch_size)

    def __deepcopy__(self, memo: dict[int, Any]) -> ClusterQDataLoader:
        # A copy per trial must not mean a synthesis per trial.
        return copy.copy(self)

    def _make(self) -> SyntheticDataset:
        request: dict[str, Any] = {
            "num_classes": self.num_classes,
            "samples": self.sampling_size,
            "seed": self.seed,
            "progress": self.progress,
        }
        digest = fingerprint(self.model, self.input)
        if self.cache_dir is None:
            return build_dataset(self.model, digest, self.input, self.settings, **request)
        return cached_dataset(self.cache_dir, self.model, digest, self.input, self.settings, **request)


def _is_whole(value: object) -> bool:
    """Whether it is a whole number, of Python or NumPy; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)
