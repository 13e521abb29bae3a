"""Identity of a run: the name of its directory, and the settings under which runs are compared.

Signatures changed once, with version 0.2.0, which renamed options. Since then a class of clpet counts by its name
alone, not by its module, so that moving a class to another module does not change the names of run directories. The
same command therefore starts a new directory instead of resuming one of version 0.1.0.
"""

import hashlib
import json
import os
from typing import cast

from omegaconf import DictConfig, OmegaConf

from clpet.config.build import MOVED_CLASSES
from clpet.records import Json

# Excluded from the identity: options that do not change a run's result, or only say where it is written.
NOT_IDENTITY = ("hydra", "hardware", "tracking", "output_dir", "cache_dir", "fresh", "dry_run", "extend", "seed")

# Options that did not exist when run directories got their names, and the defaults under which they count as absent:
# the command of an older run resumes that run.
ADDED_OPTIONS: dict[str, dict[str, Json]] = {
    "train": {"optimizer": "adamw", "momentum": None, "class_weights": "none"},
    "evaluation": {
        "metrics": ["accuracy"],
        "probes": [],
        "probe_tokens": None,
        "probe_text": None,
        "probe_task": None,
        "probe_examples": 200,
        "downstream": [],
        "downstream_every": 1,
        "downstream_limit": None,
        "downstream_dir": None,
    },
    "benchmark": {"encoding": None, "header": None, "chat": None},
    "method": {"planned_tasks": None},
}
# Options of a model for conversations, which have no effect without benchmark.chat.
CHAT_OPTIONS = ("chat_template", "chat_options", "end_tokens")

# What and how often files are written.
FILE_OPTIONS = {"train": ("save_minutes", "snapshot_every", "log_every"), "evaluation": ("keep_text",)}

# Options that say which tasks are learned in which order. Two runs that differ in nothing else learn a task alike.
TASK_OPTIONS = ("tasks", "order", "order_seed", "folders", "domains")


def digest(value: object, length: int = 8) -> str:
    """The first hex digits of the SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:length]


def _identity(cfg: DictConfig, without: tuple[str, ...]) -> Json:
    plain = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key not in without])
    identity = cast(dict[str, dict[str, Json]], OmegaConf.to_container(plain, resolve=True))
    top = cast(dict[str, Json], identity)  # the same dictionary: options that are not in a group
    for group in [group for group in (*FILE_OPTIONS, *ADDED_OPTIONS) if identity.get(group)]:
        for key in FILE_OPTIONS.get(group, ()):
            identity[group].pop(key, None)
        for key, default in ADDED_OPTIONS.get(group, {}).items():
            if identity[group].get(key, default) == default:
                identity[group].pop(key, None)
    if identity.get("model") and not identity.get("benchmark", {}).get("chat"):
        for key in CHAT_OPTIONS:
            identity["model"].pop(key, None)
    # The only hardware option that changes the model: quantized weights are rounded.
    if (cfg.get("hardware") or {}).get("quantization", "none") != "none":
        top["quantization"] = str(cfg.hardware.quantization)
    for node, key in ((top, "data_dir"), (identity.get("model") or {}, "path")):
        if node.get(key):
            node[key] = os.path.abspath(os.path.expanduser(str(node[key])))
    _fold_objective(identity)
    return _canonical(top)


def _fold_objective(identity: dict[str, dict[str, Json]]) -> None:
    """Hashes the name of an objective of clpet as an option of the benchmark, which it once was."""
    node = identity.get("objective")
    if node and str(node["_target_"]).startswith("clpet."):
        identity["benchmark"]["objective"] = node.pop("name")
        del node["_target_"]
        if not node:  # it has no other options
            del identity["objective"]


def _canonical(node: Json) -> Json:
    """The node with every integer as a float (1 and 1.0 are the same setting), and classes of clpet without module."""
    if isinstance(node, dict):
        return {key: _class_name(str(value)) if key == "_target_" else _canonical(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_canonical(value) for value in node]
    return float(node) if isinstance(node, int) and not isinstance(node, bool) else node


def _class_name(target: str) -> str:
    """The present name of a clpet class; a class of a --config-dir folder keeps its module."""
    target = MOVED_CLASSES.get(target, target)
    return target.rpartition(".")[2] if target.startswith("clpet.") else target


def signature(cfg: DictConfig) -> str:
    """Hash of every option that can change a run's result, except the seed."""
    return digest(_identity(cfg, NOT_IDENTITY))


def portable_signature(cfg: DictConfig) -> str:
    """The signature without the places of data and weights: of the same run on another machine.

    A model without a name of its own, in a local folder, goes by the name of the folder.
    """
    identity = cast(dict[str, dict[str, Json]], _identity(cfg, NOT_IDENTITY))
    identity["data_dir"] = cast(dict[str, Json], None)
    model = identity.get("model") or {}
    if path := model.get("path"):
        model["path"] = None if model.get("hub") else os.path.basename(str(path))
    return digest(identity)


def setting(cfg: DictConfig) -> str:
    """Hash of the conditions under which methods are compared: the signature without method and replay."""
    return digest(_identity(cfg, (*NOT_IDENTITY, "method", "replay")))


def differences(before: DictConfig, now: DictConfig) -> dict[str, tuple[Json, Json]]:
    """{option: (value before, value now)} where two configurations differ in more than tasks and locations."""
    without = tuple(key for key in NOT_IDENTITY if key != "seed")
    flat = [_flatten(_identity(cfg, (*without, "data_dir"))) for cfg in (before, now)]
    ignored = (*(f"benchmark.{key}" for key in TASK_OPTIONS), "model.path", "model.trust_remote_code")
    keys = [key for key in sorted({*flat[0], *flat[1]}) if not key.startswith(ignored)]
    pairs = {key: (_whole(flat[0].get(key)), _whole(flat[1].get(key))) for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _whole(value: Json) -> Json:
    """The integer that `_canonical` has turned into a float."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _flatten(node: Json, path: str = "") -> dict[str, Json]:
    """{a.b.c: value} of nested mappings."""
    if not isinstance(node, dict):
        return {path: node}
    pieces = [_flatten(value, f"{path}.{key}".lstrip(".")) for key, value in node.items()]
    return {key: value for piece in pieces for key, value in piece.items()}


def run_name(root: DictConfig) -> str:
    """`benchmark/method/sSEED-SIGNATURE`: the configuration alone determines the run directory."""
    name = f"{root.benchmark.name}/{root.method.name}/s{root.seed}-{signature(root)}"
    return f".dry/{name}" if root.dry_run else name


def register_resolvers() -> None:
    """Registers ${run_name:} with OmegaConf; safe to call twice."""
    OmegaConf.register_new_resolver("run_name", lambda _root_: run_name(_root_), replace=True)
