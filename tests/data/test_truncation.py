"""Truncation of texts and answers, and how it is reported."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from clpet.data.batches import EncodedDataset
from clpet.data.benchmark import Example, Truncate
from clpet.data.sources import Table
from clpet.data.template import Template, tokens_to_keep
from clpet.errors import ConfigError, ModelError
from clpet.evaluation.data_inspection import cut_counts
from clpet.models.backbone import byte_tokenizer
from clpet.objectives.answer_encoding import encode_answers
from tests.conftest import shared, tiny_args
from tests.data.test_sources import from_yaml


def letters(example: Example, truncate: Truncate, length: int = 14) -> str:
    """The letters of `<text>!` that remain after truncation, with a byte tokenizer that adds [CLS] and [SEP]."""
    tokenizer = byte_tokenizer()
    found = Template(tokenizer, "<{text}>!", length, truncate=truncate).encode([example])
    assert found.lengths == [len(example.text) + 5]
    assert len(found.rows[0]) <= length
    return tokenizer.decode(found.rows[0], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("truncate", "plain", "kept"),
    [
        ("end", "<abcdefghi>!", "<abcdefnop>!"),
        ("start", "<hijklmnop>!", "<hijklmnop>!"),
        ("middle", "<abcdemnop>!", "<abcklmnop>!"),
    ],
)
def test_a_text_is_cut_at_the_end_that_truncate_names(truncate: str, plain: str, kept: str) -> None:
    """16 letters, room for 9. With n, o and p protected, 6 others remain, from the end that is not cut."""
    text, side = "abcdefghijklmnop", Truncate(truncate)
    assert letters(Example(text), side) == plain
    assert letters(Example(text, protected_spans=((13, 16),)), side) == kept
    assert letters(Example("abc"), side) == "<abc>!"


def test_protected_spans_are_cut_if_they_do_not_fit() -> None:
    offsets = [(i, i + 1) for i in range(20)]
    assert tokens_to_keep(offsets, [], 4, [(10, 18)], Truncate.end) == [10, 11, 12, 13]
    assert tokens_to_keep(offsets, [], 4, [(10, 18)], Truncate.middle) == [10, 11, 16, 17]
    assert tokens_to_keep(offsets, [], 6, [(0, 2), (18, 20)], Truncate.start) == [0, 1, 16, 17, 18, 19]


def test_protected_spans_move_with_markers() -> None:
    """[m0] becomes one reserved token of another length before the text is cut."""
    tokenizer = byte_tokenizer()
    text = "[m0]" + "a" * 30 + "QUESTION"
    found = Template(tokenizer, "{text}", 20).encode([Example(text, protected_spans=((34, 42),))])
    assert tokenizer.decode(found.rows[0]).endswith("QUESTION[SEP]")
    assert found.lengths == [41]


def test_full_lengths_of_answers_are_recorded() -> None:
    """Letters plus the end token."""
    found = encode_answers(byte_tokenizer(), ["abcdef", "ab"], 5)
    assert [len(row) for row in found.rows] == [5, 3]
    assert found.lengths == [7, 3]
    pool = EncodedDataset(
        [[1], [1, 2], [3]],
        [0] * 3,
        [0] * 3,
        0,
        full_lengths=[4, 2, 1],
        answers=[[1], [2], [3]],
        full_answer_lengths=[2, 1, 9],
    )
    assert pool.num_truncated(pool.rows_of(0)) == (1, 2)


def test_matches_of_cut_last_are_protected(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"text": f"passage {i}" + "\nquestion: who?" * (i % 4 > 0), "label": "ab"[i % 2]} for i in range(16)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with caplog.at_level(logging.WARNING):
        task = Table(name="made", cut_last={"task01": "(?s)\nquestion:.*"}).load(str(tmp_path)).tasks[0]
    for example in [*task.train, *task.validation, *task.test]:
        assert [example.text[a:b] for a, b in example.protected_spans] == ["\nquestion: who?"] * (
            "question" in example.text
        )
    assert "matches nothing in 4 of 16 texts of task task01" in caplog.text
    with pytest.raises(ConfigError, match=r"benchmark.cut_last must be a regular expression"):
        Table(cut_last="(")


def test_prompts_of_long_sequence_keep_their_question() -> None:
    """With the default length, although the passage before it is far too long; without `cut_last` all lose it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared("weights", "base-5.9M"))
    chosen = [
        "benchmark.tasks=[multirc,cb]",
        "benchmark.order=listed",
        "objective=text_to_text",
        "benchmark.max_train=20",
        "benchmark.max_test=50",
    ]
    benchmark = from_yaml("long_sequence", shared("data"), *chosen)
    template = Template(tokenizer, benchmark.template, benchmark.max_length, end=False)
    for task, key in zip(benchmark.tasks, ("question: ", "sentence 2: "), strict=True):
        found = template.encode(task.test)
        assert sum(length > benchmark.max_length for length in found.lengths) > 25
        for example, row in zip(task.test, found.rows, strict=True):
            asked = example.text[example.text.rindex(key) :].strip()
            assert asked in tokenizer.decode(row)


def test_truncation_is_printed_and_recorded(clpet, words: Path, tmp_path: Path) -> None:
    """By `clpet data`, in the header of a run and in its record, with a warning above 5 %."""
    args = tiny_args(
        words, "benchmark.max_length=12", "train.epochs=1", "benchmark.tasks=[fruit]", "evaluation.matrix=last"
    )
    shown = clpet("data", "files", *[word for word in args if word != "benchmark=files"])
    header, first = (line.split() for line in shown.out.splitlines()[:2])
    assert header[-3:] == ["max", "cut", "repeats"]
    assert int(first[-3]) > 12  # the longest before the cut
    assert "warning: " in shown.out
    run = clpet("train", "method=sequential", *args, "output_dir=out")
    assert run.code == 0
    record = json.loads(next((tmp_path / "out").glob("**/run.json")).read_text())["data"]
    (texts, total), answers = cut_counts(record["tasks"]).values()
    assert 0.05 < texts / total < 1
    assert answers == (0, total)
    assert f"cut: {texts} of {total} texts at 12 tokens (end)" in run.out
    assert f"{texts} of {total} texts (" in run.out
    assert "benchmark.truncate=end" in run.out


def test_the_default_length_is_lowered_to_the_maximum_of_the_model(make, caplog: pytest.LogCaptureFixture) -> None:
    """With a warning; only a length that was set on the command line is refused."""
    with caplog.at_level(logging.WARNING):
        run = make("method=sequential", "benchmark.max_length=600")
    assert run.benchmark.max_length == 512
    assert "lowered from 600 to 512: this model reads at most 512 tokens" in caplog.text
    benchmark = replace(run.benchmark, max_length=600, length_set=True)
    with pytest.raises(ModelError, match=r"max_length=600, but this model reads at most 512 tokens"):
        run.method.objective.fit_length(benchmark)


def test_a_tokenizer_without_special_tokens_works(clpet, words: Path, tmp_path: Path) -> None:
    """Padding is masked, so a tokenizer without padding, unknown and end tokens suffices to learn labels."""
    folder = shutil.copytree(shared("weights", "base-5.9M"), tmp_path / "model", copy_function=shutil.copyfile)
    for name, gone in (
        ("tokenizer_config.json", ("pad_token", "eos_token", "unk_token")),
        ("config.json", ("pad_token_id",)),
    ):
        settings = json.loads((folder / name).read_text())
        (folder / name).chmod(0o644)
        (folder / name).write_text(json.dumps({key: value for key, value in settings.items() if key not in gone}))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    args = [
        word
        for word in tiny_args(
            words, "train.epochs=1", "benchmark.max_train=4", "benchmark.max_test=4", "benchmark.tasks=[fruit]"
        )
        if word != "model=tiny"
    ]
    model = ["model=local", f"model.path={folder}", "method=sequential", "evaluation.matrix=last"]
    found = clpet("train", *args, *model)
    assert found.code == 0, found.err
    written = clpet("train", *args, *model, "objective=text_to_text")
    assert (written.code, "no end token" in written.err) == (2, True)
