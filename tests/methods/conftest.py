"""Fixtures of the tests of SLM."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from clpet.config.seeding import derive
from clpet.evaluation.evaluator import Evaluator
from tests.models.test_sentence_encoder import make_encoder


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("encoder"), size=48)


@pytest.fixture
def slm(make, encoder: Path):
    """Builds SLM on the words benchmark; `distance` is that between the centres of the tasks' embeddings."""

    def build(*overrides: str, distance: float | None = 10.0) -> SimpleNamespace:
        run = make("method=slm", f"method.encoder={encoder}", "train.lr=2e-2", "method.rank=4",
                   "method.groups=6", "method.keys=4", "method.top_k=4",
                   "method.stage1.min_steps=150", *overrides)  # fmt: skip
        if distance is not None:
            run.method.embeddings = Around(run, distance)
        run.evaluate = lambda learned: Evaluator(run.benchmark, run.data)(run.method, learned, [0, 1, 2])
        return run

    return build


class Around:
    """Random embeddings around one centre per task; equal texts have equal embeddings."""

    def __init__(self, run: SimpleNamespace, distance: float) -> None:
        centres = torch.randn(len(run.benchmark), 48, generator=torch.Generator().manual_seed(7)) * distance
        self.data, self.tables = run.data, {}
        for split in ("train", "validation", "test"):
            texts = [(i, e.text) for i, task in enumerate(run.benchmark.tasks) for e in task.split(split)]
            self.tables[split] = torch.stack([centres[task] + noise(text) for task, text in texts])

    def __call__(self, pool: object, rows: np.ndarray) -> torch.Tensor:
        split = next(split for split in self.tables if getattr(self.data, split) is pool)
        return self.tables[split][torch.from_numpy(rows)]


def noise(text: str) -> torch.Tensor:
    return torch.randn(48, generator=torch.Generator().manual_seed(derive(0, text)))
