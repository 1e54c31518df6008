"""Go on with a recorded benchmark: what the record has of the first seeds is kept and not measured again.

An entry is what is measured of one thing, a source of images say: lists of one value per seed, or dictionaries of such.
"""

from __future__ import annotations

import json
import sys
from itertools import takewhile
from typing import Any

from arguments import Options

from inc_clusterq.adaptors.neural_compressor import NeuralCompressorAdaptor
from inc_clusterq.environment import environment


class Earlier:
    """What the file of `--json` has already; nothing without `--continue`."""

    def __init__(self, options: Options) -> None:
        """Read the record; exits with a sentence where it was made under other conditions."""
        self._record: dict[str, Any] = {}
        self._seeds = 0
        if not options.continued or options.json is None or not options.json.is_file():
            return
        self._record = json.loads(options.json.read_text(encoding="utf-8"))
        now = {
            "preset": options.preset,
            "images": options.images,
            "limit": options.limit,
            "environment": environment(NeuralCompressorAdaptor().versions()),
        }
        for condition, value in now.items():
            if (before := self._record.get(condition)) != value:
                sys.exit(f"{options.json} can't be continued: its {condition} is {before}, and now it is {value}")
        if ("--synthetic" in self._record["command"]) != options.synthetic:
            sys.exit(f"{options.json} can't be continued: its images are real and now they are not, or the other way round")
        both = zip(self._record["seeds"], options.seeds, strict=False)
        self._seeds = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], both))

    def fill(self, entry: dict[str, Any], *path: str) -> None:
        """Put into the empty lists of an entry what the record has at `path` of the seeds that both begin with."""
        recorded: Any = self._record
        for name in path:
            recorded = recorded.get(name, {})
        self._fill(entry, recorded)

    def _fill(self, entry: dict[str, Any], recorded: dict[str, Any]) -> None:
        for name in entry.keys() & recorded.keys():
            if isinstance(entry[name], list):
                entry[name] += recorded[name][: self._seeds]
            else:
                self._fill(entry[name], recorded[name])
