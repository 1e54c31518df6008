"""Data-free low-bit quantization of CNNs in Intel Neural Compressor: ClusterQ calibration data, MRECG reconstruction.

Names are handed on lazily: `import inc_clusterq` imports neither a host toolkit nor torchvision.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inc_clusterq.adaptors.neural_compressor import MRECGConfig
    from inc_clusterq.evaluation import agreement
    from inc_clusterq.inputs import InputSpec
    from inc_clusterq.synthesis.loader import ClusterQDataLoader

__all__ = ["ClusterQDataLoader", "InputSpec", "MRECGConfig", "__version__", "agreement"]

__version__ = "0.1.0"

_HOMES = {
    "ClusterQDataLoader": "inc_clusterq.synthesis.loader",
    "InputSpec": "inc_clusterq.inputs",
    "MRECGConfig": "inc_clusterq.adaptors.neural_compressor",
    "agreement": "inc_clusterq.evaluation",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
