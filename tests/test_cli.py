from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from inc_clusterq import __version__
from inc_clusterq.cli import app
from inc_clusterq.config import Config
from inc_clusterq.errors import ClusterQError, DeploymentError, OutputError
from inc_clusterq.progress import SILENT, Progress


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOGLEVEL", "INFO")  # the command sets it where it is not set; undone after the test
    monkeypatch.delenv("LOGLEVEL")
    file = tmp_path / "job.yaml"
    file.write_text("model: {architecture: 'python:nets:net', input: {shape: [1, 8, 8]}}\nbits: W4A8\n")
    return file


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException | None], list[dict[str, Any]]]:
    """Put a pipeline in place that records its arguments, then raises or returns a result."""

    def install(failure: BaseException | None) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = []

        def quantize(config: Config, *, overwrite: bool, strict: bool, progress: Progress) -> object:
            calls.append({"config": config, "overwrite": overwrite, "strict": strict, "progress": progress})
            if failure is not None:
                raise failure
            return SimpleNamespace(print=lambda console: show(console))

        def show(console: Console) -> None:
            console.print("the table")

        module = ModuleType("inc_clusterq.pipeline")
        module.quantize = quantize  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "inc_clusterq.pipeline", module)
        return calls

    return install


def test_the_result_is_all_that_goes_to_stdout(job: Path, pipeline: Callable[..., list[dict[str, Any]]]) -> None:
    calls = pipeline(None)
    result = call("quantize", job)
    assert (result.exit_code, result.stdout) == (0, "the table\n")
    assert calls[0]["config"].quantization.model_wise.weight.bits == 4
    assert calls[0]["overwrite"] is False


def test_options_override_the_yaml(job: Path, tmp_path: Path, pipeline: Callable[..., list[dict[str, Any]]]) -> None:
    calls = pipeline(None)
    result = call("quantize", job, "--output", tmp_path / "there", "--overwrite", "--seed", "7", "--quiet")
    assert (result.exit_code, result.stderr) == (0, "")
    assert calls[0]["config"].output == tmp_path / "there"
    assert calls[0]["config"].tuning.random_seed == 7
    assert calls[0]["overwrite"] is True
    assert calls[0]["progress"] is SILENT


def test_the_home_folder_is_meant_where_a_shell_leaves_it_as_it_is(
    job: Path, tmp_path: Path, pipeline: Callable[..., list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    calls = pipeline(None)
    assert call("quantize", job, "--output=~/there").exit_code == 0
    assert calls[0]["config"].output == tmp_path / "there"
    unknown = call("pack", "~nobody-of-this-name/x")
    assert (unknown.exit_code, "home folder" in unknown.stderr) == (2, True)


@pytest.mark.parametrize(
    ("failure", "status", "message"),
    [
        (OutputError("results holds [a] result"), 2, "inc-clusterq: results holds [a] result\n"),
        (ClusterQError("python:train:net is not there"), 1, "inc-clusterq: python:train:net is not there\n"),
        (DeploymentError("differs"), 1, "inc-clusterq: differs\n"),
        (ClusterQError("no"), 1, "inc-clusterq: no\n"),
        (
            RuntimeError("a\nb"),
            1,
            "inc-clusterq: internal error, RuntimeError: a b; run with --debug for the traceback\n",
        ),
        (
            KeyboardInterrupt(),
            130,
            "inc-clusterq: interrupted; finished parts are kept in the workspace, the same command resumes from them\n",
        ),
    ],
)
def test_a_failure_is_one_line_and_a_status(
    job: Path,
    pipeline: Callable[..., list[dict[str, Any]]],
    failure: BaseException,
    status: int,
    message: str,
) -> None:
    pipeline(failure)
    result = call("quantize", job)
    assert (result.exit_code, result.stdout, result.stderr) == (status, "", message)


def test_debug_shows_the_traceback_before_the_line(job: Path, pipeline: Callable[..., list[dict[str, Any]]]) -> None:
    pipeline(RuntimeError("broken"))
    result = call("quantize", job, "--debug")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("inc-clusterq: internal error, RuntimeError: broken")


@pytest.mark.parametrize("text", [None, "bits: [", "bits: W4A8\n", "model: 3\nbist: W4A8\n"])
def test_a_bad_file_is_the_users_mistake_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOGLEVEL", "WARNING")
    file = tmp_path / "job.yaml"
    if text is not None:
        file.write_text(text)
    before = set(tmp_path.iterdir())
    result = call("quantize", "job.yaml")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("inc-clusterq: job.yaml")
    assert "Traceback" not in result.stderr
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("arguments", [["quantise"], ["quantize"], ["quantize", "a", "--seed", "-1"], ["--verbose"]])
def test_a_wrong_command_line_is_the_users_mistake(arguments: list[str]) -> None:
    assert call(*arguments).exit_code == 2


def test_the_schema_is_json_or_markdown() -> None:
    assert json.loads(call("schema").stdout)["title"] == "Config"
    assert call("schema", "--markdown").stdout.startswith("# Keys of the YAML\n")


def test_the_module_prints_its_version(root: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "inc_clusterq", "--version"], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"inc-clusterq {__version__}\n"


def test_what_a_scheduler_ends_is_put_away_as_after_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def terminated(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("inc_clusterq.inspection.inspect", terminated)
    result = call("inspect", tmp_path)
    assert (result.exit_code, result.stderr) == (143, "inc-clusterq: terminated; nothing is left half-written\n")
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_does_not_resume_does_not_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("inc_clusterq.inspection.inspect", interrupted)
    result = call("inspect", tmp_path)
    assert (result.exit_code, result.stderr) == (130, "inc-clusterq: interrupted; nothing is left half-written\n")
