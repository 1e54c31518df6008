from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from inc_clusterq.progress import SILENT, Progress, Stage
from inc_clusterq.reconstruction.bits import BitPlan, LayerBits
from inc_clusterq.reconstruction.checkpoint import UnitStore
from inc_clusterq.reconstruction.quantizers import QuantizedGraph
from inc_clusterq.reconstruction.reconstruct import Reconstruction, reconstruct
from inc_clusterq.reconstruction.settings import ReconstructionSettings

Network = Callable[[str], tuple[nn.Module, Tensor]]
Quantized = Callable[..., QuantizedGraph]
Quick = Callable[..., ReconstructionSettings]


class Killed(BaseException):
    """Stands for the end of the process."""


class KilledAfter:
    """A progress whose stage dies after a number of steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Stage]:
        yield self

    def advance(self, steps: int = 1, note: str = "") -> None:
        self.left -= steps
        if self.left < 0:
            raise Killed

    skip = advance


class Job:
    """A reconstruction that can be started again and again from the same graph."""

    def __init__(self, quantized: Quantized, inputs: Tensor, name: str) -> None:
        self.quantized, self.inputs, self.name = quantized, inputs, name

    def run(
        self, folder: Path | None, settings: ReconstructionSettings, progress: Progress = SILENT, seed: int = 0
    ) -> tuple[Reconstruction, dict[str, Tensor], Tensor]:
        """The report, everything that is deployed, and the outputs."""
        graph = self.quantized(self.name, settings)
        report = reconstruct(graph, self.inputs, settings, seed=seed, store=UnitStore(folder), progress=progress)
        state = graph.graph_module.state_dict()
        deployed = {
            key: value for key, value in state.items() if key.endswith(("integers", "start_scale", "start_zero_point", "shift"))
        }
        with torch.no_grad():
            return report, deployed, graph.graph_module(self.inputs)


@pytest.fixture
def job(quantized: Quantized, network: Network) -> Callable[[str], Job]:
    return lambda name: Job(quantized, network(name)[1], name)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("residual", {"granularity": "layer"}),
        ("residual", {"granularity": "layer", "learn_weight_scale": True}),
        ("depthwise", {"granularity": "modcap", "top_k": 1, "stack_layers": 1}),
        ("chain", {"granularity": "loss", "top_k": 1, "stack_layers": 1}),
        ("concat", {"granularity": "layer"}),  # one quantizer in two units
        ("tied", {"granularity": "layer"}),  # one weight in two units
        ("transposed", {"granularity": "layer"}),  # a unit without a weight quantizer
        ("rearranged", {"granularity": "layer"}),
    ],
)
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_a_killed_run_continues_and_ends_bit_identical(
    job: Callable[[str], Job], quick: Quick, tmp_path: Path, name: str, keys: dict[str, object], share: float
) -> None:
    settings, work = quick(**keys), job(name)
    whole, expected, outputs = work.run(None, settings)
    steps = settings.iterations * (len(whole.units) + len(whole.base))
    with pytest.raises(Killed):
        work.run(tmp_path, settings, KilledAfter(int(share * steps)))
    report, found, again = work.run(tmp_path, settings)
    resumed = [unit.resumed for unit in (*report.base, *report.units)]
    assert resumed[0]
    assert not resumed[-1]
    assert_equal(found, expected)
    assert torch.equal(again, outputs)
    assert [unit.loss for unit in report.units] == [unit.loss for unit in whole.units]


def test_a_finished_run_is_read_from_disk_as_it_was(job: Callable[[str], Job], quick: Quick, tmp_path: Path) -> None:
    work = job("residual")
    first, expected, outputs = work.run(tmp_path, quick())
    report, found, again = work.run(tmp_path, quick())
    assert all(unit.resumed for unit in report.units)
    assert [unit.seconds for unit in report.units] == pytest.approx([unit.seconds for unit in first.units], abs=0.05)
    assert_equal(found, expected)
    assert torch.equal(again, outputs)
    assert {file.suffix for file in tmp_path.iterdir()} == {".safetensors"}


def shorten(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def lose_a_tensor(file: Path) -> None:
    state = load_file(file)
    # The others are changed, so that half of the file would show.
    save_file({key: value + 1 for key, value in sorted(state.items())[:-1]}, file)


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def of_another_torch(file: Path) -> None:
    with safe_open(file, "pt") as opened:
        about = {**opened.metadata(), "torch": "1.0"}
    save_file(load_file(file), file, about)


@pytest.mark.parametrize("damage", [shorten, empty, lose_a_tensor, flip_a_bit, of_another_torch])
def test_a_damaged_unit_is_computed_again_with_a_warning(
    job: Callable[[str], Job],
    quick: Quick,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[Path], None],
) -> None:
    work = job("residual")
    _, expected, _ = work.run(tmp_path, quick())
    written = sorted(tmp_path.iterdir(), key=lambda file: file.stat().st_mtime_ns)
    damage(written[1])
    with caplog.at_level(logging.WARNING, "inc_clusterq"):
        report, found, _ = work.run(tmp_path, quick())
    assert [unit.resumed for unit in report.units] == [True, False, True, True]
    assert str(written[1]) in caplog.text
    assert "computed again" in caplog.text
    assert_equal(found, expected)


def keys_of(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


@pytest.mark.parametrize("change", ["seed", "settings", "images", "weight", "bias"])
def test_what_changes_the_result_changes_every_key(quantized: Quantized, network: Network, quick: Quick, change: str) -> None:
    _, inputs = network("chain")
    graph = quantized("chain")
    store = UnitStore(Path("unused"))
    before = store.start(graph, inputs, quick(), 0).next(graph.units[0])
    assert store.start(quantized("chain"), inputs, quick(), 0).next(graph.units[0]) == before
    settings, seed = quick(), 0
    if change == "seed":
        seed = 1
    elif change == "settings":
        settings = quick(iterations=7)
    elif change == "images":
        inputs = inputs + torch.eye(8) * 1e-6
    else:
        with torch.no_grad():
            tensor = dict(graph.graph_module.named_parameters())[f"fc.{change}"]
            tensor[0] += 1e-3
    after = store.start(graph, inputs, settings, seed).next(graph.units[0])
    assert after.key != before.key
    assert after.key.isalnum()


@pytest.mark.parametrize("bits", [LayerBits(weight=5), LayerBits(activation=5)])
def test_units_in_front_of_the_first_with_other_bits_are_shared(
    quantized: Quantized, network: Network, quick: Quick, tmp_path: Path, bits: LayerBits
) -> None:
    settings, inputs = quick(granularity="layer"), network("chain")[1]

    def run(folder: Path | None, plan: BitPlan) -> tuple[list[bool], Tensor]:
        graph = quantized("chain", settings, plan)
        report = reconstruct(graph, inputs, settings, seed=0, store=UnitStore(folder))
        with torch.no_grad():
            return [unit.resumed for unit in report.units], graph.graph_module(inputs)

    run(tmp_path, BitPlan(3, 3))
    changed = BitPlan(3, 3, layers={"b.0": bits})
    resumed, outputs = run(tmp_path, changed)
    assert resumed == [True, True, False, False, False]
    assert torch.equal(outputs, run(None, changed)[1])
    assert all(run(tmp_path, BitPlan(3, 3))[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU whose units could be told from a CPU's")
def test_a_gpu_goes_on_with_no_unit_of_a_cpu(quantized: Quantized, network: Network, quick: Quick) -> None:
    _, inputs = network("chain")
    graph = quantized("chain")
    assert UnitStore().start(graph, inputs, quick(), 0).key != UnitStore().start(graph, inputs.cuda(), quick(), 0).key


def test_what_only_chooses_units_changes_no_key(quantized: Quantized, network: Network, quick: Quick) -> None:
    _, inputs = network("chain")
    graph = quantized("chain")
    chains = [UnitStore().start(graph, inputs, quick(granularity=name), 0) for name in ("layer", "block", "modcap", "loss")]
    assert len({chain.key for chain in chains}) == 1


def test_the_key_of_a_unit_tells_what_came_before_it(quantized: Quantized, network: Network, quick: Quick) -> None:
    _, inputs = network("chain")
    graph = quantized("chain")
    start = UnitStore().start(graph, inputs, quick(), 0)
    first, second = graph.units[:2]
    assert start.next(second).key != start.next(first).next(second).key
    assert start.next(first).key != start.next(second).key


def test_random_numbers_come_from_the_key_alone(quantized: Quantized, network: Network, quick: Quick) -> None:
    _, inputs = network("chain")
    graph = quantized("chain")
    first = UnitStore().start(graph, inputs, quick(), 0).next(graph.units[0])
    cpu = torch.device("cpu")
    torch.manual_seed(1)
    numbers = torch.rand(5, generator=first.generator(cpu))
    torch.manual_seed(2)
    assert torch.equal(numbers, torch.rand(5, generator=first.generator(cpu)))
    assert not torch.equal(numbers, torch.rand(5, generator=first.next(graph.units[1]).generator(cpu)))


def test_without_a_folder_nothing_is_kept(
    job: Callable[[str], Job], quick: Quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    report, _, _ = job("chain").run(None, quick())
    assert not any(unit.resumed for unit in report.units)
    assert list(tmp_path.iterdir()) == []


def test_what_the_code_of_a_network_does_is_part_of_the_key(quantized: Quantized, network: Network, quick: Quick) -> None:
    graph, inputs = quantized("residual", quick()), network("residual")[1]
    before = UnitStore().start(graph, inputs, quick(), 0).key
    assert UnitStore().start(graph, inputs, quick(), 0).key == before
    addition = next(node for node in graph.graph_module.graph.nodes if node.target is torch.ops.aten.add.Tensor)
    addition.kwargs = {"alpha": 0.5}
    graph.graph_module.recompile()
    assert UnitStore().start(graph, inputs, quick(), 0).key != before
