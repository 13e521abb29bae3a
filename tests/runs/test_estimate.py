"""The estimate of a dry run against the run itself: memory of tensors, FLOPs, stored bytes."""

import gc
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel

from clpet.evaluation.evaluator import Evaluator
from clpet.reporting.estimates import lines, read, sweep_table
from clpet.runs import estimate as estimating
from clpet.runs.dry_run import step_memory
from clpet.runs.estimate import estimate, evaluating_ranks
from clpet.runs.planning import measured_tasks
from clpet.runs.run_dir import task_cost
from clpet.runtime.distributed import get_world
from clpet.runtime.tensor_memory import PeakMemory, TensorsAlive
from clpet.runtime.tree_size import tree_bytes
from tests.conftest import set_up, tiny_args

ANSWERS = ["objective=text_to_text", "benchmark.max_target=8"]
ROBERTA = "++model.config={model_type:roberta,vocab_size:266,hidden_size:32,num_hidden_layers:2,num_attention_heads:2,\
intermediate_size:64,max_position_embeddings:130,pad_token_id:0,hidden_dropout_prob:0.0}"
QWEN = "++model.config={model_type:qwen3,vocab_size:266,hidden_size:32,num_hidden_layers:2,num_attention_heads:2,\
num_key_value_heads:1,head_dim:16,intermediate_size:64,max_position_embeddings:1024,pad_token_id:0}"
FAMILIES = {
    "bert": ["model=tiny"],
    "roberta": ["model=tiny", ROBERTA],
    "llama": ["model=tiny_llama"],
    "qwen3": ["model=tiny_llama", QWEN],
    "gpt2": ["model=tiny_gpt2"],
    "t5": ["model=tiny_t5", *ANSWERS],
}
MIB = 2**20


def real(words: list[str]) -> SimpleNamespace:
    """Peaks of learning and evaluating all tasks, operations and the state's bytes, of the run itself."""
    run = set_up(words)
    memory, flops, peaks = PeakMemory(run.method.objective.device), 0.0, {"training": 0, "evaluation": 0}
    memory.hold(run.method.objective.adapters.model)
    memory.start()
    for index, _ in run.method.curriculum():
        memory.reset()
        run.learn(index)
        peaks["training"] = max(peaks["training"], memory.peak)
        cost = task_cost(run.method)
        flops += cost["forward_flops"] + cost["backward_flops"]
        memory.reset()
        tasks = measured_tasks(run.config.evaluation, run.method, len(run.benchmark), index + 1)
        Evaluator(run.benchmark, run.data, "test")(run.method, index + 1, list(tasks))
        peaks["evaluation"] = max(peaks["evaluation"], memory.peak)
    memory.stop()
    return SimpleNamespace(**peaks, flops=flops, stored=tree_bytes(run.method.state_dict()), cost=cost)


def check(words: list[str], flops: float = 0.1) -> None:
    """The predicted peaks are within 10 % of the real ones, the operations within `flops`, stored bytes within 1 %."""
    gc.collect()
    predicted = estimate(set_up([*words, "dry_run=true"]).session)
    gc.collect()
    run = real(words)
    assert predicted["training_memory_mb"] * MIB == pytest.approx(run.training, rel=0.1)
    assert predicted["evaluation_memory_mb"] * MIB == pytest.approx(run.evaluation, rel=0.1)
    assert predicted["flops"] == pytest.approx(run.flops, rel=flops)
    assert predicted["stored_bytes"] == pytest.approx(run.stored, rel=0.01)
    assert predicted["replay_bytes"] == run.cost["replay_bytes"]
    assert predicted["seconds"] > 0


def test_a_run_needs_what_was_predicted(words: Path) -> None:
    check([*tiny_args(words, "cache_dir=null"), "method=sequential"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "family", "peft"),
    [("sequential", "bert", "none"), ("sequential", "bert", "prompt"), ("ewc", "roberta", "lora"),
     ("replay", "llama", "lora"), ("kif", "qwen3", "lora"), ("independent", "gpt2", "lora"), ("joint", "t5", "lora"),
     ("sequential", "t5", "none"), ("sequential", "t5", "prompt")],
)  # fmt: skip
def test_a_method_needs_on_a_model_what_was_predicted(method: str, family: str, peft: str, words: Path) -> None:
    """Every family with LoRA and another method, an encoder and an encoder-decoder with all weights and with a prompt."""
    check(
        [*tiny_args(words, "cache_dir=null", "train.epochs=1"), f"method={method}", f"peft={peft}", *FAMILIES[family]]
    )


@pytest.mark.gpu
@pytest.mark.parametrize("peft", ["lora", "none"])
def test_a_gpu_needs_what_was_predicted(peft: str, words: Path) -> None:
    """By the counts of its allocator."""
    check([*tiny_args(words, "cache_dir=null"), "method=ewc", f"peft={peft}", "hardware.device=cuda"])


@pytest.mark.parametrize("trained", [True, False])
def test_a_step_without_weights_needs_what_a_step_with_weights_does(trained: bool) -> None:
    """What a forward and a backward pass add, measured on tensors and on shapes alone."""
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    with torch.device("meta"):
        skeleton = BertModel(config)
    network = BertModel(config)
    for model in (skeleton, network):
        model.embeddings.requires_grad_(trained)
    with TensorsAlive() as alive:
        alive.add(list(network.parameters()))
        before = alive.bytes
        hidden = network(input_ids=torch.zeros(3, 12, dtype=torch.long)).last_hidden_state
        hidden.float().log_softmax(-1).mean().backward()
    assert step_memory(skeleton, False, 3, 12) == pytest.approx(alive.peak - before, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["independent", "ewc", "inc_lora"])
def test_tasks_that_were_not_rehearsed_are_extrapolated(
    method: str, words: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three of six tasks, whose number of operations the later ones exceed where branches are added."""
    monkeypatch.setattr(estimating, "BUDGET", -1.0)
    six = ["benchmark.task=null", "benchmark.classes_per_task=2"]
    check([*tiny_args(words, "cache_dir=null", "train.epochs=1"), f"method={method}", *six], flops=0.2)


def test_a_method_whose_steps_cannot_be_planned_has_an_estimate_without_times(
    make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three of six tasks are rehearsed, and the memory of the others is that of the newest."""
    monkeypatch.setattr(estimating, "BUDGET", -1.0)
    run = make("method=sequential", "train.epochs=1", "benchmark.task=null", "benchmark.classes_per_task=2",
               "dry_run=true")  # fmt: skip

    def stages(index: int) -> Any:
        raise RuntimeError("depends on what was learned")

    run.method.stages = stages
    predicted = estimate(run.session)
    assert (predicted["tasks"], predicted["rehearsed"]) == (6, 3)
    assert predicted["seconds"] is predicted["flops"] is None
    assert predicted["training_memory_mb"] > 0


def test_a_sharded_backbone_evaluates_every_batch_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(get_world(), "size", 2, raising=False)
    assert evaluating_ranks() == 2
    monkeypatch.setattr(get_world(), "sharded", True, raising=False)
    assert evaluating_ranks() == 1


def test_memory_of_tensors_by_hand() -> None:
    """4,000 bytes that exist before, a sum of 4,000, a view of it, and a product of 4,000 that is summed and freed."""
    before = torch.zeros(1000)
    with TensorsAlive() as alive:
        total = before + 1
        view = total.view(10, 100)
        assert alive.bytes == 8000
        result = (view * 2).sum()
        assert (alive.bytes, alive.peak) == (8004, 12_004)
        del total
        assert alive.bytes == 8004
        del view
        assert alive.bytes == 4004
    del before, result
    assert alive.bytes == 0


RECORD = {"device": "cpu", "devices": 2, "tasks": 5, "rehearsed": 3, "steps": 40, "training_seconds": 3000.0,
          "other_seconds": 0.0, "evaluation_seconds": 600.0, "seconds": 3600.0, "device_hours": 2.0, "flops": 1.5e12,
          "training_memory_mb": 300.0, "evaluation_memory_mb": 200.0, "peak_memory_mb": 300.0, "stored_bytes": 1000,
          "replay_bytes": 400}  # fmt: skip


def test_a_sweep_is_summed() -> None:
    """Times, operations and bytes are added, of the memory the largest counts; a run without an estimate leaves no sum."""
    other = {**RECORD, "seconds": 1800.0, "device_hours": 1.0, "flops": 5e11, "peak_memory_mb": 900.0}
    runs = [(["method=ewc", "seed=0"], RECORD), (["method=kif", "seed=0"], other)]
    last = sweep_table(runs).splitlines()[-1].split()
    assert last == ["sum,", "largest", "peak", "1:30:00", "3", "2e+12", "900", "2,000", "800"]
    assert "sum" not in sweep_table([*runs, (["method=x", "seed=0"], None)])
    assert "1:00:00 (training 0:50:00, other work of the method 0:00:00, evaluation 0:10:00)" in lines(RECORD)[2]


def test_a_dry_run_writes_its_estimate_and_a_sweep_prints_the_sums(words: Path, clpet, tmp_path: Path) -> None:
    args = [*tiny_args(words), "method=sequential", "dry_run=true", f"output_dir={tmp_path}"]
    answer = clpet("train", "-m", *args, "train.epochs=1,2")
    assert answer.code == 0, answer.err
    first, second = (read(path.parent) for path in sorted(tmp_path.glob(".dry/*/*/s*/estimate.json"), key=steps_of))
    assert (first["steps"], second["steps"]) == (6, 12)
    table = answer.out.splitlines()[-4:]
    assert table[0].split()[:2] == ["train.epochs", "time"]
    assert table[-1].startswith("sum, largest peak")


def steps_of(path: Path) -> int:
    """The planned steps of an estimate."""
    return json.loads(path.read_text())["steps"]
