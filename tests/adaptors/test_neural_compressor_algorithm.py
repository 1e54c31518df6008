from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from neural_compressor.torch.export import export
from neural_compressor.torch.quantization import convert, prepare, quantize
from torch import Tensor, fx, nn

from inc_clusterq.adaptors import neural_compressor_algorithm as algorithm
from inc_clusterq.adaptors.neural_compressor_algorithm import watched_by
from inc_clusterq.adaptors.neural_compressor_config import MRECGConfig
from inc_clusterq.cpu import Cpu
from inc_clusterq.errors import ModelError
from inc_clusterq.progress import Stage

Network = Callable[[str], tuple[nn.Module, Tensor]]
QUICK = {"iterations": 4, "batch_size": 8}
DYNAMIC = ({0: torch.export.Dim("batch", min=1, max=64)},)


@torch.no_grad()
@pytest.mark.parametrize("inplace", [True, False])
def test_prepare_and_convert_are_quantize_in_two_steps(
    exported: nn.Module, inputs: Tensor, run_fn: Callable[[nn.Module], None], inplace: bool
) -> None:
    config = MRECGConfig(w_bits=3, act_bits=4, **QUICK)  # type: ignore[arg-type]
    other = copy.deepcopy(exported)
    other._exported, other.dynamic_shapes = True, exported.dynamic_shapes  # type: ignore[assignment]
    prepared = prepare(other, config)
    run_fn(prepared)
    in_two_steps = convert(prepared, inplace=inplace)
    at_once = quantize(exported, config, run_fn=run_fn)
    assert torch.equal(in_two_steps(inputs), at_once(inputs))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU to reconstruct on")
def test_on_a_gpu_one_seed_names_one_result_that_is_near_the_cpus(
    network: Network, inputs: Tensor, run_fn: Callable[[nn.Module], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, config = network("residual")[0], MRECGConfig(w_bits=4, act_bits=4, iterations=60, end_to_end_iterations=20)

    def outputs() -> Tensor:
        with torch.no_grad():
            given: Tensor = quantize(export(module, (inputs[:2],), dynamic_shapes=DYNAMIC), config, run_fn=run_fn)(inputs)
        return given

    once, again = outputs(), outputs()
    monkeypatch.setattr("inc_clusterq.placement.gpu", lambda: None)
    on_cpu, wanted = outputs(), module(inputs)
    assert torch.equal(once, again)
    assert once.device.type == "cpu"
    assert (once - wanted).square().mean() < 2 * (on_cpu - wanted).square().mean()


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["transposed", "signal"]
)  # have layers without BatchNorm, whose weights the exported graph shares
def test_quantizing_leaves_the_users_float_model_alone(network: Network, name: str) -> None:
    module, inputs = network(name)
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    result = quantize(
        export(module, (inputs[:2],), dynamic_shapes=DYNAMIC),
        MRECGConfig(w_bits=2, **QUICK),  # type: ignore[arg-type]
        run_fn=lambda model: model(inputs),
    )
    assert not torch.equal(result(inputs), module(inputs))
    assert all(torch.equal(tensor, before[key]) for key, tensor in module.state_dict().items())
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_a_rewriting_that_changes_the_network_is_an_error(
    exported: nn.Module, inputs: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(graph_module: fx.GraphModule) -> None:
        (relu, *_) = [node for node in graph_module.graph.nodes if node.target is torch.ops.aten.relu.default]
        relu.target = torch.ops.aten.hardswish.default
        graph_module.recompile()

    monkeypatch.setattr("inc_clusterq.adaptors.neural_compressor_algorithm.canonicalise", wrong)
    with pytest.raises(ModelError, match="differs from the float model"):
        quantize(exported, MRECGConfig(**QUICK), run_fn=lambda model: model(inputs))  # type: ignore[arg-type]


@pytest.mark.parametrize(("ceiling", "warnings"), [(8, 1), (7, 0)])
def test_weights_that_this_processor_overflows_on_are_told_once(
    exported: nn.Module,
    inputs: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    ceiling: int,
    warnings: int,
) -> None:
    monkeypatch.setattr(algorithm, "cpu", lambda: Cpu(f"one of {ceiling}", "x86_64", frozenset({"avx2"})))
    config = MRECGConfig(weight_ceiling=ceiling, **QUICK)  # type: ignore[arg-type]
    other = copy.deepcopy(exported)
    other._exported, other.dynamic_shapes = True, exported.dynamic_shapes  # type: ignore[assignment]
    for model in (exported, other):
        quantize(model, config, run_fn=lambda model: model(inputs))
    assert caplog.text.count(f"one of {ceiling} has neither VNNI nor AMX") == warnings


def test_run_args_reach_the_calibration(exported: nn.Module, inputs: Tensor) -> None:
    seen = []

    def run(model: nn.Module, images: Tensor) -> None:
        seen.append(len(images))
        model(images)

    quantize(exported, MRECGConfig(**QUICK), run_fn=run, run_args=(inputs,))  # type: ignore[arg-type]
    assert seen == [24]


def test_a_layers_own_bits_reach_the_graph(exported: nn.Module, run_fn: Callable[[nn.Module], None]) -> None:
    config = MRECGConfig(w_bits=8, layer_bits={"one.conv1.0": (2, None)}, **QUICK)  # type: ignore[arg-type]
    model = quantize(exported, config, run_fn=run_fn)
    levels = [int(tensor.unique().numel()) for tensor in model.buffers() if tensor.dtype is torch.int8]
    assert sum(count <= 4 for count in levels) == 1


def test_an_unknown_layer_is_an_error_that_lists_the_known_ones(
    exported: nn.Module, run_fn: Callable[[nn.Module], None]
) -> None:
    config = MRECGConfig(layer_bits={"conv9": (2, None)}, **QUICK)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"conv9; it has: stem\.0"):
        quantize(exported, config, run_fn=run_fn)


def test_reconstruction_reports_to_the_progress_that_watches(exported: nn.Module, run_fn: Callable[[nn.Module], None]) -> None:
    class Recorder:
        done = 0

        @contextmanager
        def stage(self, title: str, total: int) -> Iterator[Stage]:
            self.total = total
            yield self

        def advance(self, steps: int = 1, note: str = "") -> None:
            self.done += steps

        skip = advance

    recorder = Recorder()
    with watched_by(recorder):
        quantize(exported, MRECGConfig(granularity="layer", **QUICK), run_fn=run_fn)  # type: ignore[arg-type]
    assert recorder.done == recorder.total == 4 * 4


def test_a_model_that_was_not_exported_is_refused(network: Network) -> None:
    module, inputs = network("chain")
    with pytest.raises(ModelError, match=r"call neural_compressor\.torch\.export\.export"):
        quantize(module, MRECGConfig(), run_fn=lambda model: model(inputs))


def test_a_model_that_was_not_prepared_is_refused(exported: nn.Module) -> None:
    with pytest.raises(ModelError, match="has not been prepared"):
        convert(exported, MRECGConfig())


def test_a_model_with_several_inputs_is_refused() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            result: Tensor = (self.a(x) + self.b(y)).mean((2, 3))
            return result

    pair = (torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8))
    with pytest.raises(ModelError, match="the model has 2 inputs"):
        quantize(export(Two(), pair), MRECGConfig(), run_fn=lambda model: model(*pair))


def test_a_model_without_weights_is_refused() -> None:
    inputs = torch.randn(4, 3, 8, 8)
    exported = export(nn.Sequential(nn.ReLU(), nn.Flatten()), (inputs,), dynamic_shapes=DYNAMIC)
    with pytest.raises(ModelError, match="no convolution or linear operator"):
        quantize(exported, MRECGConfig(), run_fn=lambda model: model(inputs))


@pytest.mark.parametrize("run_fn", [None, lambda model: None])
def test_missing_calibration_images_are_an_error(exported: nn.Module, run_fn: Callable[[nn.Module], None] | None) -> None:
    with pytest.raises(ModelError, match="no calibration image has passed"):
        quantize(exported, MRECGConfig(), run_fn=run_fn)


@torch.no_grad()
def test_a_loader_may_fill_one_tensor_again_and_again_and_call_by_keyword(exported: nn.Module, inputs: Tensor) -> None:
    def refilling(model: nn.Module) -> None:
        buffer = torch.empty_like(inputs[:8])
        for batch in inputs.split(8):
            model(buffer.copy_(batch))

    def named(model: nn.Module) -> None:
        (name,) = (node.target for node in exported.graph.nodes if node.op == "placeholder")  # type: ignore[union-attr]
        for batch in inputs.split(8):
            model(**{str(name): batch})

    def plain(model: nn.Module) -> None:
        for batch in inputs.split(8):
            model(batch)

    found = []
    for run_fn in (plain, refilling, named):
        own = copy.deepcopy(exported)
        own._exported, own.dynamic_shapes = True, exported.dynamic_shapes  # type: ignore[assignment]
        config = MRECGConfig(w_bits=3, act_bits=4, **QUICK)  # type: ignore[arg-type]
        found.append(quantize(own, config, run_fn=run_fn)(inputs))
    assert torch.equal(found[1], found[0])
    assert torch.equal(found[2], found[0])


def test_an_exported_model_that_has_been_quantized_is_not_quantized_again(
    exported: nn.Module, run_fn: Callable[[nn.Module], None]
) -> None:
    config = MRECGConfig(**QUICK)  # type: ignore[arg-type]
    quantize(exported, config, run_fn=run_fn)
    with pytest.raises(ModelError, match=r"prepared before; .* export it again"):
        quantize(exported, config, run_fn=run_fn)


def test_an_image_that_is_not_finite_is_named(exported: nn.Module, inputs: Tensor) -> None:
    inputs[7, 0, 3, 3] = float("nan")
    with pytest.raises(ModelError, match="calibration image 7, counted from 0, holds values that are not finite"):
        quantize(exported, MRECGConfig(**QUICK), run_fn=lambda model: model(inputs))  # type: ignore[arg-type]


class Shaped(nn.Module):
    """Flattens by the batch size that it sees, or not; returns its logits, or a pair."""

    def __init__(self, *, viewed: bool = False, paired: bool = False, logarithm: bool = False) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8 * 64, 5)
        self.viewed, self.paired, self.logarithm = viewed, paired, logarithm

    def forward(self, x: Tensor) -> Any:
        h = self.conv(x.log() if self.logarithm else x).relu()
        out = self.fc(h.view(x.size(0), -1) if self.viewed else h.flatten(1))
        return (out, h) if self.paired else out


@pytest.mark.parametrize("viewed", [False, True])
@pytest.mark.parametrize("batch", [2, 4])
def test_a_model_exported_for_one_batch_size_is_refused_before_it_is_calibrated(
    inputs: Tensor, viewed: bool, batch: int
) -> None:
    fixed = export(Shaped(viewed=viewed).eval(), (inputs[:2],))
    with pytest.raises(ModelError, match=r"exported for batches of 2 alone; .* dynamic_shapes=loader.dynamic_shapes"):
        quantize(fixed, MRECGConfig(**QUICK), run_fn=lambda model: model(inputs[:batch]))  # type: ignore[arg-type]


def test_calibration_images_of_another_size_are_refused(inputs: Tensor) -> None:
    model = export(Shaped().eval(), (inputs[:2],), dynamic_shapes=DYNAMIC)
    with pytest.raises(ModelError, match=r"have shape \(3, 4, 4\) each; the model was exported for \(3, 8, 8\)"):
        quantize(model, MRECGConfig(**QUICK), run_fn=lambda model: model(inputs[:, :, ::2, ::2]))  # type: ignore[arg-type]


def test_a_model_that_returns_more_than_a_tensor_is_refused(inputs: Tensor) -> None:
    pair = export(Shaped(paired=True).eval(), (inputs[:2],), dynamic_shapes=DYNAMIC)
    with pytest.raises(ModelError, match="the model returns tuple; only models that return one tensor"):
        quantize(pair, MRECGConfig(**QUICK), run_fn=lambda model: model(inputs))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("last", "found"),
    [
        (lambda logits: logits[:, 0], r"torch.float32 of shape \(2,\)"),
        (lambda logits: logits.argmax(1, keepdim=True), r"torch.int64 of shape \(2, 1\)"),
        (lambda logits: logits.reshape(-1, 1), r"torch.float32 of shape \(10, 1\)"),
    ],
)
def test_outputs_that_no_loss_can_be_taken_of_are_refused_before_calibration(
    inputs: Tensor, last: Callable[[Tensor], Tensor], found: str
) -> None:
    class Ending(Shaped):
        def forward(self, x: Tensor) -> Tensor:
            return last(super().forward(x))

    model = export(Ending().eval(), (inputs[:2],), dynamic_shapes=DYNAMIC)
    with pytest.raises(ModelError, match=f"returns {found} for 2 samples; .* leave what comes behind"):
        quantize(model, MRECGConfig(**QUICK), run_fn=lambda model: pytest.fail("calibrated"))  # type: ignore[arg-type]


def test_what_the_host_cannot_prepare_is_one_of_our_errors(
    exported: nn.Module, run_fn: Callable[[nn.Module], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer.X86InductorQuantizer.annotate", fail)
    with pytest.raises(ModelError, match="cannot prepare this model for quantization: AssertionError; its traceback") as told:
        quantize(exported, MRECGConfig(**QUICK), run_fn=run_fn)  # type: ignore[arg-type]
    assert isinstance(told.value.__cause__, AssertionError)


def test_a_class_that_is_masked_out_hides_no_error(inputs: Tensor) -> None:
    class Masked(Shaped):
        def __init__(self, mask: float) -> None:
            super().__init__()
            self.mask = mask

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = super().forward(x)
            return logits + self.mask * (torch.arange(5) == 2)

    told = []
    for mask in (0.0, -1e4):
        torch.manual_seed(0)
        model = export(Masked(mask).eval(), (inputs[:2],), dynamic_shapes=DYNAMIC)
        config = MRECGConfig(w_bits=2, act_bits=2, edge_bits=2, iterations=2, batch_size=8, end_to_end_iterations=2)
        reconstruction = quantize(model, config, run_fn=lambda model: model(inputs)).reconstruction
        assert reconstruction.end_to_end is not None
        told.append((reconstruction.units[-1].relative_loss, reconstruction.end_to_end.relative_loss_before))
    assert min(told[0]) > 1e-3
    for masked, plain in zip(told[1], told[0], strict=True):  # of other classes; the mask's own power would hide all of it
        assert plain / 2 < masked < 2 * plain


def test_a_class_that_is_masked_out_by_infinity_is_refused(inputs: Tensor) -> None:
    class Masked(Shaped):
        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = super().forward(x)
            return logits.masked_fill(torch.arange(5) == 2, -torch.inf)

    model = export(Masked().eval(), (inputs[:2],), dynamic_shapes=DYNAMIC)
    with pytest.raises(ModelError, match=r"not finite for calibration images; .* a finite number such as -1e4"):
        quantize(model, MRECGConfig(**QUICK), run_fn=lambda model: model(inputs))  # type: ignore[arg-type]


def test_a_model_of_logarithms_is_compared_where_it_is_finite(inputs: Tensor) -> None:
    positive = inputs.abs() + 0.1
    model = export(Shaped(logarithm=True).eval(), (positive[:2],), dynamic_shapes=DYNAMIC)
    found = quantize(model, MRECGConfig(**QUICK), run_fn=lambda model: model(positive))  # type: ignore[arg-type]
    assert bool(found(positive).isfinite().all())
