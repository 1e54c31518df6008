from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from odd_networks import Counted
from safetensors.torch import save_file
from torch import Tensor, nn

from inc_clusterq.config import ModelConfig
from inc_clusterq.errors import ModelError
from inc_clusterq.fingerprint import fingerprint
from inc_clusterq.inputs import InputSpec
from inc_clusterq.models import check_logits, load_model

SPEC = InputSpec((1, 8, 8))
NET = """
    from torch import nn
    def net():
        layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)
        return nn.Sequential(*layers).double()
    def text():
        return "net"
"""


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))


def config(folder: Path, architecture: str, **keys: Any) -> ModelConfig:
    data = {"architecture": architecture, "input": {"shape": [1, 8, 8]}, **keys}
    return ModelConfig.model_validate(data, context={"folder": folder})


def test_a_function_and_a_checkpoint_make_a_frozen_float_model(tmp_path: Path, write_module: Callable[[str], str]) -> None:
    trained = net()
    save_file(trained.state_dict(), tmp_path / "net.safetensors")
    loaded = load_model(config(tmp_path, f"python:{write_module(NET)}:net", weights="net.safetensors"))
    assert (loaded.name, loaded.num_classes, loaded.input) == ("net", 5, SPEC)
    assert not loaded.module.training
    assert all(not value.requires_grad and value.dtype == torch.float32 for value in loaded.module.parameters())
    assert loaded.fingerprint == fingerprint(trained, loaded.input)
    x = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded.module(x), trained.eval()(x))


def test_a_function_may_return_a_trained_model(tmp_path: Path, write_module: Callable[[str], str]) -> None:
    assert load_model(config(tmp_path, f"python:{write_module(NET)}:net")).num_classes == 5


ODD = """
    import warnings
    import torch
    from torch import nn
    from torch.nn import functional

    class Net(nn.Module):
        def __init__(self, ending=lambda x: x):
            super().__init__()
            self.conv, self.norm, self.fc = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5)
            self.ending = ending
        def forward(self, x):
            return self.ending(self.fc(self.norm(self.conv(x)).mean((2, 3))))

    def squeezed():
        return Net(lambda x: x.squeeze())
    def pairs():
        return Net(lambda x: x[[0, 1]])
    def noisy():
        return Net(lambda x: functional.dropout(x))
    def scripted():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is deprecated
            return torch.jit.trace(Net().eval(), torch.zeros(2, 1, 8, 8))
    def lazy():
        return Net(nn.LazyLinear(3))
    def elsewhere():
        return Net().to("meta")
    def thin():
        net = Net()
        net.register_buffer("mask", torch.eye(3).to_sparse())
        return net
    class Two(Net):
        def forward(self, x, y, z=1):
            return super().forward(x) + y
    def two():
        return Two()
    def parallel():
        return nn.DataParallel(Net())
    def compiled():
        return torch.compile(nn.DataParallel(Net()))
"""


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("squeezed", r"returns shape \(5,\) for 1 sample and \(2, 5\) for 2; .* flatten\(1\) in place of squeeze"),
        ("pairs", r"does not take an input of shape \(1, 1, 8, 8\), model\.input\.shape is \[1, 8, 8\]: IndexError: "),
        ("two", r"TypeError: .*'y'; it may have one input tensor only"),
        ("noisy", r"returns other values for the same input each time"),
        ("lazy", r"ending\.weight is not initialised yet; give the trained model"),
        ("elsewhere", r"conv\.weight is on the device meta"),
        ("thin", r"mask is of layout torch\.sparse_coo"),
        ("scripted", r"scripted returned a TorchScript module, which cannot be exported; give the Python module"),
    ],
)
def test_what_would_fail_after_the_work_is_refused_before_it(
    tmp_path: Path, write_module: Callable[[str], str], function: str, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(config(tmp_path, f"python:{write_module(ODD)}:{function}"))


def test_a_checkpoint_gives_lazy_layers_their_values(tmp_path: Path, write_module: Callable[[str], str]) -> None:
    trained = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 5))
    save_file(trained.state_dict(), tmp_path / "net.safetensors")
    layers = "nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(5)"
    module = write_module(f"from torch import nn\ndef net():\n    return nn.Sequential({layers})")
    loaded = load_model(config(tmp_path, f"python:{module}:net", weights="net.safetensors"))
    x = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded.module(x), trained.eval()(x))


@pytest.mark.parametrize("function", ["parallel", "compiled"])
def test_what_a_model_was_wrapped_in_for_training_is_taken_off(
    tmp_path: Path, write_module: Callable[[str], str], function: str
) -> None:
    loaded = load_model(config(tmp_path, f"python:{write_module(ODD)}:{function}"))
    assert type(loaded.module).__name__ == "Net"


def test_a_range_and_a_std_on_different_scales_are_told(
    tmp_path: Path, write_module: Callable[[str], str], caplog: pytest.LogCaptureFixture
) -> None:
    named = f"python:{write_module(NET)}:net"
    for high, std in ((255, 1), (255, 58.4), (1, 0.229)):
        load_model(config(tmp_path, named, input={"shape": [1, 8, 8], "range": [0, high], "std": std}))
    assert not caplog.records
    load_model(config(tmp_path, named, input={"shape": [1, 8, 8], "range": [0, 255], "mean": 0.485, "std": 0.229}))
    assert "Normalised inputs span 1114; are model.input.range, mean and std on one scale?" in caplog.text


def test_a_function_that_returns_something_else_is_refused(tmp_path: Path, write_module: Callable[[str], str]) -> None:
    with pytest.raises(ModelError, match=r"text returned str; it must return a torch.nn.Module"):
        load_model(config(tmp_path, f"python:{write_module(NET)}:text"))


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: Path, write_module: Callable[[str], str]) -> None:
    save_file({"0.weight": torch.zeros(4, 1, 3, 3)}, tmp_path / "net.safetensors")
    with pytest.raises(ModelError, match=r"net\.safetensors does not fit the model. Tensors 7 missing: 0.bias, "):
        load_model(config(tmp_path, f"python:{write_module(NET)}:net", weights="net.safetensors"))


def test_weights_that_are_not_finite_are_refused(tmp_path: Path, write_module: Callable[[str], str]) -> None:
    state = net().state_dict()
    state["4.bias"][2] = float("nan")
    save_file(state, tmp_path / "net.safetensors")
    with pytest.raises(ModelError, match=r"4\.bias holds values that are not finite"):
        load_model(config(tmp_path, f"python:{write_module(NET)}:net", weights="net.safetensors"))


class Returns(nn.Module):
    """Passes the input to a function, whose result it returns."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: {"logits": x}, "the model returns dict; it must return one tensor"),
        (lambda x: (x, x), "the model returns tuple"),
        (lambda x: x, r"of shape \(2, 1, 8, 8\) for 2 samples"),
        (lambda x: x.mean((2, 3)), r"at least 2 classes"),
        (lambda x: x.mean((2, 3), keepdim=True).expand(2, 4, 1, 1), "flatten it in the model"),
        (lambda x: x.flatten(1).argmax(1, keepdim=True).expand(2, 4), r"returns torch.int64 of shape \(2, 4\)"),
        (lambda x: x.flatten(1)[:1], r"of shape \(1, 64\) for 2 samples"),
        (lambda x: x.flatten(1).softmax(1), "take the softmax out"),
        (lambda x: x.flatten(1) / 0, "not finite"),
        (lambda x: (x - x.mean(0)).flatten(1), "depends on what else is in the batch"),
        (
            lambda x: x @ torch.zeros(3, 3),
            r"does not take an input of shape \(2, 1, 8, 8\), model.input.shape is \[1, 8, 8\]",
        ),
    ],
)
def test_what_is_not_logits_is_refused(function: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        check_logits(Returns(function), SPEC)


def test_an_input_size_that_does_not_fit_is_refused_with_both_shapes() -> None:
    with pytest.raises(ModelError, match=r"shape \(2, 3, 32, 32\), model.input.shape is \[3, 32, 32\]: RuntimeError"):
        check_logits(net(), InputSpec((3, 32, 32)))


def test_checking_leaves_the_model_as_it_was() -> None:
    model = net()
    model[2].eval()
    before = fingerprint(model, SPEC)
    assert check_logits(model, SPEC) == 5
    assert [part.training for part in model] == [True, True, False, True, True]
    assert fingerprint(model, SPEC) == before


def test_what_a_model_counts_is_as_before() -> None:
    net, spec = Counted(), InputSpec((3, 8, 8))
    first = fingerprint(net, spec)
    assert check_logits(net, spec) == 5
    assert fingerprint(net, spec) == first
    assert (int(net.calls), float(net.last_mean)) == (0, 0)


def test_a_model_that_was_made_in_inference_mode_is_refused_by_name() -> None:
    with torch.inference_mode():
        net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    with pytest.raises(ModelError, match=r"1\.weight was made in torch\.inference_mode\(\)"):
        check_logits(net, InputSpec((1, 2, 2)))


def test_numbers_that_are_not_finite_are_found_in_buffers_too(tmp_path: Path, write_module: Callable[[str], str]) -> None:
    name = write_module(
        "import torch\nfrom torch import nn\ndef net():\n"
        "    body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5))\n"
        "    body[1].running_var[2] = float('inf')\n    return body"
    )
    with pytest.raises(ModelError, match=r"1\.running_var holds values that are not finite"):
        load_model(config(tmp_path, f"python:{name}:net"))


def test_a_model_that_writes_over_its_input_is_refused() -> None:
    class Normalising(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = net()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.body(x.sub_(0.5).div_(0.25))
            return out

    with pytest.raises(ModelError, match="changes its input in place"):
        check_logits(Normalising(), SPEC)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_that_is_not_in_float32_is_refused_by_name(dtype: torch.dtype) -> None:
    with pytest.raises(ModelError, match=rf"0.weight holds {dtype}; .* model.float\(\)"):
        check_logits(net().to(dtype), SPEC)


def torchvision_config(folder: Path, name: str, weights: str | None = None) -> ModelConfig:
    return config(folder, f"torchvision:{name}", weights=weights, input={"shape": [3, 64, 64]})


@pytest.mark.parametrize("owner", ["", "model."])
def test_a_torchvision_checkpoint_brings_its_own_number_of_classes(tmp_path: Path, owner: str) -> None:
    import torchvision

    trained = torchvision.models.mobilenet_v2(num_classes=7)
    held = {f"{owner}{name}": value for name, value in trained.state_dict().items()}
    torch.save({"state_dict": held}, tmp_path / "net.pth")
    loaded = load_model(torchvision_config(tmp_path, "mobilenet_v2", "net.pth"))
    assert loaded.num_classes == 7
    assert loaded.fingerprint == fingerprint(trained, loaded.input)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_a_torchvision_checkpoint_that_does_not_tell_what_network_it_is_of_is_refused(tmp_path: Path, name: str) -> None:
    torch.save({}, tmp_path / "net.pth")
    with pytest.raises(ModelError, match=rf"{name} scales its input .* Name a function that makes it"):
        load_model(torchvision_config(tmp_path, name, "net.pth"))


def test_a_torchvision_network_with_another_head_is_to_be_made_by_a_function(tmp_path: Path) -> None:
    import torchvision

    trained = torchvision.models.shufflenet_v2_x0_5()
    trained.fc = nn.Sequential(nn.Dropout(), trained.fc)
    torch.save(trained.state_dict(), tmp_path / "net.pth")
    with pytest.raises(ModelError, match=r"2 not in the model: fc\.1\.weight, .* name a function that makes it"):
        load_model(torchvision_config(tmp_path, "shufflenet_v2_x0_5", "net.pth"))


def test_published_weights_come_from_the_cache_and_are_never_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torchvision

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: pytest.fail("downloads"))
    with pytest.raises(ModelError, match=r"not in torch's cache .* Nothing is downloaded here"):
        load_model(torchvision_config(tmp_path, "shufflenet_v2_x0_5", "DEFAULT"))
    trained = torchvision.models.shufflenet_v2_x0_5()
    file = torchvision.models.ShuffleNet_V2_X0_5_Weights.DEFAULT.url.rpartition("/")[2]
    (tmp_path / "checkpoints").mkdir()
    torch.save(trained.state_dict(), tmp_path / "checkpoints" / file)
    loaded = load_model(torchvision_config(tmp_path, "shufflenet_v2_x0_5", "DEFAULT"))
    assert loaded.fingerprint == fingerprint(trained, loaded.input)


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("resnet81", "DEFAULT", r"no classification model 'resnet81'; did you mean resnet18"),
        ("fcn_resnet50", "DEFAULT", r"no classification model 'fcn_resnet50'"),
        ("resnet18", None, r"resnet18 would be untrained; name a checkpoint file or published weights"),
        ("resnet18", "IMAGENET", r"must be one of IMAGENET1K_V1"),
    ],
)
def test_what_torchvision_does_not_have_is_refused(tmp_path: Path, name: str, weights: str | None, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(torchvision_config(tmp_path, name, weights))
