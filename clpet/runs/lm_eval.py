"""A trained language model on tasks of EleutherAI's lm-evaluation-harness (Gao et al., 2024, v0.4.9), unchanged."""

import importlib.util
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clpet.data.template import frame
from clpet.errors import ConfigError, DataError, enough_memory, suggest
from clpet.models.backbone import Architecture, first_line
from clpet.reporting.tables import table
from clpet.runs.load_run import Recorded, Reopened
from clpet.runtime.atomic_io import write_atomic

LONGER = 8  # times: the harness' texts, against those that hardware.eval_batch_size counts
OWN = "clpet_normalised"
NOTE = "normalised (clpet's own): 100 (raw - low) / (high - low), low = chance (mean of 1 / choices), high = 1"


def check(run: Recorded) -> None:
    """Raises ConfigError where the harness cannot ask the model of a run, before anything is loaded."""
    if run.objective == "classification":
        raise ConfigError("--downstream needs a model that writes; this run's objective is classification")
    if run.parts["model"].architecture is Architecture.encoder:
        raise ConfigError(
            f"--downstream needs a decoder or encoder-decoder; model {run.config.model['name']} is neither"
        )
    if not run.method.one_model:
        raise ConfigError(f"method={run.method.name} chooses for each text what it reads: there is no one model to ask")
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("--downstream needs lm-evaluation-harness: pip install 'clpet[downstream]'")


def load_tasks(names: Sequence[str], folder: Path | None) -> dict[str, Any]:
    """The harness' tasks by name, its own and those of the YAMLs in `folder`. Raises DataError.

    A YAML of the user's may name functions of the user's (!function): it is code, as --config-dir is.
    """
    from lm_eval.tasks import TaskManager

    if folder is not None and not folder.is_dir():
        raise ConfigError(f"--tasks-dir {folder} is not a folder")
    own = str(folder) if folder else None
    manager = TaskManager(include_path=own, include_defaults=False)
    if not set(names) <= set(manager.all_tasks):  # to look through all of the harness' own takes seconds
        manager = TaskManager(include_path=own)
    for name in names:
        if name not in manager.all_tasks:
            raise ConfigError(f"the harness has no task {name}{suggest(name, manager.all_tasks)[:200]}")
    try:
        return manager.load(list(names))
    except Exception as error:  # whatever a data set, a hub or a YAML can raise
        raise DataError(f"the data of {', '.join(names)} cannot be loaded: {first_line(error)}") from error


def measure(run: Reopened, tasks: dict[str, Any], limit: int | None) -> dict[str, Any]:
    """The harness' results, with each task's examples, and the normalised score where answers are chosen."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    objective = run.method.objective
    tokenizer, model = objective.tokenizer, objective.adapters.model
    if tokenizer.eos_token is None:
        tokenizer.eos_token = tokenizer.sep_token  # what ends an answer in text_to_text as well
    decoder = run.run.parts["model"].architecture is Architecture.decoder
    ends = decoder and frame(tokenizer)[1]  # would stand between a question and its answer
    objective.adapters.train_mode(False)
    with objective.autocast, enough_memory(objective.memory_advice):
        size = max(1, objective.eval_batch_size // LONGER)
        asked = HFLM(
            pretrained=model, tokenizer=tokenizer, batch_size=size, softmax_dtype="float32",
            add_bos_token=False if ends else None,
        )  # fmt: skip
        for task in tasks["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=1234)
        found = evaluate(lm=asked, task_dict=tasks, limit=limit, bootstrap_iters=1000, log_samples=False)
    for name, task in tasks["tasks"].items():
        raw, low = found["results"][name].get("acc,none"), chance(task, limit)
        if raw is not None and low is not None:
            share = 100 * (raw - low) / (1 - low)
            found.setdefault(OWN, {})[name] = {"raw": 100 * raw, "chance": 100 * low, "normalised": share}
    return found


def chance(task: Any, limit: int | None) -> float | None:
    """Mean over a task's questions of 1 / choices; None where answers are not chosen among two or more."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return None
    counts = [len(task.doc_to_choice(doc)) for doc in list(task.eval_docs)[:limit]]
    return float(np.mean([1 / count for count in counts])) if counts and min(counts) > 1 else None


def report(run: Reopened, names: Sequence[str], limit: int | None, found: dict[str, Any]) -> str:
    """Writes downstream-after-NNN.json into the run directory; returns the harness' table and the normalised scores."""
    from lm_eval.utils import make_table

    path = run.run.out / f"downstream-after-{run.row:03d}.json"
    kept = {key: found[key] for key in (OWN, "results", "groups", "versions", "n-shot", "n-samples") if key in found}
    record = {"tasks": list(names), "after": run.row, "limit": limit, "note": NOTE, **kept}
    write_atomic(path, json.dumps(record, indent=1, default=str))
    parts = [make_table(found).rstrip()]
    if rows := [[name, *(f"{value:.2f}" for value in own.values())] for name, own in found.get(OWN, {}).items()]:
        parts += [NOTE, table(["task", "raw %", "chance %", "normalised"], rows)]
    return "\n".join([*parts, f"written to {path}"])


def quiet() -> None:
    """Keeps the harness' log off the screen."""
    for name in ("lm_eval", "lm-eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
