"""Which adjacent units are optimised jointly (MRECG, arXiv 2303.11906, Sec. 3.3, Eq. 10).

    maximise over binary m:  sum_i m_i d_i + lambda (1'm - k)^2,   d_i = (CM_i - CM_{i+1})^2
that is: take the k largest differences and join the pairs. Two chosen pairs that share a unit merge into one when the
capacity is a loss; under ModCap a merged unit can no longer be compared, so a pair only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from itertools import pairwise

from inc_clusterq.reconstruction.graph import Unit, join


def stack_chains(units: Sequence[Unit], longest: int) -> list[Unit]:
    """Base granularity: branching units stay, runs of single layers stack up to `longest`, ending before a branch.

    A run also ends before its second depthwise convolution. Without this, stacking by three falls out of step with the
    depthwise-pointwise pairs of a MobileNet-V1, and no two units would be homogeneous.
    """
    stacked: list[Unit] = []
    run: list[Unit] = []
    for unit in units:
        second_depthwise = any("depthwise" in (layer.kind for layer in other.layers) for other in run) and any(
            layer.kind == "depthwise" for layer in unit.layers
        )
        if unit.branching or len(run) == longest or second_depthwise:
            stacked += [join(run)] if run else []
            run = []
        if unit.branching:
            stacked.append(unit)
        else:
            run.append(unit)
    return stacked + ([join(run)] if run else [])


def differences(
    units: Sequence[Unit], capacities: Sequence[float], comparable: Callable[[Unit, Unit], bool]
) -> list[float | None]:
    """d_i of each adjacent pair; None where the pair may not be compared."""
    return [
        (capacities[i] - capacities[i + 1]) ** 2 if comparable(units[i], units[i + 1]) else None for i in range(len(units) - 1)
    ]


def select_pairs(gaps: Sequence[float | None], top_k: int | None, chain: bool) -> list[int]:
    """Indices i of the pairs (i, i + 1) to join, largest difference first, ties to the earlier one.

    `top_k` None: the differences above their mean. `chain` False: no unit takes part in two pairs.
    """
    known = [(gap, i) for i, gap in enumerate(gaps) if gap is not None and gap > 0]
    if top_k is None:
        mean = sum(gap for gap, _ in known) / len(known) if known else 0.0
        known = [(gap, i) for gap, i in known if gap > mean]
        top_k = len(known)
    chosen: list[int] = []
    for _, i in sorted(known, key=lambda entry: (-entry[0], entry[1])):
        if len(chosen) == top_k:
            break
        if chain or not {i - 1, i + 1} & set(chosen):
            chosen.append(i)
    return sorted(chosen)


def merge_pairs(units: Sequence[Unit], pairs: Sequence[int]) -> list[Unit]:
    """Join unit i with unit i + 1 for every i in `pairs`; consecutive pairs become one unit."""
    merged: list[list[Unit]] = []
    for i, unit in enumerate(units):
        if i - 1 in pairs:
            merged[-1].append(unit)
        else:
            merged.append([unit])
    return [join(group) for group in merged]


def explicit_units(units: Sequence[Unit], wanted: Sequence[Sequence[str]]) -> list[Unit]:
    """The units that the user lists by the names of their layers; what is not listed stays as it is in `units`.

    Raises:
        ValueError: a name that the model does not have, a unit with a gap, or units that share a place of the graph.
    """
    place: dict[str, list[int]] = {}
    for i, unit in enumerate(units):
        for layer in unit.layers:
            place.setdefault(layer.name, []).append(i)
    pairs: list[int] = []
    taken: dict[int, Sequence[str]] = {}
    for names in wanted:
        for name in names:
            if name not in place:
                near = get_close_matches(name, place, 3)
                hint = f"did you mean {' or '.join(near)}?" if near else f"it has: {', '.join(place)}"
                raise ValueError(f"explicit_units names {name!r}, which the model does not have; {hint}")
        indices = sorted({i for name in names for i in place[name]})
        for one, other in pairwise(indices):
            if other != one + 1:
                between = ", ".join(layer.name for i in range(one + 1, other) for layer in units[i].layers)
                raise ValueError(f"the explicit unit {', '.join(names)} has a gap: {between} must belong to it too")
        for i in indices:
            if i in taken:
                both = f"{', '.join(taken[i])} and {', '.join(names)}"
                raise ValueError(f"the explicit units {both} share a part of the graph that cannot be cut; join them")
            taken[i] = names
        pairs += indices[:-1]
    return merge_pairs(units, pairs)
