"""Identity of a run: what its folder is called, and which runs are compared."""

import hashlib
import json
import os
from typing import Any

from omegaconf import OmegaConf

# What does not change a run's result, or only says where it goes, is no part of its identity.
NOT_IDENTITY = ("hydra", "hardware", "tracking", "output_dir", "cache_dir", "fresh", "dry_run", "seed")


def digest(value: object, length: int = 8) -> str:
    """The first hex digits of the SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:length]


def _identity(cfg: Any, without: tuple[str, ...]) -> dict:
    plain = OmegaConf.masked_copy(cfg, [key for key in cfg if key not in without])
    identity: dict = OmegaConf.to_container(plain, resolve=True)  # type: ignore[assignment]
    if identity.get("train"):
        for key in ("save_minutes", "keep"):  # when something is written changes no result
            identity["train"].pop(key, None)
    if (cfg.get("hardware") or {}).get("quantization", "none") != "none":  # alone of hardware it is a coarser model
        identity["quantization"] = str(cfg.hardware.quantization)
    for place, key in ((identity, "data_dir"), (identity.get("model") or {}, "path")):
        if place.get(key):
            place[key] = os.path.abspath(os.path.expanduser(place[key]))
    return _numbers(identity)


def _numbers(node: Any) -> Any:
    """1 and 1.0 are the same setting."""
    if isinstance(node, dict):
        return {key: _numbers(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_numbers(value) for value in node]
    return float(node) if isinstance(node, int) and not isinstance(node, bool) else node


def signature(cfg: Any) -> str:
    """Identity of an experiment up to its seed: the hash of every knob that can change its result."""
    return digest(_identity(cfg, NOT_IDENTITY))


def setting(cfg: Any) -> str:
    """Identity of what methods are compared on: the signature without method and replay."""
    return digest(_identity(cfg, (*NOT_IDENTITY, "method", "replay")))


def run_name(root: Any) -> str:
    """`benchmark/method/sSEED-SIGNATURE`: the run directory is a function of the configuration."""
    name = f"{root.benchmark.name}/{root.method.name}/s{root.seed}-{signature(root)}"
    return f".dry/{name}" if root.dry_run else name


def register_resolvers() -> None:
    """Makes ${run_name:} known to OmegaConf; safe to call twice."""
    OmegaConf.register_new_resolver("run_name", lambda _root_: run_name(_root_), replace=True)
