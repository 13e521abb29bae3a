"""`clpet export`: the folder it writes is read by transformers and peft alone."""

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from safetensors import safe_open

from tests.conftest import domain_args, tiny_args, write_words
from tests.runs.conftest import only, refused


def hidden(model: Any, batch: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state


def test_a_merged_export_loads_without_clpet(clpet, run: Path, make) -> None:
    """transformers alone loads it; its outputs equal those of the backbone with the exported adapter."""
    answer = clpet("export", run, "merged", "--merge", "--after", "2")
    assert answer.code == 0, answer.err
    about = json.loads(Path("merged/clpet.json").read_text())
    assert about["load"] == "transformers.AutoModel.from_pretrained(FOLDER)"
    assert about["tasks"] == ["fruit", "metal"]
    assert about["representation"] == "mean"
    model, tokenizer = (
        transformers.AutoModel.from_pretrained("merged"),
        transformers.AutoTokenizer.from_pretrained("merged"),
    )
    assert tokenizer("fig")["input_ids"] == make("method=sequential").method.objective.tokenizer("fig")["input_ids"]
    batch = make("method=sequential").data.test.batch([0, 1, 2])
    base = make("method=o_lora").method.objective.adapters.model  # the same backbone without adapters
    expected = peft.PeftModel.from_pretrained(base, run / "checkpoints" / "after-002" / "default").eval()
    assert torch.allclose(hidden(model.eval(), batch), hidden(expected, batch), atol=1e-5)
    with safe_open("merged/heads/default.safetensors", "pt") as head:
        assert len(json.loads(head.metadata()["labels"])) == head.get_tensor("weight").shape[0] == 8


@pytest.mark.parametrize("model", ["tiny_llama", pytest.param("tiny_gpt2", marks=pytest.mark.slow)])
def test_o_lora_branches_are_merged_into_the_weights(model: str, clpet, prose: Path) -> None:
    """The merged model has the perplexities of the run, for Linear (Llama) and transposed Conv1D (GPT-2) weights."""
    args = domain_args(prose, f"model={model}", "method=o_lora", "peft=lora")
    assert clpet("train", *args).code == 0
    run = only()
    assert clpet("export", run, "merged", "--merge").code == 0
    assert clpet("train", *args, "method=sequential", "model=local", "model.path=merged", "peft=none", "train.lr=0",
                 "output_dir=again").code == 0  # fmt: skip
    again = json.loads((only("again/*/*/s*") / "results.json").read_text())["scores"][0]
    assert again == pytest.approx(json.loads((run / "results.json").read_text())["scores"][3], rel=1e-4)


@pytest.mark.parametrize(
    ("method", "peft_option"),
    [
        pytest.param("osf", "osf", marks=pytest.mark.slow),
        ("sequential", "prompt"),
        pytest.param("sequential", "ia3", marks=pytest.mark.slow),
        pytest.param("l2p", "frozen", marks=pytest.mark.slow),
    ],
)
def test_merging_works_exactly_where_weights_change(
    method: str, peft_option: str, clpet, prose: Path, words: Path
) -> None:
    args = domain_args(prose, f"method={method}", f"peft={peft_option}")
    if peft_option == "prompt":
        args = tiny_args(words, "method=sequential", "peft=prompt")
    trained = clpet("train", *args)
    assert trained.code == 0, trained.err
    run = only()
    answer = clpet("export", run, "merged", "--merge")
    if peft_option in ("osf", "ia3"):
        assert answer.code == 0, answer.err
        again = domain_args(prose, "method=sequential", "model=local", "model.path=merged", "peft=none", "train.lr=0")
        assert clpet("train", *again, "output_dir=again").code == 0
        scores = json.loads((only("again/*/*/s*") / "results.json").read_text())["scores"][0]
        assert scores == pytest.approx(json.loads((run / "results.json").read_text())["scores"][3], rel=1e-3)
    else:
        assert refused(answer)
        assert "--merge" in answer.err


@pytest.mark.slow
def test_adapters_and_full_models_are_exported_unmerged(clpet, words: Path, prose: Path) -> None:
    assert clpet("train", "method=sequential", *domain_args(prose, "peft=none")).code == 0
    assert clpet("export", only(), "whole").code == 0
    assert json.loads(Path("whole/clpet.json").read_text())["what"] == "the whole model"
    args = tiny_args(words, "model=local", "model.path=backbone", "output_dir=second", "model.targets=[q_proj,v_proj]")
    shutil.copytree("whole", "backbone")
    assert clpet("train", "method=dynamic_conpet", *args).code == 0
    run = only("second/*/*/s*")
    assert clpet("export", run, "adapters").code == 0
    assert sorted(path.name for path in Path("adapters/adapters").iterdir()) == [
        "selector",
        "task000",
        "task001",
        "task002",
    ]
    base = transformers.AutoModel.from_pretrained("backbone")
    assert peft.PeftModel.from_pretrained(base, "adapters/adapters/task001").active_adapters == ["default"]
    assert sorted(path.stem for path in Path("adapters/heads").iterdir()) == [
        "selector",
        "task000",
        "task001",
        "task002",
    ]
    answer = clpet("export", run, "merged", "--merge")
    assert refused(answer)
    assert "chooses parameters for each text" in answer.err


def test_export_refuses(clpet, run: Path) -> None:
    answer = clpet("export", run, "adapters")
    assert refused(answer)
    assert "random weights" in answer.err
    Path("full").mkdir()
    Path("full/mine.txt").touch()
    answer = clpet("export", run, "full", "--merge")
    assert refused(answer)
    assert "is not an empty folder" in answer.err
    assert refused(clpet("export", "nowhere", "x"))
    assert refused(clpet("export", run, "x", "--merge", "--after", "7"))


def code_of(folder: str) -> str:
    """The Python code of an exported folder's model card."""
    return Path(folder, "README.md").read_text().partition("```python\n")[2].partition("```")[0]


def run_card(folder: str, texts: list[str]) -> dict[str, Any]:
    """The variables after the code of a model card, applied to these texts."""
    code = code_of(folder).replace("['a text', 'another']", repr(texts)).replace('folder = "."', f"folder = {folder!r}")
    variables: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), variables)
    return variables


@pytest.mark.parametrize("representation", ["mean", "cls", "mask"])
def test_the_code_of_a_model_card_answers_as_the_run(representation: str, clpet, words: Path) -> None:
    """The labels equal the recorded predictions for all test texts."""
    template = ["benchmark.template='{text} is {mask}'"] if representation == "mask" else []
    args = tiny_args(words, "method=replay", f"model.representation={representation}", *template)
    assert clpet("train", *args).code == 0
    run = only()
    assert clpet("export", run, "whole", "--merge").code == 0
    rows = [json.loads(line) for line in (words / "test.jsonl").read_text().splitlines()]
    recorded = pq.read_table(run / "predictions" / "after-003.parquet").to_pylist()
    by_task = [[row["text"] for row in rows if row["task"] == task] for task in ("fruit", "metal", "river")]
    answers = run_card("whole", [text for texts in by_task for text in texts])["answers"]
    assert len(answers) == 24
    assert answers == [row["prediction"] for row in recorded]


def test_a_model_card_generates_the_answers_of_the_run(clpet, words: Path) -> None:
    args = [*tiny_args(words, "method=sequential", "model=tiny_t5", "objective=text_to_text"), "benchmark.max_target=4"]
    args.remove("model=tiny")
    assert clpet("train", *args).code == 0
    run = only()
    assert clpet("export", run, "whole", "--merge").code == 0
    answers = run_card("whole", ["apple n6", "gold n7"])["answers"]
    assert all(isinstance(answer, str) for answer in answers)
    card = Path("whole/README.md").read_text()
    assert "AutoModelForSeq2SeqLM" in card
    assert "    clpet train tracking=off" in card
    assert "objective=text_to_text" in card
    assert str(words) not in card


def test_names_in_a_model_card_are_text(clpet, tmp_path: Path) -> None:
    names = {"fruit": "a|b <script>alert(1)</script>", "metal": "# title", "river": "``` x"}
    data = write_words(tmp_path / "words")
    for path in data.glob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps({**row, "task": names[row["task"]]}) + "\n" for row in rows))
    assert clpet("train", *tiny_args(data, "method=sequential")).code == 0
    assert clpet("export", only(), "whole", "--merge").code == 0
    card = Path("whole/README.md").read_text()
    assert "<script>" not in card.replace("\\<script>", "")
    assert card.count("```") == 2  # the fence of the code
    assert "| --- | ---: |" in card


@pytest.mark.slow
def test_peft_loads_the_card_of_adapters(clpet, words: Path, prose: Path) -> None:
    """An adapter for a backbone in a folder: the card's code loads both and answers as the run."""
    assert clpet("train", "method=sequential", *domain_args(prose, "peft=none")).code == 0
    assert clpet("export", only(), "backbone").code == 0
    assert "loss.exp()" in code_of("backbone")
    for method, alone in (("replay", True), ("dynamic_conpet", False)):
        args = tiny_args(words, "model=local", "model.path=backbone", f"output_dir={method}", "model.targets=[q_proj]")
        args.remove("model=tiny")
        assert clpet("train", f"method={method}", *args).code == 0
        run = only(f"{method}/*/*/s*")
        assert clpet("export", run, f"{method}_parts").code == 0
        card = Path(f"{method}_parts", "README.md").read_text()
        assert card.startswith("---\nlibrary_name: peft\n")
        assert ("clpet.load" in card) is not alone
        variables = run_card(f"{method}_parts", ["apple n6"])
        assert isinstance(variables["model"], peft.PeftModel)
        if alone:
            recorded = pq.read_table(run / "predictions" / "after-003.parquet").to_pylist()
            rows = [json.loads(line) for line in (words / "test.jsonl").read_text().splitlines()]
            texts = [row["text"] for task in ("fruit", "metal", "river") for row in rows if row["task"] == task]
            assert run_card(f"{method}_parts", texts)["answers"] == [row["prediction"] for row in recorded]
