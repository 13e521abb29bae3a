"""What is measured along with the matrix: plasticity, and benchmarks of clpet that are not learned."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from clpet.runs.plasticity import LOSS, RELATIVE, SCORE, LossCurve, Plasticity
from clpet.runtime.distributed import without_gradients
from tests.conftest import domain_args, run_cli, set_up, tiny_args
from tests.runs.conftest import only, refused

PROBE = ("evaluation.probes=[plasticity]", "evaluation.probe_task=benchmark/python_stdlib:code",
         "evaluation.probe_examples=16")  # fmt: skip
ANSWERS = ("objective=text_to_text", "model=tiny_llama", "benchmark.max_target=8", "evaluation.decode=rank")


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A --config-dir with benchmarks that read the data of the run once more."""
    folder = tmp_path_factory.mktemp("configs")
    (folder / "benchmark").mkdir()
    again = "defaults: [files, _self_]\nname: again\ntask: task\nmax_length: 24\nmax_target: 8\n"
    (folder / "benchmark" / "again.yaml").write_text(again)
    prose = "defaults: [text_domains, _self_]\nname: prose\nmax_length: 32\n"
    (folder / "benchmark" / "prose.yaml").write_text(prose)
    return folder


def tensors(run) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in run.method.named_parameters().items()}


def test_the_area_under_the_loss_curve_by_hand() -> None:
    """Epochs of two and three steps with mean losses 3 and 1: (2 * 3 + 3 * 1) / 5. Only the last fit counts."""
    curve = LossCurve()
    curve.fit("first", 1, 1)
    curve.step(0, 1, 4, torch.tensor(9.0))
    curve.fit("second", 2, 3)
    for epoch, step, mean in ((0, 1, 4.0), (0, 2, 3.0), (1, 1, 5.0), (1, 2, 2.0), (1, 3, 1.0)):
        curve.step(epoch, step, 4 * step, torch.tensor(mean))
    assert curve.area() == pytest.approx(9 / 5)


def test_a_method_learns_the_same_where_its_plasticity_is_measured(
    words: Path, configs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A branch per task: the probe gets a branch of its own, on a copy."""
    monkeypatch.setenv("CLPET_CONFIG_DIR", str(configs))
    args = tiny_args(words, "cache_dir=null", "method=inc_lora", "train.epochs=1", "peft.dropout=0.1",
                     "benchmark.tasks=[fruit,metal]")  # fmt: skip
    probe = (PROBE[0], "evaluation.probe_task='benchmark/again:river'")
    plain, probed = set_up(args), set_up([*args, *probe])
    plasticity = Plasticity.of(probed.session)
    rows = [{"row": 0, **plasticity.measure(0, [])}]
    assert rows[0][RELATIVE] == 1
    probed.learn(0)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    values = plasticity.measure(1, rows)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    assert values[RELATIVE] == values[SCORE] / rows[0][SCORE]
    assert values[LOSS] != rows[0][LOSS]  # it starts from what has been learned
    probed.learn(1)
    for index in range(2):
        plain.learn(index)
    assert probed.method.stack.branches == 2
    assert tensors(probed).keys() == tensors(plain).keys()
    assert all(torch.equal(value, tensors(probed)[name]) for name, value in tensors(plain).items())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sequential", "dynamic_conpet", "l2p", "merge"])
def test_a_run_is_the_same_with_all_measures(method: str, words: Path, configs: Path, clpet) -> None:
    """Weights, scores, costs and a method's own figures; a task that is read again has the scores of the matrix."""
    args = ("train", *tiny_args(words), f"method={method}", "train.epochs=1", "evaluation.validation=false")
    assert clpet(*args, "output_dir=without").code == 0
    answer = clpet(*args, *PROBE, "evaluation.downstream=[benchmark/again]", "--config-dir", str(configs))
    assert answer.code == 0, answer.err
    (without,) = Path("without").glob("*/*/s*")
    for file in without.glob("adapters/**/*.safetensors"):
        assert file.read_bytes() == (only() / file.relative_to(without)).read_bytes()
    before, after = (json.loads((run / "results.json").read_text()) for run in (without, only()))
    assert before["scores"] == after["scores"]
    assert before["task_scores"] == after["task_scores"]
    names = ("evaluated_examples", "forward_examples", "backward_examples", "stored_bytes")
    assert [[cost[name] for name in names] for cost in before["cost"]] == [
        [cost[name] for name in names] for cost in after["cost"]
    ]
    for row, (old, new) in enumerate(zip(before["diagnostics"], after["diagnostics"], strict=True)):
        measured = {name: value for name, value in new.items() if name.startswith(("probe/", "downstream/"))}
        assert {name: value for name, value in new.items() if name not in measured} == old
        assert {SCORE, RELATIVE, LOSS} <= measured.keys()
        again = [measured[f"downstream/again/{task}/accuracy"] for task in after["tasks"]]
        assert again == after["scores"][row]
    shown = clpet("show", str(only())).out
    assert "plasticity_relative" in shown
    assert "again/fruit/accuracy" in shown
    assert {"drift.png", "downstream.png"} <= {file.name for file in only().glob("*.png")}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["answers", "text"])
def test_tasks_of_other_objectives_have_the_scores_of_the_matrix(
    kind: str, words: Path, prose: Path, configs: Path, clpet
) -> None:
    text = domain_args(prose, "method=sequential", "train.epochs=1", "evaluation.downstream=[benchmark/prose]")
    answers = tiny_args(words, "method=sequential", *ANSWERS, "evaluation.downstream=[benchmark/again]")
    answer = clpet("train", *(text if kind == "text" else answers), "--config-dir", str(configs))
    assert answer.code == 0, answer.err
    results = json.loads((only() / "results.json").read_text())
    name = "prose/{}/perplexity" if kind == "text" else "again/{}/exact_match"
    for scores, row in zip(results["scores"], results["diagnostics"], strict=True):
        measured = [row[f"downstream/{name.format(task)}"] for task in results["tasks"]]
        assert measured == pytest.approx(scores, rel=1e-6)  # other batches round differently


def test_a_task_is_scored_without_counting_it(words: Path, configs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first four examples of one task, all labels of which the run knows."""
    from clpet.runs.downstream import Downstream

    monkeypatch.setenv("CLPET_CONFIG_DIR", str(configs))
    run = set_up(tiny_args(words, "cache_dir=null", "method=sequential", "evaluation.downstream=['benchmark/again:metal']",
                           "evaluation.downstream_limit=4"))  # fmt: skip
    downstream, counted = Downstream.of(run.session), run.method.objective.meter.cost.evaluated_examples
    assert [len(score.pool) for score in downstream.outside] == [4]
    assert downstream.measure(0) == {"downstream/again/metal/accuracy": 0.0}  # no label has been learned yet
    for index in range(2):
        run.learn(index)
    value = downstream.measure(2)["downstream/again/metal/accuracy"]
    rows = run.data.test.rows_of(1)[:4]
    with without_gradients():
        scores = run.method.predict(run.data.test.batch(rows), None).scores
    hits = scores[:, : len(run.benchmark.seen_labels(2))].argmax(1).numpy() == run.data.test.labels[rows]
    assert value == 100 * hits.mean()
    assert run.method.objective.meter.cost.evaluated_examples == counted


EARLY = [
    (("evaluation.probes=[plasticity]",), "evaluation.probe_task must be benchmark/NAME:TASK"),
    ((PROBE[0], "evaluation.probe_task=benchmark/python_stdlb:code"), "did you mean python_stdlib?"),
]
FURTHER = [
    (PROBE[1:2], "must be null without probes=[plasticity]"),
    ((*PROBE, "method=ncm"), "method=ncm trains nothing"),
    (("evaluation.downstream=[benchmark/nosuch]",), "is not benchmark/NAME"),
    (("evaluation.downstream=[benchmark/clinc150]", "method=independent"), "only where the task is given"),
    (("evaluation.downstream=[benchmark/clinc150]", "evaluation.downstream_dir=x"), "for tasks of lm-evaluation"),
    # Known once the data are read:
    ((*PROBE, "method=joint"), "method=joint: it learns all tasks at once"),
    ((PROBE[0], "evaluation.probe_task=benchmark/python_stdlib"), "names 5 tasks"),
    ((PROBE[0], "evaluation.probe_task=benchmark/python_stdlib:cod"), "has no task cod; did you mean code?"),
    (("evaluation.downstream=[benchmark/python_stdlib]",), "has the label"),
]


@pytest.mark.parametrize(
    ("words_of", "message"),
    [*EARLY, *(pytest.param(*case, marks=pytest.mark.slow) for case in FURTHER)],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_what_cannot_be_measured_is_refused(
    words_of: tuple[str, ...], message: str, words: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    code = run_cli("train", *tiny_args(words), "method=sequential", *words_of)
    error = capsys.readouterr().err
    assert refused(type("Answer", (), {"code": code, "err": error})), error
    assert message in error
    assert not list(tmp_path.glob("outputs/*/*/s*/metrics.jsonl"))
