"""kNN, in-context examples and fusion: numbers by hand, and what a frozen model is given."""

from pathlib import Path

import pytest
import torch

from clpet.errors import ConfigError
from clpet.methods import fusion, knn
from clpet.methods.knn import Scale
from tests.conftest import double, scores, tiny_args

KEYS, VALUES = double([[0, 0], [1, 0], [0, 2], [3, 3]]), torch.tensor([0, 1, 1, 0])


def test_neighbours_by_hand() -> None:
    query = double([[0.4, 0.5]])
    assert knn.squared_distances(query, KEYS)[0].tolist() == pytest.approx([0.41, 0.61, 2.41, 13.01])
    shares = knn.neighbour_shares(query, KEYS, VALUES, 2, 3, Scale.absolute)
    assert shares[0].tolist() == pytest.approx([0.511753, 0.488247], abs=1e-6)
    relative = (-double([0.41, 0.61, 2.41]) / (3.43 / 3)).softmax(0)
    shares = knn.neighbour_shares(query, KEYS, VALUES, 2, 3, Scale.relative)
    assert shares[0].tolist() == pytest.approx([relative[0].item(), relative[1:].sum().item()])


def test_of_equal_distances_the_earlier_example_counts() -> None:
    shares = knn.neighbour_shares(
        double([[0, 0]]), double([[1, 0], [0, 1]]), torch.tensor([1, 0]), 2, 1, Scale.absolute
    )
    assert shares.tolist() == [[0, 1]]


def test_a_training_example_is_its_own_nearest_neighbour(make) -> None:
    run = make("method=knn", "method.neighbours=1")
    run.learn(0)
    run.learn(1)
    rows = run.data.train.rows_of(1)
    with torch.inference_mode():
        answers = run.method.predict(run.data.train.batch(rows), None).scores
    assert answers.argmax(1).tolist() == run.data.train.labels[rows].tolist()
    assert scores(run, run.data.test.rows_of(0))[:, 8:].isinf().all()  # labels that were not learned
    dim = run.method.objective.dim
    assert run.method.stored_parameters() == 48 * (dim + 1) + 8  # features with their labels, and counts of labels
    assert "sums" not in run.method.state_dict()


def test_attention_by_hand() -> None:
    """Three increments z of rank 1, each B_i A_i x with A_i x = 1."""
    x = double([1, -1])
    z, query, key = double([[0.5, 0], [0, 0.5], [1, 1]]), double([[1, 0.5], [0, 1]]), double([[1, 0], [0.5, 1]])
    weights = fusion.attention_weights(x, double([[1, 0]] * 3), z.T, 1, query, double([0, 0]), key)
    assert weights.tolist() == pytest.approx([0.506480, 0.307196, 0.186324], abs=1e-6)
    assert (weights @ z).tolist() == pytest.approx([0.439564, 0.339922], abs=1e-6)


@pytest.mark.parametrize(
    "mode", ["attention", *[pytest.param(mode, marks=pytest.mark.slow) for mode in ("uniform", "scalar")]]
)
def test_fusion_leaves_old_loras_as_they_are(mode: str, make) -> None:
    """And a LoRA is trained as if it were the only one: that of the second task begins and learns like a first one's."""
    words = ["method=fusion", f"method.mode={mode}", "train.epochs=1", *(["replay=none"] if mode == "uniform" else [])]
    run = make(*words)
    run.learn(0)
    method = run.method
    old = {name: layer.all() for name, layer in method.stack.layers.items()}
    before = scores(run, run.data.test.rows_of(0))
    method.add_branch(1)
    method.set_fused(False)
    single = scores(run, run.data.test.rows_of(0))  # B of the new LoRA is 0
    with torch.no_grad(), method.stack.off():
        bare = method.objective.predict(run.data.test.batch(run.data.test.rows_of(0)), None).scores
    assert torch.equal(single, bare)
    assert not torch.equal(single, before)
    fresh = make(*words)
    fresh.learn(0)
    fresh.learn(1)
    for name, layer in fresh.method.stack.layers.items():
        A, B = layer.all()
        assert torch.equal(A[: len(old[name][0])], old[name][0])
        assert torch.equal(B[:, : len(old[name][0])], old[name][1])
    newest = sum(value.numel() for value in fresh.method.stack.current().values())
    weights = sum(value.numel() for value in fresh.method.fusion_weights().values())
    head = 8 * (fresh.method.objective.dim + 1)
    assert fresh.method.trainable_parameters() == newest + weights + head
    assert (weights > 0) == (mode != "uniform")
    if mode == "scalar":
        assert fresh.method.logits_of_tasks.detach().abs().sum() > 0
    if mode == "attention":
        assert any(key.detach().any() for key in fresh.method.attention.keys)


def test_learned_fusion_needs_a_memory(make) -> None:
    make("method=fusion", "replay=none", "method.mode=uniform")
    with pytest.raises(ConfigError, match="would learn to choose the newest task"):
        make("method=fusion", "replay=none")
    with pytest.raises(ConfigError, match=r"replays nothing with method.mode=uniform"):
        make("method=fusion", "method.mode=uniform")


def test_a_lora_of_fusion_is_trained_among_the_labels_of_its_task(make) -> None:
    """Else it would push down the head's rows of old labels, none of whose examples it sees."""
    run = make("method=fusion", "method.mode=uniform", "replay=none", "train.epochs=1", "train.weight_decay=0")
    run.learn(0)
    head = run.method.objective.head
    before = head.weight[:4].detach().clone(), head.bias[:4].detach().clone()
    run.learn(1)
    assert torch.equal(head.weight[:4], before[0])
    assert torch.equal(head.bias[:4], before[1])


WORDS_OUT = ["objective=text_to_text", "model=tiny_llama", "benchmark.max_target=8"]


def test_demonstrations_are_of_all_tasks_in_their_order(make) -> None:
    """They fit, they depend on the prompt alone, and with the task given they are of that task."""
    run = make("method=icl", *WORDS_OUT, "benchmark.max_length=200", "method.demonstrations=5")
    method, train = run.method, run.data.train
    assert method.draw("pear n9", 0) == []  # nothing is learned yet
    run.learn(0)
    run.learn(1)
    drawn = method.draw("pear n9", 0)
    assert sorted(train.tasks[drawn].tolist()) == train.tasks[drawn].tolist()
    assert sorted([drawn.count(row) for row in drawn]) == [1] * 5
    assert {0, 1} == set(train.tasks[drawn].tolist())
    assert method.draw("pear n9", 0) == drawn != method.draw("pear n8", 0)
    first = run.benchmark.tasks[0].train[0]
    assert method.prompt("pear n9", [0]).text == f"{first.text} {first.target}\n\npear n9"
    method.task_id_at_test = True
    assert set(train.tasks[method.draw("pear n9", 1)].tolist()) == {1}


def test_demonstrations_are_left_out_where_they_do_not_fit(make) -> None:
    run = make("method=icl", *WORDS_OUT, "benchmark.max_length=40")
    run.learn(0)
    pool, shown = run.method.prompts(["pear n9", "pear " * 30], [0, 0])
    assert 1 <= shown < 6
    few = run.data.train.full_lengths.max()
    assert few < pool.lengths[0] <= 40
    assert pool.full_lengths[0] <= 40 < pool.full_lengths[1]  # the second prompt is too long by itself


def test_answers_of_a_batch_are_those_of_its_prompts(make) -> None:
    run = make("method=icl", *WORDS_OUT, "benchmark.max_length=100", "evaluation.decode=rank")
    run.learn(0)
    pool = run.data.test
    with torch.inference_mode():
        together = run.method.predict(pool.batch(pool.rows_of(0)[:3]), None).texts
        single = [run.method.predict(pool.batch([row]), None).texts[0] for row in pool.rows_of(0)[:3]]
    assert together == single


def test_a_dry_run_of_a_method_without_training(clpet, words: Path) -> None:
    result = clpet("train", "method=knn", *tiny_args(words), "dry_run=true")
    assert result.code == 0, result.err
    assert "trainable parameters 0 of" in result.out
