"""The reconstruction's losses against depth: the oscillation that MRECG (arXiv 2303.11906, Fig. 1) is about."""

from __future__ import annotations

from inc_clusterq.reconstruction.reconstruct import Reconstruction
from inc_clusterq.report.figures import by_depth


def loss_figure(reconstruction: Reconstruction) -> bytes:
    """PNG of each unit's loss relative to its output's power: after the base pass, where there was one, and after the last.

    Both passes stand over the same layers, so that it shows which units were joined and what that did to the losses. What is
    learned end to end behind them is not in it.
    """
    passes = {"base units": reconstruction.base} if reconstruction.base else {}
    passes[f"units of granularity {reconstruction.granularity}"] = reconstruction.units
    drawn = {
        name: [(unit.layers[0] if unit.layers else unit.name, max(len(unit.layers), 1), unit.relative_loss) for unit in units]
        for name, units in passes.items()
    }
    return by_depth(drawn, "reconstruction loss of the units, relative to the power of their outputs")
