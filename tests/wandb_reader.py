"""Reads an offline run file of wandb: LevelDB log framing around protobuf records."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK = 32768


def records(path: Path) -> Iterator[bytes]:
    """Whole records: a 7-byte file header, then blocks of fragments (crc32, length, type)."""
    data = path.read_bytes()
    place, parts = 7, b""
    while place + 7 <= len(data):
        if BLOCK - place % BLOCK < 7:
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # full, or last fragment
            yield parts
            parts = b""


def read_wandb(path: Path) -> dict[str, Any]:
    """Config, group, history rows, summary, tables and names of images."""
    from wandb.proto import wandb_internal_pb2

    found: dict[str, Any] = {"config": {}, "history": [], "summary": {}, "tables": {}, "images": set(), "group": ""}
    for raw in records(path):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(raw)
        if record.HasField("run"):
            found["group"] = record.run.run_group
            found["config"] |= _items(record.run.config.update)
        if record.HasField("config"):
            found["config"] |= _items(record.config.update)
        if record.HasField("history"):
            row = _items(record.history.item)
            found["history"].append(row)
            for key, value in row.items():
                if isinstance(value, dict) and value.get("_type") == "table-file":
                    found["tables"][key] = json.loads((path.parent / "files" / value["path"]).read_text())
                elif isinstance(value, dict) and value.get("_type") == "image-file":
                    found["images"].add(key)
        if record.HasField("summary"):
            found["summary"] |= _items(record.summary.update)
    return found


def _items(items: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in items:
        *parents, last = [item.key] if item.key else item.nested_key
        node = found
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = json.loads(item.value_json)
    return found
