"""`clpet eval --downstream`: a trained language model on the unchanged tasks of EleutherAI's lm-evaluation-harness.

Gao et al., "The Language Model Evaluation Harness", v0.4.9. Its tasks, prompts and metrics stay as they are; clpet
adds one number per multiple-choice task, the accuracy normalised by chance.
"""

import copy
import importlib.util
import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from clpet.data.template import special_tokens
from clpet.errors import ConfigError, DataError, enough_memory, first_line, suggest
from clpet.methods.base import Method
from clpet.models.backbone import Architecture, Backbone
from clpet.objectives.base import Objective
from clpet.reporting.tables import table
from clpet.runs.load_run import LoadedRun
from clpet.runtime.atomic_io import write_text

Harness = dict[str, Any]  # tasks or results as the harness builds them; it has no types
LENGTH_FACTOR = 8  # the harness' texts are about so many times longer than those hardware.eval_batch_size is set for
NORMALISED = "clpet_normalised"  # key in the written file
NOTE = "normalised (clpet's own): 100 (raw - low) / (high - low), low = chance (mean of 1 / choices), high = 1"


class HarnessTask(Protocol):
    """What is read of a task of the harness."""

    OUTPUT_TYPE: str
    eval_docs: Iterable[object]

    def doc_to_choice(self, doc: object) -> Sequence[str]: ...


def check(objective: Objective, backbone: Backbone, method: Method, option: str = "--downstream") -> None:
    """Raises ConfigError if the harness cannot evaluate the model of a run, before anything is loaded."""
    if not objective.traits.needs_output_layer:
        raise ConfigError(f"{option} needs a model that generates text; the objective of this run is {objective.name}")
    if backbone.architecture is Architecture.encoder:
        raise ConfigError(f"{option} needs a decoder or an encoder-decoder; model {backbone.name} is an encoder")
    if not method.mergeable:
        raise ConfigError(
            f"method={method.name} chooses parameters for each text: the harness needs one model for all texts"
        )
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(f"{option} needs lm-evaluation-harness: pip install 'clpet[downstream]'")


def load_tasks(names: Sequence[str], folder: Path | None) -> Harness:
    """The harness' tasks by name, including those defined by YAMLs in `folder`. Raises ConfigError and DataError.

    Such a YAML may call Python functions (!function): like --config-dir, it must come from a trusted source.
    """
    from lm_eval.tasks import TaskManager

    if folder is not None and not folder.is_dir():
        raise ConfigError(f"--tasks-dir {folder} is not a folder")
    include_path = str(folder) if folder else None
    manager = TaskManager(include_path=include_path, include_defaults=False)
    if not set(names) <= set(manager.all_tasks):  # indexing the harness' own tasks takes seconds: only if needed
        manager = TaskManager(include_path=include_path)
    for name in names:
        if name not in manager.all_tasks:
            raise ConfigError(f"unknown lm-evaluation-harness task {name}{suggest(name, manager.all_tasks)[:200]}")
    try:
        return cast(Harness, manager.load(list(names)))
    except Exception as error:  # data sets, the hub and YAMLs raise errors of any type
        raise DataError(f"the data of {', '.join(names)} cannot be loaded: {first_line(error)}") from error


def measure(method: Method, causal: bool, tasks: Harness, limit: int | None) -> Harness:
    """The harness' results, plus the normalised accuracy of multiple-choice tasks under the key NORMALISED.

    `causal`: the model is a decoder. `limit` is the number of examples per task (None: all). All tasks without a
    setting of their own are zero-shot.
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    objective = method.objective
    tokenizer, model = copy.deepcopy(objective.tokenizer), objective.adapters.model  # the harness changes its tokenizer
    if tokenizer.eos_token is None:
        tokenizer.eos_token = tokenizer.sep_token  # also ends an answer in the text_to_text objective
    # Such a tokenizer appends an end token, which would separate a question from its answer.
    appends_eos = causal and special_tokens(tokenizer)[1]
    objective.adapters.train_mode(False)
    with objective.autocast, method.answering(), enough_memory(objective.memory_advice):
        batch_size = max(1, objective.eval_batch_size // LENGTH_FACTOR)
        language_model = HFLM(
            pretrained=model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype="float32",
            add_bos_token=False if appends_eos else None,
        )  # fmt: skip
        for task in tasks["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=1234)  # the default of the harness' own command line
        results: Harness = evaluate(
            lm=language_model, task_dict=tasks, limit=limit, bootstrap_iters=1000, log_samples=False
        )
    for name, task in tasks["tasks"].items():
        raw, low = results["results"][name].get("acc,none"), chance(task, limit)
        if raw is not None and low is not None:
            accuracy = 100 * (raw - low) / (1 - low)
            results.setdefault(NORMALISED, {})[name] = {"raw": 100 * raw, "chance": 100 * low, "normalised": accuracy}
    return results


def chance(task: HarnessTask, limit: int | None) -> float | None:
    """Accuracy of guessing: mean of 1 / choices over a task's questions; None if a question has fewer than two."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return None
    counts = [len(task.doc_to_choice(doc)) for doc in list(task.eval_docs)[:limit]]
    return float(np.mean([1 / count for count in counts])) if counts and min(counts) > 1 else None


def report(run: LoadedRun, names: Sequence[str], limit: int | None, results: Harness) -> str:
    """Writes downstream-after-NNN.json into the run directory; returns the tables to print."""
    from lm_eval.utils import make_table

    path = run.record.out / f"downstream-after-{run.row:03d}.json"
    keys = (NORMALISED, "results", "groups", "versions", "n-shot", "n-samples")
    stored = {key: results[key] for key in keys if key in results}
    contents = {"tasks": list(names), "after": run.row, "limit": limit, "note": NOTE, **stored}
    write_text(path, json.dumps(contents, indent=1, default=str))
    blocks = [make_table(results).rstrip()]
    scores = results.get(NORMALISED, {})
    if rows := [[name, *(f"{value:.2f}" for value in values.values())] for name, values in scores.items()]:
        blocks += [NOTE, table(["task", "raw %", "chance %", "normalised"], rows)]
    return "\n".join([*blocks, f"written to {path}"])


def silence_logs() -> None:
    """Hides the harness' log messages below errors."""
    for name in ("lm_eval", "lm-eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
