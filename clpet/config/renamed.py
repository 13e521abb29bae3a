"""Options that were renamed: the old name is an error that gives the new one, except in recorded configurations."""

from collections.abc import Callable, Collection

from clpet.records import Json

# Old key -> new key. A row stays for one release after the rename; recorded configurations are translated forever.
RENAMED_KEYS = {
    "benchmark.begin": "benchmark.add_bos",
    "benchmark.isolate": "benchmark.document_mask",
    "benchmark.keep": "benchmark.cut_last",
    "benchmark.objective": "objective",
    "method.pull": "method.key_loss_weight",
    "train.keep": "train.snapshot_every",
    "train.warmup_share": "train.max_warmup_share",
}
# Nodes of the group `objective` for recorded configurations, in which it was an option of the benchmark.
RECORDED_OBJECTIVES = {
    "classification": "clpet.objectives.classification.Classification",
    "language_modeling": "clpet.objectives.language_modeling.LanguageModeling",
    "text_to_text": "clpet.objectives.text_to_text.TextToText",
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
    if not isinstance(config, dict):
        return
    benchmark: Json = config.get("benchmark")
    if isinstance(benchmark, dict) and "objective" not in config and {"_target_", "objective"} & benchmark.keys():
        name = str(benchmark.pop("objective", "classification"))  # the oldest runs have no other objective
        config["objective"] = {"_target_": RECORDED_OBJECTIVES.get(name, name), "name": name}
    for old, new in RENAMED_KEYS.items():
        group, name = old.split(".")
        node: Json = config.get(group)
        if not (isinstance(node, dict) and name in node):
            continue
        target = str(node.get("_target_", "clpet."))  # the train group has no class
        if target.startswith("clpet.") or (option_names and name not in option_names(target, group)):
            node[new.rpartition(".")[2]] = node.pop(name)
