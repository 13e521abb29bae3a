"""Sentence embeddings: their values, and a cache that survives damaged files and several processes."""

import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch

from clpet.errors import ConfigError, ModelError
from clpet.methods.components.features import Embeddings
from clpet.models.backbone import byte_tokenizer
from clpet.models.sentence_encoder import Encoder, locate

TEXTS = ["a short text", "something else that is longer " * 3, "x", "", "a short text", "y" * 15]


def make_encoder(folder: Path, seed: int = 0, size: int = 24) -> Path:
    """A tiny BERT with dropout and random weights, as a folder in the hub's layout."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    shape = {"hidden_size": size, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=266, max_position_embeddings=256, **shape)).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.model_max_length = 256
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("encoder"))


def test_embeddings_are_masked_means_in_eval_mode(folder: Path) -> None:
    """Oracle 21: the mean of the last hidden states without dropout, text by text."""
    from transformers import BertModel

    encoder = Encoder(folder, 40)
    vectors = encoder.encode(TEXTS)
    assert vectors.shape == (6, 24)
    assert vectors.dtype is torch.float32
    model, tokenizer = BertModel.from_pretrained(folder).eval(), byte_tokenizer()
    for text, vector in zip(TEXTS, vectors, strict=True):
        ids = tokenizer(text, truncation=True, max_length=40, return_tensors="pt")
        with torch.no_grad():
            expected = model(**ids).last_hidden_state[0].mean(0)
        assert torch.allclose(vector, expected, atol=1e-5)
    assert not encoder.model.training
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())


def test_a_text_is_encoded_once(folder: Path, tmp_path: Path) -> None:
    """Oracle 21: repeated texts are looked up, a second run does not load the model; other settings miss the cache."""
    first = Encoder(folder, 40, cache_dir=str(tmp_path))
    vectors = first.encode(TEXTS)
    assert first.encoded == 5
    second = Encoder(folder, 40, cache_dir=str(tmp_path))
    assert torch.equal(second.encode(TEXTS[::-1]), vectors.flip(0))
    assert (second.encoded, second.model) == (0, None)
    assert second.encode([*TEXTS, "new"]).shape == (7, 24)
    assert second.encoded == 1
    shorter = Encoder(folder, 16, cache_dir=str(tmp_path))
    assert not torch.equal(shorter.encode(TEXTS), vectors)
    assert shorter.encoded == 5
    other = Encoder(make_encoder(tmp_path / "other", seed=1), 40, cache_dir=str(tmp_path))
    assert not torch.equal(other.encode(TEXTS), vectors)
    assert other.encoded == 5


def test_an_embedding_does_not_depend_on_the_batch(folder: Path) -> None:
    """The same bits alone or among 40 texts, because a cached embedding must not change a result."""
    texts = [f"{'word ' * (i % 9)}{i}" for i in range(40)]
    vectors = Encoder(folder, 40).encode(texts)
    for row in (0, 7, 8, 39):
        assert torch.equal(Encoder(folder, 40).encode([texts[row]])[0], vectors[row])
    assert torch.equal(Encoder(folder, 40).encode(texts[::-1]), vectors.flip(0))


@pytest.mark.parametrize("damage", ["truncated", "flipped", "emptied", "other"])
def test_damaged_files_are_ignored_and_rewritten(damage: str, folder: Path, tmp_path: Path) -> None:
    vectors = Encoder(folder, 40, cache_dir=str(tmp_path)).encode(TEXTS)
    (path,) = tmp_path.glob("embeddings/*/*.safetensors")
    data = bytearray(path.read_bytes())
    data[-40] ^= 1
    path.write_bytes(
        {"truncated": path.read_bytes()[:-9], "flipped": bytes(data), "emptied": b"", "other": b"{}" * 50}[damage]
    )
    second = Encoder(folder, 40, cache_dir=str(tmp_path))
    assert torch.equal(second.encode(TEXTS), vectors)
    assert second.encoded == 5
    third = Encoder(folder, 40, cache_dir=str(tmp_path))
    assert torch.equal(third.encode(TEXTS), vectors)
    assert third.encoded == 0


def write(folder: Path, cache: str, start: int) -> None:
    """Encodes 20 texts in one of two processes; the other encodes half of them too."""
    torch.set_num_threads(1)
    Encoder(folder, 40, cache_dir=cache).encode([f"text {i}" for i in range(start, start + 20)])


def test_processes_may_share_the_cache(folder: Path, tmp_path: Path) -> None:
    workers = [
        multiprocessing.get_context("fork").Process(target=write, args=(folder, str(tmp_path), start))
        for start in (0, 10)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    encoder = Encoder(folder, 40, cache_dir=str(tmp_path))
    encoder.encode([f"text {i}" for i in range(30)])
    assert encoder.encoded == 0
    assert not list(tmp_path.glob("embeddings/*/.*"))


def test_a_read_only_cache_is_a_warning(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "embeddings").write_text("a file where the folder should be")
    vectors = Encoder(folder, 40, cache_dir=str(tmp_path)).encode(TEXTS)
    assert torch.isfinite(vectors).all()
    assert "cannot be written" in caplog.text


def test_rows_map_to_the_texts_of_the_benchmark(folder: Path, make) -> None:
    """Each row gets the embedding of its text; only requested tasks are encoded."""
    run = make("method=sequential")
    encoder = Encoder(folder, 40)
    embeddings = Embeddings(encoder, run.benchmark, run.data)
    pool = run.data.test
    rows = pool.rows_of(1)[::-1].copy()
    vectors = embeddings(pool, rows)
    assert torch.equal(vectors, encoder.encode([example.text for example in run.benchmark.tasks[1].test][::-1]))
    count = encoder.encoded
    assert torch.equal(embeddings(pool, rows[:3]), vectors[:3])
    assert encoder.encoded == count
    assert (embeddings(pool, np.arange(len(pool)))[pool.rows_of(1)] == vectors.flip(0)).all()
    assert torch.equal(
        embeddings(run.data.train, np.array([5]))[0], encoder.encode([run.benchmark.tasks[0].train[5].text])[0]
    )


def test_minilm_embeds_into_384_dimensions() -> None:
    folder = locate("minilm")
    assert Encoder(folder, 256).dim == 384


@pytest.mark.parametrize("name", ["nli_mpnet_base", "nli_roberta_base", "someone/sentence-encoder"])
def test_a_missing_encoder_gives_a_one_line_error(name: str) -> None:
    with pytest.raises(ModelError, match="is not on this machine") as error:
        locate(name)
    assert "\n" not in str(error.value)
    assert "hf download" in str(error.value)
    assert "method.encoder=FOLDER" in str(error.value)


def test_models_that_cannot_embed_are_rejected(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="a model without weights"):
        locate("tiny")
    with pytest.raises(ConfigError, match="encoder_length=257, but this encoder reads at most 256 tokens"):
        Encoder(folder, 257)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 8}))
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickled")
    with pytest.raises(ModelError, match="pickled weights are not loaded"):
        locate(str(tmp_path))
