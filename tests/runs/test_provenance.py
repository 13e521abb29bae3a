"""Finished runs, stopped runs and caches notice when input files change under the same name."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from clpet.config.build import parse_config
from clpet.config.compose import compose_config
from clpet.errors import ConfigError, DataError
from clpet.methods.components.logit_cache import network_key, tensors_key
from clpet.runs import provenance
from clpet.runs.load_run import check_inputs, read_record
from clpet.runs.provenance import check_finished, code, hub_data
from clpet.runtime import fingerprint
from clpet.runtime.fingerprint import cached_value, file_hash, folder_hash, hub_commit
from clpet.runtime.run_checkpoint import RunState
from tests.conftest import set_up, tiny_args, write_words

MODEL = {"model_type": "bert", "vocab_size": 266, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
         "intermediate_size": 32, "max_position_embeddings": 64}  # fmt: skip


def write_model(folder: Path) -> Path:
    """Writes a one-layer BERT with a byte tokenizer, as a folder of the hub."""
    from transformers import BertConfig, BertModel

    from clpet.models.backbone import byte_tokenizer

    torch.manual_seed(0)
    BertModel(BertConfig(**MODEL)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def flip_weight(folder: Path) -> None:
    """Changes one value in the middle of the embeddings by 1."""
    tensors = load_file(folder / "model.safetensors")
    tensors["embeddings.word_embeddings.weight"][133, 17] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file counts as having rested."""
    monkeypatch.setattr(fingerprint, "TIMESTAMP_RESOLUTION", -1.0)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collects the names of all files that are hashed from now on."""
    names: list[str] = []
    original = fingerprint.hashlib.file_digest

    def spy(file, kind: str):
        names.append(Path(file.name).name)
        return original(file, kind)

    monkeypatch.setattr(fingerprint.hashlib, "file_digest", spy)
    return names


def test_a_file_is_hashed_again_only_after_a_change(tmp_path: Path, settled: None, opened: list[str]) -> None:
    file, cache = tmp_path / "x.safetensors", str(tmp_path / "cache")
    file.write_bytes(b"abc")
    first = file_hash(file, cache)
    assert first == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert file_hash(file, cache) == first
    assert len(opened) == 1
    file.write_bytes(b"abd")  # the same size, with the old time stamp
    os.utime(file, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    assert file_hash(file, cache) != first
    (damaged,) = [path for path in (tmp_path / "cache" / "fingerprints").iterdir() if first not in path.read_text()]
    damaged.write_text(damaged.read_text().replace(" ", "0 ", 1))
    assert file_hash(file, cache) == file_hash(file, None)


def test_the_hash_of_a_file_that_just_changed_is_not_cached(tmp_path: Path, opened: list[str]) -> None:
    (tmp_path / "x.json").write_text("1")
    for _ in range(2):
        file_hash(tmp_path / "x.json", str(tmp_path / "cache"))
    assert len(opened) == 2


def test_a_value_that_cannot_be_cached_is_computed(tmp_path: Path) -> None:
    (tmp_path / "fingerprints").write_text("a file where a folder should be")
    assert cached_value(str(tmp_path), "key", lambda: "value") == "value"
    assert cached_value(None, "key", lambda: "value") == "value"
    assert cached_value(str(tmp_path), None, lambda: "value") == "value"


def test_a_folder_hash_covers_the_files_that_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    (folder / "1_Pooling").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "1_Pooling/config.json"):
        (folder / name).write_text(name)
    first = folder_hash(folder, None)
    (folder / "README.md").write_text("a note")
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert folder_hash(folder, None) == folder_hash(tmp_path / "elsewhere", None) == first
    (folder / "1_Pooling" / "config.json").write_text("another")
    assert folder_hash(folder, None) != first


def test_the_commit_of_a_hub_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "models--org--net" / "refs").mkdir(parents=True)
    (tmp_path / "models--org--net" / "refs" / "main").write_text("c" * 40)
    assert hub_commit("org/net", None) == "c" * 40
    assert hub_commit("org/net", "v1") is None
    assert hub_commit("org/net", "a" * 40) == "a" * 40
    assert hub_commit("org/net", None, "dataset") is None
    (tmp_path / "datasets--org--net" / "refs").mkdir(parents=True)
    (tmp_path / "datasets--org--net" / "refs" / "v2").write_text("d" * 40)
    assert hub_data({"hub_tasks": {"a": {"hub": "org/net", "hub_revision": "v2"}, "b": {"hub": "org/gone"}}}) == {
        "org/net": "d" * 40
    }
    assert hub_data({"hub": "org/net", "hub_revision": "b" * 40}) == {"org/net": "b" * 40}


def test_the_code_hash_follows_imports_inside_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLPET_CONFIG_DIR", str(tmp_path))
    (tmp_path / "kit").mkdir()
    files = {"mine.py": "import json\nfrom kit import loss\nclass Mine: ...\n", "kit/__init__.py": "", "unread.py": "",
             "kit/loss.py": "def f():\n    from . import late\n", "kit/late.py": "RATE = 1\n"}  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    hashes = {code(["clpet.methods.sequential.Sequential", "mine.Mine"])}
    for name in files:
        (tmp_path / name).write_text(files[name] + "\n# a line\n")
        hashes.add(code(["mine.Mine"]))
    assert len(hashes) == 5  # the first one, and one for each file except the unread one
    assert code(["clpet.methods.sequential.Sequential"]) is None


def args(data: Path, model: Path, *more: str) -> list[str]:
    """Overrides of a run on a model from a folder that takes about a second."""
    return [*tiny_args(data)[1:], "model=local", f"model.path={model}", "train.epochs=1", "method=sequential", *more]


def test_a_finished_run_notices_a_changed_weight_or_label(
    clpet, tmp_path: Path, settled: None, opened: list[str], capsys: pytest.CaptureFixture
) -> None:
    data, model = write_words(tmp_path / "w", copies=2), write_model(tmp_path / "m")
    words = args(data, model, "cache_dir=outputs/.cache", "evaluation.matrix=last")
    assert clpet("train", *words).code == 0
    (run,) = tmp_path.glob("outputs/*/*/s*")
    results = json.loads((run / "results.json").read_text())
    assert results["inputs"] == {"weights": folder_hash(model, None), "data": results["data"]["fingerprint"]}
    config = parse_config(compose_config(words))
    opened.clear()
    check_finished(run, results, config)
    assert opened == []

    whole = (model / "model.safetensors").read_bytes()
    flip_weight(model)
    answer = clpet("train", *words)
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert f"finished with weights {results['inputs']['weights']}" in answer.err
    assert "fresh=true" in answer.err
    with pytest.raises(DataError, match="the weights differ from those of"):
        check_inputs(read_record(run))
    (model / "model.safetensors").write_bytes(whole)

    text = (data / "test.jsonl").read_text()
    (data / "test.jsonl").write_text(text.replace('"label": "nile"', '"label": "oder"', 1))
    with pytest.raises(ConfigError, match=f"finished with data {results['data']['fingerprint']}, now it is"):
        check_finished(run, results, config)
    (data / "test.jsonl").write_text(text)
    (data / "notes.txt").write_text("not read")  # the files are read again and are equal
    check_finished(run, results, config)
    check_finished(run, {key: value for key, value in results.items() if key != "inputs"}, config)
    data.rename(tmp_path / "gone")
    check_finished(run, results, config)
    assert "cannot check whether its inputs have changed" in capsys.readouterr().out  # the log goes to stdout


def test_a_finished_run_notices_changed_plugin_code(clpet, tmp_path: Path, words: Path) -> None:
    folder = tmp_path / "plug"
    (folder / "method").mkdir(parents=True)
    (folder / "method" / "plugged.yaml").write_text("# Plugged in.\n_target_: plugged_in.Plugged\nname: plugged\n")
    (folder / "plugged_in.py").write_text(
        "from dataclasses import dataclass\nimport plugged_part\nfrom clpet.methods.base import Method\n\n\n"
        "@dataclass\nclass Plugged(Method):\n    name: str = 'plugged'\n"
    )
    (folder / "plugged_part.py").write_text("RATE = 1\n")
    line = ["--config-dir", folder, *tiny_args(words, "method=plugged", "train.epochs=1")]
    assert clpet("train", *line).code == 0
    (folder / "plugged_part.py").write_text("RATE = 2\n")
    answer = clpet("train", *line)
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert "finished with code" in answer.err


def test_a_stopped_run_is_not_resumed_with_changed_inputs(tmp_path: Path) -> None:
    from clpet.metrics.transfer_matrix import TransferMatrix

    state = RunState(TransferMatrix(["a"]), TransferMatrix(["a"]), done=1)
    was = {"signature": "s", "weights": "w", "code": "c", "encoder": "e", "data": "d"}
    state.save(tmp_path / "state", {}, was)
    assert RunState.resume(tmp_path / "state", was) is not None
    assert RunState.resume(tmp_path / "state", {**was, "more": "x"}) is not None
    for name in was:
        with pytest.raises(ConfigError, match=f"started with {name} {was[name]}, now it is other"):
            RunState.resume(tmp_path / "state", {**was, name: "other"})


def test_cached_logits_depend_on_every_weight(tmp_path: Path, words: Path) -> None:
    """Changing one value anywhere changes the key; adapters and seeds do not."""
    model = write_model(tmp_path / "m")
    overrides = [*args(words, model)[:-1], "method=dynamic_conpet", "replay=all", "cache_dir=null"]

    def key(*more: str) -> str:
        return network_key(set_up([*overrides, *more]).method.objective)

    first = key()
    assert key("seed=1") == first
    flip_weight(model)
    assert key() != first
    assert key("model.attention=sdpa") != key()
    tiny = set_up(tiny_args(words, "method=dynamic_conpet", "replay=all", "cache_dir=null")).method.objective
    first = network_key(tiny)
    value = next(p for name, p in tiny.adapters.model.named_parameters() if "word_embeddings" in name)
    with torch.no_grad():
        value[101, 7] += 1e-3
    assert network_key(tiny) != first


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64, torch.uint8])
def test_the_hash_of_tensors_covers_every_bit(dtype: torch.dtype) -> None:
    value = torch.zeros(3, 5, dtype=dtype)
    other = value.clone()
    other.view(torch.uint8)[2, -1] = 1
    assert len({tensors_key({"x": tensor}) for tensor in (value, other, value.reshape(5, 3), value[0, 0])}) == 4
    assert tensors_key({"x": other}) == tensors_key({"x": other.T.contiguous().T}) != tensors_key({"y": other})


def test_the_cached_fingerprint_of_a_benchmark_is_used_only_for_unchanged_files(
    tmp_path: Path, settled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Showing a finished run reads sizes and times of its data, not gigabytes of contents."""
    loads = []
    source = SimpleNamespace(
        data_root=lambda folder: folder, load=lambda _: loads.append(1) or SimpleNamespace(fingerprint=lambda: "f")
    )
    config = SimpleNamespace(
        data_dir=str(tmp_path / "d"), cache_dir=str(tmp_path / "c"), benchmark={"name": "files"}, objective={}
    )
    (tmp_path / "d" / "inner").mkdir(parents=True)
    (tmp_path / "d" / "inner" / "train.csv").write_text("a")
    (tmp_path / "d" / ".hidden").write_text("a")
    monkeypatch.setattr(provenance, "load", lambda *_: (None, source))
    provenance.load_benchmark(config, source)
    for _ in range(2):
        assert provenance.data_now(config, "f") == "f"
    (tmp_path / "d" / ".hidden").write_text("b")
    assert provenance.data_now(config, "f") == "f"
    assert len(loads) == 1
    (tmp_path / "d" / "inner" / "train.csv").write_text("b")
    assert provenance.data_now(config, "f") == "f"
    config.benchmark = {"name": "other"}
    provenance.data_now(config, "f")
    assert len(loads) == 3
