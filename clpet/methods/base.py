"""Method: the hooks of a continual-learning method. All defaults together are plain sequential fine-tuning."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Generic, cast

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import TypeVar  # unlike that of typing in Python 3.11 it has a default

from clpet.config.seeding import derive
from clpet.data.batches import Batch, Encoded, EncodedDataset
from clpet.data.benchmark import Benchmark, Task
from clpet.data.traits import Traits
from clpet.errors import ConfigError
from clpet.methods import saved_state
from clpet.methods.hook_check import check_hooks
from clpet.models.peft_options import FullFineTuning
from clpet.objectives.base import AnswerSpace, Objective, ObjectiveState, Predictions
from clpet.objectives.classification import Head
from clpet.records import Figures, Json, State, Tree
from clpet.replay.base import NoReplay, ReplayState, ValidationRows
from clpet.replay.batch_plan import BatchPlan
from clpet.runtime.distributed import get_world, without_gradients
from clpet.training.step import StepContext, StepHooks
from clpet.training.trainer import Trainer

ObjectiveType = TypeVar("ObjectiveType", bound=Objective, default=Objective)


@dataclass
class Method(Generic[ObjectiveType]):
    """Base class. A subclass is a dataclass whose annotated fields are the options of its YAML.

    Method[Classification] works with labels and the head, Method with any objective.
    """

    name: str = ""

    needs_labels: ClassVar[bool] = False  # learns labels only: it works on the head or on label ids
    needs_plain_text: ClassVar[bool] = False  # learns plain text only
    supports_plain_text: ClassVar[bool] = True  # also learns plain text
    needs_logits: ClassVar[bool] = False  # works with the logits of a cross-entropy loss
    has_cross_entropy: ClassVar[bool] = True  # labels are learned by a cross-entropy, which class weights may weight
    changes_backbone: ClassVar[bool] = False  # merges what it has learned into the backbone
    trains: ClassVar[bool] = True  # by gradient; False: it counts, or learns nothing
    uses_replay: ClassVar[bool] = False  # reads a memory of old examples, so replay= may be set
    needs_adapter: ClassVar[bool] = False  # has an adapter per task, so peft=none is refused
    supported_pefts: ClassVar[tuple[str, ...]] = ()  # values of peft= it accepts; empty: all that train something
    unshardable: ClassVar[str] = ""  # why it cannot train weights that are divided over ranks; empty: it can
    supports_recompute: ClassVar[bool] = True  # a block can be run again in backward (gradient checkpointing)
    reads_activations: ClassVar[bool] = False  # finds the tokens of every example in what layers compute
    reads_examples: ClassVar[bool] = False  # answers by its stored examples, so a loaded run needs its data
    task_id_at_test = False  # True: results are task-incremental; a subclass may make it an option
    mergeable: ClassVar[bool] = True  # one set of weights for all inputs, so that adapters can be merged
    uses_validation: ClassVar[bool] = True  # validates after every epoch with train.select=best
    rounds_with_unseen_labels: ClassVar[bool] = False  # logits of a task change in the last bit with labels to come
    # Attributes that are saved, restored and counted (saved_state.py); a subclass adds its own to those of its bases.
    saved: ClassVar[tuple[str, ...]] = ()  # what later tasks need
    saved_uncounted: ClassVar[tuple[str, ...]] = ()  # records, which are not counted as stored parameters
    saved_in_task: ClassVar[tuple[str, ...]] = ()  # what the hooks of a fit gather, to resume inside a task
    cache_dir: ClassVar[str | None] = None  # set by the run: folder of the cache shared by runs

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.__orig_bases__ = ()  # type: ignore[attr-defined]  # OmegaConf takes type arguments of a base for a dict's
        check_hooks(cls, Method)

    @classmethod
    def unmet(cls, traits: Traits) -> str:
        """What the method needs and an objective with these traits lacks; '' if it supports the objective."""
        if cls.needs_labels and not traits.has_labels:
            return "it needs labels"
        if cls.needs_plain_text and not traits.plain_text:
            return "it needs plain text"
        if traits.plain_text and not (cls.supports_plain_text or cls.needs_plain_text):
            return "it needs labels or answers"
        if cls.changes_backbone and traits.frozen_backbone:
            return "it changes the backbone"
        return "it works with the logits of a cross-entropy loss" if cls.needs_logits and not traits.has_logits else ""

    def check(self, objective: Objective, replay: str, peft: FullFineTuning) -> None:
        """Raises ConfigError for an unsupported combination, before anything is loaded."""
        if unmet := self.unmet(objective.traits):
            reason = f"{unmet}; method=sequential supports all"
            raise ConfigError(f"method={self.name} does not support objective={objective.name}: {reason}")
        if replay != "none" and not self.uses_replay:
            raise ConfigError(f"method={self.name} does not replay: remove replay={replay}, or use method=replay")
        if self.needs_adapter and not peft.traits.several:
            raise ConfigError(f"method={self.name} needs an adapter per task and cannot run with peft={peft.name}")
        if self.supported_pefts and peft.name not in self.supported_pefts:
            raise ConfigError(f"method={self.name} needs peft={' or '.join(self.supported_pefts)}, not {peft.name}")
        if not (peft.traits.trains or self.supported_pefts):
            raise ConfigError(f"method={self.name} trains the model, but peft={peft.name} leaves nothing to train")

    def mixes_tasks(self, replay: str) -> bool:
        """Whether batches mix examples of several tasks; benchmark.softmax=auto is then over all seen labels."""
        return replay != "none"

    def check_benchmark(self, benchmark: Benchmark) -> None:
        """Raises ConfigError if the options do not suit the tasks, before the backbone is loaded."""

    def reserved_positions(self, benchmark: Benchmark) -> int:
        """Largest number of vectors that the method ever prepends to a text; texts are cut to make room for them."""
        return 0

    def inputs(self) -> dict[str, str]:
        """Fingerprints of the files that the method reads, by name; a run is not resumed if one has changed."""
        return {}

    def setup(self, objective: ObjectiveType, benchmark: Benchmark, data: Encoded, replay: NoReplay, seed: int) -> None:
        """Attaches the first adapter; called once, before the first evaluation."""
        self.objective, self.benchmark, self.data, self.replay, self.seed = objective, benchmark, data, replay, seed
        self.init_adapters()

    def init_adapters(self) -> None:
        """Attaches the adapter that a new run evaluates and trains first, and sets the method's initial state."""
        self.objective.adapters.add("default", derive(self.seed, "adapter", "default"))

    def ineffective(self) -> dict[str, str]:
        """Options without effect in this configuration, such as method.keep or replay.ratio, each with the reason."""
        return {}

    def resolved(self, benchmark: Benchmark) -> dict[str, Json]:
        """Options left at null and the values chosen for them from the data, for the header and results.json."""
        return {}

    def curriculum(self) -> list[tuple[int, Task]]:
        """(index, task) in learning order; after learning each, row index + 1 of the matrix is evaluated."""
        return list(enumerate(self.benchmark.tasks))

    def tied_to_later_tasks(self, learned: int, before: int, now: int) -> str:
        """Why a run of `before` tasks has not learned its first `learned` ones as a run of `now` tasks would; '' if so.

        A run that is extended takes over the state after its first tasks, unless there is such a reason.
        """
        return ""

    def evaluable_tasks(self, row: int, tasks: range) -> range:
        """The subset of `tasks` that this method has a model for after learning `row` tasks."""
        return tasks

    def learn(self, task: Task, index: int, trainer: Trainer) -> None:
        """Learns one task. A method with several stages calls trainer.fit several times."""
        self.grow_head(index)
        self.fit(trainer, index)

    def grow_head(self, index: int) -> None:
        """Adds the rows of a task's labels to the head."""
        self.objective.add_labels(self.benchmark.task_labels(index))

    def fit(self, trainer: Trainer, index: int) -> None:
        """The standard stage: trains `named_parameters` with this method's plan, loss and hooks."""
        trainer.fit(self.plan(index), self.named_parameters(), self.hooks(index))

    def hooks(self, index: int) -> StepHooks:
        """This method's own hooks, for a fit of task `index`."""
        return StepHooks(
            loss=self.loss,
            before_step=self.before_step,
            step_loss=self.step_loss,
            adjust_gradients=self.adjust_gradients,
            after_step=self.after_step,
            end_step=self.end_step,
            validate=lambda: self.validate(index),
        )

    def plan(self, index: int) -> BatchPlan:
        """The batches of a task; replayed examples are mixed in here."""
        return self.replay.plan(index)

    def stages(self, index: int) -> dict[str, BatchPlan]:
        """The plans of all fits of a task by stage name, from which a dry run counts steps."""
        return {"": self.plan(index)}

    def logits(self, batch: Batch) -> Tensor:
        """[terms, classes]: the logits of the loss's softmax."""
        return self.objective.logits(batch)

    def before_step(self, context: StepContext) -> None:
        """Prepares a step, from the rows of its whole batch."""

    def loss(self, context: StepContext) -> Tensor:
        """The objective's loss of `context.batch`, a mean over terms; subclasses add terms of the batch here."""
        return self.objective.loss(context.batch)

    def step_loss(self, context: StepContext) -> Tensor | None:
        """A term that does not depend on the batch, computed once per step: penalties on weights, for example."""
        return None

    def adjust_gradients(self, context: StepContext) -> None:
        """Changes gradients (projections, for example) after backward and before clipping and the optimiser's step."""

    def after_step(self, context: StepContext) -> None:
        """Collects statistics of a step: gradients are still available, weights are already updated."""

    def end_step(self, context: StepContext) -> None:
        """Called at the end of every step, also of a skipped one; gradients are already cleared."""

    def after_task(self, task: Task, index: int) -> None:
        """Work after a task was learned: memory selection, Fisher information."""
        self.replay.update_memory(index, self.vectors)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters that the optimiser updates, by name. A tensor that is new in a task needs a new name.

        With train.optimizer_state=carry the optimiser's moments are passed on from task to task by name.
        """
        return {**self.objective.adapters.tensors("default"), **self.objective.parameters()}

    def parameters(self) -> list[nn.Parameter]:
        """The values of `named_parameters`."""
        return list(self.named_parameters().values())

    def predict(self, batch: Batch, choices: AnswerSpace) -> Predictions:
        """Scores over all labels (those outside `choices` are masked by the caller), or texts."""
        return self.objective.predict(batch, choices)

    def answering(self) -> contextlib.AbstractContextManager[object]:
        """Inside, the network is the model that answers, if it is one model for all inputs (`mergeable`)."""
        return contextlib.nullcontext()

    def batches(self, pool: EncodedDataset, rows: np.ndarray) -> list[np.ndarray]:
        """Splits rows into the batches in which they are predicted."""
        return self.objective.batches(pool, rows)

    def before_evaluation(self, pool: EncodedDataset, rows: np.ndarray) -> None:
        """Called with all rows of an evaluation before it starts, for methods that precompute something."""

    def after_evaluation(self) -> None:
        """Sums over ranks what `predict` has counted on each."""

    def predict_known_task(self, batch: Batch, predictions: Predictions) -> Predictions:
        """Predictions with the task given (task-incremental view); reuses `predictions` of `predict` if possible."""
        return predictions

    def choices(self, batch: Batch, labels: Sequence[int]) -> AnswerSpace:
        """The answers that compete for a batch."""
        return AnswerSpace(labels, batch.tasks if self.task_id_at_test else None)

    def validate(self, index: int) -> float:
        """Score on validation examples, averaged over their tasks, for train.select=best."""
        labels = self.benchmark.seen_labels(index + 1)

        def score(batch: Batch) -> Tensor:
            choices = self.choices(batch, labels)
            return torch.as_tensor(self.objective.score(batch, self.predict(batch, choices), choices)["score"])

        return self.average_score(self.validation(index), score)

    def validation(self, index: int) -> ValidationRows:
        """Examples on which the best epoch of task `index` is chosen."""
        return self.replay.validation(index)

    @without_gradients()
    def average_score(self, validation: ValidationRows, score: Callable[[Batch], Tensor]) -> float:
        """Mean over tasks of the mean of `score`, which returns [batch] values. Batches are divided among the ranks."""
        by_task: dict[int, list[Tensor]] = {}

        def score_by_task(pool_rows: tuple[EncodedDataset, np.ndarray]) -> dict[int, Tensor]:
            pool, rows = pool_rows
            batch = pool.batch(rows, self.objective.device)
            values = score(batch).float()
            return {task: values[batch.tasks == task] for task in np.unique(pool.tasks[rows]).tolist()}

        batches = [(pool, batch_rows) for pool, rows in validation for batch_rows in self.batches(pool, rows)]
        with self.objective.meter.counting("validated"):
            computed = get_world().map(score_by_task, batches)
        for scores in computed:
            for task, values in scores.items():
                by_task.setdefault(task, []).append(values)
        return float(np.mean([torch.cat(values).mean().item() for values in by_task.values()]))

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """[n, size]: `memory_vector` of train rows, from which a memory of exemplars is selected."""
        return self.embed(rows, self.memory_vector).cpu().numpy()

    @torch.no_grad()
    def embed(self, rows: np.ndarray, vector: Callable[[Batch], Tensor]) -> Tensor:
        """[n, size] fp32: `vector` of each train row under the present model, in the order of `rows`."""
        pool = self.data.train
        order = np.argsort(-pool.lengths[rows], kind="stable")  # longest first: batches with little padding
        size = self.objective.eval_batch_size
        batches, device = [order[start : start + size] for start in range(0, len(rows), size)], self.objective.device
        computed = get_world().map(lambda positions: vector(pool.batch(rows[positions], device)).float(), batches)
        vectors = torch.cat(computed).to(device)
        return vectors[torch.from_numpy(np.argsort(np.concatenate(batches))).to(vectors.device)]  # back to given order

    def memory_vector(self, batch: Batch) -> Tensor:
        """[batch, labels]: class logits of the model just trained, on which exemplars are chosen (ConPET, 3.2)."""
        return self.logits(batch)

    def trainable_parameters(self) -> int:
        """Number of scalars trained in the current task."""
        return sum(parameter.numel() for parameter in self.parameters())

    def stored_parameters(self) -> int:
        """Number of scalars this method must store in addition to the frozen backbone."""
        stored = sum(map(self.objective.adapters.count, self.objective.adapters.names)) + saved_state.count_saved(self)
        return stored + sum(parameter.numel() for parameter in self.objective.parameters().values())

    def stored_rows(self) -> np.ndarray:
        """Rows of the training pool that are stored as old examples."""
        return self.replay.stored_rows()

    def save(self, folder: Path) -> None:
        """Writes the trained weights in a format that can be used without clpet."""
        self.objective.adapters.save(folder)

    def merged(self) -> nn.Module:
        """The backbone with all adapters merged into its weights, if `mergeable`; no training can follow."""
        return self.objective.adapters.merged()

    def diagnostics(self) -> dict[str, float]:
        """Named numbers about the task just learned, recorded alongside its scores."""
        return {}

    def figures(self) -> Figures:
        """Figures to draw at the end of a run, as plain data for `reporting.plots.method_figures.draw`."""
        return {}

    def state_dict(self) -> State:
        """Everything that later tasks need, as nested dicts of tensors, numbers, strings and lists."""
        listed = saved_state.save(self, "saved", "saved_uncounted")
        return {"objective": cast(Tree, self.objective.state()), "replay": cast(Tree, self.replay.state()), **listed}

    def load_state_dict(self, state: State) -> None:
        """Restores what `state_dict` returned, on a method fresh from `setup` or in a state after fewer tasks.

        The state may be that of a run with fewer tasks, whose benchmark had only the first labels of this one.
        """
        self.objective.load(cast(ObjectiveState, state["objective"]))
        self.replay.load(cast(ReplayState, state["replay"]))
        saved_state.load(self, state, self.objective.device, "saved")
        saved_state.load(self, state, None, "saved_uncounted")

    def task_state(self) -> State:
        """State that the hooks of a fit gather, in addition to the trained tensors; same types as in `state_dict`."""
        return saved_state.save(self, "saved_in_task")

    def load_task_state(self, state: State) -> None:
        """Restores what `task_state` returned; called inside `learn`, where the fit would start."""
        saved_state.load(self, state, self.objective.device, "saved_in_task")

    def heads(self) -> dict[str, Head]:
        """Heads by name; saved as safetensors at the end of the run."""
        return self.objective.heads()
