"""Files and folders that processes share: written whole or not at all, never pickled, a damaged one is none."""

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
from clpet.runtime.distributed import get_world

log = logging.getLogger(__name__)

SUMS = "sha256.json"  # {file: checksum} of a folder


def load(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file; none where it is not there, damaged, or cannot be read."""
    try:
        found = safetensors.numpy.load(path.read_bytes())
        checksum = found.pop("sha256").tobytes()
    except (OSError, SafetensorError, KeyError):
        return {}
    return found if checksum == _checksum(found) else {}


def save(path: Path, arrays: dict[str, np.ndarray]) -> bool:
    """Replaces a file whole; a disk that refuses gets a warning. Returns whether it was written, by the main rank."""
    if not get_world().is_main:
        return True
    checksum = np.frombuffer(_checksum(arrays), dtype=np.uint8)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(safetensors.numpy.save({**arrays, "sha256": checksum}))
        temporary.replace(path)
    except OSError as error:
        log.warning("%s cannot be written, the run goes on without: %s", path, error.strerror or error)
        with contextlib.suppress(OSError):
            temporary.unlink()
        return False
    return True


@contextlib.contextmanager
def folder(place: Path) -> Iterator[Path]:
    """A new folder to write files into, which becomes `place` when all is written, with their checksums.

    Of several processes the first one wins; a damaged folder is replaced. Raises OSError.
    """
    temporary = place.with_name(f".{place.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        sums = {path.name: _sha256(path) for path in temporary.iterdir() if path.is_file()}
        (temporary / SUMS).write_text(json.dumps(sums))
        with (place.parent / ".lock").open("w") as lock:
            _publish(temporary, place, lock)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _publish(made: Path, place: Path, lock: IO[str]) -> None:
    with contextlib.suppress(OSError):  # a file system without locks: renaming alone is safe but for damaged folders
        fcntl.flock(lock, fcntl.LOCK_EX)
    if intact(place):
        return
    if place.exists():
        aside = made.with_name(f"{made.name}.damaged")
        place.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)
    try:
        made.rename(place)
    except OSError:
        if not intact(place):
            raise


def intact(place: Path) -> bool:
    """Whether a folder is there, as `folder` wrote it."""
    try:
        sums = json.loads((place / SUMS).read_text())
        return all(_sha256(place / name) == value for name, value in sums.items())
    except (OSError, ValueError, AttributeError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def writable(folder: Path) -> bool:
    """Whether files can be made in a folder, which is made if need be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _checksum(arrays: dict[str, np.ndarray]) -> bytes:
    found = hashlib.sha256()
    for name, values in sorted(arrays.items()):
        found.update(f"{name} {values.shape} {values.dtype}".encode())
        found.update(np.ascontiguousarray(values).tobytes())
    return found.digest()


@contextlib.contextmanager
def whole(place: Path) -> Iterator[Path]:
    """A new folder to write into, which becomes `place` when all is written. Raises HostError when the disk refuses."""
    temporary = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        shutil.rmtree(place, ignore_errors=True)
        temporary.rename(place)
    except (OSError, SafetensorError) as error:
        raise HostError(f"{place} cannot be written: {getattr(error, 'strerror', None) or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_atomic(path: Path, text: str) -> None:
    """Replaces a file's text whole. Raises HostError when the disk refuses."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        _write_synced(temporary, text)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise HostError(f"{path} cannot be written: {error.strerror or error}") from error


class Lock:
    """Holds a run directory for this process and its ranks. Raises HostError when another process has it."""

    def __init__(self, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.file = (out / ".lock").open("w")
        if not get_world().is_main:
            return
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.file.close()
            raise HostError(f"another process is working in {out}: wait for it, or use another output_dir") from error

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
