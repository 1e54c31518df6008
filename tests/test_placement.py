"""Where a network is computed; the device `meta`, which computes shapes alone, stands for a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from inc_clusterq.errors import ModelError
from inc_clusterq.placement import CPU, copied_to_gpu, moved, within_gpu_memory

META = torch.device("meta")
EXAMPLE = torch.zeros(2, 3)


class Home(nn.Linear):
    """Runs where it was made, and nowhere else."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device != CPU:
            raise TypeError("can't convert this tensor to numpy")
        return super().forward(x)


class Single(nn.Linear):
    """Refuses to be copied."""

    def __deepcopy__(self, memo: object) -> Single:
        raise TypeError("there is one of me")


@pytest.fixture
def _gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inc_clusterq.placement.gpu", lambda: META)


def test_without_a_gpu_a_network_stays_itself_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inc_clusterq.placement.gpu", lambda: None)
    net = nn.Linear(3, 2)
    assert copied_to_gpu(net, EXAMPLE, "it is tested") is net
    assert moved(net, EXAMPLE, "it is tested") == net.weight.device == CPU


@pytest.mark.usefixtures("_gpu")
def test_a_copy_goes_to_the_gpu_and_the_network_stays() -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).train()
    copied = copied_to_gpu(net, EXAMPLE, "it is tested")
    assert {parameter.device for parameter in copied.parameters()} == {META}
    assert {parameter.device for parameter in net.parameters()} == {CPU}
    assert copied.training
    assert net.training


@pytest.mark.usefixtures("_gpu")
def test_a_network_is_moved_to_the_gpu() -> None:
    net = nn.Linear(3, 2)
    assert moved(net, EXAMPLE, "it is tested") == net.weight.device == META


@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize(("kind", "reason"), [(Home, "to numpy"), (Single, "one of me")])
def test_what_does_not_run_on_the_gpu_is_computed_on_the_cpu_and_the_log_says_why(
    kind: type[nn.Linear], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    net = kind(3, 2)
    assert copied_to_gpu(net, EXAMPLE, "it is tested") is net
    assert net.weight.device == CPU
    assert reason in caplog.text
    assert "it is tested on the CPU" in caplog.text


@pytest.mark.usefixtures("_gpu")
def test_what_its_owner_put_elsewhere_stays_there() -> None:
    net = nn.Linear(3, 2, device="meta")
    assert copied_to_gpu(net, EXAMPLE, "it is tested") is net


def test_where_the_gpus_memory_runs_out_the_error_says_what_to_do() -> None:
    with pytest.raises(ModelError, match=r"allocate 2.00 GiB\); lower .*CUDA_VISIBLE_DEVICES= "), within_gpu_memory():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8 GiB")
