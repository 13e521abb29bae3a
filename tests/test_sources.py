"""Benchmarks: what their tasks hold."""

import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from clpet.data import inspect_data
from clpet.errors import DataError
from clpet.sources import PythonStdlib, Table
from clpet.splits import by_label, sample, split_off
from clpet.tasks import Example, normalised, order_names

from .conftest import shared


def from_yaml(name: str, data_dir: Path | None = None, *overrides: str):
    """A benchmark as `clpet train benchmark=NAME` loads it."""
    from hydra import compose, initialize_config_dir

    from clpet.config import build, conf_dir, register_resolvers, typed

    register_resolvers()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("train", [f"benchmark={name}", *overrides])
    return build(typed(cfg).benchmark, "benchmark").load(str(data_dir) if data_dir else None)


def test_clinc150_is_ten_domains_of_fifteen() -> None:
    benchmark = from_yaml("clinc150", shared("data"))
    assert [(len(t.labels), len(t.train), len(t.test)) for t in benchmark.tasks] == [(15, 1500, 450)] * 10


def test_clinc150_in_fifteen_tasks_of_ten() -> None:
    benchmark = from_yaml("clinc150_15x10", shared("data"))
    assert [len(task.labels) for task in benchmark.tasks] == [10] * 15
    assert len(set(benchmark.labels)) == 150


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
    assert from_yaml("python_stdlib").fingerprint() == from_yaml("python_stdlib").fingerprint()


def test_a_module_that_is_not_installed_is_named() -> None:
    with pytest.raises(DataError, match="no source of the module nosuchmodule"):
        PythonStdlib(name="x", modules={"a": ["nosuchmodule"]}).load(None)


def test_orders() -> None:
    names = ["a", "b", "c", "d"]
    assert order_names(names, "listed", {}, 0) == names
    assert order_names(names, "reversed", {}, 0) == names[::-1]
    assert order_names(names, ["c", "a", "d", "b"], {}, 0) == ["c", "a", "d", "b"]
    drawn = order_names(names, "random", {}, 3)
    assert sorted(drawn) == names
    assert drawn == order_names(names, "random", {}, 3)
    assert {tuple(order_names(names, "random", {}, seed)) for seed in range(9)} != {tuple(drawn)}


@pytest.mark.parametrize("order", ["nosuch", ["a", "b"], ["a", "b", "c", "c"]])
def test_an_order_that_does_not_fit_is_refused(order) -> None:
    with pytest.raises(DataError, match=r"benchmark\.order"):
        order_names(["a", "b", "c"], order, {}, 0)


def test_a_sample_is_spread_over_labels_and_always_the_same() -> None:
    examples = [Example(str(i), "ab"[i % 2] if i < 20 else "c") for i in range(23)]
    chosen = sample(examples, 6)
    assert sorted(e.target for e in chosen) == ["a", "a", "b", "b", "c", "c"]
    assert chosen == sample(examples, 6)


def test_a_split_never_takes_a_label_away() -> None:
    examples = [Example("x", "rare")] + [Example(str(i), "often") for i in range(30)]
    rest, part = split_off(examples, 0.2)
    assert {e.target for e in rest} == {"rare", "often"}
    assert len(part) == 6


def test_a_partition_must_cover_the_labels() -> None:
    examples = {"train": [Example("x", "a"), Example("y", "b")]}
    with pytest.raises(DataError, match="does not cover"):
        by_label(examples, {"t": ["a"]})
    with pytest.raises(DataError, match="lacks"):
        by_label(examples, {"t": ["a", "b", "c"]})
    with pytest.raises(DataError, match="two tasks"):
        by_label(examples, {"t": ["a", "b"], "u": ["b"]})


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_own_files_in_three_formats(tmp_path: Path, suffix: str) -> None:
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


def test_files_as_people_have_them(tmp_path: Path) -> None:
    """A CSV with line breaks inside quotes, whole numbers with a hole as labels, a JSON array."""
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


def test_a_data_set_in_the_hubs_layout(tmp_path: Path) -> None:
    """Label ids become names, renamed columns are found, oos is dropped: read by `datasets` itself."""
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


def test_normalised_ignores_case_and_punctuation() -> None:
    assert normalised("Hello,  WORLD! 3") == "helloworld3"


def test_fingerprint_changes_with_the_text(words: Path) -> None:
    one = Table(name="files", task="task").load(str(words))
    two = Table(name="files", task="task").load(str(words))
    two.tasks[0].test[0] = Example("changed", two.tasks[0].test[0].target)
    assert one.fingerprint() != two.fingerprint()
    assert np.all([one.fingerprint() == Table(name="files", task="task").load(str(words)).fingerprint()])
