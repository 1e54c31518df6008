from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
RECORDS = sorted((ROOT / "docs" / "figures").glob("*.json"))


def prose(page: Path) -> str:
    """The text of a page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The names that the headings of a page get: lower case, hyphens for spaces, numbered where they recur."""
    seen, found = Counter[str](), set[str]()
    for heading in re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE):
        name = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.add(f"{name}-{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.stem)
def test_the_command_of_a_record_writes_it_again_wherever_the_checkout_is(record: Path) -> None:
    command = json.loads(record.read_text(encoding="utf-8"))["command"]
    assert command.endswith(f" --json {record.relative_to(ROOT)}")
    assert not re.search(r"(^|[\s=])/", command)
