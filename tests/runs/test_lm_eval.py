"""`clpet eval --downstream`: lm-evaluation-harness on a run, with tasks that lie here."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from clpet.runs.load_run import load_run, read_record
from tests.conftest import domain_args, tiny_args

HERE = importlib.util.find_spec("lm_eval") is not None


def needs_harness(test: Callable) -> Callable:
    """lm-eval takes seconds to import, and is an extra that only CI has to have."""
    return pytest.mark.slow(pytest.mark.skipif(not HERE, reason="lm-eval is not installed")(test))


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
    """A folder with a task of choices and one of writing."""
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


def right(run: Path, after: int) -> float:
    """Share of questions whose right answer is the likeliest, by the model's own logits, in percent."""
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
            scores.append(sum(logits[place - 1, ids[place]].item() for place in range(len(prompt), len(ids))))
        hits += scores.index(max(scores)) == answer
    return 100 * hits / len(QUESTIONS)


@needs_harness
@pytest.mark.parametrize("method", [["sequential", "peft=none"], ["o_lora", "peft=lora"]])
def test_choices_are_those_of_the_model_s_own_logits(method: list[str], clpet, prose: Path, tasks: Path) -> None:
    """Chance is (1/4 + 1/2 + 1/4 + 1/2) / 4 = 37.5 %; normalised = 100 (raw - 37.5) / 62.5."""
    args = domain_args(prose, f"method={method[0]}", *method[1:], "train.keep=1", "train.epochs=3")
    assert clpet("train", *args).code == 0
    for after in (0, 1, 3):
        found = clpet("eval", only(), "--after", str(after), "--downstream", "choose,write", "--tasks-dir", tasks)
        assert found.code == 0, found.err
        assert "|choose" in found.out
        assert "|write" in found.out
        record = json.loads((only() / f"downstream-after-{after:03d}.json").read_text())
        raw = right(only(), after)
        own = record["clpet_normalised"]
        assert list(own) == ["choose"]
        assert own["choose"]["raw"] == 100 * record["results"]["choose"]["acc,none"] == raw
        assert own["choose"]["chance"] == 37.5
        assert own["choose"]["normalised"] == pytest.approx((raw - 37.5) / 0.625)
        assert 0 <= record["results"]["write"]["exact_match,none"] <= 1


@needs_harness
def test_an_encoder_decoder_is_asked(clpet, words: Path, tasks: Path) -> None:
    args = ["objective=text_to_text", "benchmark.max_target=8", "model=tiny_t5", "method=sequential"]
    assert clpet("train", *tiny_args(words, *args)).code == 0
    found = clpet("eval", only(), "--downstream", "choose,write", "--tasks-dir", tasks, "--limit", "2")
    assert found.code == 0, found.err
    record = json.loads((only() / "downstream-after-003.json").read_text())
    assert record["limit"] == 2
    assert record["n-samples"]["choose"] == {"original": 4, "effective": 2}
    assert record["clpet_normalised"]["choose"]["chance"] == 37.5


@needs_harness
@pytest.mark.parametrize(
    ("words_", "message"),
    [(["--downstream", "chose"], "unknown lm-evaluation-harness task chose"), (["--downstream", "choose", "--tasks-dir", "nowhere"], "is not a folder"),
     (["--downstream", "bigbench_physics_multiple_choice"], "cannot be loaded"), (["--downstream", "choose", "--limit", "0"], "at least 1")],
)  # fmt: skip
def test_refusals_of_tasks(words_: list[str], message: str, clpet, prose: Path, tasks: Path) -> None:
    """A data set that is not here cannot be fetched offline: one line."""
    assert clpet("train", "method=sequential", *domain_args(prose)).code == 0
    if "--tasks-dir" not in words_:
        words_ = [*words_, "--tasks-dir", str(tasks)]
    found = clpet("eval", only(), *words_)
    assert found.code == 2
    assert message in found.err
    assert found.err.splitlines()[-1].startswith("clpet: ")
    assert "Traceback" not in found.err


def test_refusals_of_models(clpet, words: Path, prose: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert clpet("train", "method=sequential", *tiny_args(words), "output_dir=a").code == 0
    assert clpet("train", "method=sequential", *domain_args(prose, "model=tiny"), "output_dir=b").code == 0
    assert clpet("train", "method=l2p", *domain_args(prose, "peft=frozen"), "output_dir=c").code == 0
    assert clpet("train", "method=sequential", *domain_args(prose), "output_dir=d").code == 0
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else found(name, *rest)
    )
    for name, message in {"a": "the objective of this run is classification", "b": "needs a decoder or encoder-decoder",
                          "c": "method=l2p chooses parameters for each text", "d": "pip install 'clpet[downstream]'"}.items():  # fmt: skip
        (run,) = Path(name).glob("*/*/s*")
        answer = clpet("eval", run, "--downstream", "arc_easy")
        assert answer.code == 2
        assert message in answer.err
        assert answer.err.count("\n") == 1
