from __future__ import annotations

import errno
import os
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from inc_clusterq.errors import OutputError
from inc_clusterq.reconstruction.checkpoint import UnitStore
from inc_clusterq.reconstruction.quantizers import QuantizedGraph
from inc_clusterq.reconstruction.reconstruct import reconstruct
from inc_clusterq.reconstruction.settings import ReconstructionSettings
from inc_clusterq.reconstruction.shelf import AT_ONCE, Shelf


def mapped_bytes() -> int:
    """Bytes of this process's mapped files that `Shelf` made."""
    total = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        if ".mapped" in line:
            low, high = line.split()[0].split("-")
            total += int(high, 16) - int(low, 16)
    return total


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux what is mapped")
def test_only_what_exceeds_the_share_of_the_budget_is_mapped(tmp_path: Path) -> None:
    shelf = Shelf(AT_ONCE * 4 * 10_000, tmp_path)
    small = shelf.empty((100, 100), torch.zeros(1))
    assert mapped_bytes() == 0
    large = shelf.empty((101, 100), torch.zeros(1))
    assert mapped_bytes() >= 4 * 10_100
    assert (small.shape, large.shape, large.dtype) == ((100, 100), (101, 100), torch.float32)
    del large
    assert mapped_bytes() == 0


def test_a_mapped_tensor_holds_what_is_written_and_leaves_no_file(tmp_path: Path) -> None:
    values = torch.randn(7, 3, 5)
    mapped = Shelf(0, tmp_path / "new").empty((7, 3, 5), values)
    mapped[2:] = values[2:]
    mapped[:2] = values[:2]
    assert torch.equal(mapped, values)
    assert torch.equal(mapped[torch.tensor([6, 0, 6])], values[[6, 0, 6]])
    assert list((tmp_path / "new").iterdir()) == []


def test_a_disk_without_room_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int, offset: int, size: int) -> None:
        assert (offset, size) == (0, 4 * 105)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(OutputError, match=r"No space left on device; choose a workspace .*memory_budget"):
        Shelf(0, tmp_path).empty((7, 3, 5), torch.zeros(1))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("loss", ["squared", "fisher"])
def test_no_more_tensors_of_all_images_live_at_once_than_are_planned_for(
    quantized: Callable[..., QuantizedGraph],
    network: Callable[[str], tuple[nn.Module, Tensor]],
    quick: Callable[..., ReconstructionSettings],
    monkeypatch: pytest.MonkeyPatch,
    loss: str,
) -> None:
    made: list[weakref.ref[Tensor]] = []
    most = [0]
    make = Shelf.empty

    def counted(self: Shelf, shape: tuple[int, ...], like: Tensor) -> Tensor:
        tensor = make(self, shape, like)
        made.append(weakref.ref(tensor))
        most[0] = max(most[0], sum(alive.numel() for reference in made if (alive := reference()) is not None))
        return tensor

    monkeypatch.setattr(Shelf, "empty", counted)
    settings, (_, inputs) = quick(granularity="layer", loss=loss), network("chain")
    reconstruct(quantized("chain", settings), inputs, settings, seed=0, store=UnitStore())
    assert most[0] <= AT_ONCE * len(inputs) * 8 * 8 * 8  # the largest map of the network has 8 channels of 8 x 8
