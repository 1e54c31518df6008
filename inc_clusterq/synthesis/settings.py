"""Settings of the synthesis: every expert key with its range, its default and where that default comes from.

"Released code" is the authors' code of "ClusterQ: Semantic Feature Distribution Alignment for Data-Free Quantization"
(2022, arXiv 2205.00179); "by trial" is what a comparison on ResNet-20 (CIFAR-10)
and MobileNetV1 0.25 (ImageNet) favoured while this was written; no benchmark repeats it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from inc_clusterq.inputs import is_large

Distance = Literal["relative", "deviation", "variance"]
Augmentation = Literal["shift_flip", "shift", "none"]
Synthesizer = Literal["clusterq", "latent"]
Start = Literal["generator", "leaves"]

GENERATOR_RATE, LATENT_GENERATOR_RATE = 3e-3, 1e-2
# By trial: at 224 pixels a higher rate drives the statistics away before it brings them back.
SMALL: dict[str, float] = {"classification_weight": 0.01, "refine_learning_rate": 0.03, "refine_smoothness": 0.0}
LARGE: dict[str, float] = {"classification_weight": 0.001, "refine_learning_rate": 0.01, "refine_smoothness": 1.0}


class ClusterQSettings(BaseModel):
    """How much work the synthesis does and how its terms are weighed; the defaults are the preset `balanced`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    synthesizer: Synthesizer = Field(
        default="clusterq",
        description="`clusterq`: what `start` names is optimised itself, as what one generator painted for the whole set. "
        "`latent`: each batch has a small generator of its own, optimised together with the batch's latents (after Genie-D, "
        "CVPR 2023); `iterations`, the warm-up, `batch_size`, `refine_learning_rate` and `coarse_share` then play no part. Our "
        "choice; docs/sources.md compares both.",
    )

    start: Start | None = Field(
        default=None,
        description="Where the refinement begins (`clusterq` only): `generator`, at what the generator paints; `leaves`, at "
        "random shapes that cover each other (dead leaves), which have the edges and the spectrum of photographs, and no "
        "generator is trained. Null: `leaves` for images (C, H, W) where the network finds unrefined leaves at most half as "
        "far from its BatchNorm statistics as noise, as do networks trained on photographs; else `generator`. By trial; "
        "docs/sources.md compares both.",
    )
    iterations: int = Field(
        default=150,
        ge=0,
        description="Training steps of the generator, where `start` is `generator`; 0 skips it and refines random images. "
        "By trial.",
    )
    warmup_iterations: int = Field(
        default=100,
        ge=0,
        description="Generator steps before the class centroids start and the alignment term joins; with no fewer than "
        "`iterations` it joins in the refinement. Our choice: by then most generated samples are of their class.",
    )
    batch_size: int = Field(
        default=64,
        ge=2,
        description="Images per generator step. Released code: 64 to 200, by model; the low end.",
    )
    latent_size: int = Field(
        default=100, ge=1, description="Length of the latent vector z and of the class embedding. Released code."
    )
    learning_rate: float | None = Field(
        default=None,
        gt=0,
        description="Adam's learning rate of the generator. Null: 3e-3, with `latent` 1e-2. Released code: 1e-3, for many "
        "more steps. By trial.",
    )
    latent_learning_rate: float = Field(
        default=0.1,
        gt=0,
        description="Adam's learning rate of the latents (`latent` only), cosine decay to 0. Our choice.",
    )
    swing: bool = Field(
        default=True,
        description="Shift the input of every strided convolution at random by less than its stride, against checkerboards "
        "(`latent` only). Paper of Genie. By trial: closer to the statistics on 32 x 32 images, far from them on 8 x 8 ones, "
        "where a pixel is much: `false` there.",
    )
    betas: tuple[float, float] = Field(
        default=(0.5, 0.999), description="Adam's betas of the generator, each in [0, 1). Released code."
    )

    classification_weight: float | None = Field(
        default=None,
        ge=0,
        description="Weight of the cross-entropy with the wanted class. Null: 0.01, and 0.001 for images of 96 pixels or more. "
        "Paper: 1 beside 0.1 for the statistics. By trial, beside 1 for the statistics: 0.01 still gives every small image its "
        "class, and 0.1 spoils ranges and diversity; large images get theirs with 0.001, and with 0.01 the network is far "
        "surer of them than of photographs.",
    )
    statistics_weight: float = Field(
        default=1.0, ge=0, description="Weight of the distance to the BatchNorm statistics. See classification_weight."
    )
    alignment_weight: float = Field(
        default=0.1,
        ge=0,
        description="Weight of the alignment with the class centroids, averaged over classes and layers. Paper: 0.9 beside "
        "1 for the cross-entropy, on sums. By trial: with 0.5 diversity and class features fall behind real ones.",
    )
    prior_weight: float = Field(
        default=0.01, ge=0, description="Weight of the total variation, as a share of the value range. By trial."
    )
    statistics_distance: Distance = Field(
        default="relative",
        description="How moments are compared: `variance` squares differences of means and variances (the paper), "
        "`deviation` of means and standard deviations (Genie-D, CVPR 2023), `relative` the same in units of the "
        "layer's mean variance, so that no layer counts more because its values are large. By trial: per layer is better "
        "than per channel.",
    )
    centroid_momentum: float = Field(
        default=0.2, gt=0, le=1, description="d in C <- (1 - d) C + d m, the moving average of the centroids. Paper."
    )
    centroid_samples: int = Field(
        default=4,
        ge=1,
        description="Images per class from which the centroids start. Our choice: a few, since every step adds more.",
    )
    mean_diversity: float = Field(
        default=0.03,
        ge=0,
        description="Scale of the noise on a centroid's means, in units of the channel's deviation. Released code.",
    )
    variance_diversity: float = Field(
        default=0.05,
        ge=0,
        description="Scale of the noise on a centroid's variances, in units of the channel's variance. Released code.",
    )
    first_aligned_layer: int | None = Field(
        default=None,
        ge=0,
        description="Index of the first BatchNorm layer, in order of execution, whose class statistics are aligned. "
        "Null: floor((L + 1) / 2) - 2 of L layers, at least 0. Released code.",
    )
    augmentation: Augmentation = Field(
        default="shift_flip",
        description="What is done at random to images (C, H, W) on their way to the model: shifts by up to an eighth, "
        "left-right flips. `shift` for content that has a reading direction, such as digits, and `mirror: false` for its "
        "reconstruction. Released code: crops and flips.",
    )

    refine_iterations: int = Field(
        default=250,
        ge=0,
        description="Steps of optimisation of each batch: of its images, after the generator (0 keeps what that painted); "
        "with `latent` of its latents and generator. By trial.",
    )
    refine_learning_rate: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Adam's learning rate of the refinement, as a share of the value range, cosine decay to 0. Null: 0.03, "
        "and 0.01 for images of 96 pixels or more. By trial.",
    )
    refine_smoothness: float | None = Field(
        default=None,
        ge=0,
        le=2,
        description="The refinement moves waves instead of pixels, in steps that fall as their frequency to this power: 1 as "
        "in photographs, 0 for pixels (`clusterq` only); waves move busy places further than flat ones. Null: 1 for images of "
        "96 pixels or more, else 0. By trial.",
    )
    coarse_share: float = Field(
        default=0,
        ge=0,
        lt=1,
        description="Share of the refinement of images of 96 pixels or more that is done at half their size, as is then the "
        "training of the generator: a quarter of the cost (`clusterq` only; not where the model takes one size alone). By "
        "trial: statistics end further off than after as many steps at the full size, so it is for `fast`.",
    )
    patience: int = Field(
        default=50,
        ge=0,
        description="A batch whose mean loss over so many steps is not 1 % below that of as many before has come to rest, and "
        "is finished early; asked in the second half of its steps. 0: never. Our choice.",
    )
    refine_batch: int = Field(
        default=64,
        ge=1,
        description="Most images refined together; the classes of one batch are aligned with those of the batches before. "
        "By trial: 64 to 256 match the statistics equally well.",
    )

    compile_teacher: bool | None = Field(
        default=None,
        description="Compile the network for the refinement (`clusterq` only; needs a C++ compiler, without which it is run as "
        "it stands). Null: on a CPU, for images of 96 pixels or more and 200 steps at their full size, of all batches "
        "together. By trial; docs/synthesis.md tells what that costs and saves.",
    )
    bfloat16: bool | None = Field(
        default=None,
        description="Compute convolutions and matrix products of the network in bfloat16, by autocast. Null: where the "
        "processor has instructions for that, for images of 96 pixels or more and networks without grouped convolutions, which "
        "gain nothing. By trial; see docs/synthesis.md.",
    )

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "fast": {"iterations": 60, "warmup_iterations": 40, "refine_iterations": 100, "coarse_share": 0.4},
        "balanced": {},
        "best": {"iterations": 500, "warmup_iterations": 300, "refine_iterations": 1000},
    }

    @property
    def coarse_iterations(self) -> int:
        """Steps of the refinement of a batch at half the image size, where that is possible; below `refine_iterations`."""
        return int(self.coarse_share * self.refine_iterations)

    def of_inputs(self, shape: Sequence[int]) -> ClusterQSettings:
        """The same, with the rates, weights and smoothness that were not given as samples of this shape get them."""
        latent = self.synthesizer == "latent"
        wanted = {"learning_rate": LATENT_GENERATOR_RATE if latent else GENERATOR_RATE, **(LARGE if is_large(shape) else SMALL)}
        update = {name: value for name, value in wanted.items() if getattr(self, name) is None}
        if len(shape) < 2:
            update["refine_smoothness"] = 0.0  # there are no neighbours, whatever was given
        return self.model_copy(update=update)

    @model_validator(mode="after")
    def _check(self) -> ClusterQSettings:
        if self.iterations == 0 and self.refine_iterations == 0:
            raise ValueError("iterations and refine_iterations are both 0: nothing would be synthesised; set at least one")
        if self.start == "leaves" and self.refine_iterations == 0:
            raise ValueError("refine_iterations is 0, and `leaves` know nothing of the network unrefined; give it at least 1")
        if self.synthesizer == "latent" and self.refine_iterations == 0:
            raise ValueError("refine_iterations is 0, and `latent` makes every batch in these steps; give it at least 1")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are {self.betas}; each must be in [0, 1), for example (0.5, 0.999)")
        return self
