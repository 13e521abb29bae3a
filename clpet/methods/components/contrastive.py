"""Components of contrastive continual learning: loss, distillation of class relations, representation bank, sampling.

Formulas of CRL in the form that ConPET uses as a baseline (Song et al., 2023, arXiv 2309.14763, section 3.5).
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def contrastive(z: Tensor, labels: Tensor, bank: Tensor, bank_labels: Tensor, tau: float, eps: float) -> Tensor:
    """L_CL = mean_i (1/|P_i|) sum_{a in P_i} -log(e_ia / sum_b e_ib), with e_ia = exp(s_ia - max_a s_ia) + eps.

    z [batch, dim] are the representations of a batch, `bank` [entries, dim] those they are compared with, and
    s_ia = z_i . z_a / tau. P_i are the bank entries with the label of example i; it must not be empty.
    """
    s = z @ bank.T / tau
    e = (s - s.amax(1, keepdim=True)).exp() + eps  # subtracting the maximum keeps exp from overflowing
    terms = -(e / e.sum(1, keepdim=True)).log()
    positive = (labels[:, None] == bank_labels[None]).float()
    return ((terms * positive).sum(1) / positive.sum(1)).mean()


def relation_distillation(z: Tensor, class_index: Tensor, prototypes: Tensor, means: Tensor, t: float) -> Tensor:
    """L_KD of each example, [batch]: KL(softmax(t G[y]) || softmax(t z C^T)), with G = P P^T.

    P [old classes, dim of h] are the previous model's prototypes, normalised here; C [old classes, dim of z] the
    present class means of the bank. `class_index` [batch] is the row of an example's class in both.
    """
    p = F.normalize(prototypes, dim=1)
    target = (t * (p @ p.T)[class_index]).softmax(1)
    return F.kl_div((t * z @ means.T).log_softmax(1), target, reduction="none").sum(1)


class Bank:
    """Holds one representation z per sampled example, and the sum of z per class.

    The sums are updated along with the entries, so that class means cost no pass over the bank.
    """

    def __init__(self, z: Tensor, labels: np.ndarray, rows: np.ndarray, pool: int, classes: int) -> None:
        self.z, self.host_labels = z.clone(), labels
        self.labels = torch.from_numpy(labels).to(z.device)
        self.entry = np.full(pool, -1, dtype=np.int64)  # pool row -> bank entry
        self.entry[rows] = np.arange(len(rows))
        self.sums = z.new_zeros(classes, z.shape[1]).index_add_(0, self.labels, z)

    def update(self, rows: np.ndarray, z: Tensor) -> None:
        """Replaces the entries of `rows`; if a batch contains a row twice, its first representation is used."""
        distinct, first = np.unique(rows, return_index=True)
        entries = torch.from_numpy(self.entry[distinct]).to(z.device)
        new = z[torch.from_numpy(first).to(z.device)]
        self.sums.index_add_(0, self.labels[entries], new - self.z[entries])
        self.z[entries] = new

    def means(self) -> Tensor:
        """[classes, dim]: class means scaled to norm 1, which makes dividing the sums by counts unnecessary."""
        return F.normalize(self.sums, dim=1)

    def sample(self, labels: np.ndarray, count: int, rng: np.random.Generator) -> Tensor:
        """Indices of `count` random entries; the sample is redrawn until it contains every label of the batch."""
        required = np.unique(labels)
        while True:
            entries = rng.permutation(len(self.host_labels))[:count]
            if np.isin(required, self.host_labels[entries]).all():
                return torch.from_numpy(entries).to(self.z.device, non_blocking=True)
            if count < len(self.host_labels):
                count = min(len(self.host_labels), count + 1)  # grows, or a class with one entry could take forever


def draw(
    labels: np.ndarray, tasks: list[np.ndarray], count: int, at_least: int, rng: np.random.Generator
) -> np.ndarray:
    """Samples `count` rows from `tasks` (the rows of each task) in random order.

    Up to `at_least` rows of every class come first, one class after the other in rounds; the rest is drawn uniformly
    over tasks, with replacement. `labels` [pool] are the labels of all rows of the pool.
    """
    candidates = rng.permutation(np.concatenate(tasks))
    per_class = [candidates[labels[candidates] == label][:at_least] for label in np.unique(labels[candidates])]
    # Round-robin over classes: if `count` is too small for all of them, none gets two rows before each has one.
    guaranteed = [rows[turn] for turn in range(at_least) for rows in per_class if turn < len(rows)]
    task_of_draw = rng.integers(len(tasks), size=count)
    drawn = np.array([rng.choice(tasks[task]) for task in task_of_draw], dtype=np.int64)
    return rng.permutation(np.concatenate([np.array(guaranteed, dtype=np.int64), drawn])[:count])
