"""M2D2: its published ids, presets, folders and archives."""

import io
import tarfile
from pathlib import Path

import pytest

from clpet.data.sources import m2d2
from clpet.data.sources.m2d2 import M2D2
from clpet.errors import ConfigError, DataError
from tests.data.test_documents import letters
from tests.data.test_text_domains import texts


def test_m2d2_has_the_published_ids() -> None:
    assert len(m2d2.IDS) == len(set(m2d2.IDS)) == 236
    assert len({*m2d2.IDS, *m2d2.JUNK}) == 239
    wiki, s2orc = m2d2.SOURCES["wiki"], m2d2.SOURCES["s2orc"]
    parents = set(m2d2.PARENTS.values())
    assert (len(wiki), len(parents & set(wiki)), len(set(wiki) - parents)) == (49, 11, 38)
    assert (len(s2orc), len(parents & set(s2orc)), len(set(s2orc) - parents)) == (187, 11, 174 + 2)
    assert {"General_referece", "Human_activites__Human_activities", "cs.CL", "q-bio", "hep-ph", "Art"} <= set(m2d2.IDS)
    assert m2d2.PARENTS["astro-ph"] == m2d2.PARENTS["astro-ph.CO"] == "astro-ph_l1"
    assert m2d2.PARENTS["Culture_and_the_arts__Mass_media"] == "Culture_and_the_arts"
    assert "hep-ph" not in m2d2.PARENTS


def test_m2d2_presets_are_leaves() -> None:
    sizes = {preset: len(M2D2(name="m", preset=preset).names(None)) for preset in m2d2.Preset}
    assert [sizes[preset] for preset in (m2d2.Preset.wiki, m2d2.Preset.s2orc, m2d2.Preset.all)] == [38, 176, 214]


def test_m2d2_refuses_a_domain_together_with_its_subdomains() -> None:
    for knobs in ({"tasks": ["cs_l1", "cs.CL"]}, {"tasks": ["cs.CL"], "base": "cs_l1"}):
        with pytest.raises(ConfigError, match=r"cs_l1 contains the text of cs\.CL"):
            M2D2(name="m", **knobs).load(None)
    with pytest.raises(ConfigError, match=r"cs\.CLL is not a domain of M2D2; did you mean cs\.CL"):
        M2D2(name="m", tasks=["cs.CLL"])


def write_m2d2(folder: Path, seed: int) -> None:
    folder.mkdir(parents=True)
    for number, (file, lines) in enumerate((("train.txt", 90), ("valid.txt", 10), ("test.txt", 10))):
        (folder / file).write_text("".join(letters(seed * 1000 + number * 100 + i, 150) + "\n" for i in range(lines)))


def archive(folder: Path, path: Path, *more: tuple[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for file in folder.iterdir():
            tar.add(file, f"{path.name.removesuffix('.tar.gz')}/{file.name}")
        for name, data in more:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def test_m2d2_from_folders_and_archives(tmp_path: Path) -> None:
    """Only the three files are extracted, whatever folders their names in the archive contain."""
    write_m2d2(tmp_path / "in" / "cs.CL", 1), write_m2d2(tmp_path / "out" / "Philosophy", 2)
    write_m2d2(tmp_path / "out" / "Health_and_fitness__Exercise", 3)
    evil = [("../../evil.txt", b"x"), ("/tmp/clpet-evil.txt", b"x"), ("notes/readme.md", b"x")]
    archive(tmp_path / "out" / "Philosophy", tmp_path / "in" / "data" / "Philosophy.tar.gz", *evil)
    archive(tmp_path / "out" / "Health_and_fitness__Exercise", tmp_path / "in" / "Health_and_fitness__Exercise.tar.gz")
    tasks = ["cs.CL", "Philosophy", "Health_and_fitness__Exercise"]
    benchmark = M2D2(name="m", tasks=tasks).load(str(tmp_path / "in"))
    assert benchmark.names == tasks
    assert benchmark.groups == {"wiki": tasks[2:], "s2orc": tasks[:2]}
    for task, place in zip(
        benchmark.tasks, ("in/cs.CL", "out/Philosophy", "out/Health_and_fitness__Exercise"), strict=True
    ):
        for split, file in m2d2.FILES.items():
            assert "".join(texts(task.split(split))) == (tmp_path / place / file).read_text()
        assert not task.train.has_boundaries
    assert sorted(path.name for path in (tmp_path / "in" / "Philosophy").iterdir()) == [
        "test.txt",
        "train.txt",
        "valid.txt",
    ]
    assert not list(tmp_path.rglob("evil*"))
    assert not Path("/tmp/clpet-evil.txt").exists()


def test_m2d2_archives_that_are_damaged_or_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_m2d2(tmp_path / "out", 1)
    whole = archive(tmp_path / "out", tmp_path / "in" / "Art.tar.gz")
    whole.write_bytes(whole.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"Art\.tar\.gz cannot be unpacked"):
        M2D2(name="m", tasks=["Art"]).load(str(tmp_path / "in"))
    assert not (tmp_path / "in" / "Art").exists()
    (tmp_path / "in" / "cs.CL").mkdir()
    with pytest.raises(DataError, match=r"cs\.CL lacks train\.txt and valid\.txt and test\.txt"):
        M2D2(name="m", tasks=["cs.CL"]).load(str(tmp_path / "in"))
    with pytest.raises(
        DataError, match=r"data/hep-ph\.tar\.gz of .* cannot be loaded from the hub .* set data_dir=FOLDER"
    ):
        M2D2(name="m", tasks=["hep-ph"], hub="nobody/nothing-clpet").load(None)
