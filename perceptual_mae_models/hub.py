"""Our weights on the Hugging Face Hub: which repository, at which revision, and whether its files are whole.

A repository of ours is named after its tag and holds `manifest.json`, the size and SHA-256 of its other files. Nothing
is loaded that does not match it. The manifest of a published tag is itself pinned here, so that a repository that
changes after this version of the package was made is noticed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from timm.models import PretrainedCfg

HUB_ORGANISATION = "perceptual-mae"
"""Whose repositories our tags name; the environment variable `PMAE_HUB_ORG` puts another in its place. Tags not in
`PUBLISHED` are only asked for where the variable is set, be it to this."""
MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"
PICKLED_WEIGHTS = "pytorch_model.bin"
"""What timm called them before; read as tensors alone."""


class IntegrityError(RuntimeError):
    """A file is not the one that its manifest describes: damaged, cut short or exchanged."""


class NotPublishedError(LocalEntryNotFoundError):
    """Weights that nobody has published as far as this version of the package knows."""


class Publication(NamedTuple):
    """What this version of the package knows of a tag's repository."""

    revision: str
    """Commit, 40 hexadecimal digits."""
    manifest_sha256: str
    """Of `manifest.json` at that commit."""


PUBLISHED: dict[str, Publication] = {}
"""By `<architecture>.<tag>`; `training/publish.py` prints the line of an upload."""


class Repository(NamedTuple):
    """Where weights are on the Hub."""

    id: str
    revision: str | None
    manifest_sha256: str | None
    ours: bool
    """Whether it is named after the tag, and so has a manifest."""
    known: bool = True
    """Whether this version of the package or the user says whose it is; who else took our name is not asked."""

    def __str__(self) -> str:
        return self.id + (f"@{self.revision}" if self.revision else "")


def find_repository(cfg: PretrainedCfg) -> Repository:
    """Say where a pretrained cfg's weights are on the Hub; `cfg.hf_hub_id` must not be empty.

    A revision may stand behind the id (`org/name@revision`), as everywhere in timm.
    """
    repo_id, _, revision = str(cfg.hf_hub_id).partition("@")
    organisation, _, name = repo_id.rpartition("/")
    ours = bool(cfg.tag) and name == f"{cfg.architecture}.{cfg.tag}"
    if not ours or organisation != HUB_ORGANISATION or revision:
        return Repository(repo_id, revision or None, None, ours)
    asked = os.environ.get("PMAE_HUB_ORG")
    if asked and asked != HUB_ORGANISATION:
        return Repository(f"{asked}/{name}", None, None, True)
    if known := PUBLISHED.get(name):
        return Repository(repo_id, known.revision, known.manifest_sha256, True)
    return Repository(repo_id, None, None, True, known=bool(asked))


def fetch_weights(cfg: PretrainedCfg, cache_dir: str | Path | None = None) -> Path:
    """Get a tag's encoder from the Hub or its cache.

    Args:
        cfg: A pretrained cfg with a `hf_hub_id`.
        cache_dir: The Hub's cache; by default that of `huggingface_hub` (`HF_HUB_CACHE`).

    Returns:
        The file in the cache.

    Raises:
        OSError: If it cannot be had: no network, no such repository or revision, no access, a broken transfer
            (all of `huggingface_hub`'s own errors).
        IntegrityError: If it is not the file that the repository's manifest describes.
    """
    repository = find_repository(cfg)
    filename = cfg.hf_hub_filename or WEIGHTS
    if not repository.ours:
        return _fetch_foreign(repository, cfg.hf_hub_filename, cache_dir)
    try:
        manifest = find_manifest(repository, cache_dir)
    except LocalEntryNotFoundError as error:
        if repository.manifest_sha256:
            raise
        try:  # no network: what somebody put into the cache is all there is, with or without a manifest
            return fetch_file(repository, filename, cache_dir, local=True)
        except LocalEntryNotFoundError:
            raise error from None  # which says why the Hub was not reached
    path = fetch_file(repository, filename, cache_dir)
    if manifest:
        check_file(path, filename, manifest, str(repository))
    return path


def find_manifest(
    repository: Repository, cache_dir: str | Path | None = None, *, local: bool = False
) -> dict[str, Any] | None:
    """Get a repository's manifest from the Hub or its cache; `local`: from the cache only.

    Returns:
        None: The repository has none, as one that is not ours, or somebody's own upload by timm.

    Raises:
        OSError: If a pinned one, or the Hub, cannot be had, or the cache has none.
        IntegrityError: If it is no manifest, or not the one that this version of the package knows.
    """
    if not repository.ours:
        return None
    known = repository.manifest_sha256
    try:
        path = fetch_file(repository, MANIFEST, cache_dir, local=local)
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError:
        if known:
            raise
        return None
    if known and (found := sha256_of(path)) != known:
        raise IntegrityError(
            f"{MANIFEST} of {repository} has the SHA-256 {found}, but this version of perceptual_mae_models knows"
            f" {known}: the repository or the file {path} was changed. Delete that file and try again; if it stays so,"
            " do not use the weights."
        )
    return read_manifest(path)


def _fetch_foreign(repository: Repository, filename: str | None, cache_dir: str | Path | None) -> Path:
    """A repository's weights by the name that is asked for, or by those that timm knows.

    Not by timm, which before 1.0.29 takes a safetensors file that is asked for by its name for a pickle.
    """
    try:
        return fetch_file(repository, filename or WEIGHTS, cache_dir)
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError:
        if filename:
            raise
        with suppress(EntryNotFoundError):
            return fetch_file(repository, PICKLED_WEIGHTS, cache_dir)
        raise  # by the name that is usual


def fetch_file(
    repository: Repository, filename: str, cache_dir: str | Path | None = None, *, local: bool = False
) -> Path:
    """Get a file of a repository from the Hub or its cache; `local`: from the cache only.

    Raises:
        OSError: If it cannot be had.
    """
    local = local or not repository.known
    try:
        return Path(
            hf_hub_download(
                repository.id, filename, revision=repository.revision, cache_dir=cache_dir, local_files_only=local
            )
        )
    except LocalEntryNotFoundError:
        if repository.known:
            raise
        raise NotPublishedError(
            f"this version of perceptual_mae_models was made before any upload of {repository.id}, and does not load"
            " what others may have put there; PMAE_HUB_ORG names an organisation to ask"
        ) from None


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a manifest: `{"name": …, "files": {name: {"bytes": …, "sha256": …}}}`.

    Raises:
        OSError: If there is no such file.
        IntegrityError: If it is not a manifest, or names a file outside its own folder.
    """
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for entry in manifest["files"].values():
            int(entry["bytes"]), str(entry["sha256"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{path} is not a manifest of weights ({type(error).__name__}: {error})") from error
    for name in manifest["files"]:
        place = PureWindowsPath(name)  # which knows both kinds of slashes, and drives
        if place.anchor or ".." in place.parts or not place.name:
            raise IntegrityError(f"{path} names {name!r}, which is no file of its own folder: do not use these weights")
    return manifest


def check_file(path: Path, filename: str, manifest: Mapping[str, Any], source: str) -> None:
    """Compare a file with its line in a manifest.

    Args:
        path: Where it is.
        filename: Its name in the manifest.
        manifest: As `read_manifest` gives it.
        source: Where the manifest is from, for the message.

    Raises:
        IntegrityError: If they differ, or the manifest has no such line.
    """
    entry = manifest["files"].get(filename)
    if entry is None:
        raise IntegrityError(f"the manifest of {source} has no line for {filename}")
    size = path.stat().st_size
    if size != entry["bytes"]:
        problem = f"has {size} bytes instead of {entry['bytes']}"
    elif (found := sha256_of(path)) != entry["sha256"]:
        problem = f"has the SHA-256 {found} instead of {entry['sha256']}"
    else:
        return
    raise IntegrityError(
        f"{filename} of {source} {problem} (manifest): damaged, or exchanged. Delete {path} and get it again."
    )


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
