from __future__ import annotations

import re
from pathlib import Path

from inc_clusterq.config import Config
from inc_clusterq.config_errors import keys, sections
from inc_clusterq.config_reference import json_schema, markdown


def test_the_committed_table_of_keys_is_the_generated_one(root: Path) -> None:
    committed = (root / "docs" / "configuration.md").read_text()
    assert committed == markdown(), "run: inc-clusterq schema --markdown > docs/configuration.md"


def test_every_key_has_a_description() -> None:
    bare = [(*path, key) for path, section in sections(Config) for key, field in keys(section).items() if not field.description]
    assert bare == []


def test_every_key_is_in_the_table_once() -> None:
    text = markdown()
    for path, section in sections(Config):
        heading = f"## `{'.'.join(path)}`" if path else "## Top level"
        part = text.split(f"{heading}\n", 1)[1].split("\n## ", 1)[0]
        assert re.findall(r"^\| `(\w+)` \|", part, re.MULTILINE) == list(keys(section))


def test_the_json_schema_allows_what_the_models_allow() -> None:
    schema = json_schema()
    assert schema["required"] == ["model"]
    assert schema["additionalProperties"] is False
    assert set(schema["properties"]) == set(Config.model_fields)
    assert schema["$defs"]["Bits"]["properties"]["bits"]["maximum"] == 8
    assert "ClusterQ" in schema["$defs"]["DatasetConfig"]["properties"]
