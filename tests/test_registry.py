from __future__ import annotations

import tomllib
from pathlib import Path
from textwrap import dedent

import pytest

from inc_clusterq.errors import ConfigError
from inc_clusterq.registry import ADAPTORS, STRATEGIES, find, names


@pytest.fixture
def third_party(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A distribution with one good and two broken strategies, as `pip install` would leave it."""
    metadata = tmp_path / "third_party-2.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party\nVersion: 2.1\n")
    (metadata / "entry_points.txt").write_text(
        dedent("""
            [inc_clusterq.strategies]
            exhaustive = third_party_good:Exhaustive
            broken = third_party_broken:Strategy
            absent = third_party_good:Absent
        """)
    )
    (tmp_path / "third_party_good.py").write_text("class Exhaustive: ...")
    (tmp_path / "third_party_broken.py").write_text("import a_package_that_is_not_installed")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("third_party")
def test_an_installed_strategy_is_found_by_name_beside_a_broken_one() -> None:
    assert {"exhaustive", "broken", "absent"} <= set(names(STRATEGIES))
    assert find(STRATEGIES, "exhaustive").__name__ == "Exhaustive"


@pytest.mark.usefixtures("third_party")
def test_a_broken_strategy_is_named_with_its_package_and_the_reason() -> None:
    with pytest.raises(ConfigError, match=r"'broken' .* package third-party 2\.1 .* 'a_package_that_is_not_installed'"):
        find(STRATEGIES, "broken")
    with pytest.raises(ConfigError, match=r"'absent' .* AttributeError"):
        find(STRATEGIES, "absent")


@pytest.mark.usefixtures("third_party")
def test_an_unknown_name_lists_what_is_installed_and_the_nearest() -> None:
    with pytest.raises(ConfigError) as raised:
        find(STRATEGIES, "exhaustve")
    message = str(raised.value)
    assert message.startswith("there is no strategy 'exhaustve'; did you mean 'exhaustive'?")
    assert "absent, broken, exhaustive" in message
    assert "entry-point group 'inc_clusterq.strategies'" in message


def test_an_empty_group_says_none() -> None:
    with pytest.raises(ConfigError, match=r"'anything'\. Installed: none"):
        find("inc_clusterq.nothing", "anything")


def test_our_own_entry_points_lead_to_modules_of_this_package(root: Path) -> None:
    groups = tomllib.loads((root / "pyproject.toml").read_text())["project"]["entry-points"]
    assert groups.keys() == {STRATEGIES, ADAPTORS}
    for targets in groups.values():
        for target in targets.values():
            module = target.partition(":")[0]
            assert (root / "inc_clusterq" / Path(*module.split(".")[1:])).with_suffix(".py").is_file()
