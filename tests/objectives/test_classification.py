"""Classification: the growing head, adapters, representations and the softmax of the loss."""

from dataclasses import replace

import pytest
import torch

from clpet.models.adapters import Adapters, parameter_ratio
from clpet.models.backbone import Backbone
from clpet.models.peft_options import Lora
from clpet.objectives.classification import Head


def test_growing_a_head_keeps_old_rows_and_logits() -> None:
    """ConPET oracle 34: old rows are copied bit for bit, and logits do not depend on labels that are added later."""
    h = torch.randn(5, 8)
    head = Head(8, ["a", "b", "c", "d"], seed=0)
    head.grow([0, 1])
    before, weight, bias = head(h), head.weight.detach().clone(), head.bias.detach().clone()
    head.grow([2, 3])
    assert torch.equal(head.weight[:2], weight)
    assert torch.equal(head.bias[:2], bias)
    assert torch.allclose(head(h)[:, :2], before, atol=1e-6)


def test_initial_row_of_a_label_does_not_depend_on_other_labels() -> None:
    first, second = Head(8, ["a", "b"], seed=0), Head(8, ["x", "b", "y"], seed=0)
    first.grow([1])
    second.grow([0, 1])
    assert torch.equal(first.weight[0], second.weight[1])
    assert not torch.equal(second.weight[0], second.weight[1])


def test_scatter_uses_initial_rows_for_labels_not_added_yet() -> None:
    h = torch.randn(3, 8)
    head = Head(8, ["a", "b"], seed=0)
    before = head.scatter(h)
    head.grow([1])
    assert torch.allclose(head.scatter(h), before)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.fill_(7)
    assert torch.equal(head.scatter(h)[:, 1], torch.full((3,), 7.0))
    assert torch.equal(head.scatter(h)[:, 0], before[:, 0])


def test_a_new_lora_adapter_does_not_change_the_output(make) -> None:
    """ConPET oracle 2: B = 0 at first, so the output equals the base model's bit for bit."""
    run = make("method=sequential", "peft.r=4", "peft.alpha=1")
    objective = run.method.objective
    batch = run.data.train.batch([0, 1, 2])
    with torch.inference_mode():
        adapted = objective.features(batch)
        with objective.adapters.off():
            base = objective.features(batch)
    assert torch.equal(adapted, base)
    layers = [module for module in objective.adapters.model.modules() if hasattr(module, "lora_A")]
    assert {layer.scaling["default"] for layer in layers} == {0.25}


@pytest.mark.parametrize(
    ("labels", "ratio"), [(66, 2846.2), (86, 2750.9), (46, 2948.2), (80, 2778.8), (41, 2974.8), (18, 3104.0)]
)
def test_parameter_ratio_with_all_labels(labels: int, ratio: float) -> None:
    """ConPET oracle 1: LLaMA-7B divided by LoRA with r = 4 on q and k plus the head of each dataset."""
    trained = 2_097_152 + labels * 4097
    assert parameter_ratio(trained, 6_738_415_616)["times_fewer"] == pytest.approx(ratio, abs=0.05)


@pytest.mark.parametrize(
    ("name", "r", "expected"), [("llama2_7b", 4, 2_097_152), ("bert_large", 4, 393_216), ("minilm_shape", 8, 73_728)]
)
def test_lora_parameter_counts(name: str, r: int, expected: int) -> None:
    """ConPET oracle 1: layers * targets * r * (d_in + d_out), counted on networks without weights."""
    shapes = {
        "llama2_7b": (["q_proj", "k_proj"],
                      {"model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32,
                       "num_attention_heads": 32, "intermediate_size": 11008}),
        "bert_large": (["query", "value"],
                       {"model_type": "bert", "vocab_size": 30522, "hidden_size": 1024, "num_hidden_layers": 24,
                        "num_attention_heads": 16, "intermediate_size": 4096}),
        "minilm_shape": (["query", "value"],
                         {"model_type": "bert", "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12,
                          "intermediate_size": 1536}),
    }  # fmt: skip
    targets, config = shapes[name]
    backbone = Backbone(name=name, hub="none", config=config, targets=targets)
    with torch.device("meta"):
        adapters = Adapters(backbone.skeleton(), backbone, Lora(r=r))
        adapters.add("default", 0)
    assert adapters.count("default") == expected


def test_dropout_is_on_in_training_only(make) -> None:
    """Two passes agree outside of training and differ inside a fit."""
    run = make("method=sequential", "peft.dropout=0.5", "train.lr=1e-2")
    objective, batch = run.method.objective, run.data.test.batch([0, 1, 2])
    passes = []

    def two_passes() -> torch.Tensor:
        with torch.no_grad():
            return torch.stack([objective.features(batch), objective.features(batch)])

    run.method.after_step = lambda context: passes.append(two_passes())
    run.learn(0)
    assert any(not torch.equal(a, b) for a, b in passes)
    assert torch.equal(*two_passes())


@pytest.mark.parametrize("representation", ["mean", "cls", "last"])
def test_padding_does_not_change_a_representation(make, representation: str) -> None:
    run = make("method=sequential", f"model.representation={representation}")
    pool, objective = run.data.train, run.method.objective
    shortest, longest = int(pool.lengths.argmin()), int(pool.lengths.argmax())
    with torch.inference_mode():
        alone = objective.features(pool.batch([shortest]))
        padded = objective.features(pool.batch([shortest, longest]))[:1]
    assert torch.allclose(alone, padded, atol=1e-5)


@pytest.mark.parametrize("peft", ["lora", "ia3", "prompt", "prefix", "none"])
def test_every_adapter_type_is_trained(make, peft: str) -> None:
    run = make("method=sequential", f"peft={peft}", "train.lr=1e-2", "train.epochs=1")
    before = [p.detach().clone() for p in run.method.objective.adapters.tensors("default").values()]
    run.learn(0)
    after = run.method.objective.adapters.tensors("default").values()
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_task_softmax_ignores_labels_of_other_tasks(make) -> None:
    """benchmark.softmax=task: the logits of other tasks' labels do not affect the loss."""
    run = make("method=sequential", "benchmark.softmax=task")
    objective = run.method.objective
    objective.add_labels(run.benchmark.seen_labels(2))
    batch = run.data.train.batch(run.data.train.rows_of(0)[:4])
    first = run.benchmark.task_labels(0)
    logits = objective.logits(batch)[:, : len(first)]
    expected = torch.nn.functional.cross_entropy(logits, batch.labels)
    assert objective.loss(batch).item() == pytest.approx(expected.item(), rel=1e-6)
    with torch.no_grad():
        objective.head.bias[len(first) :] += 100
    assert objective.loss(batch).item() == pytest.approx(expected.item(), rel=1e-6)
    objective.benchmark = replace(objective.benchmark, per_task_softmax=False)
    assert objective.loss(batch).item() > 10


@pytest.mark.parametrize(
    ("overrides", "per_task"),
    [
        (["method=sequential"], True),
        (["method=kif"], True),
        (["method=kif", "replay=share"], False),
        (["method=replay"], False),
        (["method=joint"], False),
        (["method=lwf", "method.future_labels=true"], False),
        (["method=sequential", "benchmark.softmax=seen"], False),
        (["method=replay", "benchmark.softmax=task"], True),
    ],
)
def test_softmax_auto_depends_on_whether_the_loss_sees_old_examples(overrides: list[str], per_task: bool, make) -> None:
    """auto: labels of one task compete if the loss sees no old examples, else all seen labels; a set value stays."""
    assert make(*overrides).benchmark.per_task_softmax is per_task
