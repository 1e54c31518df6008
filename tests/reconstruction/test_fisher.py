from __future__ import annotations

import torch
from torch import nn

from inc_clusterq.reconstruction.fisher import fisher_weights, squared_gradient
from inc_clusterq.reconstruction.shelf import Shelf


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_mean_over_drawn_classes_is_the_diagonal_of_the_fisher_matrix() -> None:
    rest, y = nn.Linear(4, 3).double(), torch.randn(1, 4, generator=draw(), dtype=torch.float64)
    jacobian, p = rest.weight.detach(), rest(y).detach().softmax(1)[0]
    # d log p_k / d y = (e_k - p)' J, so the Fisher matrix is J' (diag p - p p') J.
    expected = (jacobian.T @ (p.diag() - p[:, None] * p) @ jacobian).diagonal()
    found = squared_gradient(rest, y.expand(200_000, 4), draw(1)).mean(0)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=1e-4)  # 200,000 draws


def test_weights_have_mean_one_and_do_not_depend_on_where_they_are_kept() -> None:
    rest, y = nn.Sequential(nn.Flatten(), nn.Linear(18, 5)), torch.randn(11, 2, 3, 3)
    found = fisher_weights(rest, y, draw(), 4, Shelf(1e9))
    assert found.shape == y.shape
    assert abs(float(found.mean()) - 1) < 1e-5
    assert float(found.min()) >= 0
    assert torch.equal(found, fisher_weights(rest, y, draw(), 4, Shelf(0)))


def test_elements_that_nothing_depends_on_have_no_weight() -> None:
    rest = nn.Linear(4, 3)
    with torch.no_grad():
        rest.weight[:, 1] = 0
    found = fisher_weights(rest, torch.randn(9, 4), draw(), 4, Shelf(1e9))
    assert float(found[:, 1].max()) == 0
    assert float(found[:, 0].max()) > 0
    with torch.no_grad():
        rest.weight.zero_()
    assert torch.equal(fisher_weights(rest, torch.randn(9, 4), draw(), 4, Shelf(1e9)), torch.ones(9, 4))


def test_the_last_unit_is_weighted_by_its_own_logits() -> None:
    logits = torch.tensor([[100.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    found = fisher_weights(None, logits, draw(), 4, Shelf(1e9))
    assert float(found[0].max()) < 1e-6  # certain: nothing changes its class
    assert float(found[1].min()) > 0
