"""Real architectures, from export to the converted model; weights are random, since only the structure matters here."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, fx, nn

from inc_clusterq.deployment.qdq import convert
from inc_clusterq.progress import NO_STAGE
from inc_clusterq.reconstruction import second_order
from inc_clusterq.reconstruction.bits import BitPlan
from inc_clusterq.reconstruction.checkpoint import UnitStore
from inc_clusterq.reconstruction.fake_quantize import Mode
from inc_clusterq.reconstruction.graph import extract
from inc_clusterq.reconstruction.layers import WEIGHTED
from inc_clusterq.reconstruction.quantizers import in_mode, install_quantizers
from inc_clusterq.reconstruction.reconstruct import base_units, reconstruct
from inc_clusterq.reconstruction.sensitivity import sensitivities
from inc_clusterq.reconstruction.settings import ReconstructionSettings

pytestmark = pytest.mark.slow

NETWORKS: dict[str, tuple[int, dict[str, object], int]] = {  # input size, arguments, fewest units to expect
    "resnet18": (64, {}, 10),
    "resnet50": (64, {}, 18),
    "wide_resnet50_2": (64, {}, 18),
    "resnext50_32x4d": (64, {}, 18),
    "mobilenet_v2": (64, {}, 20),
    "mobilenet_v3_small": (64, {}, 12),
    "mnasnet0_5": (64, {}, 18),
    "regnet_y_400mf": (64, {}, 17),
    "shufflenet_v2_x0_5": (64, {}, 18),
    "densenet121": (64, {}, 6),
    "efficientnet_b0": (64, {}, 18),
    "squeezenet1_1": (64, {}, 18),
    "vgg11_bn": (64, {}, 11),
    "googlenet": (64, {"aux_logits": False, "init_weights": False}, 12),
    "inception_v3": (96, {"aux_logits": False, "init_weights": False}, 14),
    "convnext_tiny": (64, {}, 20),
}


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_a_known_architecture_is_cut_reconstructed_and_converted(
    prepare: Callable[[nn.Module, Tensor], fx.GraphModule], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for name_of_effort, least in (("SHARES", (0.7,)), ("PASSES", 1)):  # more takes minutes of wide layers, and tells no more
        monkeypatch.setattr(second_order, name_of_effort, least)
    size, keys, fewest = NETWORKS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = torchvision.models.get_model(name, weights=None, num_classes=10, **keys).eval()
        if isinstance(module, torchvision.models.VGG):  # a hundred million weights of one kind tell nothing more than these
            module.avgpool = nn.AdaptiveAvgPool2d(1)
            module.classifier[0], module.classifier[3] = nn.Linear(512, 64), nn.Linear(64, 64)
            module.classifier[6] = nn.Linear(64, 10)
        inputs = torch.randn(8, 3, size, size)
    settings = ReconstructionSettings(iterations=2, batch_size=4, granularity="block")
    graph = install_quantizers(prepare(module, inputs), BitPlan(4, 4), settings)

    operators = [node.name for node in graph.graph_module.graph.nodes if node.target in WEIGHTED]
    assert [layer.node for unit in graph.units for layer in unit.layers] == operators
    assert {layer.name for unit in graph.units for layer in unit.layers} <= set(dict(module.named_modules()))
    assert len(graph.units) >= fewest
    expected = module(inputs)
    x = inputs
    with in_mode(graph.graph_module, Mode.FLOAT):
        for unit in graph.units:
            x = extract(graph.graph_module, unit)(x)
    torch.testing.assert_close(x, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))

    nearest = settings.model_copy(update={"start": "nearest", "correct_bias": False})
    alone, together = sensitivities(graph, base_units(graph, settings), inputs, nearest, NO_STAGE)
    assert bool(torch.tensor([*alone, together]).isfinite().all())
    assert max(alone) > 0

    reconstruct(graph, inputs, settings, seed=0, store=UnitStore())
    simulated = graph.graph_module(inputs * 2)
    assert torch.equal(convert(graph)(inputs * 2), simulated)
