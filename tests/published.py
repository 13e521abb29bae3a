"""Small synthetic files in the published layouts of the entity benchmarks."""

import json
from pathlib import Path

from omegaconf import OmegaConf

from clpet.config.compose import conf_dir

SPLITS = ("train", "dev", "test")


def tacred_names() -> list[str]:
    """The 41 relations in ConPET's order of ids."""
    return list(OmegaConf.load(conf_dir() / "benchmark" / "tacred.yaml").label_order)


def label_names(benchmark: str) -> list[str]:
    """Label names in the order of their ids: sorted as strings, except for TACRED."""
    if benchmark == "tacred":
        return tacred_names()
    prefix, count = {"fewrel": ("P", 80), "fewnerd": ("art-", 66), "ontonotes": ("/t", 86), "bbn": ("/b/", 46),
                     "ace2005": ("Sub", 18)}[benchmark]  # fmt: skip
    return [f"{prefix}{i:02d}" for i in range(count)]


def write_published(benchmark: str, folder: Path) -> Path:
    """Writes the benchmark's files, which contain every label; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    {"fewrel": _fewrel, "fewnerd": _fewnerd, "ontonotes": _spans, "bbn": _spans, "tacred": _tacred,
     "ace2005": _ace}[benchmark](folder, label_names(benchmark))  # fmt: skip
    return folder


def _fewrel(folder: Path, names: list[str]) -> None:
    """10 examples per relation, 64 relations in one file and 16 in the other."""

    def example(name: str, i: int) -> dict:
        return {"tokens": ["Paris", "in", "New", "France", name, f"n{i}"], "h": ["new france", "Q1", [[2, 3]]],
                "t": ["paris", "Q2", [[0]]]}  # fmt: skip

    for file, split in (("train_wiki.json", names[:64]), ("val_wiki.json", names[64:])):
        (folder / file).write_text(json.dumps({name: [example(name, i) for i in range(10)] for name in split}))


def _fewnerd(folder: Path, names: list[str]) -> None:
    """One sentence per label and split: a mention of two tokens and, in train, an adjacent mention of another type."""
    for split in SPLITS:
        lines = []
        for i, name in enumerate(names):
            lines += ["In\tO", f"New\t{name}", f"York{i}\t{name}"]
            lines += [f"Bob\t{names[i - 1]}"] if split == "train" else []
            lines += [".\tO", ""]
        (folder / f"{split}.txt").write_text("\n".join(lines))


def _spans(folder: Path, names: list[str]) -> None:
    """20, 5 and 5 lines per label."""
    for split, count in zip(SPLITS, (20, 5, 5), strict=True):
        lines = [f"1\t3\tin New York {split} {i} .\t{name}" for name in names for i in range(count)]
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n")


def _tacred(folder: Path, names: list[str]) -> None:
    """6, 2 and 3 examples per relation, and as many of no_relation."""
    for split, count in zip(SPLITS, (6, 2, 3), strict=True):
        rows = [
            {"id": f"{split}{i}", "relation": name, "token": ["Ann", "Lee", "of", "http://x", "====", split, str(i), "Rome"],
             "subj_start": 0, "subj_end": 1, "obj_start": 7, "obj_end": 7, "subj_type": "PERSON"}
            for name in ["no_relation", *names]
            for i in range(count)
        ]  # fmt: skip
        (folder / f"{split}.json").write_text(json.dumps(rows))


def _ace(folder: Path, names: list[str]) -> None:
    """10 documents per subtype, one per line, divided into the splits; the relation is in the second sentence."""
    documents = [
        {"doc_key": f"{name}{i}", "sentences": [["Hello", "."], ["Ann", "left", "New", "York", str(i)]], "ner": [[], []],
         "relations": [[], [[2, 2, 4, 5, f"TYPE-X.{name}"]]]}
        for i in range(10)
        for name in names
    ]  # fmt: skip
    for split, chosen in zip(SPLITS, (documents[:-40], documents[-40:-20], documents[-20:]), strict=True):
        (folder / f"{split}.json").write_text("".join(json.dumps(document) + "\n" for document in chosen))
