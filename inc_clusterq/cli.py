"""The command `inc-clusterq`: arguments to a Config, a Config to the pipeline, errors to one line and an exit status.

Exit status: 0 done, 1 our failure, 2 the user's mistake, 130 interrupted (Ctrl-C), 143 terminated (SIGTERM).
Results go to stdout, all else to stderr.
"""

from __future__ import annotations

import json
import os
import signal
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from inc_clusterq import __version__
from inc_clusterq.console import progress_on
from inc_clusterq.errors import ClusterQError
from inc_clusterq.home import expanded
from inc_clusterq.progress import Progress

INTERNAL_ERROR = 1
INTERRUPTED = 130
TERMINATED = 143

app = typer.Typer(
    help="Data-free low-bit quantization of CNNs in Intel Neural Compressor.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _at_home(value: Path | None) -> Path | None:
    """A shell leaves ~ as it is behind an equals sign."""
    try:
        return None if value is None else expanded(value)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


ConfigFile = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="YAML file of the job.", show_default=False, callback=_at_home)
]
ResultFolder = Annotated[
    Path,
    typer.Argument(metavar="RESULT", help="Output folder of `inc-clusterq quantize`.", show_default=False, callback=_at_home),
]
Seed = Annotated[
    int | None,
    typer.Option("--seed", min=0, max=2**32 - 1, help="Seed, in place of the YAML's.", show_default=False),
]
Strict = Annotated[bool, typer.Option("--strict", help="Fail when a quantizable operator would be computed in float.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the folder of a result that is already there.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print the result only.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and the host's log.")]


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="inc-clusterq")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"inc-clusterq {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Data-free low-bit quantization of CNNs in Intel Neural Compressor."""


@app.command()
def quantize(
    config_file: ConfigFile,
    output: Annotated[
        Path | None,
        typer.Option("--output", help="Folder of the result, in place of the YAML's.", show_default=False, callback=_at_home),
    ] = None,
    overwrite: Overwrite = False,
    seed: Seed = None,
    strict: Strict = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Quantize the model that CONFIG names, without data, and save what plain Neural Compressor loads."""
    with _job(quiet=quiet, debug=debug, resumes=True) as progress:
        from inc_clusterq.config import load_config

        config = load_config(config_file).override(output=output, seed=seed)

        from inc_clusterq.pipeline import quantize as run  # heavy: only once the configuration is known to be good

        result = run(config, overwrite=overwrite, strict=strict, progress=progress)
        result.print(_console())


@app.command()
def synthesize(
    config_file: ConfigFile,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            help="Folder for a copy; by default the set stays in the workspace.",
            show_default=False,
            callback=_at_home,
        ),
    ] = None,
    overwrite: Overwrite = False,
    seed: Seed = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Make the synthetic calibration set of CONFIG, or find it, and say where it is."""
    with _job(quiet=quiet, debug=debug, resumes=True) as progress:
        from inc_clusterq.config import load_config

        config = load_config(config_file).override(seed=seed)

        from inc_clusterq.synthetic_set import synthesize as run

        run(config, output=output, overwrite=overwrite, progress=progress).print(_console())


@app.command()
def inspect(
    dataset: Annotated[
        Path, typer.Argument(metavar="DATASET", help="Folder of a synthetic set.", show_default=False, callback=_at_home)
    ],
    config_file: Annotated[
        Path | None,
        typer.Option(
            "--config", help="The job's YAML, where the set does not name its model.", show_default=False, callback=_at_home
        ),
    ] = None,
    real: Annotated[
        str | None,
        typer.Option(
            "--real",
            help="Real inputs to compare with: an .npz file with inputs and labels, or python:package.module:function; "
            "by default evaluation.accuracy of --config.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", help="Folder to write; by default DATASET/inspection.", show_default=False, callback=_at_home),
    ] = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure how good a synthetic set is, and write a page about it."""
    with _job(quiet=quiet, debug=debug) as progress:
        from inc_clusterq.config import load_config

        config = load_config(config_file) if config_file is not None else None

        from inc_clusterq.inspection import inspect as run

        run(dataset, config=config, real=real, output=output, overwrite=overwrite, progress=progress).print(_console())


@app.command()
def export(
    result: ResultFolder,
    to: Annotated[str, typer.Option("--to", help="inductor, onnxruntime or openvino.", show_default=False)],
    output: Annotated[
        Path | None,
        typer.Option("--output", help="Folder to write; by default RESULT/TARGET.", show_default=False, callback=_at_home),
    ] = None,
    overwrite: Overwrite = False,
    strict: Strict = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write RESULT for another run time, and check it against the model that was evaluated."""
    with _job(quiet=quiet, debug=debug) as progress:
        from inc_clusterq.deployment.export import export as run

        run(result, to, output=output, overwrite=overwrite, strict=strict, progress=progress).print(_console())


@app.command()
def pack(
    result: ResultFolder,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Write RESULT/packed.safetensors: weights below 8 bits in as many bits as they have."""
    with _job(debug=debug):
        from inc_clusterq.deployment.packing import pack as run

        run(result, overwrite=overwrite).print(_console())


@app.command()
def bench(
    result: ResultFolder,
    batch: Annotated[str, typer.Option("--batch", help="Batch sizes, separated by commas.")] = "1,32",
    targets: Annotated[str, typer.Option("--targets", help="Targets, separated by commas.")] = "inductor,onnxruntime,openvino",
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Threads; by default all processors.", show_default=False)
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", help="The job's YAML, where the float model has moved.", show_default=False, callback=_at_home
        ),
    ] = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Time RESULT against the compiled float model, and print what was measured."""
    with _job(quiet=quiet, debug=debug) as progress:
        from inc_clusterq.deployment.bench import bench as run
        from inc_clusterq.deployment.bench import numbers

        names = tuple(name.strip() for name in targets.split(","))
        run(result, numbers(batch), names, threads=threads, config_file=config, progress=progress).print(_console())


@app.command()
def schema(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table of keys instead.")] = False,
) -> None:
    """Print the JSON Schema of CONFIG."""
    from inc_clusterq.config_reference import json_schema
    from inc_clusterq.config_reference import markdown as table

    typer.echo(table() if markdown else json.dumps(json_schema(), indent=2), nl=not markdown)


def _set_logs(*, debug: bool) -> None:
    """Keep the libraries' own remarks out of the progress; host and torch read these when they are imported."""
    os.environ.setdefault("LOGLEVEL", "INFO" if debug else "ERROR")
    if not debug:
        os.environ.setdefault("TORCH_LOGS", "-all")
        warnings.simplefilter("ignore")


@contextmanager
def _job(*, quiet: bool = True, debug: bool, resumes: bool = False) -> Iterator[Progress]:
    """Set the logs before anything heavy is imported; hand over where progress goes, which is where errors go.

    What is raised inside becomes one message and an exit status; with `debug` the traceback comes first.
    """
    _set_logs(debug=debug)
    errors = _console(stderr=True)
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield progress_on(errors, quiet=quiet)
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        message, status = _outcome(error, resumes=resumes)
        errors.print(f"inc-clusterq: {message}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(status) from error
    finally:
        signal.signal(signal.SIGTERM, before)


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which schedulers send; what is on the way is put away as after Ctrl-C."""


def _terminate(number: int, frame: object) -> None:
    raise _Terminated


def _console(*, stderr: bool = False) -> Console:
    """Where nothing that a user wrote is read as an emoji, as `python:train:net` would be."""
    return Console(stderr=stderr, emoji=False)


def _outcome(error: BaseException, *, resumes: bool) -> tuple[str, int]:
    if isinstance(error, KeyboardInterrupt):
        word, status = ("terminated", TERMINATED) if isinstance(error, _Terminated) else ("interrupted", INTERRUPTED)
        kept = "finished parts are kept in the workspace, the same command resumes from them"
        return f"{word}; {kept if resumes else 'nothing is left half-written'}", status
    if isinstance(error, ClusterQError):
        return str(error), error.exit_status
    text = " ".join(str(error).split())
    return f"internal error, {type(error).__name__}: {text}; run with --debug for the traceback", INTERNAL_ERROR
