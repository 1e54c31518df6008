from __future__ import annotations

import pytest
import torch
from neural_compressor.torch.algorithms.pt2e_quant.core import W8A8PT2EQuantizer
from neural_compressor.torch.quantization import INT8StaticQuantConfig
from torch import fx, nn
from torch.nn.utils import parametrizations

from inc_clusterq.canonical import canonicalise

aten = torch.ops.aten


LAYERS = {
    "reflect": nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"),
    "circular": nn.Conv2d(3, 8, 3, padding=(2, 1), padding_mode="circular"),
    "replicate": nn.Conv2d(3, 8, 3, padding="same", padding_mode="replicate"),
    "signal": nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 8, 3, padding=1, padding_mode="reflect")),
    "normalised": parametrizations.weight_norm(nn.Conv2d(3, 8, 3)),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_the_host_quantizes_convolutions_whose_module_holds_more(name: str, strict: bool) -> None:
    """At the padding it would raise; not strict is the host's second try, which knows no functions."""
    module = nn.Sequential(LAYERS[name], nn.ReLU()).eval()
    inputs = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    exported = torch.export.export(module, (inputs[:2],), dynamic_shapes=shapes, strict=strict).module()
    assert isinstance(exported, fx.GraphModule)
    canonicalise(exported)
    with torch.no_grad():
        torch.testing.assert_close(exported(inputs), module(inputs))
    exported._exported = True  # type: ignore[assignment]  # the host's mark
    prepared = W8A8PT2EQuantizer(quant_config=INT8StaticQuantConfig()).prepare(exported)
    (node,) = [node for node in prepared.graph.nodes if node.target is aten.conv2d.default]
    assert str(node.args[1].target).startswith("activation_post_process")
