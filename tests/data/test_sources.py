"""Sources of labelled data: tasks, labels, orders and texts of the shipped benchmarks and of the user's files."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from omegaconf import OmegaConf

from clpet.config.compose import compose_config
from clpet.data.benchmark import Example, normalize
from clpet.data.sources import PythonStdlib, Table
from clpet.data.sources.python_stdlib import _module_paragraphs
from clpet.data.tabular_files import read_local, row_text
from clpet.errors import DataError
from clpet.evaluation.data_inspection import inspect_data
from clpet.objectives import load
from tests.conftest import shared


def from_yaml(name: str, data_dir: Path | None = None, *overrides: str):
    """A benchmark as `clpet train benchmark=NAME` loads it."""
    from hydra import compose, initialize_config_dir

    from clpet.config.build import parse_config
    from clpet.config.compose import conf_dir
    from clpet.config.identity import register_resolvers

    register_resolvers()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("train", [f"benchmark={name}", *overrides])
    return load(parse_config(cfg), None)[1].load(str(data_dir) if data_dir else None)


def test_clinc150_is_ten_domains_of_fifteen() -> None:
    benchmark = from_yaml("clinc150", shared("data"))
    assert [(len(t.labels), len(t.train), len(t.test)) for t in benchmark.tasks] == [(15, 1500, 450)] * 10


def test_clinc150_in_fifteen_tasks_of_ten() -> None:
    benchmark = from_yaml("clinc150_15x10", shared("data"))
    assert [len(task.labels) for task in benchmark.tasks] == [10] * 15
    assert len(set(benchmark.labels)) == 150


@pytest.mark.slow
def test_long_sequence_keeps_label_spaces_apart_or_joins_them() -> None:
    folder = shared("data")
    chosen = "benchmark.tasks=[yelp,amazon,agnews,yahoo]"
    apart = from_yaml("long_sequence", folder, chosen)
    assert len(apart.labels) == 5 + 5 + 4 + 10
    joined = from_yaml("long_sequence", folder, chosen, "benchmark.label_sets={yelp: reviews, amazon: reviews}")
    assert len(joined.labels) == 5 + 4 + 10
    assert joined.task_labels(joined.names.index("yelp")) == joined.task_labels(joined.names.index("amazon"))
    union = from_yaml("long_sequence", folder, chosen, "benchmark.label_space=union")
    assert len(union.labels) == 5 + 4 + 10 - 1  # agnews and yahoo both have Sports


@pytest.mark.slow
def test_long_sequence_order_is_the_published_one() -> None:
    folder = shared("data", "long_sequence")
    published = json.loads((folder / "orders.json").read_text())
    for name, order in published.items():
        if name.startswith("long"):
            benchmark = from_yaml(
                "long_sequence", folder, f"benchmark.order={name}", "benchmark.max_train=20", "benchmark.max_test=20"
            )
            assert benchmark.names == order


def test_python_stdlib_is_five_tasks_of_four_modules() -> None:
    benchmark = from_yaml("python_stdlib")
    assert [len(task.labels) for task in benchmark.tasks] == [4] * 5
    counts: dict[str, int] = {}
    for task in benchmark.tasks:
        for split in ("train", "validation", "test"):
            for example in task.split(split):
                counts[example.target] = counts.get(example.target, 0) + 1
    assert max(counts.values()) <= 100
    assert min(counts.values()) >= 50


def test_python_stdlib_has_no_repeats_and_no_overlaps() -> None:
    found = inspect_data(from_yaml("python_stdlib"))
    assert found["overlaps"] == {}
    assert not any(count for task in found["tasks"].values() for count in task["repeats"].values())


def test_python_stdlib_is_the_same_every_time() -> None:
    first = from_yaml("python_stdlib").fingerprint()
    _module_paragraphs.cache_clear()
    assert from_yaml("python_stdlib").fingerprint() == first


def test_a_module_that_is_not_installed_is_reported() -> None:
    with pytest.raises(DataError, match="no source of the module nosuchmodule"):
        PythonStdlib(name="x", modules={"a": ["nosuchmodule"]}).load(None)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_user_files_in_three_formats(tmp_path: Path, suffix: str) -> None:
    """A single file is split into train, validation and test; column names are the user's."""
    rows = [{"body": f"text {i}", "topic": "ab"[i % 2]} for i in range(40)]
    path = tmp_path / f"mine.{suffix}"
    if suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif suffix == "csv":
        path.write_text("body,topic\n" + "".join(f"{row['body']},{row['topic']}\n" for row in rows))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    benchmark = Table(name="files", text="body", label="topic", classes_per_task=1).load(str(tmp_path))
    assert benchmark.names == ["task01", "task02"]
    assert [len(t.train) + len(t.validation) + len(t.test) for t in benchmark.tasks] == [20, 20]


def test_files_with_line_breaks_and_empty_labels(tmp_path: Path) -> None:
    """A CSV with line breaks inside quotes, integer labels with an empty cell, a JSON array."""
    text = "text,label\n" + "".join(f'"line {i}\nsecond",{i % 2}\n' for i in range(20))
    (tmp_path / "train.csv").write_text(text)
    (tmp_path / "test.json").write_text(json.dumps([{"text": "x", "label": 1.0}, {"text": "y", "label": 0}]))
    benchmark = Table(name="files").load(str(tmp_path))
    assert benchmark.labels == ["0", "1"]
    assert len(benchmark.tasks[0].test) == 2
    assert "second" in benchmark.tasks[0].train[0].text


def test_a_named_order_selects_its_tasks() -> None:
    benchmark = from_yaml("long_sequence", shared("data"), "benchmark.order=std_order1", "benchmark.max_train=20")
    assert benchmark.names == ["dbpedia", "amazon", "yahoo", "agnews"]


HUB_FORMS = {  # the columns that the hub gives, found in a published text
    "yelp": r"Text: (?P<text>.*)",
    "mnli": r"sentence 1: (?P<premise>.*?)\nsentence 2: (?P<hypothesis>.*)",
    "copa": r'Which sentence is the (?P<question>cause|effect) of "(?P<premise>.*)"\? Choose one between A and B.\nA: (?P<choice1>.*)\nB: (?P<choice2>.*)',
    "qqp": r"first sentence: (?P<question1>.*?)\nsecond sentence: (?P<question2>.*)",
    "imdb": r"(?P<text>.*)",
    "sst2": r"Text: (?P<sentence>.*)",
    "dbpedia": r"Title: (?P<title>.*?)\nText: (?P<content>.*)",
    "multirc": r"paragraph: (?P<paragraph>.*)\nquestion: (?P<question>.*?)\ncandidate answer: (?P<answer>.*)",
    "boolq": r"question: (?P<question>.*?)\npassage: (?P<passage>.*)",
    "wic": r"word: (?P<word>.*?)\n(?P<sentence1>.*?)\n(?P<sentence2>.*)",
}
HUB_FORMS |= dict.fromkeys(("cb", "rte"), HUB_FORMS["mnli"])


def test_the_hub_route_of_long_sequence_builds_the_published_texts_or_refuses() -> None:
    """The hub's columns, extracted from published texts, reproduce these texts; the instructions are published ones."""
    config = OmegaConf.to_container(compose_config(["benchmark=long_sequence"]).benchmark)
    assert set(config["folders"]) - set(config["hub_tasks"]) == {"amazon", "agnews", "yahoo"}
    for task in config["folders"]:
        rows = (
            pyarrow.parquet.read_table(shared("data", "long_sequence", task, "test.parquet")).slice(0, 20).to_pylist()
        )
        assert {row["instruction"] for row in rows} == {config["instructions"][task]}
        for row in rows if task in config["hub_tasks"] else ():
            columns = re.fullmatch(HUB_FORMS[task], row["text"], re.DOTALL).groupdict()
            spec = config["hub_tasks"][task]["text"]
            assert (row_text(spec, columns) if "{" in spec else columns[spec]) == row["text"]
    for name in ("amazon", "agnews", "yahoo"):
        with pytest.raises(DataError, match=f"task {name} of long_sequence has no data set on the hub"):
            from_yaml("long_sequence", None, f"benchmark.tasks=[{name}]", "benchmark.order=listed")


def test_a_data_set_in_the_hubs_layout(tmp_path: Path) -> None:
    """Read by `datasets` itself: label ids become names, columns are renamed, oos is dropped."""
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "intent": datasets.ClassLabel(names=["x", "oos", "y"])}
    )
    rows = {"text": [f"t{i}" for i in range(30)], "intent": [i % 3 for i in range(30)]}
    for split in ("train", "test"):
        (tmp_path / "data").mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(
            tmp_path / "data" / f"{split}-00000-of-00001.parquet"
        )
    source = Table(
        name="hubbed", hub=str(tmp_path), hub_columns={"label": "intent"}, drop_labels=["oos"], classes_per_task=2
    )
    benchmark = source.load(None)
    assert benchmark.labels == ["x", "y"]
    assert len(benchmark.tasks[0].test) == 20


def test_repeats_and_overlaps_are_counted(words: Path, tmp_path: Path) -> None:
    lines = [
        {"text": text, "label": "ab"[i % 2]} for i, text in enumerate(["One!", "one", "two", "three", "four", "five"])
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "test.jsonl").write_text(json.dumps({"text": "TWO.", "label": "a"}) + "\n")
    benchmark = Table(name="files", validation_share=0).load(str(tmp_path))
    found = inspect_data(benchmark)
    assert found["tasks"]["task01"]["repeats"]["train"] == 1
    assert found["overlaps"] == {"test in train": 1}
    assert found["warnings"] == ["1 of 1 test texts of files also occur in train"]


def test_normalize_ignores_case_and_punctuation() -> None:
    assert normalize("Hello,  WORLD! 3") == "helloworld3"


def test_fingerprint_changes_with_the_text(words: Path) -> None:
    one = Table(name="files", task="task").load(str(words))
    two = Table(name="files", task="task").load(str(words))
    two.tasks[0].test[0] = Example("changed", two.tasks[0].test[0].target)
    assert one.fingerprint() != two.fingerprint()
    assert np.all([one.fingerprint() == Table(name="files", task="task").load(str(words)).fingerprint()])


@pytest.mark.slow
def test_bert_cl5_has_33_labels_in_the_published_orders() -> None:
    """Yelp and Amazon share five labels; the sports labels of AG News and Yahoo are distinct."""
    folder = shared("data", "long_sequence")
    orders = {
        "order4": ["agnews", "yelp", "amazon", "yahoo", "dbpedia"],
        "order5": ["yelp", "yahoo", "amazon", "dbpedia", "agnews"],
        "order6": ["dbpedia", "yahoo", "agnews", "amazon", "yelp"],
        "order7": ["yelp", "agnews", "dbpedia", "amazon", "yahoo"],
    }
    for name, order in orders.items():
        benchmark = from_yaml(
            "bert_cl5", folder, f"benchmark.order={name}", "benchmark.max_train=40", "benchmark.max_test=40"
        )
        assert benchmark.names == order
        assert len(benchmark.labels) == 33
        assert benchmark.task_labels(order.index("yelp")) == benchmark.task_labels(order.index("amazon"))
        assert {"agnews: Sports", "yahoo: Sports"} <= set(benchmark.labels)


def test_bert_cl5_keeps_the_published_sizes(tmp_path: Path) -> None:
    """120,000 texts minus 4 % for validation leave 115,000 for training, without overlap."""
    (tmp_path / "agnews").mkdir()
    for split, count in (("train", 120_000), ("test", 7_600)):
        table = pyarrow.table(
            {"text": [f"{split} {i}" for i in range(count)], "label": [str(i % 4) for i in range(count)]}
        )
        pyarrow.parquet.write_table(table, tmp_path / "agnews" / f"{split}.parquet")
    (task,) = from_yaml("bert_cl5", tmp_path, "benchmark.tasks=[agnews]", "benchmark.order=listed").tasks
    assert (len(task.train), len(task.validation), len(task.test)) == (115_000, 4_800, 7_600)
    assert not {example.text for example in task.train} & {example.text for example in task.validation}


def test_t5_fewshot_has_sixteen_of_every_class_and_answers_in_words() -> None:
    benchmark = from_yaml("t5_fewshot", shared("data"), "benchmark.order=order3", "benchmark.max_test=20")
    assert benchmark.names == ["yahoo", "amazon", "agnews", "dbpedia"]
    assert [len(task.train) for task in benchmark.tasks] == [160, 80, 64, 224]
    assert set(benchmark.tasks[2].labels) == {"world", "sports", "business", "science"}
    assert set(benchmark.tasks[1].labels) == {"terrible", "bad", "middle", "good", "wonderful"}
    assert len(set(benchmark.tasks[3].labels)) == 14
    assert "computers and internet" in benchmark.tasks[0].labels


def domains(folder: Path) -> Path:
    """100 rows of each of the three domains, without a test split."""
    for task, labels in (
        ("finance", ["negative", "neutral"]),
        ("mmlu", ["A", "B", "C", "D"]),
        ("medical", ["Rest.", "See a doctor."]),
    ):
        (folder / task).mkdir(parents=True)
        rows = [{"text": f"{task} {i}", "label": labels[i % len(labels)]} for i in range(100)]
        (folder / task / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_llama_domains_cuts_its_test_split_without_replacement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    benchmark = from_yaml("llama_domains", domains(tmp_path))
    assert benchmark.names == ["finance", "mmlu", "medical"]
    for task in benchmark.tasks:
        texts = [example.text for split in ("train", "validation", "test") for example in task.split(split)]
        assert len(set(texts)) == len(texts) == 100
        assert 14 <= len(task.test) <= 16
    assert [task.metric for task in benchmark.tasks] == ["first_word", "first_word", "bert_score"]
    assert benchmark.template == "[INST] {text} [/INST]"
    assert not benchmark.tasks[2].labels


def test_bert_score_without_its_library_is_refused_before_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two tasks that do not need it can be run alone."""
    from clpet.errors import ConfigError

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'clpet\[bert-score\]'"):
        from_yaml("llama_domains", tmp_path)
    assert (
        len(
            from_yaml(
                "llama_domains", domains(tmp_path / "data"), "benchmark.tasks=[finance,mmlu]", "benchmark.order=listed"
            )
        )
        == 2
    )


def test_json_lines_with_a_byte_order_mark_are_read_and_lone_surrogates_refused(tmp_path: Path) -> None:
    """No tokenizer can encode half of an emoji (a lone surrogate)."""
    path, row = tmp_path / "train.jsonl", {"text": "a\u2028b 😀", "label": "x"}
    path.write_text(json.dumps(row) + "\n\n" + json.dumps({"text": "c", "more": 1}) + "\n", encoding="utf-8-sig")
    found = read_local(tmp_path, {"train": "train"})["train"]
    assert found.columns == {"text", "label", "more"}
    assert found.values == [{**row, "more": None}, {"text": "c", "label": None, "more": 1}]
    path.write_text(json.dumps(row) + "\n" + '{"text": "half \\ud83d"}\n')
    assert read_local(tmp_path, {"train": "train"})["train"].bad == {2: "half of a character (a lone surrogate)"}
    path.write_text('{"text": "a"}\n[1]\n')
    assert read_local(tmp_path, {"train": "train"})["train"].bad == {2: "a value that is not an object"}


def test_csv_cells_are_text(tmp_path: Path) -> None:
    """Labels 1 and 01 are distinct, numbers are text, and empty cells are missing."""
    (tmp_path / "train.csv").write_text("text,label,more\n12,01,\n13,1,true\n")
    found = read_local(tmp_path, {"train": "train"})["train"]
    assert found.values == [{"text": "12", "label": "01", "more": None}, {"text": "13", "label": "1", "more": "true"}]
