from __future__ import annotations

import logging
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from inc_clusterq.checkpoints import fit_state, read_state
from inc_clusterq.errors import ModelError


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))


@pytest.fixture
def state() -> dict[str, Tensor]:
    return net().state_dict()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".ckpt"])
def test_what_was_saved_is_what_is_read(tmp_path: Path, state: dict[str, Tensor], suffix: str) -> None:
    file = tmp_path / f"net{suffix}"
    if suffix == ".safetensors":
        save_file(state, file)
    else:
        torch.save(state, file)
    read = read_state(file)
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], state[name]) for name in state)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict", "state_dict_ema", "model_ema", "ema"])
def test_wrapping_and_prefixes_of_training_scripts_are_taken_off(
    tmp_path: Path, state: dict[str, Tensor], key: str, prefix: str
) -> None:
    file = tmp_path / "net.pth"
    torch.save({"epoch": 3, key: OrderedDict((f"{prefix}{name}", value) for name, value in state.items())}, file)
    assert read_state(file).keys() == state.keys()


@pytest.mark.parametrize("extra", [{"epochs": 20}, torch.tensor(20)])
def test_what_a_module_keeps_beside_parameters_and_buffers_is_left_to_it(
    tmp_path: Path, state: dict[str, Tensor], extra: object
) -> None:
    class Counting(nn.Sequential):
        def get_extra_state(self) -> object:
            return extra

        def set_extra_state(self, state: object) -> None:
            raise AssertionError(f"{state} was not asked for")

    counting = Counting(*net().children())
    torch.save(counting.state_dict(), tmp_path / "net.pth")
    read = read_state(tmp_path / "net.pth")
    assert read.keys() == state.keys()
    fit_state(counting, state, "it")
    assert all(torch.equal(counting.state_dict()[name], value) for name, value in state.items())


def test_weights_are_read_in_place_of_their_averages_and_that_is_said(
    tmp_path: Path, state: dict[str, Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    averaged = {name: value + 1 for name, value in state.items()}
    torch.save({"state_dict_ema": averaged, "state_dict": state}, tmp_path / "net.pth")
    with caplog.at_level(logging.WARNING, "inc_clusterq"):
        read = read_state(tmp_path / "net.pth")
    assert all(torch.equal(read[name], state[name]) for name in state)
    assert "'state_dict' is read; 'state_dict_ema' is there too" in caplog.text


def test_the_name_of_the_module_that_held_the_model_is_taken_off_where_all_then_fits(state: dict[str, Tensor]) -> None:
    held = {f"net.{name}": value + 1 for name, value in state.items()}
    fit_state(module := net(), held, "it")
    assert all(torch.equal(value, state[name] + 1) for name, value in module.state_dict().items() if value.is_floating_point())
    with pytest.raises(ModelError, match=r"7 not in the model: net\.0\.weight"):
        fit_state(net(), {name.replace("1.bias", "2.bias"): value for name, value in held.items()}, "it")


@pytest.mark.parametrize("owner", ["model._orig_mod.", "_orig_mod.model.", "model.module._orig_mod."])
def test_prefixes_are_taken_off_on_either_side_of_that_name(tmp_path: Path, state: dict[str, Tensor], owner: str) -> None:
    torch.save({f"{owner}{name}": value for name, value in state.items()}, tmp_path / "net.pth")
    fit_state(module := net(), read_state(tmp_path / "net.pth"), "it")
    assert all(torch.equal(module.state_dict()[name], value) for name, value in state.items())


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64])
def test_weights_that_are_no_real_numbers_are_not_taken_for_some(state: dict[str, Tensor], dtype: torch.dtype) -> None:
    with pytest.raises(ModelError, match=rf"1 of another type: 0\.weight {dtype} in place of torch\.float32"):
        fit_state(net(), {**state, "0.weight": state["0.weight"].to(dtype)}, "it")


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_torchscript_archive_is_told_from_a_damaged_file(tmp_path: Path) -> None:
    torch.jit.trace(net().eval(), torch.zeros(1, 1, 4, 4)).save(tmp_path / "net.pt")
    with pytest.raises(ModelError, match=r"is a TorchScript archive; save `model.state_dict\(\)`") as raised:
        read_state(tmp_path / "net.pt")
    assert "weights_only" not in str(raised.value)


class _Own:
    pass


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_Own(), "holds more than tensors"),
        (net(), "holds more than tensors"),
        ([1, 2], "holds list, not the named tensors"),
        ({}, "not the named tensors"),
        ({"epoch": 3, "weights": {}}, "'epoch' is int, not a tensor"),
    ],
)
def test_a_file_with_anything_but_named_tensors_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    file = tmp_path / "net.pt"
    torch.save(content, file)
    with pytest.raises(ModelError, match=r"checkpoint .*net\.pt: ") as raised:
        read_state(file)
    assert message in str(raised.value)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 half a zip"])
def test_a_damaged_file_is_refused(tmp_path: Path, suffix: str, content: bytes) -> None:
    file = tmp_path / f"net{suffix}"
    file.write_bytes(content)
    with pytest.raises(ModelError, match=r"cannot be read|is damaged"):
        read_state(file)


def test_a_missing_file_and_an_unknown_suffix_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        read_state(tmp_path / "net.pt")
    with pytest.raises(ModelError, match=r"must end in \.safetensors, \.pt, \.pth or \.ckpt"):
        read_state(tmp_path / "net.onnx")


def test_fitting_tensors_are_loaded(state: dict[str, Tensor]) -> None:
    target = net()
    del state["1.num_batches_tracked"]  # checkpoints of old torch lack it, and inference does not need it
    fit_state(target, state, "checkpoint")
    assert all(torch.equal(target.state_dict()[name], value) for name, value in state.items())


def test_misfits_are_listed_by_kind_five_of_each_at_most(state: dict[str, Tensor]) -> None:
    target = net()
    before = {name: value.clone() for name, value in target.state_dict().items()}
    other = {f"head.{position}": torch.zeros(1) for position in range(7)}
    other.update({name: value for name, value in state.items() if name != "0.bias"})
    other["0.weight"] = torch.zeros(4, 1, 3, 3)
    with pytest.raises(ModelError) as raised:
        fit_state(target, other, "checkpoint net.pt")
    assert str(raised.value) == (
        "checkpoint net.pt does not fit the model. Tensors 1 missing: 0.bias; "
        "7 not in the model: head.0, head.1, head.2, head.3, head.4 and 2 more; "
        "1 of another shape: 0.weight (4, 1, 3, 3) in place of (2, 1, 3, 3)"
    )
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


def test_a_damaged_file_is_one_sentence_wherever_it_is_damaged(tmp_path: Path, state: dict[str, Tensor]) -> None:
    file, refused = tmp_path / "net.pt", 0
    torch.save(state, file, _use_new_zipfile_serialization=False)
    whole = file.read_bytes()
    for place in range(0, len(whole), max(len(whole) // 150, 1)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        with suppress(ModelError):  # and nothing else comes out
            read_state(file)
            continue  # a damaged weight is not told
        refused += 1
    assert refused > 20
