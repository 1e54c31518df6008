"""`MRECGConfig`: MRECG reconstruction (arXiv 2303.11906) as a configuration of Neural Compressor 3.x.

Importing this module registers it with the host, whose `quantize`, `prepare`, `autotune` and list expansion then know it.
There is no `from __future__ import annotations` here: the host's expansion reads the annotations of `__init__` as types.
"""

import sys
from collections import OrderedDict
from difflib import get_close_matches
from typing import Any

from neural_compressor.common.base_config import config_registry, register_config
from neural_compressor.common.utils import DEFAULT_WHITE_LIST
from neural_compressor.torch.quantization.config import FRAMEWORK_NAME, TorchBaseConfig
from pydantic import ValidationError
from torch import nn

from inc_clusterq.errors import ClusterQError
from inc_clusterq.reconstruction.bits import BitPlan, LayerBits
from inc_clusterq.reconstruction.settings import ReconstructionSettings

ALGORITHM = "mrecg"
KINDS = ("dense", "depthwise", "grouped", "linear")
WIDTHS = range(2, 9)  # bits that the kernels' int8 can hold
WHOLE_NUMBERS = (
    ("w_bits", WIDTHS, "from 2 to 8"),
    ("act_bits", WIDTHS, "from 2 to 8"),
    ("fallback_units", range(sys.maxsize), "from 0"),
    ("seed", range(2**32), f"from 0 to {2**32 - 1}"),
)
BOOKKEEPING = {
    "params_list",
    "non_tunable_params",
    "_is_initialized",
}  # the host's own, among a configuration's attributes


def refuse_foreign(registered: object) -> None:
    """The host's registries overwrite silently, so look first; raises ClusterQError when the name is taken."""
    module = getattr(registered, "__module__", None)
    if module is not None and not module.startswith("inc_clusterq."):
        raise ClusterQError(f"another package ({module}) has registered {ALGORITHM!r} with Neural Compressor")


refuse_foreign(config_registry.get_cls_configs().get(FRAMEWORK_NAME, {}).get(ALGORITHM))


@register_config(framework_name=FRAMEWORK_NAME, algo_name=ALGORITHM)
class MRECGConfig(TorchBaseConfig):
    """MRECG reconstruction as one of the host's algorithms.

    A list in place of a named argument (`w_bits=[4, 8]`) expands into one trial per value, as with the host's own
    configurations; the other keys of `ReconstructionSettings` take one value each.

    Args:
        w_bits: bits of the weights, 2 to 8, symmetric per channel.
        act_bits: bits of the activations, 2 to 8, unsigned affine per tensor.
        granularity: "layer", "block", "modcap", "loss" or "explicit"; see `ReconstructionSettings`.
        fallback_units: this many units, those that most of what is off at the outputs comes from, get 8 bits.
        layer_bits: exact module name -> (weight bits, bits of the input); None in a place: as the rest.
        kind_bits: the same for all layers of a kind: "dense", "depthwise", "grouped" or "linear"; `layer_bits` is stronger.
        preset: effort, "fast", "balanced" or "best"; the keys below override it.
        seed: all randomness of the reconstruction flows from it.
        workspace: folder of finished units, for resuming; None keeps nothing.
        kwargs: any other key of `ReconstructionSettings`.

    Raises:
        ValueError: bits outside 2 to 8, no seed, an unknown preset, a setting outside its range, or a white list.
        TypeError: an unknown key.
    """

    name = ALGORITHM

    def __init__(
        self,
        w_bits: int = 8,
        act_bits: int = 8,
        granularity: str = "modcap",
        fallback_units: int = 0,
        layer_bits: dict[str, tuple[int | None, int | None]] | None = None,
        kind_bits: dict[str, tuple[int | None, int | None]] | None = None,
        preset: str = "balanced",
        seed: int = 1978,
        workspace: str | None = None,
        settings: dict[str, Any] | None = None,
        white_list: Any = DEFAULT_WHITE_LIST,
        **kwargs: Any,
    ) -> None:
        super().__init__(white_list=white_list)
        self.w_bits = w_bits
        self.act_bits = act_bits
        self.granularity = granularity
        self.fallback_units = fallback_units
        self.layer_bits = layer_bits or {}
        self.kind_bits = kind_bits or {}
        self.preset = preset
        self.seed = seed
        self.workspace = workspace
        self.settings = {**(settings or {}), **self._known(kwargs)}
        self._check()
        self._post_init()

    @staticmethod
    def _known(kwargs: dict[str, Any]) -> dict[str, Any]:
        """The reconstruction's keys among `kwargs`; the host hands its own bookkeeping back in the same way."""
        fields = ReconstructionSettings.model_fields
        for key in kwargs:
            if key not in fields and key not in BOOKKEEPING:
                near = get_close_matches(key, [*fields, "w_bits", "act_bits", "layer_bits", "kind_bits", "fallback_units"], 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise TypeError(f"MRECGConfig has no key {key!r}{hint}")
        return {key: value for key, value in kwargs.items() if key in fields}

    def _check(self) -> None:
        for key, allowed, told in WHOLE_NUMBERS:
            value = getattr(self, key)
            if value == []:
                raise ValueError(f"{key} is an empty list; it must be a whole number {told}, or a list of such")
            for number in value if isinstance(value, list) else [value]:
                if type(number) is not int or number not in allowed:
                    raise ValueError(f"{key} is {number!r}; it must be a whole number {told}")
        for kind in self.kind_bits:
            if kind not in KINDS:
                raise ValueError(f"kind_bits names {kind!r}; it must be one of {', '.join(KINDS)}")
        for name, pair in [*self.layer_bits.items(), *self.kind_bits.items()]:
            if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and all(map(self._is_width, pair))):
                raise ValueError(
                    f"bits of {name!r} is {pair!r}; it must be a pair (weight bits, activation bits), each from 2 to 8 or None"
                )
        if not isinstance(self.preset, list) and self.preset not in ReconstructionSettings.PRESETS:
            raise ValueError(f"preset is {self.preset!r}; it must be one of {', '.join(ReconstructionSettings.PRESETS)}")
        if not isinstance(self.granularity, list) and not isinstance(self.preset, list):
            self.reconstruction_settings()

    @staticmethod
    def _is_width(bits: object) -> bool:
        return bits is None or (type(bits) is int and bits in WIDTHS)

    def reconstruction_settings(self) -> ReconstructionSettings:
        """Preset, settings and granularity as one validated object."""
        preset = ReconstructionSettings.PRESETS[self.preset]
        try:
            return ReconstructionSettings.model_validate({**preset, **self.settings, "granularity": self.granularity})
        except ValidationError as error:
            found = error.errors(include_url=False)[0]
            key = ".".join(str(part) for part in found["loc"]) or "MRECGConfig"
            raise ValueError(f"{key} is {found['input']!r}; {found['msg'].replace('Input should', 'it should')}") from error

    def bit_plan(self) -> BitPlan:
        """Bits as the reconstruction takes them."""
        layers = {name: LayerBits(*bits) for name, bits in self.layer_bits.items()}
        kinds = {kind: LayerBits(*bits) for kind, bits in self.kind_bits.items()}
        return BitPlan(self.w_bits, self.act_bits, self.reconstruction_settings().edge_bits, layers, kinds)

    def to_dict(self) -> dict[str, Any]:
        """What the host logs and saves: without its own bookkeeping and without paths of this machine."""
        return {key: value for key, value in super().to_dict().items() if key not in {*BOOKKEEPING, "workspace"}}

    def set_local(self, operator_name_or_list: Any, config: Any) -> "MRECGConfig":
        """Refused, rather than ignored: bits of single layers are given as `layer_bits`."""
        raise ValueError(
            f"MRECGConfig takes no configuration for single operators ({operator_name_or_list!r}); "
            "give layer_bits={'module name': (weight bits, activation bits)}"
        )

    def get_model_info(self, model: nn.Module) -> list[tuple[str, str]]:
        """The configuration holds for the whole exported graph, as in the host's own PT2E algorithms."""
        return []

    def to_config_mapping(self, config_list: Any = None, model_info: Any = None) -> "OrderedDict[str, MRECGConfig]":
        """One entry; layers are told apart by `layer_bits`."""
        return OrderedDict({self.name: self})

    @classmethod
    def register_supported_configs(cls) -> None:
        """All operators that the host's x86 quantizer annotates; nothing is listed one by one."""
        cls.supported_configs = []

    @classmethod
    def get_config_set_for_tuning(cls) -> "MRECGConfig":
        """The paper's two granularities at 8 bits."""
        return cls(granularity=["modcap", "loss"])  # type: ignore[arg-type]  # the host's way to write alternatives
