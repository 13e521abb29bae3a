"""`clpet export`: writes the trained weights into a folder that transformers and peft load without clpet."""

import json
from dataclasses import replace
from pathlib import Path
from typing import cast

from clpet import __version__
from clpet.errors import ConfigError
from clpet.methods.base import Method
from clpet.models.protocols import SavedNetwork
from clpet.objectives.classification import Classification
from clpet.runs.load_run import LoadedRun, RunRecord
from clpet.runs.model_card import model_card
from clpet.runs.run_dir import save_heads
from clpet.runtime.atomic_io import replace_folder
from clpet.runtime.hardware import Quantization

WHOLE_MODEL = "the whole model"
MERGED = "the backbone with the adapters merged, in fp32"
TRAINED_ONLY = "the trained parameters without the backbone"


def prepare(record: RunRecord, folder: Path, merge: bool) -> RunRecord:
    """The record as the export loads it: adapters are merged into the published weights, not into quantized ones.

    Raises ConfigError for an export that cannot be written, before anything is loaded.
    """
    peft, model = record.components.peft, record.components.backbone
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} already exists and is not an empty folder: give the name of a new one")
    if merge and not record.method.mergeable:
        raise ConfigError(
            f"method={record.method.name} chooses parameters for each text, so it cannot be merged into one model: "
            "leave out --merge"
        )
    if merge and not peft.traits.mergeable:
        raise ConfigError(f"peft={peft.name} cannot be merged into the model's weights: leave out --merge")
    if not merge and not peft.traits.saves_model and model.random_weights and not record.config.benchmark.get("base"):
        raise ConfigError(
            f"model {record.config.model['name']} has random weights, so its adapters are useless alone: add --merge"
        )
    if not merge:
        return record
    hardware = replace(record.components.hardware, quantization=Quantization.none)
    return replace(record, components=replace(record.components, hardware=hardware))


def write(run: LoadedRun, folder: Path, merge: bool) -> str:
    """Writes the folder atomically; returns one line that says what was written."""
    method, objective = run.method, run.method.objective
    full = objective.adapters.traits.saves_model
    with replace_folder(folder) as temporary:
        if merge or full:
            cast(SavedNetwork, method.merged()).save_pretrained(temporary)
            contents = WHOLE_MODEL if full else MERGED
        else:
            method.save(temporary / "adapters")
            contents = TRAINED_ONLY
        objective.tokenizer.save_pretrained(temporary)
        if method.heads():
            save_heads(method, temporary / "heads")
        adapters = sorted(path.parent.name for path in temporary.glob("adapters/*/adapter_config.json"))
        loader = run.record.components.backbone._class(objective.traits.needs_output_layer).__name__
        about = describe(run, contents, loader, bool(adapters))
        (temporary / "clpet.json").write_text(json.dumps(about, indent=1) + "\n")
        self_sufficient = answers_without_clpet(run, merge or full or adapters == ["default"])
        (temporary / "README.md").write_text(model_card(run, contents, loader, adapters, self_sufficient))
    return f"{contents}: {method.name} on {run.benchmark.name} after {run.row} tasks, in {folder}"


def answers_without_clpet(run: LoadedRun, one_set_of_weights: bool) -> bool:
    """Whether transformers and peft answer texts with the folder's weights as the method does, without clpet."""
    method, objective = run.method, run.method.objective
    traits = objective.traits
    has_head = isinstance(objective, Classification)
    supported = has_head or traits.in_words or (traits.plain_text and objective.causal)
    return one_set_of_weights and method.mergeable and type(method).predict is Method.predict and supported


def describe(run: LoadedRun, contents: str, loader: str, peft_adapters: bool) -> dict[str, object]:
    """clpet.json: the contents of the exported folder and the call that loads it."""
    objective, backbone = run.method.objective, run.record.components.backbone
    base = backbone.hub or backbone.path or backbone.package
    load = f"transformers.{loader}.from_pretrained(FOLDER)"
    if peft_adapters:
        model = f"transformers.{loader}.from_pretrained({base!r})"
        load = f"peft.PeftModel.from_pretrained({model}, FOLDER/adapters/NAME)"
    elif contents == TRAINED_ONLY:
        load = "safetensors.torch.load_file(FOLDER/adapters/FILE): tensors by their name"
    about: dict[str, object] = {
        "what": contents,
        "load": load,
        "backbone": base,
        "revision": backbone.revision,
        "method": run.method.name,
        "one_model": run.method.mergeable,
        "benchmark": run.benchmark.name,
        "objective": objective.name,
        "tasks": run.benchmark.names[: run.row],
        "template": run.benchmark.template,
        "clpet": __version__,
    }
    if isinstance(objective, Classification):
        about |= {"representation": objective.representation.value, "heads": sorted(run.method.heads())}
    return about
