"""Options that were renamed: the old name is an error that gives the new one, except in recorded configurations."""

from clpet.records import Json

# Old key -> new key. A row stays for one release after the rename; recorded configurations are translated forever.
RENAMED_KEYS = {
    "benchmark.begin": "benchmark.add_bos",
    "benchmark.isolate": "benchmark.document_mask",
    "benchmark.keep": "benchmark.cut_last",
    "method.pull": "method.key_loss_weight",
    "train.keep": "train.snapshot_every",
    "train.warmup_share": "train.max_warmup_share",
}


def renamed_message(key: str) -> str | None:
    """The error for an option's old name; None for any other key."""
    return f"{key} was renamed to {RENAMED_KEYS[key]}" if key in RENAMED_KEYS else None


def translate_keys(config: Json) -> None:
    """Renames the old keys of a recorded configuration in place, so that run directories of earlier versions open."""
    for old, new in RENAMED_KEYS.items():
        node: Json = config
        *groups, name = old.split(".")
        for group in groups:
            node = node.get(group) if isinstance(node, dict) else None
        if isinstance(node, dict) and name in node:
            node[new.rpartition(".")[2]] = node.pop(name)
