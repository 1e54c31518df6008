from __future__ import annotations

from inc_clusterq.report.figures import by_depth, by_layer

NOT_MATHS = r"$\frac$_{"  # a module's name that must not be read as a formula


def test_no_name_is_read_as_a_formula() -> None:
    for drawn in (
        by_layer([NOT_MATHS, "b"], {"coverage": [0.5, 1.0]}, "coverage"),
        by_depth({"base units": [(NOT_MATHS, 1, 0.1)]}, "losses"),
    ):
        assert drawn.startswith(b"\x89PNG")
