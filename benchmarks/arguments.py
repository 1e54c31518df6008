"""The command line that the benchmark scripts share."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torchvision

IMAGES = 256  # that calibrate


@dataclass(frozen=True)
class Options:
    """The common command line."""

    data: Path
    nets: tuple[str, ...]
    widths: tuple[tuple[int, int], ...]
    seeds: tuple[int, ...]
    limit: int | None
    preset: str
    json: Path | None
    images: int = IMAGES
    compared: tuple[str, ...] = ()  # sources of the calibration images, or methods, where a script compares such
    word: str = ""  # for one of them
    workspace: Path | None = None  # where synthetic sets are kept
    continued: bool = False  # keep what the record has
    synthetic: bool = False  # calibrate methods with no real image


def parse(
    description: str | None,
    nets: str,
    widths: str | None = "W8A8,W4A8",
    seeds: str = "0,1,2",
    compared: str = "",
    word: str = "",
    known: Sequence[str] = (),
    synthetic: str = "",
    continues: bool = False,
    has_preset: bool = True,
) -> Options:
    """Read the command line; exits with status 2 and a sentence where it is wrong.

    A script that compares sources of images, methods or presets names the default ones in `compared`, what one is called in
    `word` and all of them in `known`; one without `widths` quantizes nothing. One that takes synthetic images in place of real
    ones on demand says so in `synthetic`; one that `continues` a record takes `--continue`.
    One that compares presets, or whose effort is its own, has none (`has_preset`).
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("INCQ_DATA"), help="data folder (or INCQ_DATA)")
    parser.add_argument("--nets", default=nets, help=f"networks, separated by commas (default {nets})")
    if widths:
        parser.add_argument("--widths", default=widths, help=f"bit-widths such as W4A8 (default {widths})")
    parser.add_argument("--seeds", default=seeds, help=f"seeds (default {seeds})")
    parser.add_argument("--limit", type=int, help="test images at most (default: all)")
    if has_preset:
        parser.add_argument("--preset", choices=("fast", "balanced", "best"), default="balanced", help="default balanced")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--workspace", type=Path, help="folder that keeps synthetic sets, so that another run finds them")
    if compared:
        parser.add_argument(f"--{word}s", default=compared, help=f"of {', '.join(known)} (default {compared})")
        parser.add_argument("--images", type=int, default=IMAGES, help=f"calibration images (default {IMAGES})")
    if continues:
        parser.add_argument(
            "--continue",
            dest="continued",
            action="store_true",
            help="measure what the file of --json lacks; it must be of this version, which nothing checks, and what is in it "
            "but not asked for goes",
        )
    if synthetic:
        parser.add_argument("--synthetic", action="store_true", help=synthetic)
    given = parser.parse_args()
    if given.data is None or not (Path(given.data) / "load.py").is_file():
        parser.error(f"--data must name a folder that holds load.py; it is {given.data}")
    try:
        pairs = tuple((int(width[1]), int(width[3])) for width in _listed(given, "widths") if _is_width(width))
        numbers = tuple(int(seed) for seed in given.seeds.split(","))
    except ValueError as error:
        parser.error(str(error))
    chosen = _listed(given, f"{word}s")
    if unknown := [name for name in chosen if name not in known]:
        parser.error(f"{unknown[0]!r} is not a {word}; there are {', '.join(known)}")
    images = given.images if compared else IMAGES
    if images < 1:
        parser.error(f"--images is {images}; it must be at least 1")
    return Options(
        data=Path(given.data),
        nets=tuple(given.nets.split(",")),
        widths=pairs,
        seeds=numbers,
        limit=given.limit,
        preset=getattr(given, "preset", ""),
        json=given.json,
        images=images,
        compared=chosen,
        word=word,
        workspace=given.workspace,
        continued=continues and given.continued,
        synthetic=bool(synthetic) and given.synthetic,
    )


def _listed(given: argparse.Namespace, name: str) -> tuple[str, ...]:
    """What an argument that a script may lack names, separated by commas."""
    return tuple(getattr(given, name).split(",")) if name in given else ()


def _is_width(text: str) -> bool:
    if len(text) == 4 and text[0] == "W" and text[2] == "A" and text[1] in "2345678" and text[3] in "2345678":
        return True
    raise ValueError(f"{text!r} is not a width; W4A8 is, with 2 to 8 bits each")


def command(options: Options) -> str:
    """The call that repeats these figures, without paths of this machine."""
    widths = ",".join(f"W{weight}A{activation}" for weight, activation in options.widths)
    words = [
        f"python benchmarks/{Path(sys.argv[0]).name} --data DIR --nets {','.join(options.nets)}",
        f"--widths {widths}" if widths else "",
        f"--seeds {','.join(map(str, options.seeds))}",
        f"--preset {options.preset}" if options.preset else "",
        f"--limit {options.limit}" if options.limit else "",
        f"--{options.word}s {shlex.quote(','.join(options.compared))} --images {options.images}" if options.compared else "",
        "--synthetic" if options.synthetic else "",
        f"--json {options.json}" if options.json else "",
    ]
    return " ".join(word for word in words if word)


def timing_parser(description: str | None, nets: str) -> argparse.ArgumentParser:
    """The command line of a script that times networks of torchvision, by default `nets`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", default=nets, help=f"of torchvision (default {nets})")
    parser.add_argument("--size", type=int, default=224, help="pixels of a side (default 224)")
    parser.add_argument("--rounds", type=int, default=5, help="of which the median is taken (default 5)")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--json", type=Path, help="file for the figures")
    return parser


def timed_networks(parser: argparse.ArgumentParser, given: argparse.Namespace) -> list[str]:
    """Those of `--nets`; exits with status 2 and a sentence where torchvision has one not."""
    nets: list[str] = given.nets.split(",")
    if unknown := set(nets) - set(torchvision.models.list_models()):
        parser.error(f"torchvision has no network {unknown.pop()!r}")
    return nets
