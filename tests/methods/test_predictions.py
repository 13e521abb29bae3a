"""New texts get the answers of the evaluation, for every method and objective: the test texts are given as new ones."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from clpet.api.model import load
from clpet.api.run import train
from clpet.errors import DataError
from clpet.evaluation.evaluator import Evaluation, Evaluator
from clpet.evaluation.text_prediction import Answers, answer_texts
from clpet.runs.load_run import read_record
from tests.conftest import PROSE, domain_args, methods_of, set_up, tiny_args, words_of

ADAPTERS = {"l2p": "frozen", "progressive_prompts": "frozen", "osf": "osf", "zero_shot": "frozen"}
NEEDS = {"emr": ["replay=dynamic"]}  # its own memory is per label
METHODS = [" ".join(words_of(name)) for name in methods_of("classification")]
WORDS_OUT = ["objective=text_to_text", "benchmark.max_target=8", "model=tiny_llama"]


def learned(*overrides: str) -> SimpleNamespace:
    """A method after all tasks, set up on the words benchmark."""
    run = set_up([*overrides, "cache_dir=null", "train.lr=2e-2"])
    for index, _ in run.method.curriculum():
        run.learn(index)
    return run


def evaluated(run: SimpleNamespace) -> Evaluation:
    """Its evaluation on all test examples."""
    count = len(run.benchmark)
    return Evaluator(run.benchmark, run.data)(run.method, count, list(range(count)))


def answered(run: SimpleNamespace, with_tasks: bool = False) -> Answers:
    """The answers to the test texts as new texts, in order, with their tasks or without."""
    texts, source = run.benchmark.texts("test"), run.session.components.source
    tasks = [task.name for task in run.benchmark.tasks for _ in task.test] if with_tasks else None
    return answer_texts(run.method, run.benchmark, source, texts, len(run.benchmark), tasks)


def names(ids: np.ndarray, words: list[str]) -> list[str]:
    return [words[number] for number in ids.tolist()]


@pytest.mark.slow
@pytest.mark.parametrize("method", [*METHODS, "method=slm method.head=per_task"])
def test_labels_and_probabilities_are_those_of_the_evaluation_bit_for_bit(method: str, words: Path) -> None:
    """Among all labels as `prediction` and `probability`; with every text's task as `own_prediction`."""
    run = learned(*tiny_args(words), *method.split())
    rows, labels = evaluated(run).rows, run.benchmark.labels
    assert answered(run, with_tasks=True)["prediction"] == names(rows["own_prediction"], labels)
    if not run.method.task_id_at_test:
        answers = answered(run)
        assert answers["prediction"] == names(rows["prediction"], labels)
        np.testing.assert_array_equal(answers["probability"], rows["probability"])
        assert ("selected" in answers) == ("selected" in rows)
        if "selected" in rows:
            assert answers["selected"] == names(rows["selected"], run.benchmark.names)


@pytest.mark.slow
@pytest.mark.parametrize("method", methods_of("text_to_text"))
def test_written_answers_are_those_of_the_evaluation(method: str, words: Path) -> None:
    run = learned(*tiny_args(words), *words_of(method), *WORDS_OUT, *NEEDS.get(method, []))
    expected = evaluated(run).rows["prediction"].tolist()
    assert answered(run, with_tasks=run.method.task_id_at_test)["prediction"] == expected


@pytest.mark.slow
@pytest.mark.parametrize("method", methods_of("preference"))
def test_a_model_of_preferences_writes_an_answer(method: str, tmp_path: Path) -> None:
    rows = [{"text": f"n{i}", "label": "yes", "rejected": "no", "task": "ab"[i % 2]} for i in range(16)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = learned(*tiny_args(tmp_path), f"method={method}", "objective=preference", *WORDS_OUT[1:],
                  *NEEDS.get(method, []), "train.epochs=1")  # fmt: skip
    answers = answered(run, with_tasks=run.method.task_id_at_test)["prediction"]
    assert len(answers) == len(run.benchmark.texts("test"))
    assert all(isinstance(answer, str) for answer in answers)


@pytest.mark.slow
@pytest.mark.parametrize("method", methods_of("language_modeling"))
def test_perplexities_are_those_of_the_evaluation(method: str, tmp_path: Path) -> None:
    """Where the test text of a domain is one document: texts are read one by one, a domain's documents together."""
    for domain, lines in PROSE.items():
        (tmp_path / domain).mkdir()
        for split, texts in {"train": lines * 8, "validation": lines, "test": [". ".join(lines * 4)]}.items():
            file = tmp_path / domain / f"{split}.jsonl"
            file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    trained = ["peft=none"] if method == "dapt" else [f"peft={ADAPTERS.get(method, 'lora')}"]
    run = learned(*domain_args(tmp_path, f"method={method}", *trained, *NEEDS.get(method, []), "train.epochs=1"))
    expected = [evaluated(run).seen[index].value for index in range(3)]
    assert answered(run)["perplexity"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "words_of_run",
    [pytest.param(words, marks=[] if words in ("method=kif", "method=dynamic_conpet") else pytest.mark.slow)
     for words in METHODS]
    + [pytest.param(f"method={name} objective=text_to_text benchmark.max_target=8 model=tiny_llama", marks=pytest.mark.slow)
       for name in ("sequential", "kif", "sapt", "slm")],
)  # fmt: skip
def test_a_run_answers_without_its_data(words_of_run: str, words: Path, tmp_path: Path, caplog) -> None:
    """A model that is at work needs no training data: the answers are the same when they are gone."""
    data = tmp_path / "words"
    shutil.copytree(words, data)
    args = [*tiny_args(data), *words_of_run.split(), "train.epochs=1", f"output_dir={tmp_path / 'out'}"]
    run = train(*args, quiet=True)
    texts, tasks = ["apple n1", "gold gold", "elbe n3"], ["fruit", "metal", "river"]
    needs_task = load(run).method.task_id_at_test
    before = load(run).predict_table(texts, task=tasks if needs_task else None)
    shutil.rmtree(data)
    if read_record(run.path).method.reads_examples:
        with pytest.raises(DataError, match="say where they are"):
            load(run)
        return
    model = load(run)
    assert "tasks and labels are those of its record" in caplog.text
    assert model.tasks == tasks
    after = model.predict_table(texts, task=tasks if needs_task else None)
    assert after.equals(before), (after.to_pylist(), before.to_pylist())
