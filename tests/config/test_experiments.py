"""The overlays of published rows: what each one sets, that its parts fit together, and per-task learning rates."""

from enum import Enum
from functools import cache
from typing import Any

import pytest
import torch

from clpet.cli.options import first_comment, options
from clpet.config.build import build, parse_config
from clpet.config.compose import compose_config
from clpet.config.schema import Config, Training
from clpet.errors import ConfigError
from clpet.replay.batch_plan import copies_for_equal_compute
from clpet.runs.dry_run import steps_per_task
from clpet.wiring import Components
from tests.config import assert_none

OVERLAYS = options("experiment")
PAPERS = {"conpet": "ConPET", "cpt": "Yildiz et al. 2024", "gain_lora": "GainLoRA", "kif": "KIF", "mocl": "MoCL",
          "o_lora": "O-LoRA", "progressive_prompts": "Progressive Prompts", "sapt": "SAPT", "slm": "SLM"}  # fmt: skip
ROWS = ["emr", "ea_emr", "crl", "emr_star", "ea_emr_star", "crl_star", "dynamic", "limitless", "ewc", "lwf"]
REPLAY = ["fixed"] * 3 + ["dynamic"] * 4 + ["all", "none", "none"]
LATER = [5e-4, 5e-4, 5e-4]
# epochs, learning rate of Dynamic, of EMR, of CRL, L, m, most copies of the memory
SETTINGS = {
    "fewnerd": (10, [5e-4, 5e-4, 1e-4], 2e-5, 1e-4, 2500, 100, 10),
    "ontonotes": (10, [*LATER, 1e-4], [*LATER, 1e-4], [*LATER, 2e-4], 1250, 100, 10),
    "bbn": (10, 2e-4, 2e-4, [2e-4, 2e-4, 2e-4, 1e-4], 500, 50, 5),
    "fewrel": (10, 2e-4, 2e-4, 2e-4, 400, 50, 5),
    "tacred": (20, 2e-4, 2e-4, 2e-4, 100, 20, 5),
    "ace2005": (20, 2e-4, 2e-4, 2e-4, 100, 20, 5),
}
LAMBDAS = {"bbn": (1000, 0.1), "fewnerd": (1000, 0.1), "ontonotes": (1, 0.1), "fewrel": (5000, 0.01)}
TRAIN_SIZES = {
    "fewnerd": [30415, 24780, 51816, 101875, 34443, 29988, 12912, 24075, 15163, 14916],
    "ontonotes": [17932, 27842, 16288, 34221, 21156, 25248, 31235, 7818, 18138, 11645],
    "bbn": [4822, 6210, 2738, 5120, 46199, 7373, 5260, 6751, 2264, 2628],
    "fewrel": [4480] * 10,
    "tacred": [651, 341, 2313, 2509, 667, 976, 1083, 248, 1469, 2755],
    "ace2005": [2507, 1013, 724, 777, 627],
}
COPIES = {
    "fewnerd": [10, 10, 10, 10, 10, 1, 10, 1, 1],
    "ontonotes": [10, 10, 10, 10, 10, 10, 1, 10, 10],
    "bbn": [5, 2, 5, 5, 5, 5, 5, 1, 1],
    "fewrel": [5] * 9,
    "tacred": [4, 5, 5, 5, 5, 5, 1, 5, 5],
    "ace2005": [5, 5, 5, 1],
}


@cache
def overlay(name: str) -> Config:
    """The configuration of an overlay, its parts built and checked against each other."""
    config = parse_config(compose_config([f"experiment={name}"]))
    Components.build(config)
    return config


def value(config: Config, key: str) -> object:
    """The value of a dotted key."""
    found: Any = config
    for name in key.split("."):
        found = found[name] if isinstance(found, dict) else getattr(found, name)
    return found.value if isinstance(found, Enum) else found


def differences(name: str, expected: dict[str, object]) -> dict[str, Any]:
    """What an overlay has where it differs from the expected values, or why its parts do not fit together."""
    try:
        config = overlay(name)
        found = {key: value(config, key) for key in expected}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {key: found[key] for key in expected if found[key] != expected[key]}


def test_every_published_row_has_its_overlay() -> None:
    """Six data sets by ten methods, and the BERT-large runs; `clpet list` leaves out their base files."""
    rows = {f"conpet/{data}_{row}" for data in SETTINGS for row in ROWS}
    logged = {f"conpet/tacred_bert_{row}" for row in ("dynamic", "emr_star", "limitless")}
    assert {name for name in OVERLAYS if name.startswith("conpet/")} == rows | logged


def settings(data: str, row: str, replay: str) -> dict[str, object]:
    """What ConPET publishes for one row of its LLaMA-7B tables."""
    epochs, dynamic, emr, crl, limit, per_class, most = SETTINGS[data]
    expected: dict[str, object] = {
        "train.epochs": epochs, "train.lr": emr if "emr" in row else crl if "crl" in row else dynamic,
        "train.global_batch_size": 8, "train.select": "best", "model.name": "llama_7b", "model.dropout": "auto",
        "benchmark.name": data, "peft.r": 4, "peft.alpha": 1, "peft.dropout": 0, "replay.name": replay,
    }  # fmt: skip
    if replay in ("fixed", "dynamic"):
        expected["replay.limit"] = limit
    if replay == "fixed":
        expected["replay.per_class"] = per_class
        expected |= {} if "crl" in row else {"replay.max_copies": most}
    if row in ("ewc", "lwf"):
        expected["method.strength"] = LAMBDAS.get(data, (1, 1))[row == "lwf"]
    return expected


@pytest.mark.slow  # composes 45 overlays
def test_settings_of_the_published_rows() -> None:
    rows = [(data, row, replay) for data in SETTINGS for row, replay in zip(ROWS, REPLAY, strict=True)]
    found = {f"conpet/{row[0]}_{row[1]}": differences(f"conpet/{row[0]}_{row[1]}", settings(*row)) for row in rows}
    assert_none(found)


def copies_of_the_memory(data: str) -> list[int]:
    """f of tasks 2 to n, from the published sizes and the overlay's L, m and most copies."""
    replay, benchmark = overlay(f"conpet/{data}_emr").replay, overlay(f"conpet/{data}_emr").benchmark
    classes = [len(ids) for ids in benchmark["task_ids"]] if benchmark["task_ids"] else benchmark["classes_per_task"]
    knobs = replay["limit"], 8, replay["max_copies"]
    memories = [4 * replay["per_class"] // 5 * sum(classes[:task]) for task in range(len(classes))]
    tasks = list(zip(TRAIN_SIZES[data], memories, strict=True))
    return [copies_for_equal_compute(new, memory, *knobs) for new, memory in tasks[1:]]


def test_copies_of_the_memory_equal_the_compute_of_dynamic_replay() -> None:
    found = {data: copies_of_the_memory(data) for data in SETTINGS}
    assert_none({data: copies for data, copies in found.items() if copies != COPIES[data]})


def test_logged_runs_with_bert_large() -> None:
    shared = {
        "model.name": "bert_large", "model.dropout": "own", "train.epochs": 50, "train.lr": 1e-3,
        "train.global_batch_size": 4,
    }  # fmt: skip
    rows = {
        "dynamic": {"method.name": "dynamic_conpet", "replay.name": "dynamic", "replay.limit": 50},
        "emr_star": {"method.name": "emr", "replay.name": "dynamic", "replay.limit": 50},
        "limitless": {"method.name": "dynamic_conpet", "replay.name": "all"},
    }
    found = {row: differences(f"conpet/tacred_bert_{row}", {**shared, **own}) for row, own in rows.items()}
    assert_none(found)


WORDS = {
    "objective.name": "text_to_text",
    "train.schedule": "constant",
    "benchmark.max_length": 512,
    "benchmark.max_target": 50,
}
KIF = {
    "train.epochs": 10,
    "train.lr": 3e-4,
    "train.global_batch_size": 8,
    "train.schedule": "linear",
    "train.warmup_steps": 50,
    "train.clip": 1,
    "train.weight_decay": 0,
    "peft.r": 8,
    "peft.dropout": 0.05,
    "model.dropout": "own",
}
SLM = {
    "train.weight_decay": 0.01,
    "train.clip": 1,
    "method.groups": 6,
    "method.keys": 4,
    "method.encoder_length": 512,
    "method.stage1.top_k": 2,
    "method.stage1.dropout": 0.2,
    "method.stage1.min_steps": 0,
    "method.stage1.lr": 1e-3,
}
BERT = {
    "model.representation": "pooled",
    "model.head_dropout": 0.1,
    "model.dropout": "own",
    "train.epochs": 5,
    "train.global_batch_size": 32,
    "train.schedule": "linear",
    "train.warmup_steps": 100,
}
O_LORA = {**WORDS, "train.global_batch_size": 64, "peft.r": 8, "peft.alpha": 32, "peft.dropout": 0.1}
SAPT = {**WORDS, "train.global_batch_size": 32, "peft.alpha": 32, "peft.dropout": 0}
PROMPTS = {
    "train.epochs": 10,
    "train.lr": 0.3,
    "train.weight_decay": 1e-5,
    "train.global_batch_size": 8,
    "train.select": "best",
    "benchmark.max_length": 512,
    "method.length": 10,
    "method.task_id_at_test": True,
}
# What the papers and their code give, by overlay.
PUBLISHED: dict[str, dict[str, object]] = {
    "kif/superni_1_adaptive": {**KIF, "peft.alpha": 16, "benchmark.max_length": 1024, "benchmark.max_target": 128,
                               "benchmark.prompt": "[INS] {definition}\n [IN] {text} \n [OUT] "},
    "kif/long_order4_recurrent": {**KIF, "peft.alpha": 32, "benchmark.prompt": "{instruction}\n{text}\nAnswer:"},
    "slm/bert_slm": {**SLM, **BERT, "train.lr": 2e-4, "method.top_k": 4, "method.rank": 12, "method.stage1.epochs": 3},
    "slm/bert_finetune": {**BERT, "peft.name": "none"},
    "slm/t5_slm": {**SLM, "model.dropout": "own", "method.stage1.epochs": 3, "method.stage1.batch_size": 4},
    "slm/llama_slm": {**SLM, "train.epochs": [3, 3, 6], "train.lr": 2e-4, "train.global_batch_size": 64, "train.schedule": "cosine",
                      "train.max_warmup_share": 0.03, "method.top_k": 2, "method.rank": 8, "method.stage1.epochs": 2},
    "slm/llama_finetune": {"train.lr": 3e-5, "train.epochs": 3, "train.clip": 1, "train.max_warmup_share": 0.03},
    "slm/retrieval_6x4": {"method.stage1.lr": 5e-4, "method.stage1.dropout": 0, "method.top_k": 2},
    "slm/retrieval_6x4_mask": {"method.stage1.lr": 5e-4, "method.stage1.dropout": 0.2, "method.top_k": 2},
    "slm/retrieval_1x24": {"method.stage1.lr": 5e-4, "method.groups": 1, "method.keys": 24, "method.top_k": 12},
    "o_lora/standard": {**O_LORA, "train.epochs": 1, "train.lr": 1e-3, "method.orthogonality": 0.5, "method.decay": 0,
                        "model.name": "t5_large", "model.dropout": "own"},
    "o_lora/standard_inc_lora": {**O_LORA, "train.epochs": 1, "train.lr": 1e-3, "method.name": "inc_lora"},
    "o_lora/standard_llama": {**O_LORA, "train.epochs": 1, "train.lr": [1e-3, 1e-4], "model.name": "llama2_7b"},
    "sapt/superni": {**SAPT, "train.epochs": 100, "train.lr": 3e-4, "peft.r": 4, "method.kl_ratio": 0.5, "model.dropout": "own"},
    "sapt/long": {**SAPT, "train.epochs": 10, "train.lr": 3e-4, "peft.r": 8, "method.kl_ratio": 0.1, "model.dropout": "own"},
    "sapt/superni_llama": {**SAPT, "train.epochs": 50, "train.lr": 5e-5, "peft.r": 4, "method.kl_ratio": 1, "benchmark.max_length": 1024},
    "sapt/long_llama": {**SAPT, "train.epochs": 20, "train.lr": 5e-5, "peft.r": 4, "method.kl_ratio": 2, "benchmark.max_length": 1024},
    "gain_lora/superni": {**SAPT, "train.epochs": 100, "train.lr": 3e-4, "peft.r": 4, "method.epsilon": 0.995, "method.hidden": 100},
    "gain_lora/long": {**SAPT, "train.epochs": 10, "train.lr": 3e-4, "peft.r": 8, "method.design": "svd", "model.dropout": "own"},
    "gain_lora/long_inf_lora": {**SAPT, "train.epochs": 10, "train.lr": 3e-4, "peft.r": 8, "method.design": "random"},
    "mocl/fewshot_llama": {**WORDS, "train.epochs": 40, "train.lr": 1e-3, "train.global_batch_size": 8, "train.select": "best",
                           "peft.r": 4, "peft.alpha": 16, "peft.dropout": 0.1, "benchmark.shots": 16},
    "progressive_prompts/standard": PROMPTS,
    "progressive_prompts/long": PROMPTS,
}  # fmt: skip


@pytest.mark.slow  # composes 88 overlays
def test_overlays_of_other_papers() -> None:
    """Each overlay's parts fit together, and it sets what its paper publishes."""
    found = {name: differences(name, PUBLISHED.get(name, {})) for name in OVERLAYS if not name.startswith("conpet/")}
    assert_none(found)
    assert PUBLISHED.keys() <= found.keys()


def test_first_comment_of_an_overlay_begins_with_its_paper() -> None:
    comments = {name: first_comment(path) for name, path in OVERLAYS.items()}
    begins = {name: f"{PAPERS.get(name.split('/')[0], 'a paper in PAPERS')}: " for name in OVERLAYS}
    assert_none({name: text for name, text in comments.items() if not text.startswith(begins[name])})


def test_o_lora_s_weights_go_with_their_tasks() -> None:
    """The first weight by place in the order, the second and the epochs by task."""
    decay = {"copa": 0.1, "qqp": 0.1, "rte": 0.3, "sst2": 0.1, "yahoo": 0.1, "boolq": 0.1, "wic": 0.3}
    for order in ("long_order4", "long_order5", "long_order6"):
        config = overlay(f"o_lora/{order}")
        tasks = config.benchmark["orders"][config.benchmark["order"]]
        assert config.benchmark["order"] == order
        assert config.method["orthogonality"] == [0] + [0.5] * 8 + [5] * 6
        assert config.method["decay"] == [decay.get(task, 0) for task in tasks]
        assert config.train.epochs == [2 if task == "mnli" else 1 for task in tasks]


def test_learning_rates_by_task() -> None:
    rates = Training(lr=[5e-4, 5e-4, 1e-4])
    assert [rates.lr_of(task) for task in range(5)] == [5e-4, 5e-4, 1e-4, 1e-4, 1e-4]
    assert Training(lr=2e-4).lr_of(7) == 2e-4
    for wrong in ([], [1e-3, -1], ["fast"], [True]):
        with pytest.raises(ConfigError, match=r"train\.lr must be 0 or more, or a list"):
            Training(lr=wrong)


def test_a_list_of_epochs_has_one_for_every_task_and_the_last_for_all_that_follow() -> None:
    passes = Training(epochs=[5, 3])
    assert [passes.epochs_of(task) for task in range(4)] == [5, 3, 3, 3]
    assert Training(epochs=2).epochs_of(7) == 2
    for wrong in ([], [3, 0], ["two"], [True], "two", 1.5):
        with pytest.raises(ConfigError, match=r"train\.epochs must be at least 1, or a list"):
            Training(epochs=wrong)


def test_a_task_is_trained_for_its_own_epochs(make) -> None:
    """The steps that trainer, progress and dry run count, and the length of a linear schedule."""
    run = make("method=sequential", "train.epochs=[2, 1]", "train.schedule=linear")
    fits: list[int] = []
    run.trainer.progress.fit = lambda stage, epochs, steps: fits.append(epochs * steps)
    for task in range(3):
        run.learn(task)
    steps = run.method.plan(0).steps
    assert fits == [2 * steps, steps, steps]
    assert run.trainer.stage_history[""]["steps"] == 4 * steps
    assert [part.split()[-1] for part in steps_per_task(run.method, run.config.train.epochs_of).split("; ")] == [
        str(count) for count in fits
    ]


def baselines_of_kif(name: str) -> dict[str, object]:
    """What differs from KIF's tables in its EWC and LwF overlays (baselines.md 3.5 and 3.6)."""
    kif, ewc, lwf = (overlay(f"kif/{name}_{row}") for row in ("adaptive", "ewc", "lwf"))
    penalty, distillation = build(ewc.method, "method"), build(lwf.method, "method")
    found = {
        "ewc": (penalty.fisher.value, penalty.merge.value, penalty.strength),
        "lwf": (distillation.temperature, distillation.reduction.value, distillation.strength),
    }
    published = {"ewc": ("batch", "average", 5000), "lwf": (2, "mean", 1)}
    parts = [(row, part) for row in (ewc, lwf) for part in ("train", "peft", "benchmark", "model")]
    differ = {f"{row.method['name']} {part}": getattr(row, part) for row, part in parts
              if getattr(row, part) != getattr(kif, part)}  # fmt: skip
    return differ | {row: values for row, values in found.items() if values != published[row]}


def test_baselines_of_kif_write_answers_as_its_tables_have_them() -> None:
    """Only the method differs from KIF's own overlay."""
    names = ("long_order4", "long_order5", "long_order6", "superni_1", "superni_2")
    found = {name: baselines_of_kif(name) for name in names}
    assert_none(found)


def test_trace_is_trained_and_scored_as_by_its_authors() -> None:
    config = parse_config(compose_config(["benchmark=trace"]))
    assert config.train.epochs == [5, 3, 7, 5, 3, 5, 5, 7]
    source = build(config.benchmark, "benchmark")
    found = {name: source.metrics.get(name, source.metric) for name in source.folders}
    assert found == {
        "C-STANCE": "accuracy", "FOMC": "accuracy", "MeetingBank": "rouge_l", "Py150": "edit_similarity",
        "ScienceQA": "first_char", "NumGLUE-cm": "accuracy", "NumGLUE-ds": "accuracy", "20Minuten": "sari",
    }  # fmt: skip
    assert source.max_target == 512


def test_a_task_is_trained_at_its_own_rate(make) -> None:
    """With rate 0 from the second task on, what the first has learned stays bit for bit."""
    run = make("method=sequential", "train.lr=[1e-3, 0]", "train.epochs=1")
    states = []
    for task in range(3):
        run.learn(task)
        states.append(
            {name: tensor.clone() for name, tensor in run.method.objective.adapters.tensors("default").items()}
        )
    assert any(tensor.any() for name, tensor in states[0].items() if "lora_B" in name)
    for state in states[1:]:
        assert all(torch.equal(state[name], tensor) for name, tensor in states[0].items())
