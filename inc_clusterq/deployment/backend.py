"""The quantize operators of a saved program, and Inductor's int8 passes: both exist once this module has been imported.

The passes that turn quantize-dequantize pairs into int8 kernels live in torchao, and are registered when its x86 quantizer
is imported. A program that was loaded with torch alone, without the host, compiles to float convolutions otherwise,
freezing or not, and nothing says so.
"""

from __future__ import annotations

import torch
import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer  # noqa: F401

QUANTIZE = torch.ops.quantized_decomposed.quantize_per_tensor.default
DEQUANTIZE = torch.ops.quantized_decomposed.dequantize_per_tensor.default
DEQUANTIZE_WEIGHT = torch.ops.quantized_decomposed.dequantize_per_channel.default
STORED_MAX = 255  # top of uint8, which every activation is stored in
