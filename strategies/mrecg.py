"""The MRECG tuning strategy: joint granularity first, then harmful units at 8 bits (arXiv 2303.11906, Sec. 3.3).

Order of the trials, cheapest promise first:
  1. ModCap granularity: needs no pass of its own.
  2. Loss granularity: one base pass, whose units are reused; the paper's global optimum.
  3. The first again with 1, 2, 4, ... units at 8 bits, those first that do its outputs the most harm, until all are; the base
     pass of the second costs half as much time again or more, and docs/methods.md shows no gain by it.
A granularity that the user fixed leaves out the choice between 1 and 2.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from inc_clusterq.reconstruction.bits import FULL_BITS
from inc_clusterq.reconstruction.settings import ReconstructionSettings
from inc_clusterq.tuning import Trial, TuningRequest


class MRECGStrategy:
    """Proposes granularities, then fallbacks; it has no options of its own."""

    def trials(self, request: TuningRequest) -> Sequence[Trial]:
        """At most `request.max_trials` trials; see the module's text for their order."""
        fixed = request.settings.granularity
        granularities = (fixed,) if fixed else ("modcap", "loss")
        proposals = [Trial(name, _with_granularity(request.settings, name)) for name in granularities]
        if request.lowest_bits < FULL_BITS and request.units != 0:
            units, most = 1, request.units or sys.maxsize
            while len(proposals) < request.max_trials and units < 2 * most:
                raised = min(units, most)
                how_many = "all units" if raised == most else f"{raised} unit{'s' if raised > 1 else ''}"
                label = f"{granularities[0]}, {how_many} at {FULL_BITS} bits"
                proposals.append(Trial(label, proposals[0].settings, raised))
                units *= 2
        return proposals[: request.max_trials]


def _with_granularity(settings: ReconstructionSettings, granularity: str) -> ReconstructionSettings:
    return ReconstructionSettings.model_validate({**settings.model_dump(), "granularity": granularity})
