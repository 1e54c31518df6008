"""Where the refinement begins: at dead leaves where the network takes them for what it was trained on, else at a generator's.

A network that was trained on photographs finds in unrefined dead leaves, of which it knows nothing, means and variances near
those that its BatchNorm layers remember; one that was trained on spectrograms finds in them no more than in noise. So both
are shown to it once. The outcome is a property of the network, whatever the seed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from inc_clusterq.errors import ConfigError
from inc_clusterq.inputs import InputSpec
from inc_clusterq.synthesis.leaves import dead_leaves
from inc_clusterq.synthesis.objective import distance_of
from inc_clusterq.synthesis.refine import from_unit, random_samples
from inc_clusterq.synthesis.settings import ClusterQSettings
from inc_clusterq.synthesis.teacher import Teacher

PROBES = 32  # images of each kind
# Leaves' distance as a share of noise's was 0.11 to 0.19 on five networks trained on photographs, 1.2 on one trained on
# spectrograms, and 0.58 on one that reads digits.
NEARER = 0.5


def begins_with_leaves(settings: ClusterQSettings, spec: InputSpec, teacher: Teacher) -> bool:
    """Whether dead leaves are refined, and no generator is needed.

    Raises:
        ConfigError: they were asked for, and the inputs are no images.
    """
    if settings.start == "leaves" and len(spec.shape) != 3:
        raise ConfigError(f"start is leaves, images (C, H, W), and the inputs have shape {list(spec.shape)}; use generator")
    if not settings.refine_iterations:
        return False
    if settings.start is not None:
        return settings.start == "leaves"
    return len(spec.shape) == 3 and knows_leaves(teacher, spec, settings.refine_batch)


def knows_leaves(teacher: Teacher, spec: InputSpec, most: int) -> bool:
    """Whether dead leaves are much nearer to the BatchNorm statistics than noise around the middle of the value range is.

    The network sees at most `most` images at once.
    """
    rng = torch.Generator().manual_seed(0)
    leaves = distance_of(leaf_samples(spec, rng)(slice(0, PROBES)), teacher, most)
    return leaves <= NEARER * distance_of(random_samples(spec, PROBES, rng), teacher, most)


def leaf_samples(spec: InputSpec, rng: torch.Generator) -> Callable[[slice], Tensor]:
    """Dead leaves, normalised, some rows at a time."""
    return lambda rows: from_unit(dead_leaves(spec.shape, rows.stop - rows.start, rng), spec)
