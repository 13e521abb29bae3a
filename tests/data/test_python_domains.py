"""The standard library as domains of plain text."""

from pathlib import Path

import pytest

from clpet.data.benchmark import SPLITS
from clpet.data.sources import python_domains
from clpet.errors import ConfigError, DataError
from tests.data.test_sources import from_yaml
from tests.data.test_text_domains import texts


@pytest.fixture(scope="module")
def library_benchmark():
    return from_yaml("python_domains")


def test_the_standard_library_is_several_domains(library_benchmark) -> None:
    assert len(library_benchmark) >= 6
    assert library_benchmark.base.name == "general"
    assert library_benchmark.base.train.bytes > 500_000
    for task in library_benchmark.tasks:
        sizes = [task.split(split).bytes for split in SPLITS]
        assert sum(sizes) >= 100_000
        assert min(sizes) >= 5_000
    if "language" in library_benchmark.names:  # text, not the file that holds it
        language = library_benchmark.tasks[library_benchmark.names.index("language")]
        assert not any(text.startswith("topics =") for text in texts(language.train))


def test_the_standard_library_is_the_same_every_time(library_benchmark) -> None:
    assert from_yaml("python_domains").fingerprint() == library_benchmark.fingerprint()


def fake_library(folder: Path, sizes: dict[str, int]) -> Path:
    for name, size in sizes.items():
        path = folder / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\n" + "".join(f"x{i} = 1\n" for i in range(size // 10)))
    return folder


def test_missing_modules_are_skipped_and_small_domains_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A domain below min_bytes is merged into the smallest other one; tests and installed packages are excluded."""
    files = {f"big/m{i}": 2000 for i in range(6)} | {f"wide/m{i}": 3000 for i in range(6)}
    files |= {"small": 900, "left": 4000, "over": 4000, "tables/t": 5000, "big/test/x": 9000, "site-packages/y": 9000}
    monkeypatch.setattr(python_domains, "library", lambda: fake_library(tmp_path, files))
    source = python_domains.PythonDomains(
        name="p", modules={"one": ["big"], "two": ["wide"], "three": ["small", "imp"], "rest": ["*"]}, base="rest",
        exclude=["tables"], min_bytes=5000, test_share=0.2, validation_share=0.2,
    )  # fmt: skip
    found = {name: sorted(path.stem for path in paths) for name, paths in source.files.items()}
    assert found == {
        "one": [*(f"m{i}" for i in range(6)), "small"],
        "two": [f"m{i}" for i in range(6)],
        "rest": ["left", "over"],
    }
    with pytest.raises(ConfigError, match="big twice"):
        python_domains.PythonDomains(name="p", modules={"one": ["big"], "two": ["big"]})


def test_a_python_without_its_source_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(python_domains, "library", lambda: tmp_path)
    with pytest.raises(DataError, match="source of the standard library is not installed"):
        python_domains.PythonDomains(name="p", modules={"one": ["*"]}).load(None)


# M2D2
