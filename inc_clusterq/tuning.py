"""What a tuning strategy and a host adaptor are, so that others can write their own.

A strategy proposes trials, in the order in which they are worth trying; it knows no host. An adaptor runs them through its
host's own tuning loop, with the host's accuracy criterion. Both are found by name through the entry-point groups
`inc_clusterq.strategies` and `inc_clusterq.adaptors` (see `inc_clusterq.registry`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from inc_clusterq.models import FloatModel
from inc_clusterq.progress import SILENT, Progress
from inc_clusterq.reconstruction.bits import LayerBits
from inc_clusterq.reconstruction.reconstruct import Reconstruction
from inc_clusterq.reconstruction.settings import ReconstructionSettings

Score = Callable[[nn.Module], float]  # higher is better; the host needs it to be above 0 for the float model


@dataclass(frozen=True)
class TuningRequest:
    """What the user asked for."""

    weight_bits: int
    activation_bits: int
    settings: ReconstructionSettings
    layers: Mapping[str, LayerBits] = field(default_factory=dict)
    kinds: Mapping[str, LayerBits] = field(default_factory=dict)  # of all layers of a kind, see `Layer.kind`
    units: int | None = None  # with fewer bits than they can get, before any are joined; None: not known
    max_trials: int = 3
    tolerable_loss: float = 0.01  # relative to the float model's score, the host's criterion
    seed: int = 1978

    @property
    def lowest_bits(self) -> int:
        """Of any weight or activation that was asked for."""
        named = [bits for asked in (*self.layers.values(), *self.kinds.values()) for bits in (asked.weight, asked.activation)]
        return min(self.weight_bits, self.activation_bits, *(bits for bits in named if bits is not None))


@dataclass(frozen=True)
class Trial:
    """One model to make and to score."""

    label: str
    settings: ReconstructionSettings
    fallback_units: int = 0  # this many units, those that do the outputs the most harm, get 8 bits


@dataclass(frozen=True)
class TrialRecord:
    """A trial that was run."""

    trial: Trial
    score: float
    met_goal: bool


@dataclass(frozen=True)
class TuningOutcome:
    """The best model that was found, whether or not it met the goal."""

    model: nn.Module
    reconstruction: Reconstruction
    float_score: float
    best: TrialRecord
    trials: tuple[TrialRecord, ...]


class Strategy(Protocol):
    """Proposes trials. The class is called with the YAML's own keys under `tuning.strategy`, `name` left out."""

    def trials(self, request: TuningRequest) -> Sequence[Trial]:
        """At least one and at most `request.max_trials` trials, no two alike."""


class Adaptor(Protocol):
    """Runs trials in a host, and knows the host's files. The class is called without arguments."""

    name: str

    def export(self, model: FloatModel) -> nn.Module:
        """The float model in the host's form. Raises ModelError where the host cannot take it."""

    def count_units(self, exported: nn.Module, request: TuningRequest) -> int:
        """Units that a trial can raise to 8 bits, before any are joined.

        Raises:
            ModelError: the request names layers that the model does not have, or units that it cannot have.
        """

    def tune(
        self,
        exported: nn.Module,
        calibration: Sequence[Tensor],  # batches, each of shape (N, *shape)
        trials: Sequence[Trial],
        request: TuningRequest,
        score: Score,
        workspace: Path | None,
        progress: Progress = SILENT,
    ) -> TuningOutcome:
        """Run the trials through the host's own loop until one meets the goal."""

    def quantize_static(self, exported: nn.Module, calibration: Sequence[Tensor]) -> nn.Module:
        """The host's own 8-bit static quantization with its defaults: what a user has without this project."""

    def save(self, model: nn.Module, example: Tensor, folder: Path) -> None:
        """Write the model in the host's own form, loadable without this project."""

    def load(self, folder: Path) -> nn.Module:
        """What `save` has written, through the host's own loader."""

    def versions(self) -> dict[str, str]:
        """Host and back end, by distribution."""
