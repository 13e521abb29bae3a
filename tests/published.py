"""Small made-up files in the layouts that the entity benchmarks are published in."""

import json
from pathlib import Path

from omegaconf import OmegaConf

from clpet.config.compose import conf_dir

PARTS = ("train", "dev", "test")


def tacred_names() -> list[str]:
    """The 41 relations in ConPET's order of ids."""
    return list(OmegaConf.load(conf_dir() / "benchmark" / "tacred.yaml").label_order)


def label_names(benchmark: str) -> list[str]:
    """Label names in the order of their ids: string order but for TACRED."""
    if benchmark == "tacred":
        return tacred_names()
    prefix, count = {"fewrel": ("P", 80), "fewnerd": ("art-", 66), "ontonotes": ("/t", 86), "bbn": ("/b/", 46),
                     "ace2005": ("Sub", 18)}[benchmark]  # fmt: skip
    return [f"{prefix}{i:02d}" for i in range(count)]


def write_published(benchmark: str, folder: Path) -> Path:
    """The benchmark's files, every label in them."""
    folder.mkdir(parents=True, exist_ok=True)
    {"fewrel": _fewrel, "fewnerd": _fewnerd, "ontonotes": _spans, "bbn": _spans, "tacred": _tacred,
     "ace2005": _ace}[benchmark](folder, label_names(benchmark))  # fmt: skip
    return folder


def _fewrel(folder: Path, names: list[str]) -> None:
    """10 examples a relation, 64 relations in one file and 16 in the other."""

    def example(name: str, i: int) -> dict:
        return {"tokens": ["Paris", "in", "New", "France", name, f"n{i}"], "h": ["new france", "Q1", [[2, 3]]],
                "t": ["paris", "Q2", [[0]]]}  # fmt: skip

    for file, part in (("train_wiki.json", names[:64]), ("val_wiki.json", names[64:])):
        (folder / file).write_text(json.dumps({name: [example(name, i) for i in range(10)] for name in part}))


def _fewnerd(folder: Path, names: list[str]) -> None:
    """A sentence per label and part: a mention of two tokens and, in train, one more next to another type."""
    for part in PARTS:
        lines = []
        for i, name in enumerate(names):
            lines += ["In\tO", f"New\t{name}", f"York{i}\t{name}"]
            lines += [f"Bob\t{names[i - 1]}"] if part == "train" else []
            lines += [".\tO", ""]
        (folder / f"{part}.txt").write_text("\n".join(lines))


def _spans(folder: Path, names: list[str]) -> None:
    """20, 5 and 5 lines a label."""
    for part, count in zip(PARTS, (20, 5, 5), strict=True):
        lines = [f"1\t3\tin New York {part} {i} .\t{name}" for name in names for i in range(count)]
        (folder / f"{part}.txt").write_text("\n".join(lines) + "\n")


def _tacred(folder: Path, names: list[str]) -> None:
    """6, 2 and 3 examples a relation, and as many without one."""
    for part, count in zip(PARTS, (6, 2, 3), strict=True):
        rows = [
            {"id": f"{part}{i}", "relation": name, "token": ["Ann", "Lee", "of", "http://x", "====", part, str(i), "Rome"],
             "subj_start": 0, "subj_end": 1, "obj_start": 7, "obj_end": 7, "subj_type": "PERSON"}
            for name in ["no_relation", *names]
            for i in range(count)
        ]  # fmt: skip
        (folder / f"{part}.json").write_text(json.dumps(rows))


def _ace(folder: Path, names: list[str]) -> None:
    """10 documents a subtype over the parts, the relation in the second sentence, a line each."""
    documents = [
        {"doc_key": f"{name}{i}", "sentences": [["Hello", "."], ["Ann", "left", "New", "York", str(i)]], "ner": [[], []],
         "relations": [[], [[2, 2, 4, 5, f"TYPE-X.{name}"]]]}
        for i in range(10)
        for name in names
    ]  # fmt: skip
    for part, chosen in zip(PARTS, (documents[:-40], documents[-40:-20], documents[-20:]), strict=True):
        (folder / f"{part}.json").write_text("".join(json.dumps(document) + "\n" for document in chosen))
