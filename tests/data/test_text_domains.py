"""Domains of plain text: files, splits, sizes, groups, order and decontamination."""

import json
from pathlib import Path

import pytest

from clpet.data.benchmark import SPLITS
from clpet.data.sources import Table
from clpet.data.sources.text_domains import Balance, TextDomains
from clpet.data.traits import LABELS, PLAIN_TEXT
from clpet.errors import ConfigError, DataError
from clpet.evaluation.data_inspection import inspect_data
from tests.conftest import shared
from tests.data.test_documents import letters
from tests.data.test_sources import from_yaml


def write_domain(folder: Path, seed: int, documents: int = 50, length: int = 400) -> None:
    folder.mkdir(parents=True)
    rows = [{"text": letters(1000 * seed + i, length)} for i in range(documents)]
    (folder / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def four(tmp_path: Path) -> Path:
    for seed, name in enumerate(("ant", "bee", "cat", "dog")):
        write_domain(tmp_path / name, seed + 1)
    return tmp_path


def domains(folder: Path, **knobs) -> TextDomains:
    return TextDomains(name="mine", **{"test_share": 0.1, "validation_share": 0.1, **knobs})


def texts(documents) -> list[str]:
    return [example.text for example in documents]


def test_every_sub_folder_is_a_domain_split_by_document(four: Path) -> None:
    benchmark = domains(four).load(str(four))
    assert benchmark.names == ["ant", "bee", "cat", "dog"]
    for task in benchmark.tasks:
        assert (task.labels, task.metric) == ((), "perplexity")
        parts = [texts(task.split(split)) for split in SPLITS]
        assert [len(part) for part in parts] == [41, 4, 5]
        assert len(set().union(*parts)) == 50
    assert benchmark.labels == []


def test_splits_follow_the_names_of_files_and_folders(tmp_path: Path) -> None:
    def put(name: str, *lines: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("jsonl"):
            (tmp_path / name).write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
        else:
            (tmp_path / name).write_text("".join(lines))

    put("a/train-1.jsonl", "one"), put("a/train-2.jsonl", "two"), put("a/dev.jsonl", "three")
    put("a/test.jsonl", "four"), put("a/LICENCE.txt", "none of it")
    put("b/train/x.txt", "one"), put("b/train/y.txt", "two"), put("b/valid/z.txt", "three"), put("b/test/w.txt", "four")
    put("c.txt", *(f"line {i}\n" for i in range(2000)))
    put("d/testimony.txt", "one"), put("d/validity.txt", "two"), put("d/other.txt", "three")
    benchmark = domains(tmp_path).load(str(tmp_path))
    for task in benchmark.tasks[:2]:
        assert [texts(task.split(split)) for split in SPLITS] == [["one", "two"], ["three"], ["four"]]
    c, d = benchmark.tasks[2:]
    assert not c.train.has_boundaries
    assert "".join(texts(c.train) + texts(c.validation) + texts(c.test)) == (tmp_path / "c.txt").read_text()
    assert [len(d.split(split)) for split in SPLITS] == [1, 1, 1]  # no train file: one pool


def test_text_domains_as_their_readme_counts_them() -> None:
    """Pieces and documents of the published splits; decontamination can add elements to a test split."""
    folder = shared("data", "text_domains")
    benchmark = from_yaml("text_domains", folder, "benchmark.decontaminate=false")
    found = {task.name: [task.split(split).num_pieces for split in SPLITS] for task in benchmark.tasks}
    assert found["medical"] == [5338, 269, 254]
    assert found["python_peps"] == [4545, 224, 234]
    assert found["wikipedia"] == [1308, 95, 104]
    documents = {task.name: [len(task.split(split)) for split in SPLITS] for task in benchmark.tasks}
    assert documents["fiction"] == [34, 2, 2]
    assert documents["medical"] == [2120, 101, 95]
    assert documents["arxiv_mathematics"] == [12478, 636, 611]
    assert inspect_data(benchmark)["warnings"] == [
        "test texts were not compared to train (benchmark.decontaminate=false)"
    ]


def test_pieces_of_real_test_text_that_occur_in_train_are_left_out() -> None:
    folder = shared("data", "text_domains")
    knobs = ["benchmark.tasks=[python_peps]", "benchmark.max_test=30"]
    before = from_yaml("text_domains", folder, *knobs, "benchmark.decontaminate=false").tasks[0]
    after = from_yaml("text_domains", folder, *knobs).tasks[0]
    train, remains = ("\0".join(texts(documents)) for documents in (before.train, after.test))
    pieces = [text[at : at + 200] for text in texts(before.test) for at in range(0, len(text) - 200, 400)]
    known = {piece for piece in pieces if piece in train}
    assert after.test.num_contaminated > len(known) > 10
    assert [piece for piece in pieces if (piece in remains) == (piece in known)] == []


def test_a_limit_of_one_domain_does_not_depend_on_the_others(four: Path) -> None:
    whole = domains(four, max_train=10, max_test=2).load(str(four))
    some = domains(four, max_train=10, max_test=2, tasks=["cat", "ant"]).load(str(four))
    assert some.names == ["cat", "ant"]
    for task in some.tasks:
        other = whole.tasks[whole.names.index(task.name)]
        assert (len(task.train), len(task.validation), len(task.test)) == (10, 2, 2)
        assert [task.split(split).fingerprint() for split in SPLITS] == [
            other.split(split).fingerprint() for split in SPLITS
        ]


def sized(folder: Path, sizes: list[int]) -> Path:
    for name, size in zip("abcd", sizes, strict=True):
        (folder / name).mkdir()
        (folder / name / "train.txt").write_text("x" * size)
        (folder / name / "test.txt").write_text(name)
    return folder


def test_domains_are_balanced_by_bytes_of_train(tmp_path: Path) -> None:
    folder = str(sized(tmp_path, [10, 40, 25, 5]))

    def sizes(**knobs) -> list[int]:
        return [task.train.bytes for task in domains(tmp_path, **knobs).load(folder).tasks]

    assert sizes() == [10, 40, 25, 5]
    assert sizes(balance=Balance.min) == [5, 5, 5, 5]
    assert sizes(balance=Balance.cap, max_bytes=20) == [10, 20, 20, 5]
    assert sizes(drop_above=25) == [10, 25, 5]
    assert sizes(balance=Balance.min, base="d") == [10, 10, 10]  # the base corpus is not balanced


def test_a_base_corpus_has_a_limit_separate_from_the_tasks(four: Path) -> None:
    alike, apart = (domains(four, base="ant", max_train=2, max_base=most).load(str(four)) for most in (None, 4))
    assert [len(task.train) for task in [*alike.tasks, *apart.tasks]] == [2] * 6
    assert alike.base is not None
    assert apart.base is not None
    assert (len(alike.base.train), len(apart.base.train)) == (2, 4)


def test_a_base_corpus_is_not_a_task_but_counts_as_train(four: Path) -> None:
    """Pieces of test texts that occur in it are left out, too."""
    copied = json.loads((four / "ant" / "all.jsonl").read_text().splitlines()[0])["text"]
    (four / "bee" / "test.jsonl").write_text(json.dumps({"text": letters(1, 300) + copied[:200]}) + "\n")
    (four / "bee" / "all.jsonl").rename(four / "bee" / "train.jsonl")
    (four / "ant" / "all.jsonl").rename(four / "ant" / "train.jsonl")
    (four / "ant" / "test.jsonl").write_text(json.dumps({"text": letters(2, 300)}) + "\n")
    benchmark = domains(four, base="ant").load(str(four))
    assert benchmark.names == ["bee", "cat", "dog"]
    assert benchmark.base is not None
    assert benchmark.base.name == "ant"
    assert benchmark.tasks[0].test.num_contaminated == 1  # of the pieces at 0, 200 and 300 the last


def test_what_is_left_out_is_recorded(four: Path) -> None:
    train = [json.loads(line)["text"] for line in (four / "ant" / "all.jsonl").read_text().splitlines()]
    (four / "bee" / "all.jsonl").rename(four / "bee" / "train.jsonl")
    (four / "bee" / "test.jsonl").write_text(json.dumps({"text": train[7][30:230] + letters(5, 350)}) + "\n")
    found = inspect_data(domains(four).load(str(four)))
    assert found["tasks"]["bee"]["dropped"] == 1
    assert found["tasks"]["bee"]["bytes"]["test"] == 350
    assert found["overlaps"] == {"test pieces in train": 1}
    assert found["warnings"] == [
        "domain bee: 1 pieces of 200 characters of its test texts also occur in train and are left out"
    ]
    (four / "bee" / "test.jsonl").write_text(json.dumps({"text": train[7][30:230]}) + "\n")
    with pytest.raises(DataError, match="every piece of the test texts of domain bee also occurs in train"):
        domains(four).load(str(four))


def test_groups_follow_the_order(four: Path) -> None:
    groups = {"pets": ["cat", "dog"], "insects": ["bee", "ant"]}
    benchmark = domains(four, groups=groups, order="reversed", base="cat").load(str(four))
    assert benchmark.groups == {"pets": ["dog"], "insects": ["bee", "ant"]}
    swapped = domains(four, groups=groups, source_order=["insects", "pets"], order="reversed").load(str(four))
    assert swapped.names == ["bee", "ant", "dog", "cat"]
    with pytest.raises(DataError, match=r"benchmark\.groups\.pets names owl, which is not a domain"):
        domains(four, groups={"pets": ["owl"]}).load(str(four))


def test_similar_domains_follow_each_other_from_the_reference(tmp_path: Path) -> None:
    words = {"fruit": "apple pear plum fig", "tree": "apple pear oak elm", "river": "rhine nile oder elbe"}
    for name, line in words.items():
        (tmp_path / "in" / name).mkdir(parents=True)
        for i in range(30):
            (tmp_path / "in" / name / f"{i}.txt").write_text(" ".join(line.split() * (i + 1)))
    (tmp_path / "elsewhere.txt").write_text("oak elm oak elm oak\n" * 50)
    knobs = {"order": "similar", "order_encoder": "hashed", "decontaminate": False}
    for reference, first in (("river", "river"), (str(tmp_path / "elsewhere.txt"), "tree")):
        benchmark = domains(tmp_path, reference=reference, **knobs).load(str(tmp_path / "in"))
        assert benchmark.names[0] == first
        assert benchmark.order["encoder"] == "hashed (no sentence encoder)"
    assert benchmark.names == ["tree", "fruit", "river"]
    limited = domains(tmp_path, reference="river", max_train=1, **knobs).load(str(tmp_path / "in"))
    assert limited.names == domains(tmp_path, reference="river", **knobs).load(str(tmp_path / "in")).names


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"base": "owl"}, "benchmark.base=owl is not a domain of mine; available: ant, bee, cat, dog"),
        ({"reference": "owls"}, "benchmark.reference=owls is neither a domain of mine nor a file or folder"),
        ({"tasks": ["ant", "cot"]}, "benchmark.tasks names cot, which mine does not have; did you mean cat"),
        ({"domains": ["ant", "emu"]}, "has no domain emu"),
        ({"drop_above": 10}, "no domains left"),
        ({"order": "alphabetical"}, "benchmark.order=alphabetical is none of"),
    ],
)
def test_unknown_names_are_reported(four: Path, knobs: dict, message: str) -> None:
    with pytest.raises(DataError, match=message.replace(".", r"\.")):
        domains(four, **knobs).load(str(four))


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"base": "a", "tasks": ["a"]}, "benchmark.base must be none of benchmark.tasks"),
        ({"balance": Balance.cap}, "benchmark.max_bytes must be set with balance=cap"),
        ({"max_bytes": 5}, "benchmark.max_bytes must be set with balance=cap"),
        ({"shots": 3}, "benchmark.shots must be null"),
    ],
)
def test_inconsistent_options_are_refused(knobs: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        TextDomains(name="d", **knobs)


def test_labelled_data_is_not_read_as_plain_text() -> None:
    with pytest.raises(ConfigError, match="objective=language_modeling does not suit benchmark=x, which has labels"):
        Table(name="x").reading_for("language_modeling", PLAIN_TEXT)


def test_plain_text_is_not_read_as_labelled_data() -> None:
    message = (
        "objective=classification does not suit benchmark=d, which has plain text: use objective=language_modeling"
    )
    with pytest.raises(ConfigError, match=message):
        TextDomains(name="d").reading_for("classification", LABELS)


def test_domains_without_text_are_refused(four: Path, tmp_path: Path) -> None:
    (four / "eel").mkdir()
    (four / "eel" / "all.jsonl").write_text('{"text": "  "}\n')
    with pytest.raises(DataError, match="domain eel of benchmark mine is empty"):
        domains(four).load(str(four))
    (four / "eel" / "all.jsonl").write_text('{"text": "alone"}\n')
    with pytest.raises(
        DataError, match="domain eel of benchmark mine has a single document, so no test split can be cut"
    ):
        domains(four).load(str(four))
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="has no domains: a sub-folder or a file"):
        domains(four).load(str(tmp_path / "nothing"))
    (tmp_path / "nothing" / "train.txt").write_text("text")
    with pytest.raises(DataError, match="train are splits, not domains: make a sub-folder for each domain"):
        domains(four).load(str(tmp_path / "nothing"))
    with pytest.raises(DataError, match="set data_dir=FOLDER"):
        domains(four).load(None)


def test_a_method_for_labels_is_refused(clpet) -> None:
    done = clpet("train", "method=dynamic_conpet", "benchmark=python_domains", "model=tiny", "tracking=off")
    assert done.code == 2
    assert "language_modeling" in done.err
    assert "dynamic_conpet" in done.err


# The standard library


def test_clpet_data_prints_domains(clpet, four: Path) -> None:
    done = clpet("data", "text_domains", f"data_dir={four}", "benchmark.test_share=0.1", "benchmark.base=dog")
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert lines[0].split()[:3] == ["domain", "documents", "pieces"]
    assert lines[1].split()[:3] == ["ant", "44/1/5", "44/1/5"]
    assert any(line.startswith("dog (base)") for line in lines)
    assert "overlap: none" in done.out
