"""Saving as the host saves, so that its loader reads it, but for two faults of its function.

It lets torch write the archive, which on a full disk ends the whole process; and it puts a dictionary in the place of the
model's configuration, with which a second call raises.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from neural_compressor.torch.utils import QCONFIG_NAME, WEIGHT_NAME
from torch import nn

from inc_clusterq.deployment.qdq import archived
from inc_clusterq.output import replace_file


def save(model: nn.Module, example_inputs: tuple[Any, ...], output_dir: str = "./saved_results") -> None:
    """Write `quantized_weight.pt` and `qconfig.json` of a quantized model to a folder, which need not exist.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = Path(output_dir).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    doubled = tuple(torch.cat([part, part]) if len(part) == 1 else part for part in example_inputs)  # one row is taken for all
    program = torch.export.export(model, doubled, dynamic_shapes=model.dynamic_shapes)
    replace_file(folder / WEIGHT_NAME, archived(program))
    configs = {key: config.to_dict() for key, config in model.qconfig.items()}  # type: ignore[operator, union-attr]
    replace_file(folder / QCONFIG_NAME, json.dumps(configs, indent=4).encode())
