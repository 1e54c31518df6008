from __future__ import annotations

import math

import matplotlib.image
import pytest

from inc_clusterq.reconstruction.reconstruct import Reconstruction, UnitReport
from inc_clusterq.report import losses
from inc_clusterq.report.losses import loss_figure


def unit(layers: tuple[str, ...], loss: float) -> UnitReport:
    return UnitReport(" .. ".join(layers), layers, 4, 8, 100.0, 10 * loss, loss, 1.0, False)


BASE = (unit(("a", "b"), 0.1), unit(("c",), 0.4), unit(("d",), 0.2))
JOINED = (unit(("a", "b", "c"), 0.2), unit(("d",), 0.15))


def test_both_passes_stand_over_the_same_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, list[tuple[str, int, float]]] = {}
    monkeypatch.setattr(losses, "by_depth", lambda passes, title: drawn.update(passes) or b"")
    loss_figure(Reconstruction("loss", JOINED, BASE))
    assert drawn == {
        "base units": [("a", 2, 0.1), ("c", 1, 0.4), ("d", 1, 0.2)],
        "units of granularity loss": [("a", 3, 0.2), ("d", 1, 0.15)],
    }


@pytest.mark.parametrize(
    "reconstruction",
    [
        Reconstruction("loss", JOINED, BASE),
        Reconstruction("modcap", JOINED),
        Reconstruction("block", (unit((), 0.0),)),
        Reconstruction("block", (unit(("a",), math.nan),)),
    ],
)
def test_a_figure_is_drawn_whatever_the_losses_are(
    reconstruction: Reconstruction, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("figure") / "losses.png"
    file.write_bytes(loss_figure(reconstruction))
    height, width = matplotlib.image.imread(file).shape[:2]
    assert width > height > 100
