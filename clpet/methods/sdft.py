"""SDFT: self-distillation on answers that the model itself samples (Shenfeld et al., 2026, arXiv 2601.19897).

The student reads a prompt x and samples an answer y; the teacher reads x with the correct answer c as an example. With
p_S = student(. | x, y_<t) and p_T = teacher(. | x, c, y_<t) the loss of token t of y is
    alpha = 0       KL(p_T || p_S)                               (forward, published)
    alpha = 1       KL(p_S || p_T)                               (reverse)
    between         alpha KL(p_T || m) + (1 - alpha) KL(p_S || m),   m = (1 - alpha) p_S + alpha p_T
and L is the mean over the tokens of an answer from number `skip` to its end, and then over answers. No gradient passes
through the teacher or through sampling. Neither model uses dropout. The teacher's weights are, by `teacher`,
    ema     theta_T <- (1 - rate) theta_T + rate theta_S after every step, from theta_S at the start of the task
    start   those of the student at the start of the task
    live    those of the student
    base    those of the pretrained model
"""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar, cast

import numpy as np
import torch
from torch import Tensor

from clpet.config.schema import require
from clpet.config.seeding import derive
from clpet.data.batches import Batch, EncodedDataset, pad_id
from clpet.data.benchmark import Task
from clpet.data.traits import Traits
from clpet.errors import ConfigError
from clpet.methods.base import Method
from clpet.methods.components.second_weights import SecondWeights
from clpet.methods.components.token_divergence import divergence, in_chunks, mean_behind, on_support, token_losses
from clpet.models.peft_options import FullFineTuning
from clpet.models.protocols import network_of
from clpet.objectives.answer_encoding import through
from clpet.objectives.base import Objective
from clpet.objectives.demonstrations import ANSWER, PROMPT, demonstrating_prompts
from clpet.objectives.generation import InverseTransform, greedy, padded_answers
from clpet.objectives.text_to_text import TextToText
from clpet.runtime.distributed import get_world
from clpet.runtime.sharding.network import gathered
from clpet.training.step import StepContext
from clpet.training.trainer import Trainer

log = logging.getLogger(__name__)

PUBLISHED = (
    "\n{prompt}\n\nThis is an example for a response to the question:\n{answer}\n\nNow answer with a response of your "
    "own, including the thinking process.\n"
)
MANY = 0.1  # share of answers without a loss from which a task is warned of


class Teacher(Enum):
    """The weights of the teacher."""

    ema = "ema"
    start = "start"
    live = "live"
    base = "base"


class Writer(Enum):
    """The model that writes the answers, each with its own prompt."""

    student = "student"
    teacher = "teacher"


class SampleCounts:
    """Sums over the answers of a task: answers, those without a loss, copies of c; loss tokens and their divergence.

    Every rank adds its own; the state holds those of all.
    """

    def __init__(self) -> None:
        self.sums = torch.zeros(5, dtype=torch.float64)

    def add(self, *values: float) -> None:
        """Adds those of a micro-batch."""
        self.sums += torch.tensor(values, dtype=torch.float64)

    def state(self) -> Tensor:
        """Returns the sums over all ranks."""
        total = self.sums.clone()
        get_world().sum([total])
        return total

    def load(self, state: Tensor) -> None:
        """Continues from a state, which the main rank holds."""
        self.sums = state.cpu().clone() if get_world().is_main else torch.zeros_like(self.sums)


@dataclass
class SDFT(Method[TextToText]):
    """Replayed examples are learned in the same way, with their own correct answers."""

    teacher: Teacher = Teacher.ema
    rate: float = 0.01
    alpha: float = 0.0
    top_k: int = 0
    tail: bool = False
    sampled_token: bool = False
    skip: int = 0
    temperature: float = 1.0
    generations: int = 1
    generate_from: Writer = Writer.student
    template: str = PUBLISHED

    uses_replay: ClassVar[bool] = True
    needs_logits: ClassVar[bool] = True
    has_cross_entropy: ClassVar[bool] = False
    saved_uncounted: ClassVar[tuple[str, ...]] = ("figures_of_task",)
    saved_in_task: ClassVar[tuple[str, ...]] = ("second", "counts")

    def __post_init__(self) -> None:
        require(0 <= self.rate <= 1, "method.rate", self.rate, "in [0, 1]")
        require(0 <= self.alpha <= 1, "method.alpha", self.alpha, "in [0, 1]")
        require(self.top_k >= 0, "method.top_k", self.top_k, "0 (the whole vocabulary) or more")
        require(self.skip >= 0, "method.skip", self.skip, "0 or more")
        require(self.temperature > 0, "method.temperature", self.temperature, "more than 0")
        require(self.generations >= 1, "method.generations", self.generations, "at least 1")
        require(not self.tail or self.top_k > 0, "method.tail", "true", "false without method.top_k")
        once = self.template.count(PROMPT) == 1 and ANSWER in self.template
        require(once, "method.template", repr(self.template), "a text with {prompt} once, and {answer}")
        if self.sampled_token:
            require(self.alpha == 1 and not self.top_k, "method.sampled_token", "true",
                    "false unless method.alpha=1 and method.top_k=0")  # fmt: skip

    @classmethod
    def unmet(cls, traits: Traits) -> str:
        return super().unmet(traits) if traits.generates_text else "it learns from answers that the model writes"

    def check(self, objective: Objective, replay: str, peft: FullFineTuning) -> None:
        super().check(objective, replay, peft)
        if self.teacher is Teacher.base and not peft.traits.keeps_backbone:
            raise ConfigError(
                f"method.teacher=base is the model whose adapter is switched off, which peft={peft.name} does not "
                "have: set method.teacher=start or ema, or use peft=lora"
            )

    def ineffective(self) -> dict[str, str]:
        averages = self.teacher is Teacher.ema
        return {} if averages else {"method.rate": f"method.teacher={self.teacher.value} is not an average"}

    def init_adapters(self) -> None:
        super().init_adapters()
        self.second: SecondWeights | None = None
        self.counts, self.figures_of_task = SampleCounts(), dict[str, float]()
        self._switch_dropout_off()
        self.shown = demonstrating_prompts(self.objective, self.data.train, self.template)
        self._check_skip()

    def _switch_dropout_off(self) -> None:
        """Raises ConfigError for dropout that the user has set."""
        adapters, set_by_user = self.objective.adapters, self.objective.backbone.dropout not in ("auto", "off")
        fields = {} if adapters.config is None else vars(adapters.config)
        options = [f"peft.{name}" for name, rate in fields.items() if "dropout" in name and rate]
        options += ["model.dropout"] if set_by_user and adapters.drops else []
        if options:
            raise ConfigError(f"method={self.name} compares models without dropout: do not set {options[0]}")
        adapters.drops = False

    def _check_skip(self) -> None:
        """Raises ConfigError if the correct answers of a task are, on average, not longer than what is skipped."""
        train = self.data.train
        assert train.answer is not None
        for index, name in enumerate(self.benchmark.names if self.skip else []):
            lengths = train.answer.lengths[train.rows_of(index)]
            if len(lengths) and self.skip >= lengths.mean():
                raise ConfigError(
                    f"method.skip={self.skip} leaves no loss in task {name}, whose answers have {lengths.mean():.1f} "
                    "tokens on average: lower it"
                )

    def learn(self, task: Task, index: int, trainer: Trainer) -> None:
        copies = self.teacher in (Teacher.ema, Teacher.start)
        self.second = SecondWeights(cast(Method, self), self.named_parameters()) if copies else None
        self.counts = SampleCounts()
        super().learn(task, index, trainer)
        self.second = None
        answers, empty, copied, tokens, divergence = self.counts.state().tolist()
        self.figures_of_task = {"divergence": divergence / tokens} if tokens else {}
        if answers:
            self.figures_of_task |= {"copied": copied / answers, "empty": empty / answers}
        if answers and empty >= MANY * answers:
            log.warning(
                "task %s: %.0f %% of the sampled answers have no token after the first %d (method.skip)",
                task.name, 100 * empty / answers, self.skip,
            )  # fmt: skip

    @contextlib.contextmanager
    def teaching(self) -> Iterator[None]:
        """Inside, the network is the teacher."""
        adapters = self.objective.adapters
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.second.active() if self.second else adapters.evaluating())
            if self.teacher is Teacher.base:
                stack.enter_context(adapters.off())
            yield

    def loss(self, context: StepContext) -> Tensor:
        """A micro-batch counts by its number of examples, and not by that of the tokens of their correct answers."""
        objective, batch, device = self.objective, context.batch, self.objective.device
        rows = np.repeat(batch.rows, self.generations)
        answers = self.written(context, rows)
        with torch.no_grad(), self.teaching():
            teacher = objective.logits(self.prompted(self.shown, rows, answers))
        student = objective.logits(self.prompted(self.data.train, rows, answers))
        tokens = torch.tensor([token for answer in answers for token in answer], device=device)
        losses, divergences = in_chunks(self.compare, student, teacher, tokens)
        lengths = [len(answer) for answer in answers]
        if context.counts:
            self.add_counts(rows, answers, divergences.detach().split(lengths))
        total = torch.stack([mean_behind(values, self.skip) for values in losses.split(lengths)]).sum()
        # The trainer weights a micro-batch by its share of the batch's weight; dividing makes this a mean over answers.
        return total / (self.generations * len(context.rows) * batch.share)

    def written(self, context: StepContext, rows: np.ndarray) -> list[list[int]]:
        """Tokens of an answer to each train row, with the end token if one was drawn; a row may be there several times.

        They depend on the seed of the run, the step, the example and the model alone, so a resumed run draws the same.
        """
        objective, tokenizer = self.objective, self.objective.tokenizer
        by_student = self.generate_from is Writer.student
        batch = self.prompted(self.data.train if by_student else self.shown, rows)
        length, position = objective.benchmark.max_target, (context.task, context.epoch, context.step)
        seeds = [derive(self.seed, "sdft", *position, row, i % self.generations) for i, row in enumerate(rows.tolist())]
        uniform = torch.from_numpy(np.stack([np.random.default_rng(seed).random(length) for seed in seeds]))
        draw = InverseTransform(uniform.to(objective.device), self.temperature)
        settings = greedy(length, objective.ends, pad_id(tokenizer), objective.start)
        model, writer = objective.adapters.model, objective.adapters.evaluating() if by_student else self.teaching()
        with writer, gathered(model), objective.autocast:
            drawn = padded_answers(network_of(model), objective.inputs(batch), settings, objective.causal, draw)
        answers = through(drawn, objective.ends)
        # With a key-value cache, writing costs about as much as one pass over prompts and answers.
        objective.count(self.prompted(self.data.train if by_student else self.shown, rows, answers), gradient=False)
        return answers

    def prompted(self, pool: EncodedDataset, rows: np.ndarray, answers: list[list[int]] | None = None) -> Batch:
        """The prompts of these rows in `pool`, with `answers` as their answers if there are any."""
        prompts, tasks = [pool.source[row].tolist() for row in rows], pool.tasks[rows].tolist()
        drawn = EncodedDataset(prompts, [-1] * len(rows), tasks, pool.pad_id, answers=answers, left=pool.left)
        return drawn.batch(np.arange(len(rows)), self.objective.device)

    def compare(self, student: Tensor, teacher: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """[tokens] losses and divergences from logits [tokens, vocabulary]."""
        student, teacher = student / self.temperature, teacher / self.temperature
        if self.sampled_token:
            return token_losses(student, teacher, tokens)
        values = divergence(*on_support(student, teacher, self.top_k, self.tail), self.alpha)
        return values, values

    def add_counts(self, rows: np.ndarray, answers: list[list[int]], divergences: Sequence[Tensor]) -> None:
        """Counts answers, and sums the divergences of their tokens."""
        gold = self.data.train.answer
        assert gold is not None
        empty = sum(len(answer) <= self.skip for answer in answers)
        copied = sum(gold[row].tolist() == answer for row, answer in zip(rows, answers, strict=True))
        tokens = sum(max(0, len(answer) - self.skip) for answer in answers)
        total = torch.stack([values[self.skip :].sum() for values in divergences]).sum().item()
        self.counts.add(len(answers), empty, copied, tokens, total)

    def after_step(self, context: StepContext) -> None:
        if self.second and self.teacher is Teacher.ema:
            self.second.average(1 - self.rate)

    def diagnostics(self) -> dict[str, float]:
        """Mean divergence of a token, shares of answers equal to the correct one, and of those without a loss."""
        return self.figures_of_task
