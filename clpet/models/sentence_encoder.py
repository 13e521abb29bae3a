"""Sentence embeddings of a frozen encoder: computed once per text and cached on disk by encoder and text.

A looked-up embedding has the same bits as a computed one: texts always pass through the encoder in blocks of one
fixed shape, as in logit_cache.py. A cache file holds the hashes and vectors of some texts and is never changed
after it is written, so concurrent processes can at worst write the same file twice.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError, safe_open
from torch import Tensor

from clpet.config.compose import conf_dir, plugin_dirs
from clpet.config.identity import digest
from clpet.errors import ConfigError, ModelError, first_line, need_package
from clpet.models.architectures import first_position
from clpet.models.backbone import Backbone
from clpet.models.fixed_blocks import BLOCK_ROWS, WIDTH_MULTIPLE, rounding_platform, split_into_blocks
from clpet.models.protocols import NetworkConfig
from clpet.runtime import atomic_io
from clpet.runtime.fingerprint import folder_hash
from clpet.runtime.hub import unavailable

if TYPE_CHECKING:  # takes seconds to import
    from sentence_transformers import SentenceTransformer

TEXTS_PER_FILE = 16384  # at most; a run that stops loses the texts of one file
FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]


def locate(name: str) -> Path:
    """The folder of a sentence encoder, given as a model option, a folder or a hub id. Raises ModelError."""
    source = backbone(name)
    need_package("sentence_transformers", "encoder", f"the sentence encoder {name}", ModelError)
    location = source.locate()
    folder = location if isinstance(location, Path) else _download(source)
    if not list(folder.glob("*.safetensors")):
        raise ModelError(f"the sentence encoder {name} has no .safetensors in {folder}; pickled weights are not loaded")
    modules = json.loads((folder / "modules.json").read_text()) if (folder / "modules.json").is_file() else []
    for module in modules:
        if not str(module["type"]).startswith("sentence_transformers."):  # it would be imported, and could run anything
            raise ModelError(f"the sentence encoder {name} names {module['type']}, which is custom code")
    return folder


def backbone(name: str) -> Backbone:
    """The backbone that a sentence encoder's name refers to. Raises ModelError for one without weights."""
    options = [folder / "model" / f"{name}.yaml" for folder in (conf_dir(), *plugin_dirs())]
    values = next((OmegaConf.to_container(OmegaConf.load(file)) for file in options if file.is_file()), None)
    spec = cast(dict[str, Any] | None, values)  # the values of the YAML, which Backbone checks
    if spec is None:
        return (
            Backbone(name=name, path=name) if (Path(name) / "config.json").is_file() else Backbone(name=name, hub=name)
        )
    if not any(spec.get(key) for key in ("hub", "path", "package")):
        raise ModelError(f"method.encoder={name} is a model without weights: it cannot embed sentences")
    keys = ("hub", "revision", "path", "package", "sha256")
    return Backbone(name=name, **{key: spec[key] for key in keys if key in spec})


def _download(backbone: Backbone) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(str(backbone.hub), revision=backbone.revision, allow_patterns=[*FILES, "*/*.json"])
    except Exception as error:  # offline, no such id, no permission: each library version has its own types
        alternative = f"method.encoder=FOLDER{backbone.package_hint}"
        encoder = f"the sentence encoder {backbone.hub}"
        raise ModelError(unavailable(encoder, str(backbone.hub), error, alternative)) from error
    return Path(folder)


class Encoder:
    """Mean-pooled last hidden states of a frozen encoder in eval mode, in fp32; texts are cut at `max_length` tokens.

    The model is loaded when the first text must be encoded. `encoded` counts the texts that were.
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
        self.model: SentenceTransformer | None = None
        self.encoded = 0

    def _check_length(self) -> None:
        config = self.config
        offset = first_position(cast(NetworkConfig, SimpleNamespace(**config)))
        limit = config.get("max_position_embeddings", self.max_length + offset) - offset
        if self.max_length > limit:
            raise ConfigError(f"method.encoder_length={self.max_length}, but this encoder reads at most {limit} tokens")

    def key(self) -> str:
        """Hash of everything but the text that an embedding depends on: encoder files, length, device, libraries."""
        files = folder_hash(self.folder, self.cache_dir)
        platform = rounding_platform(self.device)
        return digest([files, self.max_length, "mean", *platform, BLOCK_ROWS, WIDTH_MULTIPLE], 32)

    def encode(self, texts: Sequence[str], save: bool = True) -> Tensor:
        """[n, dim] fp32 on the CPU. Only texts that are not in the cache are computed, each different one once.

        Without `save` they are not added to the cache.
        """
        keys = [hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:16] for text in texts]
        row_of = {key: row for row, key in enumerate(dict.fromkeys(keys))}
        values, cached = np.empty((len(row_of), self.dim), dtype=np.float32), np.zeros(len(row_of), dtype=bool)
        for file_keys, vectors in self._cache_files(row_of):
            pairs = [(row_of[key], row) for row, key in enumerate(file_keys) if key in row_of]
            values[[target for target, _ in pairs]] = vectors[[row for _, row in pairs]]
            cached[[target for target, _ in pairs]] = True
        text_of = dict(zip(keys, texts, strict=True))
        missing = [key for key, row in row_of.items() if not cached[row]]
        # Saved file by file, so that an interrupted run resumes with the files it has written.
        for start in range(0, len(missing), TEXTS_PER_FILE):
            chunk = missing[start : start + TEXTS_PER_FILE]
            vectors = self._compute([text_of[key] for key in chunk])
            values[[row_of[key] for key in chunk]] = vectors
            if save:
                self._save(chunk, vectors)
        return torch.from_numpy(values[[row_of[key] for key in keys]])

    def _cache_files(self, row_of: dict[bytes, int]) -> Iterator[tuple[list[bytes], np.ndarray]]:
        """(hashes, vectors) of every intact file with one of the texts; only the hashes of other files are read."""
        for path in sorted(self.cache.glob("*.safetensors")) if self.cache else []:
            try:
                with safe_open(path, "numpy") as file:
                    keys = [row.tobytes() for row in file.get_tensor("keys")]
            except (OSError, SafetensorError):
                continue
            if not row_of.keys().isdisjoint(keys) and (arrays := atomic_io.load_arrays(path)):
                yield keys, arrays["vectors"]

    def _save(self, keys: list[bytes], vectors: np.ndarray) -> None:
        """Writes one cache file; after a failed write the cache is not tried again."""
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
        for rows in split_into_blocks(lengths, np.arange(len(texts))):
            # A small block repeats its rows up to BLOCK_ROWS: the bits of an embedding depend on the shape alone.
            block = {"input_ids": [ids[row] for row in np.resize(rows, BLOCK_ROWS)]}
            batch = tokenizer.pad(block, pad_to_multiple_of=WIDTH_MULTIPLE, return_tensors="pt").to(self.device)
            values[rows] = model(dict(batch))["sentence_embedding"][: len(rows)].float().cpu().numpy()
        return values

    def _load(self) -> "SentenceTransformer":
        from sentence_transformers import SentenceTransformer

        try:
            model = SentenceTransformer(
                str(self.folder), device=str(self.device), local_files_only=True, model_kwargs={"use_safetensors": True}
            )
        except (OSError, ValueError, ImportError) as error:
            raise ModelError(f"the sentence encoder in {self.folder} cannot be loaded: {first_line(error)}") from error
        return model.float().eval().requires_grad_(False)
