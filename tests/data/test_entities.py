"""ConPET's six benchmarks: label partitions, splits, mentions, cleaning, and invalid input."""

import json
import random
from pathlib import Path

import pytest

from clpet.config.build import build, parse_config
from clpet.config.compose import compose_config
from clpet.data.benchmark import SPLITS, Benchmark
from clpet.data.sources.entities import Relations, Typing, mark_entities, shuffle_and_split
from clpet.data.sources.entity_formats import cleaned, convert, read_published
from clpet.data.splits import partition
from clpet.data.tabular_files import SplitRows
from clpet.data.template import Template
from clpet.errors import ConfigError, DataError
from clpet.models.backbone import byte_tokenizer
from tests.conftest import shared
from tests.published import label_names, tacred_names, write_published

CLASSES = {"fewnerd": 66, "ontonotes": 86, "bbn": 46, "fewrel": 80, "tacred": 41, "ace2005": 18}
ENDS = {  # ids of the first and the last task
    "fewnerd": ({5, 27, 37, 38, 44, 45, 58}, {4, 14, 18, 47, 49, 60}),
    "ontonotes": ({9, 10, 19, 25, 31, 40, 48, 58, 72}, {17, 26, 27, 42, 49, 54, 59, 76}),
    "bbn": ({4, 5, 16, 21, 41}, {1, 2, 9, 13}),
    "fewrel": ({2, 3, 27, 30, 31, 51, 63, 79}, {18, 22, 44, 50, 55, 58, 64, 78}),
    "tacred": ({0, 24, 26, 28, 30}, {9, 11, 29, 39}),
    "ace2005": ({3, 7, 9, 13}, {4, 14, 16}),
}


def source(name: str, *overrides: str):
    """The source of a benchmark, built as by `clpet train benchmark=NAME`."""
    return build(parse_config(compose_config([f"benchmark={name}", *overrides])).benchmark, "benchmark")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Benchmark]:
    """All six, read from synthetic files in their published layouts."""
    root = tmp_path_factory.mktemp("published")
    for name in CLASSES:
        write_published(name, root / (source(name).folder or name))
    return {name: source(name).load(str(root)) for name in CLASSES}


def counts(benchmark: Benchmark) -> list[tuple[int, ...]]:
    return [tuple(len(task.split(split)) for split in SPLITS) for task in benchmark.tasks]


@pytest.mark.parametrize("name", CLASSES)
def test_label_partitions_of_conpet(name: str, loaded: dict[str, Benchmark]) -> None:
    """Numbers of classes, first and last task as published; every label belongs to exactly one task."""
    names = label_names(name)
    ids = [{names.index(label) for label in task.labels} for task in loaded[name].tasks]
    assert (ids[0], ids[-1]) == ENDS[name]
    assert sum(map(len, ids)) == len(set.union(*ids)) == CLASSES[name]
    sizes = [len(part) for part in ids]
    assert len(sizes) == (5 if name == "ace2005" else 10)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1


def test_partition_without_a_seed_cuts_as_listed() -> None:
    assert partition(["c", "a", "b"], [2, 1], None) == [["c", "a"], ["b"]]
    with pytest.raises(DataError, match="4 slots for 3 labels"):
        partition(["a", "b", "c"], [2, 2], 1)


def test_seven_hundred_examples_are_cut_560_70_70() -> None:
    """FewRel: 4480 / 560 / 560 for a task of eight relations; every example is in exactly one split."""
    pools = [[{"label": label, "i": i} for i in range(700)] for label in range(8)]
    parts = shuffle_and_split(pools, random.Random(100))
    assert {split: len(rows) for split, rows in parts.items()} == {"train": 4480, "validation": 560, "test": 560}
    assert len({(row["label"], row["i"]) for rows in parts.values() for row in rows}) == 5600


def test_splits_follow_each_data_sets_rule(loaded: dict[str, Benchmark]) -> None:
    """Label by label (FewRel, BBN, ACE), all at once (OntoNotes), as published (Few-NERD, TACRED)."""
    assert counts(loaded["fewrel"]) == [(64, 8, 8)] * 10
    assert counts(loaded["bbn"]) == [(120, 15, 15)] * 6 + [(96, 12, 12)] * 4
    assert counts(loaded["ace2005"]) == [(32, 4, 4)] * 3 + [(24, 3, 3)] * 2
    assert counts(loaded["tacred"]) == [(30, 10, 15)] + [(24, 8, 12)] * 9
    assert [sum(column) for column in zip(*counts(loaded["ontonotes"]), strict=True)] == [2064, 258, 258]
    assert [sum(column) for column in zip(*counts(loaded["fewnerd"]), strict=True)] == [132, 66, 66]


def test_pooled_examples_are_split_with_the_generator_of_the_labels(tmp_path: Path) -> None:
    """FewRel by hand: shuffle 80 ids, then the ten examples of each label, tasks in order, labels ascending."""
    folder = write_published("fewrel", tmp_path)
    rng = random.Random(100)
    ids = list(range(80))
    rng.shuffle(ids)
    examples = list(range(10))
    rng.shuffle(examples)
    first = source("fewrel").load(str(folder)).tasks[0]
    label = label_names("fewrel")[min(ids[:8])]
    assert [e.text.split()[-1] for e in first.train if e.target == label] == [f"n{i}" for i in examples[:8]]
    assert [e.text.split()[-1] for e in first.test if e.target == label] == [f"n{examples[9]}"]


def test_marked_sentences(loaded: dict[str, Benchmark]) -> None:
    texts = {name: benchmark.tasks[0].test[0] for name, benchmark in loaded.items()}
    assert texts["fewrel"].text.startswith("[m2] Paris [m3] in [m0] New France [m1] P")
    assert texts["tacred"].text.startswith("[m0] Ann Lee [m1] of [UNK] [UNK] test")
    assert texts["tacred"].fields == {"head": "Ann Lee", "tail": "Rome"}
    assert texts["ace2005"].text.startswith("[m0] Ann [m1] left [m2] New York [m3]")
    assert texts["bbn"].text.startswith("in [m0] New York [m1]")
    assert texts["fewnerd"].text.startswith("In [m0] New York")
    assert texts["fewnerd"].fields["entity"].startswith("New York")


def test_consecutive_equal_tags_are_one_mention() -> None:
    record = {"tokens": list("abcdef"), "fine_ner_tags": ["x", "x", "O", "x", "y", "y"]}
    rows = convert([record], "fewnerd", "here")
    assert [(row["label"], row["entity_pos"]) for row in rows] == [("x", [0, 1]), ("x", [3]), ("y", [4, 5])]


def test_tacred_tokens_are_cleaned() -> None:
    odd = ["http", "https://a.b", "---", "=-*=", "*****"]
    plain = ["--", "-", "a---", "--a", "xhttp", "=+=", ""]
    assert [cleaned(token) for token in odd] == ["[UNK]"] * len(odd)
    assert [cleaned(token) for token in plain] == plain


def test_tacred_has_the_published_relation_names() -> None:
    """Published names contain slashes; there are 16 relations of organisations and 25 of persons."""
    names = tacred_names()
    assert len(set(names)) == 41
    assert sum(name.startswith("org:") for name in names) == 16
    assert {name for name in names if "/" in name} == {"org:political/religious_affiliation", "org:top_members/employees",
                                                       "org:number_of_employees/members"}  # fmt: skip


def test_ace_positions_count_from_the_start_of_the_document() -> None:
    record = {"sentences": [["a", "b"], ["c", "d", "e"]], "relations": [[], [[4, 4, 2, 3, "PHYS.Near"]]]}
    assert convert([record], "ace", "here") == [
        {"tokens": ["c", "d", "e"], "head_pos": [2], "tail_pos": [0, 1], "label": "Near"}
    ]


def test_the_word_filter_applies_to_train_only(tmp_path: Path) -> None:
    """'In this sentence, X is a [MASK].' has 6 words without the mention: 45 more are too many."""
    lines = [f"0\t{n}\t{' '.join(['w'] * n)} .\t{label}" for label in "ab" for n in (44, 45)]
    for part in ("train", "dev", "test"):
        (tmp_path / f"{part}.txt").write_text("\n".join(lines))
    knobs = {"layout": "spans", "published": {"train": "train.txt", "validation": "dev.txt", "test": "test.txt"},
             "template": "{text} In this sentence, {entity} is a {mask}."}  # fmt: skip
    kept = Typing(name="x", template_words=50, **knobs).load(str(tmp_path))
    assert counts(kept) == [(2, 4, 4)]
    assert {len(e.fields["entity"].split()) for e in kept.tasks[0].train} == {44}
    assert counts(Typing(name="x", **knobs).load(str(tmp_path))) == [(4, 4, 4)]


def test_a_long_sentence_is_cut_around_its_mention() -> None:
    typing = source("fewnerd")
    found = Template(byte_tokenizer(), typing.template, typing.max_length, True)
    tokens = ["word"] * 200 + ["Ulm"] + ["word"] * 200
    ids = found.encode([mark_entities(tokens, {"entity": [(200, 200)]}, "x")]).rows[0]
    text = found.tokenizer.decode(ids)
    assert len(ids) <= typing.max_length == 256
    assert "[unused0] Ulm [unused1]" in text
    assert "In this sentence, Ulm is a" in text


@pytest.mark.parametrize("name", CLASSES)
def test_templates_and_lengths(name: str) -> None:
    found = source(name)
    relation = isinstance(found, Relations)
    assert found.max_length == (128 if relation else 256)
    end = "{tail} is the {mask} of {head}." if relation else "{entity} is a {mask}."
    assert found.template == "{text} In this sentence, " + end
    assert found.template_words == 50


@pytest.mark.parametrize("name", ["ontonotes", "bbn", "tacred", "ace2005"])
def test_errors_of_licensed_data_sets_name_the_files_to_get(name: str, tmp_path: Path) -> None:
    """The data set, its files and their folder; with data_dir, the files that are missing."""
    found = source(name)
    files = list(found.published.values())
    with pytest.raises(DataError, match=rf"put {', '.join(files)} of .*LDC20.* into FOLDER/{name} and set data_dir"):
        found.load(None)
    write_published(name, tmp_path / name)
    (tmp_path / name / files[1]).unlink()
    with pytest.raises(DataError, match=rf"{name} lacks {files[1]}: put"):
        found.load(str(tmp_path))


@pytest.mark.parametrize(("name", "places"), [("fewrel", 80), ("ontonotes", 86), ("bbn", 46), ("ace2005", 18)])
def test_a_partition_that_does_not_fit_is_refused(name: str, places: int, tmp_path: Path) -> None:
    """Without one of the labels, ids would be numbered differently, and tasks would silently contain other labels."""
    write_published(name, tmp_path)
    for path in tmp_path.iterdir():
        path.write_text(path.read_text().replace(label_names(name)[3], label_names(name)[4]))
    with pytest.raises(DataError, match=rf"{places} slots for {places - 1} labels"):
        source(name).load(str(tmp_path))


def test_an_unknown_relation_of_tacred_is_refused(tmp_path: Path) -> None:
    write_published("tacred", tmp_path)
    for path in tmp_path.iterdir():
        path.write_text(path.read_text().replace("org:founded_by", "org:found_by"))
    with pytest.raises(DataError, match="does not cover 1 labels of the data"):
        source("tacred").load(str(tmp_path))


@pytest.mark.parametrize(
    ("layout", "text", "reason"),
    [
        ("spans", "0\t1\ta b\tx\n1\t3\ta b\tx\n", "tokens 1 to 2 are not in a sentence of 2"),
        ("spans", "0\t0\ta b\tx\n", "tokens 0 to -1"),
        ("spans", "0 1 a b x\n", "not enough values"),
        ("tacred", '[{"relation": "x"}]', "missing 'token'"),
        ("tacred", "[{", "Expecting"),
        ("ace", '{"sentences": [["a"]], "relations": [[[0, 0, 1, 1, "A.B"]]]}', "tokens 1 to 1 are not in a sentence"),
        ("fewnerd", "London art-music", "not enough values"),
        ("fewrel", "[]", "no attribute"),
    ],
)
def test_a_file_of_another_layout_is_refused(layout: str, text: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text(text)
    with pytest.raises(DataError, match=rf"file is not in the {layout} layout near record .*{reason}"):
        read_published(path, layout)


def test_positions_outside_the_sentence_are_refused(tmp_path: Path) -> None:
    rows = [{"tokens": ["a", "b"], "entity_pos": [2], "label": "x"}]
    (tmp_path / "train.jsonl").write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(DataError, match="in a sentence of 2 tokens"):
        Typing(name="x").load(str(tmp_path))


@pytest.mark.parametrize("knob", [{"template_words": 0}, {"layout": "conll"}, {"resplit": "some"}])
def test_knobs_out_of_range(knob: dict) -> None:
    with pytest.raises(ConfigError, match="must be"):
        Typing(name="x", **knob)


def hub_folder(folder: Path, config: str, splits: dict[str, list[dict]], features=None) -> Path:
    """A folder in the layout of the hub's own parquet conversion."""
    import datasets

    for split, rows in splits.items():
        (folder / config / split).mkdir(parents=True)
        datasets.Dataset.from_list(rows, features=features).to_parquet(folder / config / split / "0000.parquet")
    return folder


def test_fewrel_entity_names_come_from_the_data_and_blank_tokens_are_dropped(tmp_path: Path) -> None:
    """O15 (`fewrel_script.py`): `h[0]` and `t[0]`; tokens that are a single space are left out, at every position."""
    films = [*["The", "Assassination", "of", "Jesse", "James", "by", "the", "Coward", "Robert", "Ford"], '"']
    tokens = ["350–351", " ", "That", *films[:4], " ", *films[4:], "are", "James", "gang", "."]
    record = {"tokens": tokens, "h": ["the assassination of jesse james by the coward robert ford", "Q1",
              [list(range(3, 14))]], "t": ["james gang", "Q2", [[16, 17]]]}  # fmt: skip
    (tmp_path / "train_wiki.json").write_text(json.dumps({"P1": [record]}))
    (row,) = read_published(tmp_path / "train_wiki.json", "fewrel")
    named, unnamed = source("fewrel"), source("fewrel", "benchmark.names=null")
    template = Template(byte_tokenizer(), named.template, 512, True)
    ids, plain = (template.encode([one.example(dict(row))]).rows[0] for one in (named, unnamed))
    start = '350–351 That [unused0] The Assassination of Jesse James by the Coward Robert Ford [unused1] " are [unused2] James'
    end = " gang [unused3] . In this sentence, james gang is the [MASK] of the assassination of jesse james by the coward robert ford."
    assert template.tokenizer.decode(ids) == f"[CLS]{start}{end}[SEP]"
    assert "In this sentence, James gang is the [MASK] of The Assassination" in template.tokenizer.decode(plain)
    named.examples(SplitRows("here", set(row) - {"tail"}, []), "train")
    assert "here has no column tail: names are taken from the tokens" in named.report.notes()
    with pytest.raises(ConfigError, match=r"benchmark.names must be a column for each of entity, or null"):
        Typing(name="x", names={"head": "head"})


def test_fewrel_in_the_hubs_layout(tmp_path: Path) -> None:
    """The published columns: relation, tokens, head and tail with nested indices; other splits are not read."""

    def row(i: int) -> dict:
        return {"relation": f"P{i % 2}", "tokens": ["Paris", "in", "France"],
                "head": {"text": "france", "type": "Q", "indices": [[2]]},
                "tail": {"text": "paris", "type": "Q", "indices": [[0]]}}  # fmt: skip

    rows = [row(i) for i in range(20)]
    hub_folder(tmp_path, "default", {"train_wiki": rows, "val_wiki": rows, "pid2name": [{"relation": "P0"}]})
    found = source("fewrel", f"benchmark.hub={tmp_path}", "benchmark.classes_per_task=1").load(None)
    assert counts(found) == [(16, 2, 2)] * 2
    example = found.tasks[0].train[0]
    assert example.text == "[m2] Paris [m3] in [m0] France [m1]"
    assert example.fields == {"head": "france", "tail": "paris"}


def test_fewnerd_in_the_hubs_layout(tmp_path: Path) -> None:
    """Lists of label ids become names; only the supervised one of the three configurations is read."""
    import datasets

    tags = datasets.ClassLabel(names=["O", *label_names("fewnerd")])
    features = datasets.Features({"tokens": datasets.List(datasets.Value("string")),
                                  "fine_ner_tags": datasets.List(tags)})  # fmt: skip
    rows = [{"tokens": ["in", "New", "York"], "fine_ner_tags": [0, i, i]} for i in range(1, 67)]
    splits = {"train": rows, "validation": rows[:3], "test": rows}
    hub_folder(tmp_path, "supervised", splits, features)
    hub_folder(tmp_path, "inter", {"train": rows * 3}, features)
    found = source("fewnerd", f"benchmark.hub={tmp_path}").load(None)
    assert sum(len(task.train) for task in found.tasks) == 66
    assert len(found.labels) == 66
    assert found.tasks[0].train[0].text == "in [m0] New York [m1]"


def test_fewrel_has_the_published_partition() -> None:
    """ConPET's task of each relation, as recorded with the data."""
    folder = shared("data", "fewrel80")
    benchmark = source("fewrel").load(str(folder.parent))
    listed = json.loads((folder / "labels.json").read_text())["relations"]
    for index, task in enumerate(benchmark.tasks):
        assert set(task.labels) == {item["pid"] for item in listed if item["task"] == index}
    assert len(benchmark.labels) == 80
    assert sum(len(task.train) for task in benchmark.tasks) == 14593


def test_fewrel_balanced_part() -> None:
    benchmark = source("fewrel", "benchmark.where={balanced: true}").load(str(shared("data")))
    assert [len(task.train) for task in benchmark.tasks] == [640] * 10
