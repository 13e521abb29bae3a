"""Loaded models: predictions of new texts are those of the run's evaluation; perplexities are those of the formula."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

import clpet
from tests.conftest import domain_args, tiny_args


@pytest.mark.parametrize("method", ["sequential", "dynamic_conpet", "progressive_prompts", "o_lora"])
def test_predictions_of_the_test_texts_are_those_of_the_run(method: str, words: Path) -> None:
    """In every row of the matrix, among all labels and among each task's own; the template and the cut are used."""
    settings = (
        "train.snapshot_every=1",
        "benchmark.template='{text}!'",
        "benchmark.max_length=12",
        "train.lr=1e-2",
        "train.epochs=6",
    )
    run = clpet.train(f"method={method}", *tiny_args(words), *settings, quiet=True)
    for after in (1, 2, 3):
        model = clpet.load(run, after=after)
        tests = {task.name: [example.text for example in task.test] for task in model.benchmark.tasks}
        recorded = run.predictions(after=after).to_pydict()
        assert len(set(recorded["own_prediction"])) > 4
        assert model.predict([text for texts in tests.values() for text in texts]) == recorded["prediction"]
        own = [label for task, texts in tests.items() for label in model.predict(texts, task=task)]
        assert own == recorded["own_prediction"]
    assert len(model.labels) == 12
    assert list(model.scores.values()) == run.matrix.scores[3].tolist()


def test_predictions_write_no_files(words: Path) -> None:
    """dynamic_conpet caches outputs of its frozen modules on disk, but not those for new texts."""
    run = clpet.train("method=dynamic_conpet", *tiny_args(words), quiet=True)
    model = clpet.load(run)
    files = sorted(Path().rglob("*"))
    model.predict(["apple", "iron n7"])
    assert sorted(Path().rglob("*")) == files


def test_generated_answers_are_those_of_the_run(words: Path) -> None:
    settings = ("objective=text_to_text", "model=tiny_t5", "benchmark.max_target=8", "benchmark.prompt='word: {text}'")
    run = clpet.train("method=sequential", *tiny_args(words), *settings, "train.lr=1e-2", "train.epochs=8", quiet=True)
    model = clpet.load(run)
    texts = [example.text for task in model.benchmark.tasks for example in task.test]
    recorded = run.predictions(after=3).column("prediction").to_pylist()
    assert len(set(recorded)) > 1
    assert model.predict(texts) == recorded


def test_ranking_needs_the_task(words: Path) -> None:
    settings = ("objective=text_to_text", "model=tiny_t5", "benchmark.max_target=8", "evaluation.decode=rank")
    run = clpet.train("method=sequential", *tiny_args(words), *settings, "tasks=[fruit,metal]", quiet=True)
    model = clpet.load(run)
    with pytest.raises(clpet.ClpetError, match="chooses among the labels of a task"):
        model.predict(["iron"])
    recorded = [row["prediction"] for row in run.predictions(after=2).to_pylist() if row["task"] == "metal"]
    assert model.predict([example.text for example in model.benchmark.tasks[1].test], task="metal") == recorded


def test_perplexity_is_that_of_the_formula(prose: Path) -> None:
    """exp of the mean negative log-likelihood of every token but the first, end token included, in windows of 32."""
    run = clpet.train("method=sequential", *domain_args(prose), "train.epochs=1", quiet=True)
    model = clpet.load(run)
    texts = ["the tide comes in", "gold", "a heron waits in the reeds, and the wren sings at dawn in the hedge"]
    objective = model.method.objective
    for text, perplexity in zip(texts, model.perplexity(texts), strict=True):
        ids, nll = objective.tokenizer(text)["input_ids"], []  # with this tokenizer's first and end token
        for start in range(0, len(ids), 32):
            window = torch.tensor([ids[start : start + 32]])
            with torch.inference_mode():
                logits = objective.adapters.model(input_ids=window).logits[0, :-1].log_softmax(-1)
            nll += (-logits.gather(1, window[0, 1:, None])).flatten().tolist()
        assert perplexity == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-5)
    assert model.perplexity([]) == []
    assert model.labels == []
    with pytest.raises(clpet.ClpetError, match="measure texts with perplexity"):
        model.predict(["a"])


def test_rows_fill_the_slots_of_a_prompt(tmp_path: Path) -> None:
    """A prompt of two columns needs rows with both; the run's own examples work as they are."""
    rows = [{"text": f"n{i}", "hint": f"h{i % 2}", "label": "ab"[i % 2]} for i in range(12)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = (
        "objective=text_to_text",
        "model=tiny_t5",
        "benchmark.max_target=4",
        "benchmark.prompt='{hint}: {text}'",
    )
    tracked = ("tracking=off", "hardware=cpu", "hardware.threads=1", "benchmark=files", "train.epochs=1")
    run = clpet.train("method=sequential", *tracked, *settings, data_dir=tmp_path, quiet=True)
    model = clpet.load(run)
    examples = model.benchmark.tasks[0].test
    as_rows = [{"text": example.text, **example.fields} for example in examples]
    assert model.predict(as_rows) == model.predict(examples) == run.predictions(after=1)["prediction"].to_pylist()
    with pytest.raises(clpet.ClpetError, match=r"is not a row \{'text': \.\.\., 'hint': \.\.\.\}"):
        model.predict(["n1"])


def test_what_cannot_be_predicted_is_refused(words: Path) -> None:
    run = clpet.train("method=independent", *tiny_args(words), "train.snapshot_every=1", quiet=True)
    model = clpet.load(run, after=1)
    for texts, task, message in [
        (
            ["apple"],
            None,
            r"needs the task of the texts: --task NAME \(in Python task=NAME\), one of fruit, metal, river",
        ),
        (["apple"], "fruits", "unknown task 'fruits'; did you mean fruit"),
        ("apple", "fruit", "put it into a list"),
        ([3], "fruit", "3 is not a text"),
        ([{"text": "a", "b": "c"}], "fruit", "is not a text"),
    ]:
        with pytest.raises(clpet.ClpetError, match=message):
            model.predict(texts, task=task)
    assert model.predict([], task="fruit") == []
    assert model.predict(["apple"], task="fruit")[0] in model.labels
    with pytest.raises(clpet.ClpetError, match="has no perplexity: use predict"):
        model.perplexity(["a"])
    with pytest.raises(clpet.ClpetError, match="needs the task"):
        clpet.load(run, after=0).predict(["apple"])
    with pytest.raises(clpet.ClpetError, match="has no weights after 4 tasks"):
        run.load(after=4)
    with pytest.raises(clpet.ClpetError, match="cannot be set when a run is loaded"):
        clpet.load(run, "train.lr=1")


def test_the_data_of_a_run_may_have_moved(words: Path, tmp_path: Path, caplog) -> None:
    shutil.copytree(words, tmp_path / "a")
    run = clpet.train("method=sequential", *tiny_args(tmp_path / "a"), "tasks=[fruit]", quiet=True)
    (tmp_path / "a").rename(tmp_path / "b")
    gone, moved = clpet.load(run), clpet.load(run, data_dir=tmp_path / "b")
    assert caplog.text.count("tasks and labels are those of its record") == 1
    assert gone.tasks == moved.tasks == ["fruit"]
    assert gone.labels == moved.labels
