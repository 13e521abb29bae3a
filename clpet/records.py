"""Types of plain values: JSON trees, and the records that a run writes into its folder."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NotRequired, TypeAlias, TypedDict, Union

if TYPE_CHECKING:  # commands that only read files do not import torch
    from torch import Tensor

# A value that json.dumps accepts. Mapping and Sequence, since dict and list would refuse dict[str, int] and list[str].
Json: TypeAlias = bool | int | float | str | Sequence["Json"] | Mapping[str, "Json"] | None
# A tree with tensors, such as the state of a method or an optimiser.
Tree: TypeAlias = Union["Tensor", bool, int, float, str, Sequence["Tree"], Mapping[str, "Tree"], None]
State = dict[str, Tree]
# {kind of a figure: arguments of the function that draws it, apart from path and title}, whose types depend on the kind
Figures = Mapping[str, Mapping[str, object]]
Rows = list[list[float | None]]  # [T+1, T] scores of a transfer matrix, None where not measured
Metrics = dict[str, float | None]


class MatrixRecord(TypedDict):
    """A transfer matrix as `TransferMatrix.to_json` writes it."""

    tasks: list[str]
    direction: str  # higher or lower: which scores are better
    scores: Rows
    correct: Rows
    total: Rows


class MeanMedian(TypedDict):
    """Mean and median over domains."""

    mean: float | None
    median: float | None


class CurveValues(TypedDict):
    """Mean and median at every position of a curve."""

    mean: list[float | None]
    median: list[float | None]


class Curve(TypedDict):
    """Transfer at each position, in four views; one of `after`, `age` and `lead` holds the positions."""

    after: NotRequired[list[int]]
    age: NotRequired[list[int]]
    lead: NotRequired[list[int]]
    count: list[int]
    perplexity: CurveValues
    minus_zs: CurveValues
    over_zs: CurveValues
    minus_own: CurveValues


class Curves(TypedDict):
    """Backward transfer by checkpoint and by age, forward transfer by checkpoint and by lead."""

    backward: Curve
    by_age: Curve
    forward: Curve
    by_lead: Curve


class PartOfDomains(Curves):
    """The metrics of `perplexity_transfer` over some domains."""

    average: dict[str, MeanMedian]
    classic: Metrics
    saturation: dict[str, MeanMedian]  # position from which a curve stays near its median; None if it never does


class DomainGroup(PartOfDomains):
    """The metrics over the named domains of a group."""

    domains: list[str]


class DomainRow(TypedDict):
    """Perplexities of one domain."""

    domain: str
    zs: float | None
    dapt: float | None
    cpt: float | None
    lc: float | None
    fg: float | None


class PerplexityTransfer(PartOfDomains):
    """All metrics of continual pretraining, as `perplexity_transfer.figures` returns them."""

    direction: NotRequired[str]
    domains: list[DomainRow]
    groups: dict[str, DomainGroup]


class Cost(TypedDict):
    """The cost of learning and evaluating one task."""

    seconds: float
    forward_examples: int
    backward_examples: int
    forward_tokens: int
    peak_memory_mb: float
    trainable_parameters: int
    stored_parameters: int
    replay_examples: int
    backward_tokens: NotRequired[int]
    forward_flops: NotRequired[float]
    backward_flops: NotRequired[float]
    reference_examples: NotRequired[int]
    stored_bytes: NotRequired[int]
    replay_bytes: NotRequired[int]
    evaluation_memory_mb: NotRequired[float]
    validated_examples: NotRequired[int]
    evaluated_examples: NotRequired[int]
    cached_examples: NotRequired[int]
    steps: NotRequired[int]
    skipped_steps: NotRequired[int]
    evaluation_seconds: NotRequired[float]


class ParameterRatio(TypedDict):
    """Trained parameters of all parameters."""

    trainable: int
    total: int
    percent: float
    times_fewer: NotRequired[float | None]


class OrderRecord(TypedDict, total=False):
    """How the domains were ordered; the similarities are present for orders by similarity."""

    order: str
    hash: str
    names: list[str]
    encoder: str | None
    similarity: list[list[float]] | None  # [N, N]
    reference_similarity: list[float] | None  # [N]


class UnreadFiles(TypedDict):
    """Number and first names of the files of a folder that were not read."""

    count: int
    names: list[str]


class ReadRecord(TypedDict):
    """The rows or documents that were read, kept and repaired; empty mappings are left out."""

    unit: str
    read: int
    kept: int
    unread: NotRequired[dict[str, UnreadFiles]]
    encodings: NotRequired[dict[str, str]]
    dropped: NotRequired[dict[str, int]]
    replaced: NotRequired[dict[str, int]]
    line_ends: NotRequired[dict[str, int]]
    empty: NotRequired[dict[str, int]]
    notes: NotRequired[list[str]]


class SplitSizes(TypedDict):
    """Numbers of examples or documents."""

    train: int
    validation: int
    test: int
    data_fingerprint: NotRequired[str]  # of the texts and targets of a task; runs of older versions lack it


class TaskRecord(SplitSizes):
    """Counts of a task with labels or answers; the other mappings are by split."""

    labels: int
    label_names: NotRequired[list[str]]  # runs of older versions lack them
    smallest_label: int
    largest_label: int
    repeats: dict[str, int]
    tokens: dict[str, int]  # median, p95 and max of the train texts; empty without a tokenizer
    texts_cut: dict[str, int]
    answers_cut: dict[str, int]


class DomainRecord(SplitSizes):
    """Counts of a domain of plain text; the mappings are by split."""

    pieces: dict[str, int]
    bytes: dict[str, int]
    repeats: dict[str, int]
    tokens: dict[str, int]
    borders: bool
    dropped: int | None  # test pieces found in train; None if they were not compared


class BaseRecord(DomainRecord):
    """The corpus of a base model."""

    name: str


class CommonDataRecord(TypedDict):
    """The keys that every report of a benchmark's data has."""

    fingerprint: str
    read: ReadRecord
    labels: list[str]
    overlaps: dict[str, int]
    warnings: list[str]
    order: NotRequired[OrderRecord]  # of benchmarks of plain text


class LabelledDataRecord(CommonDataRecord):
    """The report of a benchmark of tasks with labels or answers."""

    tasks: dict[str, TaskRecord]
    max_length: int
    max_target: int
    truncate: str
    chat: NotRequired[str]  # turns of the assistant in the loss; longer conversations lose their oldest turns first


class TextDataRecord(CommonDataRecord):
    """The report of a benchmark of plain text."""

    tasks: dict[str, DomainRecord]
    base: BaseRecord | None
    groups: dict[str, list[str]]


DataRecord: TypeAlias = LabelledDataRecord | TextDataRecord


class ExtendedFrom(TypedDict):
    """A finished run, its first tasks, the folder of the state after them, and rows that are not measured again."""

    run: str
    tasks: list[str]
    state: str
    copied_rows: list[int]


class Description(TypedDict):
    """The keys that run.json and results.json share; runs of older versions lack the NotRequired ones."""

    method: str
    model: str
    benchmark: str
    objective: NotRequired[str]
    softmax: NotRequired[str | None]
    replay: str
    peft: str
    batch: NotRequired[dict[str, int]]
    seed: int
    split: NotRequired[str]
    signature: str
    setting: str
    inputs: NotRequired[dict[str, str]]
    hub_data: NotRequired[dict[str, str]]
    tasks: list[str]
    overrides: list[str]
    config_dirs: NotRequired[list[str]]
    versions: NotRequired[dict[str, str]]
    git: NotRequired[str | None]


class Headline(TypedDict):
    """The summary metrics at the top level of results.json."""

    average: float | None
    whole: float | None
    backward_transfer: float | None
    forward_transfer: NotRequired[float | None]
    forgetting: float | None
    learning_accuracy: float | None


class Measurements(TypedDict):
    """Everything that a checkpoint has measured so far."""

    done: int
    matrix: MatrixRecord
    own: MatrixRecord
    costs: list[Cost]
    diagnostics: list[Metrics]
    validation: NotRequired[dict[str, float] | None]
    extended_from: NotRequired[ExtendedFrom | None]


class Checkpoint(Measurements):
    """A checkpoint of a run: after a task with the state of method and trainer, inside a task with its progress."""

    identity: dict[str, str]
    method: NotRequired[State]
    trainer: NotRequired[State]
    task: NotRequired[State]


FAILURE = "failed.json"  # {"error": message}: present if the last attempt of an unfinished run ended with an error


class ProgressScore(TypedDict):
    """The score of one task in a line of metrics.jsonl."""

    score: float
    correct: float
    total: float
    own_labels: float


class ProgressLine(TypedDict):
    """The keys of a line of metrics.jsonl that are read again; diagnostics have further names."""

    done: int
    row: int
    split: str
    tasks: dict[str, ProgressScore]


HeadlineKey = Literal["average", "whole", "backward_transfer", "forgetting", "learning_accuracy"]


class Results(Description, MatrixRecord, Headline):
    """results.json of a finished run."""

    backward: Rows
    forward: NotRequired[Rows]
    task_scores: Rows
    task_backward: NotRequired[Rows]
    task_forward: Rows
    task_id_at_test: bool
    extended_from: NotRequired[ExtendedFrom]
    resolved: NotRequired[dict[str, Json]]
    metric: NotRequired[str]
    validation: NotRequired[dict[str, float]]
    test_sets: NotRequired[dict[str, str]]
    metrics: NotRequired[Metrics]
    task_metrics: NotRequired[Metrics]
    pretraining: NotRequired[PerplexityTransfer]
    diagnostics: list[Metrics]
    parameters: ParameterRatio
    dropout: NotRequired[dict[str, float]]
    cost: list[Cost]
    data: NotRequired[DataRecord]
