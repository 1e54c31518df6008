"""A synthetic set in the making: finished shards, and the state from which the rest follows to the bit.

    FOLDER/set/shard-00000.safetensors   a finished batch: inputs (n, *shape) float32, labels (n,) int64
    FOLDER/NAME.safetensors              the state of stage NAME: parameters, moments, centroids, random numbers

Each file appears by one rename when it is whole, a shard before the state that counts it; so a process that is killed at
any point leaves a state and all shards it speaks of. What does not fit its checksum, or was begun under another version
of torch, is not used: the work begins again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from inc_clusterq.output import replace_file
from inc_clusterq.resuming import SAVE_SECONDS, State

Shard = tuple[Tensor, Tensor]  # inputs (n, *shape), labels (n,)


class Draft:
    """In memory only: nothing is written, nothing is found."""

    def __init__(self) -> None:
        self.shards: list[Shard] = []

    def find(self, stage: str) -> State | None:
        """The last state of a stage that was kept, on the CPU; None where there is none."""
        return None

    def keep(self, stage: str, state: State) -> None:
        """Keep the state of a stage in place of the one before."""

    def add(self, inputs: Tensor, labels: Tensor, stage: str, state: State) -> None:
        """Keep one more shard, and the state of the stage after it."""
        self.shards.append((inputs, labels))

    @property
    def due(self) -> bool:
        """Whether so much time has passed that a long stage should keep its state."""
        return False


class FolderDraft(Draft):
    """On disk, in a folder of its own that one process at a time may use."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.set = folder / "set"
        self.checksums: list[str] = []
        self._saved = time.monotonic()
        self._states: dict[str, State] = {}
        try:
            self._open()
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as failure:
            logging.getLogger(__name__).warning("%s cannot be used (%s); the set is begun anew", folder, failure)
            shutil.rmtree(folder, ignore_errors=True)
            self.shards, self.checksums, self._states = [], [], {}
        self.set.mkdir(parents=True, exist_ok=True)

    def find(self, stage: str) -> State | None:
        return self._states.get(stage)

    def keep(self, stage: str, state: State) -> None:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        about = {"torch": str(torch.__version__), "shards": json.dumps(self.checksums), "sha256": sha256(save(tensors))}
        replace_file(self.folder / f"{stage}.safetensors", save(tensors, about))
        self._saved = time.monotonic()

    def add(self, inputs: Tensor, labels: Tensor, stage: str, state: State) -> None:
        content = save({"inputs": inputs.contiguous(), "labels": labels.contiguous()})
        file = self.set / shard_name(len(self.shards))
        replace_file(file, content, self.folder)
        self.checksums.append(sha256(content))
        self.shards.append(open_shard(file))
        self.keep(stage, state)

    @property
    def due(self) -> bool:
        return time.monotonic() - self._saved >= SAVE_SECONDS

    def _open(self) -> None:
        for file in sorted(self.folder.glob("*.safetensors")):
            with safe_open(file, "pt") as opened:
                about: dict[str, str] = opened.metadata()
                state = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118 not a mapping
            if about["torch"] != str(torch.__version__):
                raise ValueError(f"it was begun with torch {about['torch']}")
            if about["sha256"] != sha256(save(state)):
                raise ValueError(f"{file.name} is damaged")
            self._states[file.stem] = state
            self.checksums = max(self.checksums, json.loads(about["shards"]), key=len)
        for number, checksum in enumerate(self.checksums):
            file = self.set / shard_name(number)
            if file_sha256(file) != checksum:
                raise ValueError(f"{file.name} is damaged")
            self.shards.append(open_shard(file))


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:05}.safetensors"


def open_shard(file: Path) -> Shard:
    """Inputs and labels of a shard, memory-mapped; SafetensorError where it is no such file."""
    with safe_open(file, "pt") as opened:
        return opened.get_tensor("inputs"), opened.get_tensor("labels")


def sha256(content: bytes) -> str:
    """SHA-256, in hex."""
    return hashlib.sha256(content).hexdigest()


def file_sha256(file: Path) -> str:
    """SHA-256 of a file's content, in hex, without holding it in memory."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
