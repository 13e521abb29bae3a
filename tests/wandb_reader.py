"""Reads the file of an offline wandb run: protobuf records in the framing of a LevelDB log."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK = 32768


def records(path: Path) -> Iterator[bytes]:
    """The records of a file: a 7-byte header, then blocks of BLOCK bytes with fragments (crc32, length, type)."""
    data = path.read_bytes()
    offset, record = 7, b""
    while offset + 7 <= len(data):
        if BLOCK - offset % BLOCK < 7:  # a fragment's header never crosses a block's end: the rest is padding
            offset += BLOCK - offset % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[offset : offset + 7])
        record += data[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # a complete record, or the last fragment of one
            yield record
            record = b""


def read_wandb(path: Path) -> dict[str, Any]:
    """The config, group, history rows, summary, tables and image names of a run."""
    from wandb.proto import wandb_internal_pb2

    run: dict[str, Any] = {"config": {}, "history": [], "summary": {}, "tables": {}, "images": set(), "group": "",
                           "artifacts": {}}  # fmt: skip
    for raw in records(path):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(raw)
        if record.HasField("run"):
            run["group"] = record.run.run_group
            run |= {key: getattr(record.run, key) for key in ("project", "display_name", "notes")}
            run["tags"] = list(record.run.tags)
            run["config"] |= _items(record.run.config.update)
        if record.HasField("config"):
            run["config"] |= _items(record.config.update)
        if record.HasField("history"):
            row = _items(record.history.item)
            run["history"].append(row)
            for key, value in row.items():
                if isinstance(value, dict) and value.get("_type") == "table-file":
                    run["tables"][key] = json.loads((path.parent / "files" / value["path"]).read_text())
                elif isinstance(value, dict) and value.get("_type") == "image-file":
                    run["images"].add(key)
        if record.HasField("artifact"):
            artifact = record.artifact
            run["artifacts"][artifact.type] = {entry.path for entry in artifact.manifest.contents}
        if record.HasField("summary"):
            run["summary"] |= _items(record.summary.update)
    return run


def _items(items: Any) -> dict[str, Any]:
    """Key-value items as a nested dictionary."""
    result: dict[str, Any] = {}
    for item in items:
        *parents, last = [item.key] if item.key else item.nested_key
        node = result
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = json.loads(item.value_json)
    return result
