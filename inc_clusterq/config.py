"""The one schema of a job: YAML, Python and JSON Schema are views of these models.

Keys follow the YAML of Neural Compressor 1.x and 2.x where that has them. Unknown keys are errors. The expert keys of
the two methods live with the methods (`synthesis.settings`, `reconstruction.settings`) and are composed here.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from inc_clusterq.config_errors import explain
from inc_clusterq.errors import ConfigError
from inc_clusterq.home import expanded
from inc_clusterq.inputs import MOST_PER_BATCH, InputSpec
from inc_clusterq.reconstruction.settings import ReconstructionSettings
from inc_clusterq.references import REFERENCE_PATTERN
from inc_clusterq.synthesis.settings import ClusterQSettings
from inc_clusterq.yaml_file import read_yaml

Settings = TypeVar("Settings", ClusterQSettings, ReconstructionSettings)
Name = Annotated[str, StringConstraints(min_length=1)]


def _channels(value: object) -> object:
    if isinstance(value, list | tuple):
        return tuple(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return (value,)
    raise ValueError("must be a number or a list of numbers")


Channels = Annotated[  # a value for all channels, or one for each
    tuple[float, ...], BeforeValidator(_channels, json_schema_input_type=float | tuple[float, ...])
]
Preset = Literal["fast", "balanced", "best"]
Kind = Literal["dense", "depthwise", "grouped", "linear"]


Folder = Annotated[Path, AfterValidator(expanded)]


class Section(BaseModel):
    """A mapping of the YAML: no unknown keys, no changes afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)


class _SectionOfFile(Section):
    """A section with file names or module names, which are relative to the folder of the YAML."""

    _folder: Path = PrivateAttr(default_factory=Path.cwd)

    def model_post_init(self, context: Any) -> None:
        if isinstance(context, dict) and "folder" in context:
            self._folder = context["folder"]

    @property
    def folder(self) -> Path:
        """The folder of the YAML; the current folder for a config that was made in Python."""
        return self._folder


class InputConfig(Section):
    """One input sample of the model."""

    shape: tuple[int, ...] = Field(description="Sizes of one sample without the batch dimension, for example `[3, 224, 224]`.")
    range: tuple[float, float] = Field(
        (0.0, 1.0), description="Lowest and highest raw value that the sensor can produce, before normalisation."
    )
    mean: Channels = Field((0.0,), description="Subtracted from raw values; one number for all channels or one per channel.")
    std: Channels = Field((1.0,), description="Raw values less `mean` are divided by it; one number or one per channel.")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        self.spec()
        return self

    def spec(self) -> InputSpec:
        """The same as the type that the methods take."""
        low, high = self.range
        return InputSpec(self.shape, low, high, self.mean, self.std)


class ModelConfig(_SectionOfFile):
    """The trained float model."""

    architecture: str = Field(
        description="`torchvision:resnet18` or `python:package.module:function`; the function is called without arguments and "
        "returns an nn.Module; it is imported from the YAML's folder or an installed package."
    )
    weights: Name | None = Field(
        None,
        description="Checkpoint, relative to the YAML: `.safetensors`, or `.pt`, `.pth` or `.ckpt` that holds tensors only: a "
        "state dict, or one under `state_dict`, `model_state_dict` or `model`, or else `state_dict_ema`, `model_ema` or `ema`. "
        "For torchvision also the name of published weights, such as `DEFAULT`, that are already in torch's cache; "
        "googlenet and inception_v3 take no checkpoint, which would not tell whether they scale their input. "
        "Empty: the function returns a trained model.",
    )
    input: InputConfig = Field(description="What the model expects at its input.")

    @field_validator("weights")
    @classmethod
    def _expand(cls, value: str | None) -> str | None:
        return None if value is None else str(expanded(Path(value)))

    @field_validator("architecture")
    @classmethod
    def _known_form(cls, value: str) -> str:
        if not re.match(r"^torchvision:\w+$", value) and not re.match(REFERENCE_PATTERN, value):
            raise ValueError(
                "it must read torchvision:NAME or python:package.module:function, a function that is called without arguments"
            )
        return value

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint file; None when `weights` is empty or names published weights of torchvision."""
        if self.weights is None or (self.architecture.startswith("torchvision:") and not Path(self.weights).suffix):
            return None
        return self.folder / self.weights


class Bits(Section):
    """A bit-width."""

    bits: int = Field(8, ge=2, le=8, description="Bits per value, 2 to 8.")


class ModelWise(Section):
    """Widths of every layer that `op_wise` does not name."""

    weight: Bits = Field(Bits(), description="Weights of all layers.")
    activation: Bits = Field(Bits(), description="Inputs of all layers.")


class OpWise(Section):
    """Widths of one layer, or of all layers of a kind."""

    weight: Bits | None = Field(None, description="Weights; empty: as `model_wise`.")
    activation: Bits | None = Field(
        None,
        description="Input, and what is added or joined on its way there from the layers before; empty: as `model_wise`. "
        "Layers that read the same tensor get the most bits asked for any of them here.",
    )


class DatasetConfig(Section):
    """The calibration set, by the name of its synthesiser."""

    clusterq: ClusterQSettings = Field(
        ClusterQSettings(), alias="ClusterQ", description="ClusterQ synthesis (arXiv 2205.00179)."
    )


class DataLoaderConfig(Section):
    """How the calibration set is handed to the host."""

    batch_size: int = Field(32, ge=1, le=MOST_PER_BATCH, description="Images per batch; a short last batch is used too.")
    dataset: DatasetConfig = Field(DatasetConfig(), description="Where the calibration images come from.")


class CalibrationConfig(Section):
    """Calibration without data: the images are synthesised from the model."""

    sampling_size: int = Field(256, ge=2, le=65_536, description="Number of synthetic calibration images (MRECG: 4096).")
    dataloader: DataLoaderConfig = Field(DataLoaderConfig(), description="Batches of the calibration set.")


class QuantizationConfig(Section):
    """What is quantized to how many bits, and how."""

    calibration: CalibrationConfig = Field(CalibrationConfig(), description="The synthetic calibration set.")
    model_wise: ModelWise = Field(ModelWise(), description="Widths of the whole model; `bits` is the short form.")
    op_wise: dict[str, OpWise] = Field({}, description="Widths of single layers, by exact module name.")
    optype_wise: dict[Kind, OpWise] = Field(
        {},
        description="Widths of all layers of a kind: `dense`, `depthwise` and `grouped` convolutions, `linear`. First and last "
        "layer are no exception; `op_wise` is stronger.",
    )
    reduce_range: bool | Literal["auto"] = Field(
        "auto",
        description="Keep all weights to 7 bits, for processors without VNNI, whose 8-bit kernels overflow on 8-bit weights. "
        "`auto`: where this machine has neither VNNI nor AMX; say `true` when the model is deployed on such a machine.",
    )
    reconstruction: ReconstructionSettings = Field(
        ReconstructionSettings(), description="MRECG reconstruction (arXiv 2303.11906)."
    )


class AccuracyConfig(_SectionOfFile):
    """A labelled set for scoring trials; never used for calibration."""

    dataset: Annotated[str, StringConstraints(pattern=REFERENCE_PATTERN)] = Field(
        examples=["python:my_module:validation"],
        description="`python:package.module:function` that returns (inputs, labels): floats as the model takes them and class "
        "numbers, as tensors or NumPy arrays; or a torch DataLoader of such.",
    )


class EvaluationConfig(Section):
    """How trials are scored."""

    accuracy: AccuracyConfig | None = Field(
        None, description="A labelled set; empty: agreement with the float model on held-out synthetic images."
    )
    held_out: int = Field(
        128,
        ge=16,
        le=65_536,
        description="Synthetic images that only score, never calibrate; made when no labelled set is named.",
    )


class StrategyConfig(BaseModel):
    """The tuning strategy; every key besides `name` is an option of that strategy, which checks it."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: Name = Field("mrecg", description="Name of an installed strategy (entry-point group `inc_clusterq.strategies`).")

    @property
    def options(self) -> dict[str, Any]:
        """The strategy's own keys."""
        return dict(self.model_extra or {})


class AccuracyCriterion(Section):
    """When a trial is good enough."""

    relative: float = Field(0.01, ge=0, lt=1, description="Tolerated loss as a share of the float score (host: 0.01).")


class ExitPolicy(Section):
    """When tuning ends without success; the best trial is kept."""

    max_trials: int = Field(3, ge=1, le=1000, description="Trials at most.")


class WorkspaceConfig(Section):
    """Where finished parts of the work are kept, so that an interrupted job resumes."""

    path: Folder = Field(
        Path("nc_workspace"),
        description="Folder for synthetic sets and reconstructed units, relative to the current folder.",
    )


class TuningConfig(Section):
    """Which trials are run, and how many."""

    host: Name = Field(
        "neural_compressor",
        description="Toolkit that runs the trials (entry-point group `inc_clusterq.adaptors`).",
    )
    strategy: StrategyConfig = Field(StrategyConfig(), description="Which trial comes next.")
    accuracy_criterion: AccuracyCriterion = Field(AccuracyCriterion(), description="When a trial is good enough.")
    exit_policy: ExitPolicy = Field(ExitPolicy(), description="When tuning ends.")
    random_seed: int = Field(1978, ge=0, le=2**32 - 1, description="Seed of everything random (host: 1978).")
    workspace: WorkspaceConfig = Field(WorkspaceConfig(), description="Folder for what can be used again.")


class Config(Section):
    """A whole job. Presets and the short form `bits` are already worked into `quantization`."""

    model: ModelConfig = Field(description="The trained float model.")
    bits: Annotated[str, StringConstraints(pattern=r"^W[2-8]A[2-8]$")] | None = Field(
        None,
        examples=["W4A8", "W8A8"],
        description="Short form of `quantization.model_wise`: `W4A8` is 4-bit weights and 8-bit activations; each 2 to 8.",
    )
    preset: Preset = Field("balanced", description="Effort of synthesis and reconstruction; keys given below override it.")
    output: Folder = Field(Path("saved_results"), description="Folder of the result, relative to the current folder.")
    quantization: QuantizationConfig = Field(
        QuantizationConfig(), description="What is quantized, and how.", validate_default=True
    )
    evaluation: EvaluationConfig = Field(EvaluationConfig(), description="How trials are scored.")
    tuning: TuningConfig = Field(TuningConfig(), description="Which trials are run.")

    @field_validator("quantization")
    @classmethod
    def _resolve(cls, value: QuantizationConfig, info: ValidationInfo) -> QuantizationConfig:
        """Work `preset` and `bits` into the keys that they stand for."""
        bits, preset = info.data.get("bits"), info.data.get("preset")
        if bits is not None:
            widths = ModelWise(weight=Bits(bits=int(bits[1])), activation=Bits(bits=int(bits[3])))
            if "model_wise" in value.model_fields_set and value.model_wise != widths:
                raise ValueError("`bits` and `quantization.model_wise` are both given and differ; keep one of them")
            value = value.model_copy(update={"model_wise": widths})
        if preset is None:  # not valid, which is reported by itself
            return value
        loader = value.calibration.dataloader
        dataset = loader.dataset.model_copy(update={"clusterq": _with_preset(loader.dataset.clusterq, preset)})
        loader = loader.model_copy(update={"dataset": dataset})
        calibration = value.calibration.model_copy(update={"dataloader": loader})
        reconstruction = _with_preset(value.reconstruction, preset)
        return value.model_copy(update={"calibration": calibration, "reconstruction": reconstruction})

    def override(self, *, output: Path | None = None, seed: int | None = None) -> Config:
        """The same job with another output folder or seed."""
        tuning = self.tuning if seed is None else self.tuning.model_copy(update={"random_seed": seed})
        return self.model_copy(update={"output": output or self.output, "tuning": tuning})


def _with_preset(settings: Settings, preset: str) -> Settings:
    given = settings.model_dump(exclude_unset=True)
    return type(settings).model_validate({**settings.PRESETS.get(preset, {}), **given})


def load_config(path: Path) -> Config:
    """Read a job from YAML; ConfigError lists everything that is wrong with it."""
    file = read_yaml(path)
    # By way of JSON, whose strict mode takes lists for tuples and text for paths, but not `true` for 1 or "8" for 8.
    text = json.dumps(file.data, default=str)
    try:
        return Config.model_validate_json(text, strict=True, context={"folder": path.resolve().parent})
    except ValidationError as error:
        raise ConfigError(explain(error, file, Config)) from error
