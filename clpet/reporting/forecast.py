"""The time that a run will still take: what has been measured so far, applied to the work that is planned."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

EVALUATION_COST = 1 / 3  # of a token in evaluation, in tokens of training: a backward pass costs two forward passes


@dataclass
class TaskWork:
    """The planned work of a task: training tokens of every stage, and tokens of the evaluation after it."""

    stages: Mapping[str, float] = field(default_factory=dict)
    evaluation: float = 0.0

    @property
    def training(self) -> float:
        """Training tokens of all stages."""
        return sum(self.stages.values())


@dataclass
class Measured:
    """Seconds that a number of tokens took."""

    seconds: float = 0.0
    tokens: float = 0.0

    @property
    def rate(self) -> float | None:
        """Seconds per token."""
        return self.seconds / self.tokens if self.tokens > 0 else None


class Forecast:
    """Follows a run through tasks, fits and evaluations, and predicts the seconds that are left.

    A stage that has not been measured yet is taken to be as fast as the others. What a task does outside of fits and
    evaluations, such as estimating importance, is taken to grow with its training tokens.
    """

    def __init__(self, works: Sequence[TaskWork] = (), clock: Callable[[], float] = time.perf_counter) -> None:
        self.works, self.clock = works, clock
        self.fits: dict[str, Measured] = {}
        self.evaluation = Measured()  # of the latest evaluation
        self.other = Measured()  # of the latest finished task: seconds outside of fits, training tokens
        self.start_task(0)

    def start_task(self, position: int) -> None:
        """Starts task `position`, counted from 1; 0 is what comes before all tasks."""
        self.position, self.task_start = position, self.clock()
        self.stage: str | None = None
        self.share = self.share_before = 0.0  # of the current fit; the second one was done by an earlier process
        self.finished: set[str] = set()
        self.inside = 0.0  # seconds of this task in planned fits and evaluations
        self.unplanned = 0.0  # in other fits

    def start_fit(self, stage: str) -> None:
        """Starts a fit of the task. An unnamed fit may have a name in the plan: it is the next one ahead."""
        self.end_fit()
        stages = self._work(self.position).stages
        if stage == "" and stage not in stages:
            stage = next(filter(self._is_ahead, stages), stage)
        self.stage, self.fit_start = stage, self.clock()
        self.share = self.share_before = 0.0

    def resume_fit(self, share: float) -> None:
        """Continues a fit of which a share was done by an earlier process."""
        self.share = self.share_before = share

    def end_fit(self) -> None:
        """Ends the current fit, if there is one."""
        if self.stage is None:
            return
        seconds = self.clock() - self.fit_start
        if tokens := self._tokens(self.stage):  # a fit that is not planned counts as time outside of fits
            measured = self.fits.setdefault(self.stage, Measured())
            measured.seconds += seconds
            measured.tokens += tokens * (self.share - self.share_before)
            self.inside += seconds
        else:
            self.unplanned += seconds
        self.finished.add(self.stage)
        self.stage = None

    def start_evaluation(self) -> None:
        """Starts the evaluation after a task, or before the first one."""
        self.end_fit()
        self.evaluation_start = self.clock()

    def end_evaluation(self, tokens: float) -> None:
        """Ends an evaluation of `tokens` tokens."""
        seconds = self.clock() - self.evaluation_start
        self.inside += seconds
        self.evaluation = Measured(seconds, tokens) if tokens else self.evaluation

    def end_task(self) -> None:
        """Ends a task, after its evaluation."""
        self.end_fit()
        self.other = Measured(self.clock() - self.task_start - self.inside, self._work(self.position).training)

    def left(self, share: float) -> float:
        """Seconds that are left when a share of the current fit is done, over all remaining work."""
        work, rest = self._work(self.position), 0.0
        outside = self._other_rate() * work.training - (self.clock() - self.task_start - self.inside)
        if self.stage is not None:
            self.share, seconds = share, self.clock() - self.fit_start
            gained = share - self.share_before
            rest = seconds / gained * (1 - share) if gained > 0 else 0.0
            if self._tokens(self.stage):
                outside += seconds
            else:  # it is a part of the work outside of planned fits
                outside -= rest
        stages = sum(tokens * self._rate(stage) for stage, tokens in work.stages.items() if self._is_ahead(stage))
        later = sum(map(self._seconds, range(self.position + 1, len(self.works) + 1)))
        return rest + max(0.0, outside) + stages + work.evaluation * self._evaluation_rate() + later

    def _is_ahead(self, stage: str) -> bool:
        return stage != self.stage and stage not in self.finished

    def _seconds(self, position: int) -> float:
        """Seconds of a whole task."""
        work = self._work(position)
        training = sum(tokens * self._rate(stage) for stage, tokens in work.stages.items())
        return training + self._other_rate() * work.training + work.evaluation * self._evaluation_rate()

    def _work(self, position: int) -> TaskWork:
        return self.works[position - 1] if 0 < position <= len(self.works) else TaskWork()

    def _tokens(self, stage: str) -> float:
        return self._work(self.position).stages.get(stage, 0.0)

    def _rate(self, stage: str) -> float:
        """Seconds per training token of a stage; of all stages if it has not been measured, else from evaluation."""
        measured = self._with_current()
        rate = measured[stage].rate if stage in measured else None
        if rate is not None:
            return rate
        overall = Measured(
            sum(one.seconds for one in measured.values() if one.tokens), sum(one.tokens for one in measured.values())
        )
        return overall.rate or (self.evaluation.rate or 0.0) / EVALUATION_COST

    def _with_current(self) -> dict[str, Measured]:
        """The measurements of all fits, the current one included."""
        if self.stage is None:
            return self.fits
        before = self.fits.get(self.stage, Measured())
        tokens = self._tokens(self.stage) * (self.share - self.share_before)
        current = Measured(before.seconds + self.clock() - self.fit_start, before.tokens + tokens)
        return {**self.fits, self.stage: current}

    def _evaluation_rate(self) -> float:
        return self.evaluation.rate or EVALUATION_COST * self._rate("")

    def _other_rate(self) -> float:
        """Seconds outside of planned fits and evaluations per training token, of the latest finished task.

        Before the first is finished, those of its unplanned fits so far, and of the whole current one.
        """
        if self.other.tokens:
            return self.other.rate or 0.0
        seconds, share = self.unplanned, self.share - self.share_before
        if self.stage is not None and not self._tokens(self.stage) and share > 0:
            seconds += (self.clock() - self.fit_start) / share
        return Measured(seconds, self._work(self.position).training).rate or 0.0
