"""Hashes of files and folders, remembered by size and time stamps."""

import contextlib
import hashlib
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clpet.config.identity import digest
from clpet.runtime.atomic_io import atomic_file

READ = (".json", ".txt", ".model", ".safetensors", ".py")  # what is read of a model's folder
SETTLED = 2.0  # seconds after which a change of a file is sure to change its time stamp


def _stat(path: Path) -> list[Any] | None:
    """A file's path, size, times and inode; None where it has just changed, so that it may change unnoticed."""
    try:
        found = path.stat()
    except OSError:
        return [str(path)]
    newest = max(found.st_mtime, found.st_ctime)
    if time.time() - newest < SETTLED:
        return None
    return [str(path.resolve()), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def remembered(cache: str | None, key: str | None, compute: Callable[[], str]) -> str:
    """A value that is kept under a key in the cache folder; without a folder or a key it is computed."""
    place = Path(cache).expanduser() / "fingerprints" / key if cache and key else None
    with contextlib.suppress(OSError, ValueError):
        value, check = place.read_text().split() if place else ("", "")
        if place and check == digest([key, value]):
            return value
    value = compute()
    if place:
        remember(place, value)
    return value


def remember(place: Path, value: str) -> None:
    """Writes a value whole with its checksum; a disk that refuses costs only the time to compute it again."""
    with contextlib.suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(place) as temporary:
            temporary.write_text(f"{value} {digest([place.name, value])}\n")


def file_hash(path: Path, cache: str | None) -> str:
    """SHA-256 of a file, remembered by its path, size, times and inode."""
    before = _stat(path)

    def compute() -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return remembered(cache, digest(before, 32) if before else None, compute)


def folder_hash(folder: Path, cache: str | None) -> str:
    """Hash of the files that are read of a model's folder, and of the modules of a sentence encoder in it."""
    files = sorted(path for path in (*folder.glob("*"), *folder.glob("[0-9]_*/*")) if path.suffix in READ)
    return digest([[path.relative_to(folder).as_posix(), file_hash(path, cache)] for path in files], 32)


def hub_commit(name: str, revision: str | None, kind: str = "model") -> str | None:
    """The commit of a model or dataset of the hub that lies in this machine's cache; None where none does."""
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    if revision and re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    folder = repo_folder_name(repo_id=name, repo_type=kind)
    with contextlib.suppress(OSError):
        return (Path(HF_HUB_CACHE) / folder / "refs" / (revision or "main")).read_text().strip() or None
    return None
