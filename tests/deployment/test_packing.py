from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from inc_clusterq.deployment.packing import PACKED, load_packed, pack, pack_integers, unpack_integers, weight_bits
from inc_clusterq.deployment.saved import SavedModel
from inc_clusterq.errors import OutputError, ResultError

SavedResult = Callable[..., SavedModel]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shape", [(1,), (3, 5), (4, 3, 3, 3), (0,)])
def test_unpacking_is_the_inverse_of_packing(bits: int, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(bits)
    integers = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, generator=generator).to(torch.int8)
    stream = pack_integers(integers, bits)
    assert stream.numel() == -(-integers.numel() * bits // 8)
    assert torch.equal(unpack_integers(stream, bits, shape), integers)


def test_4_bits_lie_two_to_a_byte_and_2_bits_four() -> None:
    assert pack_integers(torch.tensor([-8, 7, 0], dtype=torch.int8), 4).tolist() == [0xF0, 0x08]
    assert pack_integers(torch.tensor([-2, -1, 0, 1, 1], dtype=torch.int8), 2).tolist() == [0b11100100, 0b11]
    assert pack_integers(torch.tensor([-128, 127], dtype=torch.int8), 8).tolist() == [0, 255]


def test_integers_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit 4 bits"):
        pack_integers(torch.tensor([8], dtype=torch.int8), 4)
    with pytest.raises(ValueError, match="take 2 bytes, not 1"):
        unpack_integers(torch.zeros(1, dtype=torch.uint8), 4, (3,))


@pytest.mark.parametrize(("name", "bits"), [("residual", 2), ("residual", 3), ("depthwise", 4), ("tied", 8)])
def test_the_packed_model_is_the_saved_one_to_the_bit(saved: SavedResult, name: str, bits: int) -> None:
    model = saved(name, bits, weight_ceiling=8)  # on every machine: nothing here runs on kernels
    found = pack(model.folder, overwrite=True)
    assert found.packed_size == (model.folder / PACKED).stat().st_size
    assert found.packed_size < found.plain_size
    widths = weight_bits(model.program)
    assert set(widths.values()) == {bits, 8}  # the first and the last layer keep 8
    inputs = torch.randn(5, *model.shape) * 3
    with torch.no_grad():
        assert torch.equal(load_packed(found.file)(inputs), model.module(inputs))


def test_the_sizes_are_those_of_the_weights(saved: SavedResult) -> None:
    found = pack(saved("residual", 4, weight_ceiling=8).folder, overwrite=True)
    # stem 8 x 27 and fc 16 x 5 of 8 bits; 8 x 72 twice, 16 x 72 and 16 x 144 of 4 bits
    assert found.weights == {8: 216 + 80, 4: 2 * 576 + 1152 + 2304}
    assert found.float_size == 4 * (296 + 4608 + 8 + 8 + 8 + 16 + 16 + 5)


def test_a_weight_that_two_layers_share_is_stored_and_counted_once(saved: SavedResult) -> None:
    found = pack(saved("tied", 8, weight_ceiling=8).folder, overwrite=True)
    assert found.weights == {8: 8 * 27 + 8 * 72 + 8 * 5}
    assert found.float_size == 4 * (8 * 27 + 8 + 8 * 72 + 8 + 8 * 5 + 5)


def test_a_packed_file_is_only_replaced_when_asked(saved: SavedResult) -> None:
    folder = saved("chain").folder
    pack(folder, overwrite=True)
    with pytest.raises(OutputError, match="--overwrite"):
        pack(folder)


def test_a_damaged_file_is_refused(saved: SavedResult, tmp_path: Path) -> None:
    file = tmp_path / PACKED
    with pytest.raises(ResultError, match="there is no"):
        load_packed(file)
    data = bytearray(pack(saved("chain").folder, overwrite=True).file.read_bytes())
    data[-1000] ^= 1
    file.write_bytes(data)
    with pytest.raises(ResultError, match="checksum"):
        load_packed(file)
    file.write_bytes(data[:100])
    with pytest.raises(ResultError, match="damaged"):
        load_packed(file)
