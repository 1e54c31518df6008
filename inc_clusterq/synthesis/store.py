"""Synthetic sets by what was asked for: found again, or made once, and published whole.

In a cache the folder of a set is named by the SHA-256 of the request, so that asking for anything else changes the name; the
kind of machine that made it does not count. One process at a time makes a set, in the hidden folder `.KEY.partial` beside it,
and the others wait; a folder appears by one rename when it is whole. What a killed process has finished is found there by the
next one.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import nn

from inc_clusterq.errors import DatasetError, OutputError
from inc_clusterq.inputs import InputSpec
from inc_clusterq.output import is_of
from inc_clusterq.progress import SILENT, Progress
from inc_clusterq.synthesis.clusterq import synthesise_into
from inc_clusterq.synthesis.dataset import (
    MANIFEST,
    VERSION,
    SyntheticDataset,
    canonical,
    load_dataset,
    write_manifest,
    write_shards,
)
from inc_clusterq.synthesis.draft import Draft, FolderDraft, sha256
from inc_clusterq.synthesis.settings import ClusterQSettings


@dataclass(frozen=True)
class Source:
    """The model section of the YAML and the folder it is relative to, so that `inspect` finds the model again."""

    model: Mapping[str, Any]
    folder: Path

    def seen_from(self, dataset: Path) -> dict[str, Any]:
        """For the manifest of the set in the folder `dataset`."""
        return {"source": {"model": dict(self.model), "folder": os.path.relpath(self.folder.resolve(), dataset.resolve())}}


def describe(
    fingerprint: str, spec: InputSpec, settings: ClusterQSettings, *, num_classes: int, samples: int, seed: int
) -> dict[str, Any]:
    """The request for a set, in plain JSON values: everything that its content depends on, but for the kind of machine."""
    request = {
        "fingerprint": fingerprint,
        "spec": asdict(spec),
        "settings": settings.model_dump(mode="json"),
        "num_classes": num_classes,
        "samples": samples,
        "seed": seed,
        "version": VERSION,
    }
    plain: dict[str, Any] = json.loads(canonical(request))
    return plain


def request_key(request: dict[str, Any]) -> str:
    """SHA-256 (hex) of a request, the name of its folder in a cache."""
    return sha256(canonical(request))


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
    draft = Draft()
    request = describe(fingerprint, spec, settings, num_classes=num_classes, samples=samples, seed=seed)
    decided = synthesise_into(
        draft, module, spec, settings, num_classes=num_classes, samples=samples, seed=seed, progress=progress
    )
    return SyntheticDataset(tuple(draft.shards), _about(request, decided))


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
    source: Source | None = None,
) -> SyntheticDataset:
    """The set for this request out of `cache_dir`, synthesised first if it is not there. Processes may race."""
    request = describe(fingerprint, spec, settings, num_classes=num_classes, samples=samples, seed=seed)
    folder = cached_folder(cache_dir, request)
    partial = folder.with_name(f".{folder.name}.partial")
    if not folder.exists():
        # Before the work, not after it: an unwritable cache must not cost minutes.
        _make_folder(folder.parent)
        with _alone(folder, progress):
            if not folder.exists():  # another process was faster
                with _written(folder, partial):
                    draft = FolderDraft(partial)
                    decided = synthesise_into(
                        draft, module, spec, settings, num_classes=num_classes, samples=samples, seed=seed, progress=progress
                    )
                    about = {**_about(request, decided), **(source.seen_from(folder) if source else {})}
                    write_manifest(draft.set, tuple(draft.shards), draft.checksums, about)
                    draft.set.rename(folder)
    shutil.rmtree(partial, ignore_errors=True)  # here, where also goes what a kill after the renaming left
    dataset = load_dataset(folder)
    if dataset.manifest.get("request") != request:
        raise DatasetError(f"{folder / MANIFEST} describes another request than its folder's name; delete {folder}")
    return dataset


def cached_folder(cache_dir: Path, request: dict[str, Any]) -> Path:
    """Where the set for a request lies, or will lie."""
    return Path(cache_dir) / request_key(request)


def write_dataset(folder: Path, dataset: SyntheticDataset, source: Mapping[str, Any] | None = None) -> None:
    """Write all files of a set into an empty folder, made if need be; `source` goes over the manifest's own."""
    folder.mkdir(parents=True, exist_ok=True)
    write_manifest(folder, dataset.shards, write_shards(folder, dataset), {**dataset.manifest, **(source or {})})


def _about(request: dict[str, Any], decided: ClusterQSettings) -> dict[str, Any]:
    return {"torch": str(torch.__version__), "request": request, "decided": decided.model_dump(mode="json")}


@contextmanager
def _alone(folder: Path, progress: Progress) -> Iterator[None]:
    """Wait until no other process makes the set `folder`. The system ends a lock with the process that holds it."""
    file = folder.with_name(f".{folder.name}.lock")
    lock = FileLock(file, fallback_to_soft=False)  # a soft lock outlives a killed process, and whoever comes waits for ever
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            with progress.stage("Waiting for another process that makes this set", 1) as stage:
                lock.acquire()
                stage.advance(1)
    except OSError as failure:
        raise OutputError(f"cannot lock {file} ({failure}); choose a workspace on a file system with locks") from failure
    try:
        yield
    finally:
        if folder.exists():  # who comes now needs no lock; who already waits finds the set
            file.unlink(missing_ok=True)
        lock.release()


@contextmanager
def _written(folder: Path, unfinished: Path) -> Iterator[None]:
    """Tell what goes wrong with the files of a set; what goes wrong elsewhere meanwhile passes."""
    try:
        yield
    except OSError as failure:
        if not is_of(failure, unfinished):
            raise
        if failure.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR) and folder.exists():
            raise OutputError(
                f"{folder} already exists and is not an empty folder; choose another one or remove it"
            ) from failure
        raise OutputError(f"cannot write the synthetic set to {folder}: {failure.strerror}") from failure


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as failure:
        raise OutputError(f"cannot create the folder {folder}: {failure.strerror}") from failure
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write to the folder {folder}; choose another one or change its permissions")
