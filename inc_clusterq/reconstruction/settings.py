"""Settings of MRECG reconstruction (arXiv 2303.11906), AdaRound and QDrop included as values of the same keys."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from inc_clusterq.inputs import LARGE

SMALLEST_VIEWED = 24  # pixels of a side; of what is smaller, or has not two sides, there are no views
MOST_VIEWS = 4  # of an image, by default
ENOUGH_IMAGES = 1024  # with their views, by default
FEWEST_IMAGES = 4  # of a step whose images have many positions
END_TO_END = 3  # times the steps of a unit, of the pass end to end by default. By trial
FAR_OFF = 0.06  # error of a network's outputs, in units of their power, from which on they are learned end to end by default


class ReconstructionSettings(BaseModel):
    """Every expert key of the reconstruction; the same names serve in YAML, in Python and in the result's JSON."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "fast": {"iterations": 400},
        "balanced": {"iterations": 1000},
        "best": {"iterations": 5000},
    }

    granularity: Literal["layer", "block", "modcap", "loss", "explicit"] | None = Field(
        None,
        description="What is reconstructed jointly: single layers (AdaRound; parts that cannot be cut stay whole), residual "
        "blocks (BRECQ), or blocks joined where their capacity differs most, by ModCap or by the loss of a base pass (MRECG); "
        "or the units of `explicit_units`. Empty: the strategy decides.",
    )
    explicit_units: tuple[tuple[str, ...], ...] = Field(
        (),
        description="For granularity `explicit`: the layers of each unit by module name, such as "
        "`[[layer1.0.conv1, layer1.0.conv2]]`; what is not listed stays in the smallest units that the graph has.",
    )
    top_k: int | None = Field(
        None,
        ge=0,
        description="Number of adjacent pairs to join (MRECG, Eq. 10). Empty: the differences above their mean.",
    )
    stride_factor: float = Field(
        1.6,
        gt=0,
        le=4,
        description="Capacity factor of a strided convolution in ModCap (MRECG: about 1.6; 1 for stride 1).",
    )
    stack_layers: int = Field(
        3, ge=1, le=16, description="Layers of a plain chain that form one block (released MRECG code: 3)."
    )
    weight_ceiling: int = Field(
        8,
        ge=2,
        le=8,
        description="Most bits that any weight gets, those of the first and last layer included. "
        "`quantization.reduce_range` sets it to 7.",
    )
    start: Literal["nearest", "second_order"] = Field(
        "second_order",
        description="Where the rounding begins: at the nearest integers (AdaRound), or layer by layer at those of least output "
        "error by the second moments of the layer's input (as GPTQ), with the weight's step size chosen in the same way. "
        "Layers with more than 5000 weights per row begin at the nearest.",
    )
    correct_bias: bool = Field(
        True,
        description="Let each bias make up for what quantization does to the mean of its layer's output (DFQ, Sec. 4.2), "
        "and learn the rest.",
    )
    bias_learning_rate: float = Field(
        1e-3, ge=0, le=1, description="Adam step on biases, relative to the deviation of the layer's output, cosine decay."
    )
    iterations: int = Field(1000, ge=0, le=100_000, description="Optimisation steps per unit (released code: 20000).")
    batch_size: int = Field(32, ge=1, le=4096, description="Most images per step (QDrop: 32).")
    step_positions: int = Field(
        4096,
        ge=1,
        description="Positions of a unit's output map that are enough for a step: units with large maps take fewer images, but "
        f"at least {FEWEST_IMAGES}, since neighbouring positions are samples too. The time goes into more steps. By trial.",
    )
    weight_learning_rate: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Adam step on the rounding variable V. AdaRound: 1e-3 at 20000 iterations; with fewer iterations V must "
        "move faster to get anywhere. Empty: 0.03 at 1000, and half of that with every 2.5-fold number. By trial.",
    )
    activation_learning_rate: float = Field(
        2e-2,
        ge=0,
        le=1,
        description="Adam step on the step sizes of activations and, with `learn_weight_scale`, of weights, relative to the "
        "size, cosine decay (QDrop: 4e-5 absolute at 20000 iterations; in a few hundred they must move faster). By trial.",
    )
    learn_weight_scale: bool = Field(
        True, description="Train the weight step size together with the rounding (Genie-M, arXiv 2212.04780)."
    )
    rounding_weight: float = Field(
        0.1,
        ge=0,
        le=10,
        description="Weight of the rounding regulariser (AdaRound: 0.01; MRECG: 0.1 for MobileNetV2). From a second-order "
        "start 0.1 was the better on ResNet-20 too. By trial.",
    )
    beta_start: float = Field(20.0, gt=1, le=100, description="First exponent of the rounding regulariser (AdaRound: 20).")
    beta_end: float = Field(2.0, gt=1, le=100, description="Last exponent of the rounding regulariser (AdaRound: 2).")
    warm_up: float = Field(
        0.2, ge=0, lt=1, description="Share of the steps before the rounding regulariser sets in (AdaRound: 0.2)."
    )
    loss: Literal["squared", "fisher"] = Field(
        "squared",
        description="Error of a unit's output: squared, or weighted with the Fisher information of each element (BRECQ), which "
        "takes one more pass through the rest of the network per unit. For classifiers.",
    )
    drop_probability: float = Field(
        0.5, ge=0, le=1, description="Chance that an element stays unquantized during optimisation (QDrop: 0.5)."
    )
    views: int | None = Field(
        None,
        ge=1,
        le=16,
        description="Views of each calibration image that units learn from, itself included: shifted by up to a tenth of a "
        "side, every other one mirrored (`mirror`). Inputs of less than "
        f"{SMALLEST_VIEWED} pixels, and those that are no images, have one. Empty: 1 from {LARGE} pixels on, below that as "
        f"many as make {ENOUGH_IMAGES} images of them, at most {MOST_VIEWS}. By trial.",
    )
    mirror: bool = Field(
        True,
        description="Mirror every other view left to right where there are three channels. `false` for content that has a "
        "reading direction, such as digits or signs.",
    )
    validation_share: float = Field(
        0.125,
        ge=0,
        lt=1,
        description="Share of the calibration images that no unit learns from: of a unit's start and its states after each "
        "twentieth of the steps, the one of least loss on them stays. 0, or less than an image: the start is compared with the "
        "end, on all images. Our choice.",
    )
    patience: int = Field(
        2,
        ge=1,
        description="Once its rounding is decided, a unit stops when that loss has not fallen for this many twentieths of the "
        "steps. 20: never before the end. Our choice.",
    )
    end_to_end_iterations: int | None = Field(
        None,
        ge=0,
        le=100_000,
        description="Steps behind the last unit, in which step sizes and biases of the whole network learn to give the float "
        "network's outputs (as E2E-QP, arXiv 2407.11062), and the integers of the weights stay. Empty: three times "
        "`iterations` where the units have left an error of the outputs of more than 0.06 of their power, otherwise none.",
    )
    end_to_end_features: float = Field(
        20.0,
        ge=0,
        le=1e6,
        description="Weight of what comes to the activation quantizers beside the outputs in these steps: the mean of its "
        "relative squared errors, times the power of the outputs (FitNets, arXiv 1412.6550). By trial.",
    )
    end_to_end_learning_rate: float = Field(
        5e-3,
        gt=0,
        le=1,
        description="Adam step on these step sizes, relative to the size, and on the biases, relative to the deviation of the "
        "layer's output, cosine decay. By trial.",
    )
    range_norm: float = Field(2.4, ge=1, le=8, description="p of the Lp error that initial scales minimise (AdaRound: 2.4).")
    memory_budget: float = Field(
        4.0,
        ge=0,
        description="Gigabytes that the inputs and outputs of a unit may take for all images; larger ones are kept in "
        "memory-mapped files in the workspace. It changes no result.",
    )
    edge_bits: int = Field(
        8,
        ge=2,
        le=8,
        description="Bits of the first and the last layer and of their inputs (protocol of the papers: 8), where the rest "
        "has fewer.",
    )

    @property
    def rounding_rate(self) -> float:
        """Adam step on V: `weight_learning_rate`, or what goes with this many iterations (0.06 at 400, 0.03 at 1000)."""
        if self.weight_learning_rate is not None:
            return self.weight_learning_rate
        return min(1.0, 0.03 * 2 ** math.log(1000 / max(1, self.iterations), 2.5))

    def end_to_end_steps(self, relative_loss: float) -> int:
        """Steps of the pass end to end, where the units have left this error of the outputs in units of their power."""
        if self.end_to_end_iterations is not None:
            return self.end_to_end_iterations
        return END_TO_END * self.iterations if relative_loss > FAR_OFF else 0

    @model_validator(mode="after")
    def _units_belong_to_explicit(self) -> Self:
        if self.explicit_units and self.granularity != "explicit":
            raise ValueError("`explicit_units` is for granularity `explicit`; set `granularity: explicit` or delete it")
        if self.granularity == "explicit" and not self.explicit_units:
            raise ValueError("granularity `explicit` needs `explicit_units`, the layers of each unit by module name")
        if any(not unit for unit in self.explicit_units):
            raise ValueError("`explicit_units` holds a unit without layers")
        return self
