"""SHA-256 hashes of files and folders, cached by size and time stamps so that large files are not read again."""

import contextlib
import hashlib
import re
import time
from collections.abc import Callable
from pathlib import Path

from clpet.config.identity import digest
from clpet.runtime.atomic_io import atomic_file

# Files of a model folder that a run reads; the others, such as README.md, do not change its fingerprint.
MODEL_FILES = (".json", ".txt", ".model", ".safetensors", ".py")
TIMESTAMP_RESOLUTION = 2.0  # seconds; two changes within one tick of a file system's clock give one time stamp


def file_stat(path: Path) -> list[str | int] | None:
    """Returns a file's path, size, times and inode, which together identify its content without reading it.

    None for a file changed in the last seconds: a further change might leave the time stamp as it is.
    """
    try:
        stat = path.stat()
    except OSError:
        return [str(path)]
    newest = max(stat.st_mtime, stat.st_ctime)
    if time.time() - newest < TIMESTAMP_RESOLUTION:
        return None
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def cached_value(cache: str | None, key: str | None, compute: Callable[[], str]) -> str:
    """Returns the value cached under `key`, else computes and caches it; computes it without a cache folder or key."""
    path = Path(cache).expanduser() / "fingerprints" / key if cache and key else None
    with contextlib.suppress(OSError, ValueError):
        value, check = path.read_text().split() if path else ("", "")
        if path and check == digest([key, value]):  # a damaged entry must not become a run's fingerprint
            return value
    value = compute()
    if path:
        _write(path, value)
    return value


def _write(path: Path, value: str) -> None:
    """Writes a value with its checksum; if the disk refuses, the value is merely computed again next time."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary:
            temporary.write_text(f"{value} {digest([path.name, value])}\n")


def file_hash(path: Path, cache: str | None) -> str:
    """SHA-256 of a file as hex digits, cached by its path, size, times and inode."""
    stat = file_stat(path)  # before reading: a change during the read then invalidates the cached hash

    def compute() -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return cached_value(cache, digest(stat, 32) if stat else None, compute)


def folder_hash(folder: Path, cache: str | None) -> str:
    """Hash of the files that are read from a model folder, including the modules of a sentence encoder in it."""
    # A sentence encoder stores its modules in folders named 0_..., 1_..., and so on.
    files = sorted(path for path in (*folder.glob("*"), *folder.glob("[0-9]_*/*")) if path.suffix in MODEL_FILES)
    return digest([[path.relative_to(folder).as_posix(), file_hash(path, cache)] for path in files], 32)


def hub_commit(name: str, revision: str | None, kind: str = "model") -> str | None:
    """Commit hash of a model or dataset in the local cache of the Hugging Face hub; None if it is not cached."""
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    if revision and re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    folder = repo_folder_name(repo_id=name, repo_type=kind)
    with contextlib.suppress(OSError):
        return (Path(HF_HUB_CACHE) / folder / "refs" / (revision or "main")).read_text().strip() or None
    return None
