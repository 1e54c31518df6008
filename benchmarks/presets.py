"""What the synthesis costs by preset: wall time and peak memory, in a process that does nothing else.

The number of threads is that of the environment (OMP_NUM_THREADS) and is recorded; nothing else should run on the machine.

    python benchmarks/presets.py --data DIR --json docs/figures/presets-NAME.json && python benchmarks/tables.py
"""

from __future__ import annotations

import recording
import subjects
from arguments import parse
from making import COSTS, make
from page import cell
from rich.console import Console

from inc_clusterq.synthesis.settings import ClusterQSettings

DEFAULT = "fast,balanced"


def main() -> None:
    """Time every network, seed and preset."""
    options = parse(
        __doc__,
        "resnet20,mobilenet_v1_025",
        widths=None,
        seeds="0",
        compared=DEFAULT,
        word="preset",
        known=tuple(ClusterQSettings.PRESETS),
        has_preset=False,
    )
    console = Console(width=100)
    recording.print_head(f"Synthesis of {options.images} images", options, console)
    figures: dict[str, dict[str, dict[str, list[float]]]] = {}
    for net in options.nets:
        subject = subjects.load(options, net)
        found: dict[str, dict[str, list[float]]] = {preset: {cost: [] for cost in COSTS} for preset in options.compared}
        figures[net] = found
        for seed in options.seeds:
            for preset, costs in found.items():
                settings = ClusterQSettings.model_validate(ClusterQSettings.PRESETS[preset])
                made = make(subject, settings, options.images, seed, options.data)
                for cost in COSTS:
                    costs[cost].append(getattr(made, cost))
                recording.write_json(options, {"images": options.images, "presets": figures})
        rows = [[preset, cell(costs["seconds"], 0), cell(costs["peak_mb"], 0)] for preset, costs in found.items()]
        recording.print_table(net, ("preset", "seconds", "peak MB"), rows, console)


if __name__ == "__main__":
    main()
