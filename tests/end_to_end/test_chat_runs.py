"""Runs on conversations, with tiny models."""

import json
from pathlib import Path

import pytest
import torch

import clpet
from tests.conftest import methods_of, run_cli

FOODS = {"ant": "sugar", "bee": "honey", "cow": "grass", "doe": "leaf"}
COLOURS = {"bea": "green", "cas": "red", "dot": "blue", "eli": "black"}


def write_talks(folder: Path, copies: int = 12) -> Path:
    """Writes two tasks of conversations of one or two exchanges, some of them with a system message."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for task, table in (("food", FOODS), ("colour", COLOURS)):
        names = list(table)
        for number in range(4 * copies):
            pair = [names[number % 4], names[(number // 4) % 4]]
            turns = [
                {"role": role, "content": content}
                for name in pair[number % 3 == 0 :]
                for role, content in (("user", f"{task} of {name}?"), ("assistant", table[name]))
            ]
            system = [{"role": "system", "content": "Be brief."}] if number % 5 == 0 else []
            rows.append({"messages": [*system, *turns], "task": task})
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_talks(tmp_path_factory.mktemp("talks"))


def chat_args(talks: Path, *more: str) -> list[str]:
    """Overrides of a run on these conversations that takes about two seconds."""
    return ["model=tiny_llama", "tracking=off", "hardware=cpu", "hardware.threads=1", "benchmark=chat", f"data_dir={talks}",
            "benchmark.max_length=128", "benchmark.max_target=8", "benchmark.metric=exact_match", "evaluation.matrix=last",
            "train.lr=1e-2", "train.epochs=1", *more]  # fmt: skip


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def exported_answers(run: Path, talks: list) -> list[str]:
    """Answers of an exported model to conversations, with transformers alone as the folder's README shows."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert run_cli("export", run, "out") == 0
    readme = Path("out/README.md").read_text()
    model, tokenizer = AutoModelForCausalLM.from_pretrained("out"), AutoTokenizer.from_pretrained("out")
    answers = []
    for messages in talks:
        lines = readme[readme.index("options = {") :].split("```")[0].replace("print(", "answers.append(")
        exec(lines, {"tokenizer": tokenizer, "model": model, "messages": messages, "torch": torch, "answers": answers})
    return answers


@pytest.mark.slow
def test_a_run_learns_its_answers_and_stops_at_the_end_token(talks: Path) -> None:
    settings = (
        "method=sequential",
        "peft=none",
        "train.epochs=50",
        "train.global_batch_size=8",
        "train.clip=1",
        "train.schedule=cosine",
        "tasks=[food]",
    )
    run = clpet.train(*chat_args(talks), *settings, quiet=True)
    assert run.matrix.scores[1, 0] > 90
    model = clpet.load(run)
    questions = [f"food of {name}?" for name in FOODS]
    assert model.predict(questions) == list(FOODS.values())
    turns = [[{"role": "user", "content": text}] for text in questions]
    assert model.predict(turns) == [model.predict([turn])[0] for turn in turns] == list(FOODS.values())
    tests = model.benchmark.tasks[0].test
    Path("new.jsonl").write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns))
    assert run_cli("predict", run.path, "new.jsonl", "-o", "answers.jsonl") == 0
    answers = [json.loads(line)["prediction"] for line in Path("answers.jsonl").read_text().splitlines()]
    assert answers == list(FOODS.values())
    assert exported_answers(run.path, turns) == list(FOODS.values())
    assert model.predict(tests) == run.predictions(after=1)["prediction"].to_pylist()


def test_the_record_of_a_run_on_conversations(talks: Path) -> None:
    run = clpet.train(
        "method=sequential", *chat_args(talks, "benchmark.max_length=48", "evaluation.keep_text=true"), quiet=True
    )
    data = run.results["data"]
    assert data["chat"] == "all"
    assert data["tasks"]["food"]["texts_cut"]["train"] > 0
    assert set(run.predictions(after=2)["text"].to_pylist()) <= {
        f"{task} of {name}?" for task, names in (("food", FOODS), ("colour", COLOURS)) for name in names
    }
    assert run_cli("data", "chat", f"data_dir={talks}", "model=tiny_llama", "benchmark.max_length=48") == 0
    assert run_cli("show", run.path, "--mistakes", 2) == 0


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(set(methods_of("text_to_text")) - {"icl", "lamol"}))
def test_every_method_of_generated_answers_learns_from_conversations(method: str, talks: Path) -> None:
    run = clpet.train(f"method={method}", *chat_args(talks, *["replay=share"] * (method == "emr")), quiet=True)
    model = clpet.load(run)
    task = "colour" if model.method.task_id_at_test else None
    tests = model.benchmark.tasks[1].test
    assert model.predict(tests, task=task) == run.predictions(after=2)["prediction"].to_pylist()[-len(tests) :]


@pytest.mark.slow
def test_the_chat_form_of_a_benchmark_of_prompts_and_answers(tmp_path: Path) -> None:
    rows = [{"prompt": f"say {'ab'[n % 2]} {n}", "answer": "ab"[n % 2]} for n in range(24)]
    for task in ("C-STANCE", "FOMC"):
        folder = tmp_path / "trace" / task
        folder.mkdir(parents=True)
        for split in ("train", "eval", "test"):
            (folder / f"{split}.json").write_text(json.dumps(rows))
    words = ["method=sequential", "benchmark=trace", f"data_dir={tmp_path}", "tasks=[C-STANCE,FOMC]", "model=tiny_llama",
             "tracking=off", "hardware=cpu", "hardware.threads=1", "train.epochs=1", "benchmark.max_target=4", "evaluation.matrix=last"]  # fmt: skip
    plain, chat = (clpet.train(*words, *more, quiet=True) for more in ([], ["benchmark.chat=last"]))
    assert plain.path != chat.path
    assert clpet.load(chat).method.objective.ends != []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["benchmark=chat", "objective=preference"], "benchmark.chat=all needs objective=text_to_text, not preference"),
        (["benchmark=chat", "model=tiny_t5"], "benchmark.chat=all needs a decoder, which model tiny_t5 is not"),
        (["benchmark=files", "benchmark.chat=all"], "benchmark.chat=all needs objective=text_to_text, not classification"),
        (["benchmark=text_domains", "benchmark.chat=all"], "benchmark.chat=all has no effect on plain text: remove it"),
        (["benchmark=chat", "model.chat_template=plian"], "neither a file nor a template of clpet; did you mean plain"),
        (["benchmark=chat", "model.chat_template=chatml"], "whose last token is not a special token"),
        (["benchmark=fewrel", "benchmark.chat=all"], "benchmark.chat must be null: the entities of a sentence"),
        (["benchmark=chat", "benchmark.chat=first"], "benchmark.chat must be one of all, last, not first"),
    ],
)  # fmt: skip
def test_settings_that_are_refused(words: list[str], message: str, talks: Path, capsys: pytest.CaptureFixture) -> None:
    base = ["model=tiny_llama", "tracking=off", "hardware=cpu", f"data_dir={talks}", "method=sequential"]
    assert run_cli("train", *base, *words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") <= 2
