"""LAMOL: the numbers of its losses and samples, the two forms of an example, and runs of a decoder and a T5."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clpet.data.micro_batches import MicroBatchLimits
from clpet.methods.lamol import LAMOL, is_example, num_written, split, token_weights, weighted_nll
from clpet.objectives.generation import InverseTransform
from clpet.training.step import StepContext
from tests.training.test_fit_checkpoint import learned_with_checkpoints, resumed_from, same

WORDS_OUT = ["method=lamol", "objective=text_to_text", "benchmark.max_target=8", "train.epochs=1", "train.lr=1e-2"]
ANS = 100


@pytest.mark.parametrize(
    ("new", "old", "gamma", "expected"),
    [(1000, 3, 0.05, 48), (1000, 3, 0.2, 198), (7, 2, 0.05, 0), (1000, 0, 0.2, 0), (1000, 1, 0.2, 200)],
)
def test_number_of_written_texts(new: int, old: int, gamma: float, expected: int) -> None:
    assert num_written(new, old, gamma) == expected


def test_losses_of_the_two_forms() -> None:
    """Token 1 of 3 is ANS."""
    answer = F.cross_entropy(torch.tensor([[2.0, 0, 1], [0, 1, 3]]), torch.tensor([0, 2])).item()
    logits, targets = torch.tensor([[1.0, 1, 0], [0, 2, 0], [0.5, 0, 1]]), torch.tensor([1, 1, 2])
    means = {}
    for weight in (1.0, 5.0):
        weights = token_weights(targets, 1, weight)
        means[weight] = (weighted_nll(logits, targets, weights) / weights.sum()).item()
    assert (answer, means[5], means[1]) == pytest.approx((0.288726, 0.562543, 0.593936), abs=1e-6)
    assert answer + LAMOL().weight * means[5] == pytest.approx(0.429362, abs=1e-6)


@pytest.mark.parametrize(
    ("text", "expected"),
    [([5, ANS, 6], True), ([5, 6, ANS, 7, 8], True), ([5, 6], False), ([5, ANS, 6, ANS, 7], False), ([ANS, 6], False),
     ([5, ANS], False), ([5, ANS, 6, ANS + 1], False), ([], False)],
)  # fmt: skip
def test_which_texts_can_be_read(text: list[int], expected: bool) -> None:
    assert is_example(text, ANS) == expected
    assert not expected or split(text, ANS) == (text[: text.index(ANS)], text[text.index(ANS) + 1 :])


def run_with_texts(make, model: str, *overrides: str) -> SimpleNamespace:
    """A run in its second task, before which the model has written two texts that can be read and one that cannot."""
    run = make(*WORDS_OUT, f"model={model}", "method.gamma=0.125", *overrides)
    run.learn(0)
    method = run.method
    question, answer = method.data.train.source[0].tolist(), method.data.train.answer[0].tolist()
    text = method.text(question, answer)[:-1]
    texts = iter([text, text[1:], [*text, method.ans]])
    method.write_group = lambda index, numbers: [next(texts) for _ in numbers]
    run.learn(1)
    return run


def check_forms(run: SimpleNamespace, causal: bool) -> None:
    """Rows of both pools: new examples, then the two that could be read."""
    method, train = run.method, run.data.train
    assert method.diagnostics() == {"written": 3.0, "parsed_share": 2 / 3}
    assert len(method.pool) == len(method.texts) == len(train.rows_of(1)) + 2
    assert method.pool.tasks[-3:].tolist() == [1, 0, 0]
    assert method.pool.source[len(method.pool) - 2].tolist() == train.source[0].tolist()
    assert method.pool.answer[len(method.pool) - 2].tolist() == train.answer[0].tolist()
    for row in (0, len(method.pool) - 1):
        text, answer = method.texts.answer[row].tolist(), method.pool.answer[row].tolist()
        question = [token for token in method.pool.source[row].tolist() if token not in method.objective.ends]
        assert text[-len(answer) - 1 :] == [method.ans, *answer]
        assert text[: -len(answer) - 1] == question[-len(text) + len(answer) + 1 :]
        assert method.texts.source[row].tolist() == [method.ans + 1]
    batch = method.pool.batch(np.arange(2), "cpu")
    shown = method.with_ans(batch)
    assert (shown.input_ids[:, -1].tolist() == [method.ans] * 2) == causal
    assert shown.input_ids.shape[1] == batch.input_ids.shape[1] + causal


def check_loss(run: SimpleNamespace) -> None:
    """Both means are over the whole batch, however it is divided; all trained tensors have a gradient."""
    method, rows = run.method, np.arange(len(run.method.pool) - 5, len(run.method.pool))
    method.objective.micro_batches = MicroBatchLimits(2)
    context = StepContext(1, "", 0, 0, rows, method.pool)
    method.before_step(context)
    weights = method.pool.weights
    total = 0.0
    for part in method.objective.micro_batches.divide(method.pool, rows):
        share = float(weights[part].sum() / weights[rows].sum())
        batch = method.pool.batch(part, "cpu")
        context.micro_batch = type(batch)(**{**vars(batch), "share": share})
        total += method.loss(context) * share
    total.backward()
    assert all(p.grad is not None for name, p in method.named_parameters().items() if "lora_A" not in name)
    assert (method.tokens.rows.grad.abs().sum(1) > 0).all()
    texts = method.texts.batch(rows, "cpu")
    targets = method.objective.targets(texts)
    nll = F.cross_entropy(method.objective.logits(texts), targets, reduction="none")
    w = torch.where(targets == method.ans, 5.0, 1.0)
    expected = method.objective.loss(method.with_ans(method.pool.batch(rows, "cpu"))) + 0.25 * (nll * w).sum() / w.sum()
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_decoder_learns_and_writes_both_forms(make) -> None:
    run = run_with_texts(make, "tiny_llama")
    check_forms(run, causal=True)
    check_loss(run)
    vocabulary = len(run.method.objective.tokenizer)
    assert run.method.ans >= vocabulary
    del run.method.write_group  # what the model itself writes
    texts = run.method.write_group(1, range(3))
    assert texts[1:] == run.method.write_group(1, [1, 2])
    assert texts[0] != texts[1]


@pytest.mark.slow
def test_a_t5_has_gen_in_its_encoder(make) -> None:
    run = run_with_texts(make, "tiny_t5")
    check_forms(run, causal=False)
    check_loss(run)
    del run.method.write_group
    assert len(run.method.write_group(1, range(2))) == 2


@pytest.mark.slow
def test_a_killed_run_does_not_write_its_texts_again(make, tmp_path, monkeypatch) -> None:
    """Texts that can be read come from a model that repeats a training example; the resumed run is equal bit for bit."""
    overrides = [*WORDS_OUT, "model=tiny_llama", "train.global_batch_size=4", "method.task_tokens=true"]
    calls = []

    def write_group(self, index, numbers):
        calls.append(len(numbers))
        row = self.data.train.rows_of(0)[0]
        text = self.text(self.data.train.source[row].tolist(), self.data.train.answer[row].tolist())[:-1]
        return [text for _ in numbers]

    monkeypatch.setattr(LAMOL, "write_group", write_group)
    whole, _ = learned_with_checkpoints(make, overrides, tmp_path, (4,))
    assert calls == [5]
    resumed = resumed_from(make, overrides, tmp_path, 4)
    assert calls == [5]
    assert same(whole.method.state_dict(), resumed.method.state_dict())
    assert whole.method.diagnostics() == resumed.method.diagnostics() == {"written": 5.0, "parsed_share": 1.0}
    assert len(resumed.method.tokens.rows) == 4


def test_a_state_of_fewer_tasks_keeps_the_new_token_of_later_ones(make) -> None:
    run = make(*WORDS_OUT, "model=tiny_llama", "method.task_tokens=true")
    rows, state = run.method.tokens.rows.detach().clone(), run.method.state_dict()
    run.method.load_state_dict({**state, "tokens": torch.zeros(2, rows.shape[1])})
    assert torch.equal(run.method.tokens.rows[2:], rows[2:])
    assert not run.method.tokens.rows[:2].any()


def test_only_the_most_likely_tokens_are_drawn() -> None:
    """Of probabilities .5, .3, .15, .05 the two largest are .625 and .375."""
    scores = torch.tensor([0.3, 0.05, 0.5, 0.15]).log().repeat(4, 1)
    uniform = torch.tensor([[0.0], [0.37], [0.38], [0.999]])
    drawn = InverseTransform(uniform, 1.0, top_k=2)(torch.zeros(4, 1), scores).argmax(1)
    assert drawn.tolist() == [0, 0, 2, 2]
