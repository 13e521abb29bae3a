"""Probes (evaluation.probes): how far a model has moved from the pretrained one, on text that stays the same.

Two sets of text are read, by the pretrained and by the present model: neutral text, and the start of the test texts of
the task learned last. The values belong to the diagnostics of a row of the matrix, under names that begin with probe/.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import cast

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from clpet.config.schema import EvaluationOptions, Probe
from clpet.data.batches import EncodedDataset
from clpet.errors import ConfigError, DataError
from clpet.methods.base import Method
from clpet.metrics.drift import (
    effective_rank,
    hidden_rank,
    kl_divergences,
    linear_cka,
    low_rank_singular_values,
    mean,
    nll_and_drift,
    stable_rank,
)
from clpet.models.adapters import Adapters
from clpet.models.backbone import Architecture, Backbone
from clpet.models.peft_options import FullFineTuning
from clpet.models.protocols import config_of, network_of
from clpet.objectives.base import Objective, longest_input
from clpet.runtime.distributed import get_world, without_gradients

MAX_TOKENS = 4096  # of a set of text
SHARE = 0.1  # of the tokens of an evaluation, which both sets are read within, by two models
WIDTH = 128  # tokens of a window of neutral text


def check_probes(
    evaluation: EvaluationOptions,
    method: Method,
    objective: Objective,
    backbone: Backbone,
    peft: FullFineTuning,
    sharded: bool,
) -> None:
    """Raises ConfigError for probes that a run cannot measure, before anything is loaded."""
    probes = drift_probes(evaluation)
    if evaluation.probes and sharded:
        raise ConfigError("evaluation.probes cannot be used with hardware.shard: one rank reads the whole model")
    if probes and not method.mergeable:
        raise ConfigError(
            f"evaluation.probes compares one model with the pretrained one; method={method.name} chooses parameters "
            "for each text"
        )
    for probe in (Probe.kl, Probe.nll):
        if probe in probes and not objective.traits.needs_output_layer:
            raise ConfigError(
                f"evaluation.probes={probe.value} needs a model that predicts tokens, which "
                f"objective={objective.name} does not: use representation and weights"
            )
    if Probe.nll in probes and backbone.architecture is not Architecture.decoder:
        raise ConfigError(f"evaluation.probes=nll needs a decoder, not model={backbone.name}")
    prompted = backbone.architecture is Architecture.encoder_decoder and (peft.traits.prepends or peft.traits.prefixes)
    if Probe.representation in probes and (prompted or peft.traits.adds_blocks):
        raise ConfigError(
            f"evaluation.probes=representation does not support peft={peft.name} with model={backbone.name}"
        )
    all_trained = peft.traits.saves_model and not peft.traits.adds_blocks
    if Probe.weights in probes and not (peft.traits.lora_factors or all_trained):
        raise ConfigError(f"evaluation.probes=weights needs peft=lora or none, not peft={peft.name}")


def drift_probes(evaluation: EvaluationOptions) -> list[Probe]:
    """The probes that compare the present model with the pretrained one."""
    return [probe for probe in evaluation.probes if probe is not Probe.plasticity]


def neutral_text(path: str | None) -> str:
    """The text of a file; without one the language reference that Python contains, in English. Raises DataError."""
    if path is None:
        from pydoc_data import topics

        return "\n\n".join(text for _, text in sorted(topics.topics.items()))
    try:
        return Path(path).expanduser().read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"evaluation.probe_text={path} cannot be read as UTF-8 text: {error}") from error


@dataclass
class Probes:
    """Measures the probes of a run. `load_base` loads the pretrained network, for adapters that cannot be switched off.

    `pool` holds the test examples; a full evaluation of them is what the cost of the probes is limited by.
    """

    options: EvaluationOptions
    method: Method
    pool: EncodedDataset
    load_base: Callable[[], nn.Module]

    def measure(self, row: int) -> dict[str, float]:
        """The values after `row` tasks; empty without probes, and on all ranks but the main one."""
        if not drift_probes(self.options):
            return {}
        with get_world().wait_for_main():
            return self._measure(row) if get_world().is_main else {}

    def _measure(self, row: int) -> dict[str, float]:
        objective, values = self.method.objective, dict[str, float]()
        objective.adapters.train_mode(False)
        counted, model = objective.meter.counting("evaluated"), self.method.answering()
        with self._base() as base, without_gradients(), counted, objective.autocast, model:
            if Probe.kl in self.options.probes:
                values |= self._task_divergence(max(row - 1, 0), base)
            values |= self._neutral(base)
            if Probe.weights in self.options.probes:
                values |= self._weights(base)
        return {f"probe/{name}": value for name, value in values.items()}

    def describe(self) -> str:
        """The line about the probes in the header of a run; '' without any."""
        if not drift_probes(self.options):
            return ""
        tokens, dim = self.windows.numel(), self.method.objective.dim
        names = ", ".join(probe.value for probe in drift_probes(self.options))
        few = Probe.representation in self.options.probes and tokens < 4 * dim
        bias = f"; fewer than 4 tokens for each of {dim} dimensions bias CKA towards 1" if few else ""
        return f"probes {names} on {tokens:,} tokens of neutral text{bias}"

    @cached_property
    def num_tokens(self) -> int:
        """Tokens of a set: evaluation.probe_tokens, or a share of those of an evaluation, in whole windows."""
        limit = self.options.probe_tokens or int(min(MAX_TOKENS, SHARE * float(self.pool.lengths.sum()) / 4))
        return max(limit, self.width)

    @property
    def width(self) -> int:
        """Tokens of a window of neutral text."""
        return min(WIDTH, longest_input(self.method.objective.adapters) or WIDTH)

    @cached_property
    def windows(self) -> Tensor:
        """[windows, width]: the first tokens of the neutral text."""
        tokenizer, width = self.method.objective.tokenizer, self.width
        count = self.num_tokens // width
        text = neutral_text(self.options.probe_text)[: 16 * count * width]  # characters; a token has fewer
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) < width:
            raise DataError(f"evaluation.probe_text has {len(ids)} tokens, fewer than one window of {width}")
        count = min(count, len(ids) // width)
        return torch.tensor(ids[: count * width], device=self.method.objective.device).view(count, width)

    @contextlib.contextmanager
    def _base(self) -> "Iterator[Base]":
        """The pretrained network: the present one with its adapters off, or loaded once more from its files."""
        adapters = self.method.objective.adapters
        if adapters.traits.keeps_backbone and not self.method.changes_backbone:
            yield Base(adapters, None)
            return
        device = self.method.objective.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):  # random weights draw numbers
            model = self.load_base().requires_grad_(False)
        yield Base(adapters, model)

    def _task_divergence(self, task: int, base: "Base") -> dict[str, float]:
        """Mean KL divergences of the next token in the first test texts of a task, over the tokens to predict."""
        objective = self.method.objective
        rows = self.pool.rows_of(task)
        rows = rows[: max(1, int(np.searchsorted(np.cumsum(self.pool.lengths[rows]), self.num_tokens)))]
        totals = Totals()
        for batch_rows in objective.batches(self.pool, rows):
            batch = self.pool.batch(batch_rows, objective.device)
            with base.switched_on():
                before = objective.logits(batch)
            totals.add("kl_forward/task", "kl_reverse/task", kl_divergences(before, objective.logits(batch)))
        return totals.means()

    def _neutral(self, base: "Base") -> dict[str, float]:
        """Divergences, negative log-likelihoods and hidden states on neutral text."""
        size, causal = max(1, self.method.objective.eval_batch_size // 4), self.method.objective.causal
        totals, states = Totals(), list[tuple[list[Tensor], list[Tensor]]]()
        for ids in self.windows.split(size) if self._reads_neutral_text else ():
            with base.switched_on():
                states_before, before = self._forward(ids)
            states_now, now = self._forward(ids)
            if Probe.representation in self.options.probes:
                states.append((states_before, states_now))
            if before is None or now is None or not causal:
                continue
            targets, (before, now) = ids[:, 1:].flatten(), (x[:, :-1].flatten(0, 1) for x in (before, now))
            if Probe.kl in self.options.probes:
                totals.add("kl_forward/neutral", "kl_reverse/neutral", kl_divergences(before, now))
            if Probe.nll in self.options.probes:
                totals.add("nll/neutral", "nll_drift/neutral", nll_and_drift(before, now, targets))
        return {**totals.means(), **(_representation(states) if states else {})}

    @property
    def _reads_neutral_text(self) -> bool:
        probes, causal = self.options.probes, self.method.objective.causal
        return Probe.representation in probes or (causal and (Probe.kl in probes or Probe.nll in probes))

    def _forward(self, ids: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """([tokens, dim] on the host of every block, [batch, width, vocabulary] logits if the network has them).

        Of an encoder-decoder the encoder is read. The positions of virtual tokens are left out.
        """
        model = self.method.objective.adapters.model
        network = network_of(model).get_encoder() if config_of(model).is_encoder_decoder else network_of(model)
        output = network(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
        states = [state[:, -ids.shape[1] :].flatten(0, 1).float().cpu() for state in output.hidden_states[1:]]
        logits = cast(Tensor | None, getattr(output, "logits", None))
        return states, None if logits is None else logits[:, -ids.shape[1] :]

    def _weights(self, base: "Base") -> dict[str, float]:
        """Norm and ranks of the change of all adapted matrices; ranks are means over those that have changed."""
        spectra, squared_norm = [], 0.0
        for singular_values, weight in changes(self.method.objective.adapters, base.model):
            spectra.append(singular_values)
            squared_norm += float(weight.float().square().sum())
        norm = math.sqrt(sum(float(values.square().sum()) for values in spectra))
        changed = [values for values in spectra if values.any()]
        return {
            "weight_norm": norm,
            "weight_norm_relative": norm / math.sqrt(squared_norm) if squared_norm else 0.0,
            "weight_effective_rank": mean([effective_rank(values) for values in changed]) if changed else 0.0,
            "weight_stable_rank": mean([stable_rank(values) for values in changed]) if changed else 0.0,
        }


@dataclass
class Base:
    """The pretrained network: `model`, or that of `adapters` with its adapters off."""

    adapters: Adapters
    model: nn.Module | None

    @contextlib.contextmanager
    def switched_on(self) -> Iterator[None]:
        """Forward passes of the objective inside are those of the pretrained network."""
        if self.model is None:
            with self.adapters.off():
                yield
            return
        present, self.adapters.model = self.adapters.model, self.model
        try:
            yield
        finally:
            self.adapters.model = present


class Totals:
    """Sums over tokens, by name."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.count: dict[str, int] = {}

    def add(self, first: str, second: str, values: tuple[Tensor, Tensor]) -> None:
        """Adds the values [tokens] of two names."""
        for name, tensor in zip((first, second), values, strict=True):
            self.sums[name] = self.sums.get(name, 0.0) + float(tensor.double().sum())
            self.count[name] = self.count.get(name, 0) + tensor.numel()

    def means(self) -> dict[str, float]:
        """Means over tokens; 0 without any."""
        return {name: total / max(1, self.count[name]) for name, total in self.sums.items()}


def _representation(batches: list[tuple[list[Tensor], list[Tensor]]]) -> dict[str, float]:
    """CKA with the pretrained model and the effective rank of the hidden states after every block, and their means."""
    values, similarities, ranks = dict[str, float](), [], []
    for block in range(len(batches[0][0])):
        before, now = (torch.cat([batch[side][block] for batch in batches]) for side in (0, 1))
        similarities.append(linear_cka(before, now))
        ranks.append(hidden_rank(now))
        values[f"cka/block{block + 1:02d}"] = similarities[-1]
        values[f"effective_rank/block{block + 1:02d}"] = ranks[-1]
    return {"cka": mean(similarities), "effective_rank": mean(ranks), **values}


def changes(adapters: Adapters, base: nn.Module | None) -> Iterator[tuple[Tensor, Tensor]]:
    """(singular values of its change, pretrained weight) of every adapted matrix.

    With the network `base` every matrix that is trained is compared with its own, else the factors of low-rank
    increments are read.
    """
    if base is not None:
        pretrained = dict(base.named_parameters())
        for name, weight in adapters.tensors("default").items():
            before = pretrained.get(name)
            if before is not None and before.dim() == 2:
                yield torch.linalg.svdvals((weight.detach() - before).double()).cpu(), before
        return
    for module in adapters.model.modules():
        for name in module.active_adapters if isinstance(module, LoraLayer) else ():
            assert isinstance(module, LoraLayer)
            if name in module.lora_A:
                A, B, base_weight = (
                    cast(Tensor, layer.weight)
                    for layer in (module.lora_A[name], module.lora_B[name], module.get_base_layer())
                )
                yield low_rank_singular_values(A, B, module.scaling[name]).cpu(), base_weight
    for branches in adapters.branches:
        for singular_values, base_weight in branches.spectra():
            yield singular_values.cpu(), base_weight
