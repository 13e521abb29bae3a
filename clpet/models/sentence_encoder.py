"""Sentence embeddings of a frozen encoder: computed once per text, kept on disk by encoder and text.

A looked-up embedding has the same bits as a computed one: texts always pass through the encoder in blocks of one
fixed shape, as in logit_cache.py. A cache file holds the hashes and vectors of some texts and is never changed
after it is written, so concurrent processes can at worst write the same file twice.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError, safe_open
from torch import Tensor

from clpet.config.compose import conf_dir, plugin_dirs
from clpet.config.identity import digest
from clpet.errors import ConfigError, ModelError, first_line
from clpet.models.backbone import Backbone, first_position
from clpet.models.fixed_blocks import BLOCK, STEP, blocks, platform
from clpet.runtime import atomic_io
from clpet.runtime.fingerprint import folder_hash
from clpet.runtime.hub import unavailable

PART = 16384  # texts of one file at most: what is lost when a run is stopped
FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]


def locate(name: str) -> Path:
    """The folder of a sentence encoder: a model option's, a folder, or a hub id's. Raises ModelError."""
    named = backbone(name)
    place = named.found()
    folder = place if isinstance(place, Path) else _download(named)
    if not list(folder.glob("*.safetensors")):
        raise ModelError(f"the sentence encoder {name} has no .safetensors in {folder}; pickled weights are not read")
    known = json.loads((folder / "modules.json").read_text()) if (folder / "modules.json").is_file() else []
    for module in known:
        if not str(module["type"]).startswith("sentence_transformers."):  # it would be imported
            raise ModelError(f"the sentence encoder {name} names {module['type']}, which is code of its own")
    return folder


def backbone(name: str) -> Backbone:
    """The backbone behind a sentence encoder's name. Raises ModelError for one without weights."""
    options = [folder / "model" / f"{name}.yaml" for folder in (conf_dir(), *plugin_dirs())]
    spec: Any = next((OmegaConf.to_container(OmegaConf.load(file)) for file in options if file.is_file()), None)
    if spec is None:
        return (
            Backbone(name=name, path=name) if (Path(name) / "config.json").is_file() else Backbone(name=name, hub=name)
        )
    if not any(spec.get(key) for key in ("hub", "path", "package")):
        raise ModelError(f"method.encoder={name} is a model without weights: it cannot embed sentences")
    wanted = ("hub", "revision", "path", "package", "sha256")
    return Backbone(name=name, **{key: spec[key] for key in wanted if key in spec})


def _download(backbone: Backbone) -> Path:
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(str(backbone.hub), revision=backbone.revision, allow_patterns=[*FILES, "*/*.json"])
    except Exception as error:  # offline, no such id, no permission: each library version has its own types
        alternative = f"method.encoder=FOLDER{backbone.package_hint}"
        what = f"the sentence encoder {backbone.hub}"
        raise ModelError(unavailable(what, str(backbone.hub), error, alternative)) from error
    return Path(found)


class Encoder:
    """Mean-pooled last hidden states of a frozen encoder in eval mode, fp32, texts cut at `max_length` tokens.

    Nothing is loaded before a text has to be encoded. `encoded` counts those texts.
    """

    def __init__(
        self, folder: Path, max_length: int, device: torch.device | str = "cpu", cache_dir: str | None = None
    ) -> None:
        self.folder, self.max_length, self.device = folder, max_length, torch.device(device)
        self.cache_dir = cache_dir
        self.config = json.loads((folder / "config.json").read_text())
        self.dim = int(self.config.get("hidden_size") or self.config["d_model"])
        self._check_length()
        self.cache = Path(cache_dir).expanduser() / "embeddings" / self.key() if cache_dir else None
        self.model: Any = None
        self.encoded = 0

    def _check_length(self) -> None:
        config = self.config
        offset = first_position(SimpleNamespace(**config))
        most = config.get("max_position_embeddings", self.max_length + offset) - offset
        if self.max_length > most:
            raise ConfigError(f"method.encoder_length={self.max_length}, but this encoder reads at most {most} tokens")

    def key(self) -> str:
        """What an embedding depends on beside its text: every file of the encoder, length, device, library."""
        files = folder_hash(self.folder, self.cache_dir)
        return digest([files, self.max_length, "mean", *platform(self.device), BLOCK, STEP], 32)

    def encode(self, texts: Sequence[str]) -> Tensor:
        """[n, dim] fp32 on the CPU; a text that no run has encoded is encoded, each one once."""
        keys = [hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:16] for text in texts]
        place = {key: row for row, key in enumerate(dict.fromkeys(keys))}
        values, known = np.empty((len(place), self.dim), dtype=np.float32), np.zeros(len(place), dtype=bool)
        for found, vectors in self._files(place):
            rows = [(place[key], row) for row, key in enumerate(found) if key in place]
            values[[to for to, _ in rows]] = vectors[[row for _, row in rows]]
            known[[to for to, _ in rows]] = True
        text_of = dict(zip(keys, texts, strict=True))
        missing = [key for key, row in place.items() if not known[row]]
        for start in range(0, len(missing), PART):
            part = missing[start : start + PART]
            vectors = self._compute([text_of[key] for key in part])
            values[[place[key] for key in part]] = vectors
            self._save(part, vectors)
        return torch.from_numpy(values[[place[key] for key in keys]])

    def _files(self, wanted: dict[bytes, int]) -> Iterator[tuple[list[bytes], np.ndarray]]:
        """(hashes, vectors) of every whole file that holds a wanted text; of the others only the hashes are read."""
        for path in sorted(self.cache.glob("*.safetensors")) if self.cache else []:
            try:
                with safe_open(path, "numpy") as file:
                    keys = [row.tobytes() for row in file.get_tensor("keys")]
            except (OSError, SafetensorError):
                continue
            if not wanted.keys().isdisjoint(keys) and (found := atomic_io.load_arrays(path)):
                yield keys, found["vectors"]

    def _save(self, keys: list[bytes], vectors: np.ndarray) -> None:
        if self.cache:
            name = hashlib.sha256(b"".join(keys)).hexdigest()[:32]
            rows = np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(len(keys), -1)
            if not atomic_io.save_arrays(self.cache / f"{name}.safetensors", {"keys": rows, "vectors": vectors}):
                self.cache = None

    @torch.inference_mode()
    def _compute(self, texts: list[str]) -> np.ndarray:
        self.encoded += len(texts)
        model = self.model = self.model or self._load()
        tokenizer = model.tokenizer
        ids = tokenizer(texts, truncation=True, max_length=self.max_length, verbose=False)["input_ids"]
        lengths = np.array([len(row) for row in ids])
        values = np.empty((len(texts), self.dim), dtype=np.float32)
        for rows in blocks(lengths, np.arange(len(texts))):
            block = {"input_ids": [ids[row] for row in np.resize(rows, BLOCK)]}
            batch = tokenizer.pad(block, pad_to_multiple_of=STEP, return_tensors="pt").to(self.device)
            values[rows] = model(dict(batch))["sentence_embedding"][: len(rows)].float().cpu().numpy()
        return values

    def _load(self) -> Any:
        from sentence_transformers import SentenceTransformer

        try:
            model = SentenceTransformer(
                str(self.folder), device=str(self.device), local_files_only=True, model_kwargs={"use_safetensors": True}
            )
        except (OSError, ValueError, ImportError) as error:
            raise ModelError(f"the sentence encoder in {self.folder} cannot be loaded: {first_line(error)}") from error
        return model.float().eval().requires_grad_(False)
