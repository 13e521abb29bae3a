"""SDFT: divergences by hand and equal to TRL's, what the teacher reads, and what is drawn."""

import numpy as np
import pytest
import torch

from clpet.data.batches import EncodedDataset
from clpet.errors import ConfigError
from clpet.methods.components.token_divergence import divergence, in_chunks, mean_behind, on_support, token_losses
from clpet.methods.sdft import SDFT
from clpet.objectives.chunked_cross_entropy import CHUNK
from clpet.objectives.generation import InverseTransform
from clpet.training.step import StepContext
from tests.conftest import double

S = double([[2, 1, 0, -1, 0.5], [0, 0, 1, 3, -2], [1, -1, 0.5, 0.25, 0]])
T = double([[1, 2, 0.5, 0, -1], [0.5, 1, 1, 2, 0], [0, 0, 0, 0, 2]])
Y = torch.tensor([1, 3, 0])
WORDS = ["method=sdft", "objective=text_to_text", "model=tiny_llama", "benchmark.max_target=8", "train.epochs=1"]
SHORT = [*WORDS, r"method.template='{prompt} {answer} again:'", "train.global_batch_size=6"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.452861, 0.357935, 0.747673]),
        ({"alpha": 1.0}, [0.478208, 0.257126, 0.697151]),
        ({"alpha": 0.5}, [0.111038, 0.070644, 0.166849]),
        ({"alpha": 0.25}, [0.083168, 0.057659, 0.129325]),
        ({"top_k": 3}, [0.508566, 0.254226, 0.049892]),
        ({"top_k": 3, "alpha": 0.5}, [0.119276, 0.051186, 0.012478]),
        ({"top_k": 3, "alpha": 1.0}, [0.492318, 0.183383, 0.050482]),
        ({"top_k": 3, "tail": True}, [0.447219, 0.320421, 0.698226]),
        ({"top_k": 3, "tail": True, "alpha": 0.5}, [0.110117, 0.067506, 0.160831]),
        ({"top_k": 3, "tail": True, "alpha": 1.0}, [0.475462, 0.249462, 0.681052]),
        ({"top_k": 2}, [0.462117, 0.082608, 0.030930]),
        ({"alpha": 1.0, "sampled_token": True}, [1.574438, -0.113142, -1.407777]),
        ({"temperature": 2.0}, [0.124131, 0.118368, 0.179576]),
    ],
)
def test_losses_of_tokens_by_hand(options: dict, expected: list[float]) -> None:
    losses, _ = SDFT(**options).compare(S, T, Y)
    assert losses.tolist() == pytest.approx(expected, abs=1e-6)


def test_the_gradient_of_the_forward_divergence_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the vocabulary is so large that every token is a chunk."""
    gradients = []
    for chunk in (CHUNK["cpu"], 1):
        monkeypatch.setitem(CHUNK, "cpu", chunk)
        student = S.clone().requires_grad_()
        losses, _ = in_chunks(SDFT().compare, student, T, Y)
        losses[0].backward()
        gradients.append(student.grad[0].tolist())
    expected = [0.355897, -0.355897, -0.049430, -0.048165, 0.097596]
    assert gradients[0] == pytest.approx(expected, abs=1e-6)
    assert gradients[0] == gradients[1]


def test_the_mean_over_tokens_and_answers_by_hand() -> None:
    answers = double([1, 2, 3]), double([4])
    assert torch.stack([mean_behind(values, 0) for values in answers]).mean() == 3
    assert torch.stack([mean_behind(values, 1) for values in answers]).mean() == 1.25


@pytest.mark.slow
def test_the_losses_are_those_of_trl() -> None:
    pytest.importorskip("trl")
    trl = pytest.importorskip("trl.experimental.sdft.loss_utils")
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(40, 300, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    tokens = torch.randint(300, (40,), generator=generator)
    for alpha in (0.0, 0.3, 0.5, 1.0):
        ours = divergence(*on_support(student, teacher, 0, False), alpha)
        theirs = trl.compute_full_logit_self_distillation_loss(student, teacher, distillation_alpha=alpha)
        assert (ours - theirs).abs().max() < 1e-6
        for tail in (False, True):
            theirs = trl.compute_topk_self_distillation_loss(
                student, teacher, distillation_topk=20, distillation_alpha=alpha, distillation_add_tail=tail
            )
            ours = divergence(*on_support(student, teacher, 20, tail), alpha)
            assert (ours - theirs).abs().max() < 1e-6
    theirs = trl.compute_sampled_token_self_distillation_loss(student, teacher, tokens, distillation_alpha=1.0)
    assert torch.allclose(token_losses(student, teacher, tokens)[0], theirs, rtol=0, atol=1e-6)


def test_tokens_are_drawn_by_inverting_the_distribution() -> None:
    """p = (.5, 0, .25, .25), and at half the temperature p^2 / sum: (2/3, 0, 1/6, 1/6)."""
    scores = torch.tensor([[0.5, 0, 0.25, 0.25]]).log()
    uniform = [0.0, 0.49, 0.51, 0.74, 0.76, 1 - 1e-12]
    for temperature, expected in ((1.0, [0, 0, 2, 2, 3, 3]), (0.5, [0, 0, 0, 2, 2, 3])):
        draw = InverseTransform(double([uniform]), temperature)
        assert [int(draw(torch.zeros(1, 0), scores).argmax()) for _ in uniform] == expected


def context_of(run, rows: list[int], task: int = 0) -> StepContext:
    context = StepContext.of(run.data.train.batch(rows))
    context.task = task
    return context


@pytest.mark.slow
def test_what_the_teacher_reads(make) -> None:
    """The prompt of the student with the answer; only its text is cut where the model cannot read more."""
    run = make(*SHORT)
    method, tokenizer = run.method, run.method.objective.tokenizer
    example = run.benchmark.tasks[1].train[3]
    row = int(run.data.train.rows_of(1)[3])
    shown = tokenizer.decode(method.shown.tokens(row), skip_special_tokens=True)
    assert shown == f"{example.text} {example.target} again:"
    run = make(*SHORT, "model.config.max_position_embeddings=36", "benchmark.max_length=28")
    for row, ids in enumerate(map(run.method.shown.tokens, range(len(run.data.train)))):
        text = tokenizer.decode(ids, skip_special_tokens=True)
        assert len(ids) <= 28
        assert text.endswith(f" {[e.target for t in run.benchmark.tasks for e in t.train][row]} again:")
    with pytest.raises(ConfigError, match=r"method.template and the answer do not fit into a prompt of 28 tokens"):
        make(*SHORT[:-2], "method.template='{prompt}{answer} a very, very long template'",
             "model.config.max_position_embeddings=36", "benchmark.max_length=28")  # fmt: skip


def test_answers_depend_on_step_and_example_and_not_on_the_batch(make) -> None:
    run = make(*SHORT, "method.generations=2")
    method, rows = run.method, np.array([0, 3, 9])
    together = method.written(context_of(run, rows), np.repeat(rows, 2))
    alone = [method.written(context_of(run, [row]), np.array([row, row])) for row in rows.tolist()]
    assert together == [answer for pair in alone for answer in pair]
    assert together[0] != together[1]
    later = context_of(run, rows)
    later.step = 1
    assert method.written(later, np.repeat(rows, 2)) != together
    ends = method.objective.ends
    assert all(len(answer) <= 8 and not set(answer[:-1]) & set(ends) for answer in together)


def test_equal_prompts_and_weights_teach_nothing(make) -> None:
    run = make(*SHORT, "method.teacher=live")
    run.method.shown = EncodedDataset(
        [ids.tolist() for ids in map(run.data.train.tokens, range(len(run.data.train)))],
        [-1] * len(run.data.train), run.data.train.tasks, run.data.train.pad_id, left=True,
    )  # fmt: skip
    loss = run.method.loss(context_of(run, [0, 5]))
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-7)
    assert all(value.grad.abs().max() < 1e-6 for value in run.method.parameters() if value.grad is not None)


def test_micro_batches_weigh_by_their_examples(make) -> None:
    """The loss of a batch is the mean over examples of the losses of batches of one."""
    run = make(*SHORT, "method.skip=1")
    rows = np.array([0, 3, 9, 14])
    one = run.method.loss(context_of(run, rows)).item()
    alone = [run.method.loss(context_of(run, [row])).item() for row in rows.tolist()]
    assert one == pytest.approx(np.mean(alone), rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("teacher", ["ema", "base", "start", "live"])
def test_the_weights_of_the_teacher(teacher: str, make) -> None:
    """After two steps at a rate of 1/4: with updates D_1 and D_2, the average has moved by D_1 7/16 + D_2 / 4."""
    run = make(*SHORT, f"method.teacher={teacher}", "method.rate=0.25", "train.lr=1e-2")
    run.learn(0)
    method, name = run.method, next(name for name in run.method.named_parameters() if "lora_B" in name)
    weight, after_step = method.named_parameters()[name], method.after_step
    start, students, teachers, logits = weight.detach().clone(), [], [], []

    def noting(context: StepContext) -> None:
        after_step(context)
        students.append(weight.detach().clone())
        with torch.no_grad(), method.teaching():
            teachers.append(weight.detach().clone())
            logits.append(method.objective.logits(method.prompted(run.data.train, np.array([0]), [[5, 6]])))

    method.after_step = noting
    run.learn(1)
    if teacher == "ema":
        first, second = students[0] - start, students[1] - students[0]
        assert torch.allclose(teachers[1], start + first * (1 - 0.75**2) + second * 0.25, atol=1e-7)
    elif teacher == "start":
        assert torch.equal(teachers[1], start)
    elif teacher == "live":
        assert torch.equal(teachers[1], students[1])
    assert torch.equal(logits[0], logits[1]) == (teacher in ("start", "base"))
    assert method.second is None
    assert method.diagnostics()["divergence"] > 0
    assert {"copied", "empty"} <= method.diagnostics().keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["objective=classification", "model=tiny"], "it learns from answers that the model writes"),
        (["method.teacher=base", "peft=none"], "method.teacher=base is the model whose adapter is switched off"),
        (["peft.dropout=0.1"], "compares models without dropout: do not set peft.lora_dropout"),
        (["method.skip=6"], "method.skip=6 leaves no loss in task fruit, whose answers have 5.0 tokens on average"),
        (["method.tail=true"], "method.tail"),
        (["method.sampled_token=true"], "method.sampled_token"),
        (["method.template=text"], "a text with {prompt} once, and {answer}"),
    ],
)
def test_settings_that_are_refused(options: list[str], message: str, make) -> None:
    with pytest.raises(ConfigError) as error:
        make(*SHORT, *options)
    assert message in str(error.value)
