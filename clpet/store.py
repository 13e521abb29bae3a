"""Arrays on disk that processes share: written whole or not at all, never pickled, a damaged file is none."""

import contextlib
import hashlib
import logging
import os
import tempfile
from pathlib import Path

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from clpet.ranks import world

log = logging.getLogger(__name__)


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
    if not world().main:
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
