"""In-context learning: a frozen model reads examples with their answers in front of every prompt.

A prompt is    example_1 answer_1 <blank line> ... example_n answer_n <blank line> prompt
The examples are drawn from the memory (`replay`) of all tasks learned so far, in their order and about as many of each,
or with task_id_at_test=true from the prompt's own task. Nothing is trained.
"""

import logging
from dataclasses import dataclass

import numpy as np
import torch

from clpet.config.schema import require
from clpet.config.seeding import derive
from clpet.data.batches import Batch, EncodedDataset
from clpet.data.benchmark import Benchmark, Example
from clpet.data.traits import Traits
from clpet.errors import ConfigError
from clpet.methods.zero_shot import ZeroShot
from clpet.models.peft_options import FullFineTuning
from clpet.objectives.base import AnswerSpace, Objective, Predictions
from clpet.runtime.distributed import get_world

log = logging.getLogger(__name__)


@dataclass
class ICL(ZeroShot):
    """Examples are left out from the front until a prompt fits benchmark.max_length; the prompt itself is never cut for
    them. Which ones are drawn depends on the prompt alone, not on its batch.
    """

    demonstrations: int = 6
    task_id_at_test: bool = False

    uses_replay = True
    reads_examples = True
    mergeable = False  # the model without its demonstrations is another method: zero_shot

    @classmethod
    def unmet(cls, traits: Traits) -> str:
        return "it shows answers in words" if traits.plain_text else super().unmet(traits)

    def __post_init__(self) -> None:
        require(self.demonstrations >= 1, "method.demonstrations", self.demonstrations, "at least 1")

    def check(self, objective: Objective, replay: str, peft: FullFineTuning) -> None:
        super().check(objective, replay, peft)
        if replay == "none":
            raise ConfigError(f"method={self.name} needs a memory of examples: set replay=dynamic, reservoir or share")

    def check_benchmark(self, benchmark: Benchmark) -> None:
        if getattr(benchmark, "chat", None):
            raise ConfigError(f"method={self.name} writes prompts of its own and does not support benchmark.chat")

    def init_adapters(self) -> None:
        self.examples = [example for task in self.benchmark.tasks for example in task.train]
        self.answered = torch.zeros(2, dtype=torch.long)  # demonstrations that were shown, and prompts, per evaluation

    def draw(self, text: str, task: int) -> list[int]:
        """Train rows of the demonstrations of one prompt."""
        memory = self.replay.memory_rows() if self.replay.memory else np.empty(0, dtype=np.int64)
        tasks = self.data.train.tasks[memory]
        groups = [memory[tasks == task]] if self.task_id_at_test else [memory[tasks == t] for t in np.unique(tasks)]
        rng = np.random.default_rng(derive(self.seed, "icl", text))
        # The tasks whose examples are one more than those of others are drawn too.
        counts = np.full(len(groups), self.demonstrations // max(1, len(groups)))
        counts[rng.permutation(len(groups))[: self.demonstrations - counts.sum()]] += 1
        drawn = [
            rng.choice(rows, min(n, len(rows)), replace=False) for rows, n in zip(groups, counts, strict=True) if n
        ]
        return [row for rows in drawn for row in rows.tolist()]

    def prompt(self, text: str, rows: list[int]) -> Example:
        """A prompt with demonstrations."""
        shown = [f"{self.examples[row].text} {self.examples[row].target}" for row in rows]
        return Example("\n\n".join([*shown, text]))

    def prompts(self, texts: list[str], tasks: list[int]) -> tuple[EncodedDataset, int]:
        """The prompts with as many demonstrations as fit, and the number of these."""
        rows = [self.draw(text, task) for text, task in zip(texts, tasks, strict=True)]
        limit = self.objective.benchmark.max_length
        while True:
            pool = self.objective.prompts([self.prompt(*pair) for pair in zip(texts, rows, strict=True)], tasks)
            too_long = [i for i in range(len(texts)) if pool.full_lengths[i] > limit and rows[i]]
            if not too_long:
                return pool, sum(map(len, rows))
            for i in too_long:
                rows[i] = rows[i][1:]

    def predict(self, batch: Batch, choices: AnswerSpace) -> Predictions:
        pool, shown = self.prompts(batch.sources, batch.tasks.tolist())
        self.answered += torch.tensor([shown, len(batch)])
        return super().predict(pool.batch(np.arange(len(batch)), self.objective.device), choices)

    def before_evaluation(self, pool: EncodedDataset, rows: np.ndarray) -> None:
        self.answered.zero_()

    def after_evaluation(self) -> None:
        get_world().sum([self.answered])
        if self.replay.memory and not self.answered[0]:
            log.warning("no demonstration fits benchmark.max_length=%d: raise it", self.objective.benchmark.max_length)

    def diagnostics(self) -> dict[str, float]:
        """The mean number of demonstrations in a prompt of the last evaluation."""
        shown, prompts = self.answered.tolist()
        return {"demonstrations": shown / prompts} if prompts else {}
