"""A synthetic set: shards of inputs and labels with the manifest that says where they come from.

    FOLDER/shard-00000.safetensors ...   inputs (n, *shape) float32, labels (n,) int64; -1 where there are no classes
    FOLDER/manifest.json                 what was asked for, versions, SHA-256 of every shard and of the manifest itself

Shards that are read from a folder are memory-mapped: their pages are loaded when they are used, and can be dropped again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from inc_clusterq.errors import DatasetError
from inc_clusterq.synthesis.draft import Shard, file_sha256, open_shard, sha256, shard_name

FORMAT = "inc-clusterq synthetic set"
VERSION = 8  # raised when the files or the method change, so that a cache never serves what would now come out otherwise
MANIFEST = "manifest.json"


@dataclass(frozen=True, eq=False)
class SyntheticDataset:
    """Shards, and where they come from; indexable like a `torch.utils.data.Dataset`."""

    shards: tuple[Shard, ...]
    manifest: dict[str, Any]

    @cached_property
    def inputs(self) -> Tensor:
        """All inputs, (N, *shape), in memory."""
        return torch.cat([inputs for inputs, _ in self.shards])

    @cached_property
    def labels(self) -> Tensor:
        """All labels, (N,)."""
        return torch.cat([labels for _, labels in self.shards])

    def batches(self, size: int) -> Iterator[Shard]:
        """Every sample once, `size` at a time, the last batch as short as it comes out; read as they are needed.

        Batches are copies: whoever changes one in place changes nothing of the set.
        """
        waiting: list[Shard] = []
        for inputs, labels in self.shards:
            while len(labels):
                take = size - sum(len(part) for _, part in waiting)
                waiting.append((inputs[:take], labels[:take]))
                inputs, labels = inputs[take:], labels[take:]
                if sum(len(part) for _, part in waiting) == size:
                    yield _joined(waiting)
                    waiting = []
        if waiting:
            yield _joined(waiting)

    def __len__(self) -> int:
        return sum(len(labels) for _, labels in self.shards)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        left = index + len(self) if index < 0 else index
        for inputs, labels in self.shards:
            if 0 <= left < len(labels):
                return inputs[left].clone(), labels[left].clone()
            left -= len(labels)
        raise IndexError(f"sample {index} of a set of {len(self)}")


def _joined(parts: list[Shard]) -> Shard:
    return torch.cat([inputs for inputs, _ in parts]), torch.cat([labels for _, labels in parts])


def load_dataset(folder: Path) -> SyntheticDataset:
    """Map a set and check every byte of it; DatasetError names the file that is missing, damaged or foreign."""
    folder = Path(folder)
    manifest = _read_manifest(folder / MANIFEST)
    shards = tuple(_load_shard(folder, number, entry) for number, entry in enumerate(manifest["shards"]))
    return SyntheticDataset(shards, manifest)


def write_shards(folder: Path, dataset: SyntheticDataset) -> list[str]:
    """Write the shards of a set to a folder; returns their SHA-256."""
    checksums = []
    for number, (inputs, labels) in enumerate(dataset.shards):
        content = save({"inputs": inputs.contiguous(), "labels": labels.contiguous()})
        (folder / shard_name(number)).write_bytes(content)
        checksums.append(sha256(content))
    return checksums


def write_manifest(folder: Path, shards: tuple[Shard, ...], checksums: list[str], about: Mapping[str, Any]) -> None:
    """Write the manifest of shards that lie in `folder`; `about` says where they come from."""
    manifest = {
        **about,
        "format": FORMAT,
        "version": VERSION,
        "shards": [
            {"file": shard_name(number), "sha256": checksum, **_form(shard)}
            for number, (shard, checksum) in enumerate(zip(shards, checksums, strict=True))
        ],
    }
    manifest["checksum"] = _manifest_checksum(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", encoding="utf8")


def canonical(value: Any) -> bytes:
    """One spelling for equal JSON values, to be hashed."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _form(shard: Shard) -> dict[str, Any]:
    return {name: [str(tensor.dtype), *tensor.shape] for name, tensor in zip(("inputs", "labels"), shard, strict=True)}


def _load_shard(folder: Path, number: int, entry: Mapping[str, Any]) -> Shard:
    path = folder / shard_name(number)  # whatever the manifest calls it: nothing beside the folder is read
    remedy = f"delete {folder}, then run again"
    try:
        if file_sha256(path) != entry["sha256"]:
            raise DatasetError(f"{path} is damaged, or belongs to another set: its SHA-256 is not that of {MANIFEST}; {remedy}")
        shard = open_shard(path)
    except OSError as failure:
        raise DatasetError(f"cannot read {path}, part of an {FORMAT}: {failure.strerror}; {remedy}") from failure
    except SafetensorError as failure:
        raise DatasetError(f"{path} is not a shard of an {FORMAT}: {failure}; {remedy}") from failure
    found, wanted = _form(shard), {name: entry.get(name) for name in ("inputs", "labels")}
    if found != wanted:
        raise DatasetError(f"{path} holds {found}, {MANIFEST} says {wanted}; {remedy}")
    return shard


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_bytes())
    except OSError as failure:
        raise DatasetError(
            f"cannot read {path}, part of an {FORMAT}: {failure.strerror}; name a folder that `synthesize` has written"
        ) from failure
    except ValueError as failure:  # not UTF-8 or not JSON
        raise DatasetError(f"{path} is not JSON ({failure}); delete {path.parent}, then run again") from failure
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DatasetError(f"{path} does not describe an {FORMAT}; name a folder that was written as one")
    if manifest.get("version") != VERSION:
        raise DatasetError(
            f"{path} has version {manifest.get('version')}, this program reads {VERSION}; synthesise the set again"
        )
    if manifest.get("checksum") != _manifest_checksum(manifest):
        raise DatasetError(f"{path} is damaged: it does not match its own checksum; delete {path.parent}, then run again")
    shards = manifest.get("shards")
    if not isinstance(shards, list) or not all(isinstance(entry, dict) and "sha256" in entry for entry in shards):
        raise DatasetError(f"{path} does not list shards and their SHA-256; synthesise the set again")
    return manifest


def _manifest_checksum(manifest: dict[str, Any]) -> str:
    return sha256(canonical({name: value for name, value in manifest.items() if name != "checksum"}))
