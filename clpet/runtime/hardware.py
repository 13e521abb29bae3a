"""Hardware options of a run: device, precision, number of ranks, and how a large backbone is made to fit in memory."""

import contextlib
import importlib.util
import os
import platform
import shutil
from dataclasses import dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import ClassVar, Protocol, cast

import torch

from clpet.config.schema import WordOrNumber, require
from clpet.errors import ConfigError, HostError
from clpet.runtime.allocator import keep_freed_memory
from clpet.runtime.distributed import get_world


class Adapters(Protocol):
    """The part of an option of the group `peft` that hardware depends on."""

    name: str

    @property
    def traits(self) -> "AdapterTraits":
        """What the option can do."""


class AdapterTraits(Protocol):
    """The part of `PeftTraits` that hardware depends on."""

    @property
    def full(self) -> bool:
        """Whether weights of the backbone are trained."""

    @property
    def nf4(self) -> bool:
        """Whether quantized weights are supported."""

    @property
    def saves_model(self) -> bool:
        """Whether weights of the backbone itself are trained."""

    @property
    def shards(self) -> bool:
        """Whether a backbone that is sharded is supported."""


class Method(Protocol):
    """The part of a method that hardware depends on."""

    name: str
    supports_recompute: ClassVar[bool]
    unshardable: ClassVar[str]


class Device(Enum):
    """Device of the network; auto: cuda where available, else cpu."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Dtype(Enum):
    """Precision of the frozen backbone; adapters and heads are always fp32."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


class Quantization(Enum):
    """Storage of the frozen backbone's weights; nf4: four bits per weight (QLoRA, Dettmers et al., 2023)."""

    none = "none"
    nf4 = "nf4"


class Kernels(Enum):
    """Kernels of the backbone's norms and gated layers; liger: fused ones."""

    none = "none"
    liger = "liger"


class Generation(Enum):
    """How greedy answers are computed; padded: in batches of equal length; continuous: without padding, on a GPU."""

    padded = "padded"
    continuous = "continuous"


# Options that change the rounding, as `Hardware.record` names them, and the values that it leaves out.
NOT_RECORDED = {"generation": "padded", "compiled": "false", "fused": "none", "padding_free": "false",
                "max_tokens": "unlimited"}  # fmt: skip


@dataclass
class Hardware:
    """A hardware group option: it changes how a run is carried out, not what it computes (nf4 alone rounds weights)."""

    name: str = "auto"
    device: Device = Device.auto
    dtype: Dtype = Dtype.auto
    micro_batch_size: int | None = None
    max_tokens: int | None = None
    padding_free: bool = False
    eval_batch_size: int = 128
    generation: Generation = Generation.padded
    threads: int | None = None
    parallel_runs: int = 1
    ranks: WordOrNumber = 1  # an integer, or auto
    shard: bool = False
    replicas: int = 1
    gradient_checkpointing: bool = False
    offload: bool = False
    quantization: Quantization = Quantization.none
    compile: bool = False
    kernels: Kernels = Kernels.none

    def __post_init__(self) -> None:
        valid = self.ranks == "auto" or (
            isinstance(self.ranks, int) and not isinstance(self.ranks, bool) and self.ranks >= 1
        )
        require(valid, "hardware.ranks", self.ranks, "auto, or a number of processes")
        size = self.micro_batch_size
        require(size is None or size >= 1, "hardware.micro_batch_size", size, "at least 1, or null")
        tokens = self.max_tokens
        require(tokens is None or tokens >= 1, "hardware.max_tokens", tokens, "at least 1, or null")
        require(self.eval_batch_size >= 1, "hardware.eval_batch_size", self.eval_batch_size, "at least 1")
        require(self.threads is None or self.threads >= 1, "hardware.threads", self.threads, "at least 1, or null")
        require(self.replicas >= 1, "hardware.replicas", self.replicas, "at least 1")
        require(self.replicas == 1 or self.shard, "hardware.replicas", self.replicas, "1 without hardware.shard=true")
        require(self.parallel_runs >= 1, "hardware.parallel_runs", self.parallel_runs, "at least 1")
        if self.device is Device.cuda and not torch.cuda.is_available():
            raise HostError("hardware.device=cuda, but this machine has no CUDA device: use hardware=cpu or auto")
        if self.quantization is Quantization.nf4:
            installed = all(importlib.util.find_spec(name) for name in ("bitsandbytes", "accelerate"))
            if self.torch_device.type != "cuda" or not installed:
                raise HostError(
                    "hardware.quantization=nf4 needs a CUDA device, and `pip install bitsandbytes accelerate`"
                )
            require(not self.shard, "hardware.shard", "true", "false with hardware.quantization=nf4")
        if self.threads:
            torch.set_num_threads(self.threads)
        if self.torch_device.type == "cpu":
            keep_freed_memory()
        self._check_kernels()

    def _check_kernels(self) -> None:
        """Raises HostError where this machine lacks what compile, kernels and offload need."""
        cuda = self.torch_device.type == "cuda"
        if self.offload and not cuda:
            raise HostError("hardware.offload=true needs a CUDA device: a CPU has all activations in the host's memory")
        if self.kernels is Kernels.liger and not (cuda and importlib.util.find_spec("liger_kernel")):
            raise HostError("hardware.kernels=liger needs a CUDA device, and `pip install liger-kernel`")
        if self.compile and cuda and not importlib.util.find_spec("triton"):
            raise HostError("hardware.compile=true needs triton on a CUDA device: pip install triton")
        compilers = (os.environ.get("CXX", "g++"), "clang++")
        if self.compile and not cuda and not any(map(shutil.which, compilers)):
            raise HostError("hardware.compile=true needs a C++ compiler, which this machine lacks: install g++")
        for option in ("compile", "offload"):
            both = self.shard and getattr(self, option)
            require(not both, f"hardware.{option}", "true", "false with hardware.shard=true")

    @property
    def torch_device(self) -> torch.device:
        """The device, with `auto` resolved on this machine."""
        name = self.device.value
        return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)

    def check(self, peft: Adapters, method: Method) -> None:
        """Raises ConfigError if the adapter option or the method does not support sharding, nf4 or recomputation."""
        traits, nf4 = peft.traits, self.quantization is Quantization.nf4
        for option, value, supported in (("shard", self.shard, traits.shards), ("quantization", nf4, traits.nf4)):
            if value and not supported:
                frozen = option == "quantization" and traits.full
                reason = "needs a frozen backbone" if frozen else f"does not support peft={peft.name}"
                raise ConfigError(f"hardware.{option} {reason}: use peft=lora instead of peft={peft.name}")
        if self.shard and traits.saves_model and method.unshardable:
            raise ConfigError(
                f"hardware.shard with peft={peft.name} does not support method={method.name}, which "
                f"{method.unshardable}: use peft=lora"
            )
        self._check_replicas(get_world().size)
        if self.generation is Generation.continuous:
            self._check_generation()
        options = {"gradient_checkpointing": self.gradient_checkpointing, "compile": self.compile}
        repeated = next((name for name, on in options.items() if on), None)
        if repeated and not method.supports_recompute:
            raise ConfigError(
                f"hardware.{repeated} cannot be used with method={method.name}, whose branches are mixed "
                "differently for every batch: lower hardware.micro_batch_size instead"
            )

    def _check_generation(self) -> None:
        cuda = self.torch_device.type == "cuda" and self.torch_dtype is torch.bfloat16
        if not cuda or importlib.util.find_spec("flash_attn") is None:
            raise HostError(
                "hardware.generation=continuous needs a CUDA device, hardware.dtype=bf16, and `pip install flash-attn`;"
                " else use hardware.generation=padded"
            )

    def processes(self) -> int:
        """Number of ranks on this machine, with `auto` resolved. Raises HostError if it exceeds the number of GPUs."""
        gpus = torch.cuda.device_count() if self.torch_device.type == "cuda" else 0
        count = max(1, gpus) if self.ranks == "auto" else cast(int, self.ranks)
        if gpus and count > gpus:
            raise HostError(f"hardware.ranks={self.ranks}, but this machine has {gpus} GPUs: use hardware.ranks=auto")
        self._check_replicas(count)
        return count

    def _check_replicas(self, ranks: int) -> None:
        """Raises ConfigError if the ranks do not form equal groups; one rank divides nothing."""
        if ranks > 1 and self.replicas > 1 and (ranks % self.replicas or ranks == self.replicas):
            raise ConfigError(
                f"hardware.replicas={self.replicas} must divide the {ranks} ranks of the run into groups of two or more"
            )

    @property
    def torch_dtype(self) -> torch.dtype:
        """The precision, with `auto` resolved: bf16 where the device computes in it natively, else fp32."""
        if self.dtype is Dtype.auto:
            cuda = self.torch_device.type == "cuda"
            native = torch.cuda.is_bf16_supported(including_emulation=False) if cuda else _cpu_has_bf16()
            return torch.bfloat16 if native else torch.float32
        return torch.bfloat16 if self.dtype is Dtype.bf16 else torch.float32

    def record(self) -> dict[str, str | int]:
        """This machine: its name, and what the rounding of sums depends on (other values give other last bits)."""
        cuda = self.torch_device.type == "cuda"
        options: dict[str, str | int] = {
            "generation": self.generation.value,
            "compiled": str(self.compile).lower(),
            "fused": self.kernels.value,
            "padding_free": str(self.padding_free).lower(),
            "max_tokens": self.max_tokens or "unlimited",
        }
        return {
            "device": self.torch_device.type,
            **({"gpu": torch.cuda.get_device_name(self.torch_device)} if cuda else {}),
            "dtype": str(self.torch_dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "ranks": get_world().size,
            "kernels": torch.backends.cpu.get_cpu_capability(),
            **({} if cuda else {"processor": processor()}),
            **{name: value for name, value in options.items() if value != NOT_RECORDED[name]},
            "name": platform.node(),
        }


@cache
def processor() -> str:
    """The model of the CPU: libraries choose their kernels by it, beyond the capability that torch names."""
    fields: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines():
            key, _, value = line.partition(":")
            fields[key.strip()] = value.strip()
    if name := fields.get("model name"):
        return f"{name}, family {fields.get('cpu family', '-')}, model {fields.get('model', '-')}"
    return platform.processor() or platform.machine()


def _cpu_has_bf16() -> bool:
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # private, so it may be missing in some release
    return bool(probe and probe())
