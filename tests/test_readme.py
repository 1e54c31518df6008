from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from inc_clusterq.config import load_config


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_every_set_up_command_of_the_readme_is_run_by_ci(root: Path) -> None:
    script = (root / ".ci" / "run").read_text()
    commands = [block.strip() for block in blocks((root / "README.md").read_text(), "sh")]
    assert len(commands) == 2
    job, tests = (command.rpartition(" && ") for command in commands)
    assert f"\n{tests[0]}\n" in script
    assert f"\n{tests[2]}\n" in script
    assert f"\n{job[2]}\n" in script
    assert job[0].replace("[examples]", "[dev]") == tests[0]  # one installation serves both: dev brings the examples


def test_ci_stops_at_the_first_failure_and_can_be_run(root: Path) -> None:
    script = root / ".ci" / "run"
    assert "set -euo pipefail" in script.read_text()
    assert script.stat().st_mode & 0o111


def test_the_yaml_of_the_readme_is_valid_as_a_whole(root: Path, tmp_path: Path) -> None:
    short, full = blocks((root / "README.md").read_text(), "yaml")
    file = tmp_path / "job.yaml"
    file.write_text(short)
    assert load_config(file).quantization.model_wise.weight.bits == 4
    file.write_text(short.replace("bits: W4A8\n", "") + full)
    config = load_config(file)
    assert config.quantization.op_wise["layer1.0.conv1"].weight is not None


@pytest.mark.parametrize("name", ["digits.yaml"])
def test_the_examples_are_valid(root: Path, name: str) -> None:
    file = root / "examples" / name
    config = load_config(file)
    assert config.model.checkpoint is not None
    assert config.model.checkpoint.is_file()
    assert yaml.safe_load(file.read_text())["model"]["architecture"] == config.model.architecture


@pytest.mark.slow
def test_the_python_example_of_the_readme_runs_as_it_stands(root: Path, tmp_path: Path) -> None:
    (example,) = blocks((root / "README.md").read_text(), "python")
    (tmp_path / "examples").symlink_to(root / "examples")
    done = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    opened = "from neural_compressor.torch.quantization import load; load('saved_results')"
    subprocess.run([sys.executable, "-c", opened], cwd=tmp_path, check=True, capture_output=True)
