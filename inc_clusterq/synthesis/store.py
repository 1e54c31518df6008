"""Synthetic sets on disk: two tensors beside a manifest, published whole, checked when read, found by their content.

    FOLDER/dataset.safetensors   inputs (N, *shape) float32, labels (N,) int64
    FOLDER/manifest.json         what was asked for, versions, SHA-256 of the tensors and of the manifest itself

A folder appears by one rename of a finished sibling: whoever finds it finds it whole, and of two processes that make the
same set the second discards its copy. In a cache the folder's name is the SHA-256 of the request, so that anything that
could change the set changes the name.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from inc_clusterq.errors import DatasetError, OutputError
from inc_clusterq.inputs import InputSpec
from inc_clusterq.progress import SILENT, Progress
from inc_clusterq.synthesis.clusterq import synthesise
from inc_clusterq.synthesis.settings import ClusterQSettings

FORMAT = "inc-clusterq synthetic set"
VERSION = 1  # raised when the files or the method change, so that a cache never serves what would now come out otherwise
TENSORS, MANIFEST = "dataset.safetensors", "manifest.json"


@dataclass(frozen=True, eq=False)
class SyntheticDataset:
    """Inputs (N, *shape), labels (N,) and where they come from; indexable like a `torch.utils.data.Dataset`."""

    inputs: Tensor
    labels: Tensor
    manifest: dict[str, Any]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.labels[index]


def describe(
    fingerprint: str, spec: InputSpec, settings: ClusterQSettings, *, num_classes: int, samples: int, seed: int
) -> dict[str, Any]:
    """The request for a set, in plain JSON values: everything that its content depends on."""
    request = {
        "fingerprint": fingerprint,
        "spec": asdict(spec),
        "settings": settings.model_dump(mode="json"),
        "num_classes": num_classes,
        "samples": samples,
        "seed": seed,
        "version": VERSION,
    }
    plain: dict[str, Any] = json.loads(_canonical(request))
    return plain


def request_key(request: dict[str, Any]) -> str:
    """SHA-256 (hex) of a request, the name of its folder in a cache."""
    return _sha256(_canonical(request))


def build_dataset(
    module: nn.Module,
    fingerprint: str,
    spec: InputSpec,
    settings: ClusterQSettings,
    *,
    num_classes: int,
    samples: int,
    seed: int,
    progress: Progress = SILENT,
) -> SyntheticDataset:
    """Synthesise a set, kept in memory."""
    inputs, labels = synthesise(module, spec, settings, num_classes=num_classes, samples=samples, seed=seed, progress=progress)
    request = describe(fingerprint, spec, settings, num_classes=num_classes, samples=samples, seed=seed)
    return SyntheticDataset(inputs, labels, {"torch": str(torch.__version__), "request": request})


def cached_dataset(
    cache_dir: Path,
    module: nn.Module,
    fingerprint: str,
    spec: InputSpec,
    settings: ClusterQSettings,
    num_classes: int,
    samples: int,
    seed: int,
    progress: Progress = SILENT,
) -> SyntheticDataset:
    """The set for this request out of `cache_dir`, synthesised first if it is not there. Processes may race."""
    request = describe(fingerprint, spec, settings, num_classes=num_classes, samples=samples, seed=seed)
    folder = Path(cache_dir) / request_key(request)
    if not folder.exists():
        # Before the work, not after it: an unwritable cache must not cost minutes.
        _make_folder(folder.parent)
        made = build_dataset(
            module,
            fingerprint,
            spec,
            settings,
            num_classes=num_classes,
            samples=samples,
            seed=seed,
            progress=progress,
        )
        _publish(folder, made)  # False when another process was faster: its set is the one to share
    dataset = load_dataset(folder)
    if dataset.manifest.get("request") != request:
        raise DatasetError(f"{folder / MANIFEST} describes another request than its folder's name; delete {folder}")
    return dataset


def save_dataset(folder: Path, dataset: SyntheticDataset) -> SyntheticDataset:
    """Write a set to `folder`, which must not hold anything yet; returns it with the manifest as written."""
    folder = Path(folder)
    _make_folder(folder.parent)
    if not _publish(folder, dataset):
        raise OutputError(f"{folder} already exists and is not an empty folder; choose another one or remove it")
    return load_dataset(folder)


def load_dataset(folder: Path) -> SyntheticDataset:
    """Read a set and check every byte of it; DatasetError names the file that is missing, damaged or foreign."""
    folder = Path(folder)
    manifest = _read_manifest(folder / MANIFEST)
    path = folder / TENSORS
    content = _read(path)
    if _sha256(content) != manifest["sha256"]:
        raise DatasetError(f"{path} is damaged: its SHA-256 is not the one in {MANIFEST}; delete {folder}, then run again")
    try:
        tensors = load(content)
    except SafetensorError as failure:
        raise DatasetError(f"{path} is not a safetensors file: {failure}; delete {folder}, then run again") from failure
    found = {name: [str(t.dtype), *t.shape] for name, t in sorted(tensors.items())}
    if found != manifest["tensors"]:
        raise DatasetError(f"{path} holds {found}, {MANIFEST} says {manifest['tensors']}; delete {folder}, then run again")
    return SyntheticDataset(tensors["inputs"], tensors["labels"], manifest)


def _publish(folder: Path, dataset: SyntheticDataset) -> bool:
    """Write to a sibling and rename it to `folder`; False if something was there already."""
    tensors = {"inputs": dataset.inputs.contiguous(), "labels": dataset.labels.contiguous()}
    content = save(tensors)
    manifest = {
        **dataset.manifest,
        "format": FORMAT,
        "version": VERSION,
        "tensors": {name: [str(t.dtype), *t.shape] for name, t in sorted(tensors.items())},
        "sha256": _sha256(content),
    }
    manifest["checksum"] = _manifest_checksum(manifest)
    sibling = folder.with_name(f".{folder.name}.{os.getpid()}.{uuid4().hex[:8]}")
    try:
        sibling.mkdir()
        (sibling / TENSORS).write_bytes(content)
        (sibling / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", encoding="utf8")
        sibling.rename(folder)
    except OSError as failure:
        shutil.rmtree(sibling, ignore_errors=True)
        if failure.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR) and folder.exists():
            return False
        raise OutputError(f"cannot write the synthetic set to {folder}: {failure.strerror}") from failure
    return True


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(_read(path))
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
    return manifest


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as failure:
        raise DatasetError(f"cannot read {path}, part of an {FORMAT}: {failure.strerror}") from failure


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as failure:
        raise OutputError(f"cannot create the folder {folder}: {failure.strerror}") from failure
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write to the folder {folder}; choose another one or change its permissions")


def _manifest_checksum(manifest: dict[str, Any]) -> str:
    return _sha256(_canonical({name: value for name, value in manifest.items() if name != "checksum"}))


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
