"""`clpet export`: what a run trained, in a folder that works without clpet."""

import json
from pathlib import Path
from typing import Any

from clpet import __version__
from clpet.errors import ConfigError
from clpet.runs.load_run import Recorded, Reopened
from clpet.runs.run_dir import save_heads
from clpet.runtime.atomic_io import whole
from clpet.runtime.hardware import Quantization

PARTS = "what was trained beside the backbone's own weights"
UNMERGED = ("prompt", "prefix", "frozen")


def check(run: Recorded, folder: Path, merge: bool) -> None:
    """Raises ConfigError for what cannot be written, before anything is loaded."""
    peft, model = run.config.peft["name"], run.parts["model"]
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is there already and not empty: name a new folder")
    if merge and not run.method.one_model:
        raise ConfigError(f"method={run.method.name} chooses for each text what it reads: leave out --merge")
    if merge and peft in UNMERGED:
        raise ConfigError(f"peft={peft} does not change the model's weights and cannot be merged: leave out --merge")
    if not merge and peft not in ("none", "blocks") and (model.random_weights and not run.config.benchmark.get("base")):
        raise ConfigError(
            f"model {run.config.model['name']} has random weights, which adapters alone are no use to: add --merge"
        )
    if merge:  # into the weights as they were published
        run.parts["hardware"].quantization = Quantization.none


def write(run: Reopened, folder: Path, merge: bool) -> str:
    """Writes the folder whole; returns what it is, in a line."""
    method, objective = run.method, run.method.objective
    full = objective.adapters.full and objective.adapters.config is None
    with whole(folder) as place:
        if merge or full:
            method.merged().save_pretrained(place)
            what = "the whole model" if full else "the backbone with the adapters merged, in fp32"
        else:
            method.save(place / "adapters")
            what = PARTS
        objective.tokenizer.save_pretrained(place)
        if method.heads():
            save_heads(method, place / "heads")
        about = describe(run, what, bool(list(place.glob("adapters/*/adapter_config.json"))))
        (place / "clpet.json").write_text(json.dumps(about, indent=1) + "\n")
    return f"{what}: {method.name} on {run.benchmark.name} after {run.row} tasks, in {folder}"


def describe(run: Reopened, what: str, adapters: bool) -> dict[str, Any]:
    """clpet.json: what lies in the folder and how it is loaded."""
    objective, backbone = run.method.objective, run.run.parts["model"]
    kind = backbone._class(objective.generates).__name__
    base = backbone.hub or backbone.path or backbone.package
    load = f"transformers.{kind}.from_pretrained(FOLDER)"
    if what == PARTS and not adapters:
        load = "safetensors.torch.load_file(FOLDER/adapters/FILE): tensors by their name"
    elif adapters:
        load = f"peft.PeftModel.from_pretrained(transformers.{kind}.from_pretrained({base!r}), FOLDER/adapters/NAME)"
    found = {
        "what": what,
        "load": load,
        "backbone": base,
        "revision": backbone.revision,
        "method": run.method.name,
        "one_model": run.method.one_model,
        "benchmark": run.benchmark.name,
        "objective": objective.name,
        "tasks": run.benchmark.names[: run.row],
        "template": run.benchmark.template,
        "clpet": __version__,
    }
    if objective.name == "classification":
        found |= {"representation": objective.representation.value, "heads": sorted(run.method.heads())}
    return found
