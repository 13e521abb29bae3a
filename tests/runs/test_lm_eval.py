"""`clpet eval --downstream`: lm-evaluation-harness on a run, with tasks defined in this file."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from clpet.runs.load_run import load_run, read_record
from tests.conftest import domain_args, tiny_args

INSTALLED = importlib.util.find_spec("lm_eval") is not None


def needs_harness(test: Callable) -> Callable:
    """Marks a test as slow (importing lm-eval takes seconds) and skips it where the optional lm-eval is missing."""
    return pytest.mark.slow(pytest.mark.skipif(not INSTALLED, reason="lm-eval is not installed")(test))


QUESTIONS = [
    ("the moon pulls the", ["sea", "hedge", "iron", "owl"], 0),
    ("gold does not", ["sing", "rust"], 1),
    ("an owl hunts by", ["tide", "night", "gold", "air"], 1),
    ("a heron waits in the", ["reeds", "silvery metal"], 0),
]
TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
"""
CHOICE = 'doc_to_choice: "{{choices}}"\ndoc_to_target: "{{answer}}"\nmetric_list: [{metric: acc}]\n'
WRITE = (
    'doc_to_target: "{{choices[answer]}}"\ngeneration_kwargs: {until: ["\\n"], max_gen_toks: 4}\n'
    "metric_list: [{metric: exact_match}]\n"
)


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a multiple-choice task and a generation task."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"question": q, "choices": choices, "answer": answer} for q, choices, answer in QUESTIONS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, kind, rest in (("choose", "multiple_choice", CHOICE), ("write", "generate_until", WRITE)):
        text = TASK.format(name=name, rows=folder / "rows.jsonl", kind=kind) + rest
        (folder / f"{name}.yaml").write_text(text)
    return folder


def only() -> Path:
    (run,) = Path().glob("outputs/*/*/s*")
    return run


def accuracy(run: Path, after: int) -> float:
    """Percent of questions whose correct answer has the highest log-probability under the model's own logits."""
    method = load_run(read_record(run), after).method
    model, tokenizer = method.objective.adapters.model, method.objective.tokenizer
    hits = 0
    for question, choices, answer in QUESTIONS:
        prompt = tokenizer(question, add_special_tokens=False)["input_ids"]
        scores = []
        for choice in choices:
            ids = tokenizer(f"{question} {choice}", add_special_tokens=False)["input_ids"]
            with torch.inference_mode():
                logits = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
            scores.append(sum(logits[i - 1, ids[i]].item() for i in range(len(prompt), len(ids))))
        hits += scores.index(max(scores)) == answer
    return 100 * hits / len(QUESTIONS)


@needs_harness
@pytest.mark.parametrize("method", [["sequential", "peft=none"], ["o_lora", "peft=lora"]])
def test_multiple_choice_accuracy_follows_from_the_model_s_logits(
    method: list[str], clpet, prose: Path, tasks: Path
) -> None:
    """Chance is (1/4 + 1/2 + 1/4 + 1/2) / 4 = 37.5 %; normalised = 100 (raw - 37.5) / 62.5."""
    args = domain_args(prose, f"method={method[0]}", *method[1:], "train.snapshot_every=1", "train.epochs=3")
    assert clpet("train", *args).code == 0
    for after in (0, 1, 3):
        answer = clpet("eval", only(), "--after", str(after), "--downstream", "choose,write", "--tasks-dir", tasks)
        assert answer.code == 0, answer.err
        assert "|choose" in answer.out
        assert "|write" in answer.out
        record = json.loads((only() / f"downstream-after-{after:03d}.json").read_text())
        raw = accuracy(only(), after)
        normalised = record["clpet_normalised"]
        assert list(normalised) == ["choose"]
        assert normalised["choose"]["raw"] == 100 * record["results"]["choose"]["acc,none"] == raw
        assert normalised["choose"]["chance"] == 37.5
        assert normalised["choose"]["normalised"] == pytest.approx((raw - 37.5) / 0.625)
        assert 0 <= record["results"]["write"]["exact_match,none"] <= 1


@needs_harness
def test_an_encoder_decoder_is_evaluated(clpet, words: Path, tasks: Path) -> None:
    args = ["objective=text_to_text", "benchmark.max_target=8", "model=tiny_t5", "method=sequential"]
    assert clpet("train", *tiny_args(words, *args)).code == 0
    answer = clpet("eval", only(), "--downstream", "choose,write", "--tasks-dir", tasks, "--limit", "2")
    assert answer.code == 0, answer.err
    record = json.loads((only() / "downstream-after-003.json").read_text())
    assert record["limit"] == 2
    assert record["n-samples"]["choose"] == {"original": 4, "effective": 2}
    assert record["clpet_normalised"]["choose"]["chance"] == 37.5


@needs_harness
@pytest.mark.usefixtures("rendered")
def test_downstream_tasks_are_measured_with_the_matrix(clpet, prose: Path, tasks: Path) -> None:
    """The values of a run are those of `clpet eval`, and the run is otherwise the same."""
    args = domain_args(prose, "method=sequential", "train.snapshot_every=1", "train.epochs=1")
    settings = [f"evaluation.downstream_dir={tasks}", "evaluation.downstream_every=2"]
    assert clpet("train", *args, "output_dir=without").code == 0
    answer = clpet("train", *args, "evaluation.downstream=[choose,write]", *settings)
    assert answer.code == 0, answer.err
    rows = json.loads((only() / "results.json").read_text())["diagnostics"]
    names = ["downstream/choose/acc", "downstream/choose/normalised", "downstream/write/exact_match"]
    measured = [sorted(name for name in row if name.startswith("downstream/")) for row in rows]
    assert measured == [names, [], names, names]
    for row in (0, 2):
        assert rows[row]["downstream/choose/acc"] == accuracy(only(), row) / 100
    (without,) = Path("without").glob("*/*/s*")
    for file in without.glob("adapters/**/*.safetensors"):
        assert file.read_bytes() == (only() / file.relative_to(without)).read_bytes()
    assert "choose/normalised" in clpet("show", str(only())).out
    assert (only() / "downstream.png").is_file()
    for options, message in (
        (["evaluation.downstream=[chose]"], "unknown lm-evaluation-harness task chose"),
        (["evaluation.downstream=[choose]", "hardware.shard=true", "peft=lora"], "hardware.shard"),
    ):
        refused = clpet("train", *args, *settings, *options, "output_dir=refused")
        assert refused.code == 2
        assert message in refused.err


@needs_harness
@pytest.mark.parametrize(
    ("options", "message"),
    [(["--downstream", "chose"], "unknown lm-evaluation-harness task chose"), (["--downstream", "choose", "--tasks-dir", "nowhere"], "is not a folder"),
     (["--downstream", "bigbench_physics_multiple_choice"], "cannot be loaded"), (["--downstream", "choose", "--limit", "0"], "at least 1")],
)  # fmt: skip
def test_unusable_tasks_are_refused(options: list[str], message: str, clpet, prose: Path, tasks: Path) -> None:
    """Among them a data set that would have to be downloaded: one line, no traceback."""
    assert clpet("train", "method=sequential", *domain_args(prose)).code == 0
    if "--tasks-dir" not in options:
        options = [*options, "--tasks-dir", str(tasks)]
    answer = clpet("eval", only(), *options)
    assert answer.code == 2
    assert message in answer.err
    assert answer.err.splitlines()[-1].startswith("clpet: ")
    assert "Traceback" not in answer.err


@pytest.mark.slow
def test_unsuitable_models_are_refused(clpet, words: Path, prose: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert clpet("train", "method=sequential", *tiny_args(words), "output_dir=a").code == 0
    assert clpet("train", "method=sequential", *domain_args(prose, "model=tiny"), "output_dir=b").code == 0
    assert clpet("train", "method=l2p", *domain_args(prose, "peft=frozen"), "output_dir=c").code == 0
    assert clpet("train", "method=sequential", *domain_args(prose), "output_dir=d").code == 0
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else find_spec(name, *rest)
    )
    for name, message in {"a": "the objective of this run is classification", "b": "needs a decoder or an encoder-decoder",
                          "c": "method=l2p chooses parameters for each text", "d": "pip install 'clpet[downstream]'"}.items():  # fmt: skip
        (run,) = Path(name).glob("*/*/s*")
        answer = clpet("eval", run, "--downstream", "arc_easy")
        assert answer.code == 2
        assert message in answer.err
        assert answer.err.count("\n") == 1
