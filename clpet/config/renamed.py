"""Options that were renamed: the old name is an error that gives the new one, except in recorded configurations."""

from collections.abc import Callable, Collection

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
    """The error for an option's old name, or for an entry of its mapping; None for any other key."""
    for old, new in RENAMED_KEYS.items():
        if key == old or key.startswith(f"{old}."):
            return f"{key} was renamed to {new}{key.removeprefix(old)}"
    return None


def translate_keys(config: Json, option_names: Callable[[str, str], Collection[str]] | None = None) -> None:
    """Renames the old keys of a recorded configuration in place, so that run directories of earlier versions open.

    A class outside clpet may itself have an option with an old name. `option_names(target, group)` returns the options
    of such a class, and its node is translated where they lack the old name; without it the node stays as recorded.
    """
    for old, new in RENAMED_KEYS.items():
        group, name = old.split(".")
        node: Json = config.get(group) if isinstance(config, dict) else None
        if not (isinstance(node, dict) and name in node):
            continue
        target = str(node.get("_target_", "clpet."))  # the train group has no class
        if target.startswith("clpet.") or (option_names and name not in option_names(target, group)):
            node[new.rpartition(".")[2]] = node.pop(name)
