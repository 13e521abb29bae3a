"""Atomic writes: a file or folder appears complete or not at all, also after a crash or with several writers.

Every write goes to a hidden temporary path in the same directory, which is then renamed: a rename within one file
system is atomic. Cached arrays and folders carry checksums, so a damaged cache entry is recomputed, never used.
Nothing is pickled.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from clpet.errors import HostError

log = logging.getLogger(__name__)

CHECKSUMS = "sha256.json"  # {file name: SHA-256} of a cached folder


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write to; it replaces `path` when the block ends without an error. Raises OSError."""
    temporary = _temporary(path)
    try:
        yield temporary
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replaces a text file atomically and durably. Raises HostError when the disk refuses."""
    with as_host_error(path), atomic_file(path) as temporary:
        write_synced(temporary, text)


def write_synced(path: Path, text: str) -> None:
    """Writes a text file and waits until it is on disk, so that a rename after it never publishes an empty file."""
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Yields a new folder to fill; it replaces `folder` when the block ends. Raises HostError when the disk refuses."""
    with as_host_error(folder), _new_folder(folder) as temporary:
        yield temporary
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)


@contextlib.contextmanager
def create_folder(folder: Path) -> Iterator[Path]:
    """Yields a new folder to fill; it becomes `folder` unless another process created that first. Raises OSError."""
    with _new_folder(folder) as temporary:
        yield temporary
        if not folder.is_dir():
            temporary.rename(folder)


@contextlib.contextmanager
def cache_folder(folder: Path) -> Iterator[Path]:
    """Yields a new folder to fill; with the checksums of its files it becomes `folder`, an entry of a shared cache.

    Of several processes the first wins; a damaged entry is replaced. Raises OSError.
    """
    with _new_folder(folder) as temporary:
        yield temporary
        checksums = {path.name: _sha256(path) for path in temporary.iterdir() if path.is_file()}
        (temporary / CHECKSUMS).write_text(json.dumps(checksums))
        with (folder.parent / ".lock").open("w") as lock:
            _publish(temporary, folder, lock)


def is_intact(folder: Path) -> bool:
    """Whether a folder written by `cache_folder` exists and every file still has its checksum."""
    try:
        checksums = json.loads((folder / CHECKSUMS).read_text())
        return all(_sha256(folder / name) == value for name, value in checksums.items())
    except (OSError, ValueError, AttributeError):
        return False


def is_writable(folder: Path) -> bool:
    """Whether files can be created in a folder; creates the folder where it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """Reads the arrays that `save_arrays` wrote; empty where the file is missing, damaged or unreadable."""
    try:
        arrays = safetensors.numpy.load(path.read_bytes())
        checksum = arrays.pop("sha256").tobytes()
    except (OSError, SafetensorError, KeyError):
        return {}
    return arrays if checksum == _checksum(arrays) else {}


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> bool:
    """Replaces a cache file of arrays atomically, on the main rank only; logs a warning when the disk refuses.

    Returns False after such a failure: the caller then stops using the cache.
    """
    if not _is_main():
        return True
    checksum = np.frombuffer(_checksum(arrays), dtype=np.uint8)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary:
            temporary.write_bytes(safetensors.numpy.save({**arrays, "sha256": checksum}))
    except OSError as error:
        log.warning("%s cannot be written, the run continues without this cache: %s", path, error.strerror or error)
        return False
    return True


class RunLock:
    """An exclusive lock on a run directory for this process and its ranks, held until the `with` block ends.

    Raises HostError when another process holds it.
    """

    def __init__(self, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.file = (out / ".lock").open("w")
        if not _is_main():
            return
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.file.close()
            raise HostError(f"another process is working in {out}: wait for it, or use another output_dir") from error

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def is_locked(out: Path) -> bool:
    """Whether a process holds the lock on a run directory."""
    if not (out / ".lock").is_file():
        return False
    with (out / ".lock").open("r") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def wait_for_lock(out: Path) -> None:
    """Waits until no process holds the lock on a run directory."""
    with (out / ".lock").open("r") as file:
        fcntl.flock(file, fcntl.LOCK_SH)


def _is_main() -> bool:
    from clpet.runtime.distributed import get_world  # imports torch, which commands that only read files do without

    return get_world().is_main


def _temporary(path: Path) -> Path:
    """A hidden sibling of `path`; the random part keeps apart hosts of one file system that have equal process ids."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder next to `folder`, removed at the end unless it was renamed."""
    temporary = _temporary(folder)
    try:
        temporary.mkdir(parents=True)
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def as_host_error(path: Path) -> Iterator[None]:
    """Raises HostError where the block cannot write `path`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise HostError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}") from error


def _publish(temporary: Path, folder: Path, lock: IO[str]) -> None:
    """Renames a filled folder to its final path, under a lock so that no two processes replace the same damaged one."""
    with contextlib.suppress(OSError):  # on a file system without locks the rename alone is safe for intact folders
        fcntl.flock(lock, fcntl.LOCK_EX)
    if is_intact(folder):
        return
    if folder.exists():
        damaged = temporary.with_name(f"{temporary.name}.damaged")
        folder.rename(damaged)
        shutil.rmtree(damaged, ignore_errors=True)
    try:
        temporary.rename(folder)
    except OSError:
        if not is_intact(folder):  # else another process without the lock has published the same content first
            raise


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksum(arrays: dict[str, np.ndarray]) -> bytes:
    """SHA-256 over names, shapes, types and values, in the order of the names."""
    checksum = hashlib.sha256()
    for name, values in sorted(arrays.items()):
        checksum.update(f"{name} {values.shape} {values.dtype}".encode())
        checksum.update(np.ascontiguousarray(values).tobytes())
    return checksum.digest()
