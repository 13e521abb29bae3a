"""Gradients of stored examples, and the change of a step's gradient that does not conflict with them."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from clpet.methods.base import Method
from clpet.runtime.distributed import get_world, is_sharded
from clpet.runtime.sharding.gradients import gradients_of_share, own_gradients
from clpet.runtime.sharding.tensors import local, sums


def memory_gradient(method: Method, rows: np.ndarray, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """The gradient of the objective's mean loss of train rows, at the present weights and without penalties."""
    pool, objective = method.data.train, method.objective
    return mean_gradient(
        method, rows, parameters, lambda positions: objective.loss(pool.batch(rows[positions], objective.device))
    )


def mean_gradient(
    method: Method, rows: np.ndarray, parameters: Sequence[nn.Parameter], loss: Callable[[np.ndarray], Tensor]
) -> list[Tensor]:
    """The gradient of a mean over train rows; `loss` is the mean over those at the given positions in `rows`.

    The rows are divided into micro-batches and among the ranks, like those of a step. Of a sharded tensor it is the
    gradient of this rank's rows.
    """
    pool, world, limits = method.data.train, get_world(), method.objective.micro_batches
    weights = pool.weights[rows]

    def divide(positions: np.ndarray) -> list[np.ndarray]:
        return [positions[group] for group in limits.groups(pool, rows[positions])]

    total = [torch.zeros_like(local(parameter.detach())) for parameter in parameters]
    with world.local_only(), own_gradients(parameters):
        for positions, counts in world.micro_batches(np.arange(len(rows)), divide):
            share = float(weights[positions].sum() / weights.sum()) if counts else 0.0
            torch._foreach_add_(total, gradients_of_share(loss(positions) * share, parameters))
    world.sum([value for value, parameter in zip(total, parameters, strict=True) if not is_sharded(parameter)])
    return total


@torch.no_grad()
def memory_loss(method: Method, rows: np.ndarray) -> float:
    """The objective's mean loss of train rows at the present weights, without dropout. Waits for the device."""
    pool, objective, world = method.data.train, method.objective, get_world()
    weights, total = pool.weights[rows], torch.zeros((), device=objective.device)
    objective.adapters.train_mode(False)
    with world.local_only():
        for micro_batch, counts in world.micro_batches(rows, lambda mine: objective.micro_batches.divide(pool, mine)):
            share = float(pool.weights[micro_batch].sum() / weights.sum()) if counts else 0.0
            total += objective.loss(pool.batch(micro_batch, objective.device)) * share
    objective.adapters.train_mode(True)
    world.sum([total])
    return total.item()


def dot(one: Sequence[Tensor], two: Sequence[Tensor], parameters: Sequence[Tensor] = ()) -> Tensor:
    """The product of two gradients, each as one flat vector; of this rank's rows if `parameters` are sharded."""
    products = [(a * b).sum() for a, b in zip(one, two, strict=True)]
    return torch.stack(sums(list(zip(parameters or one, products, strict=True)))).sum()


def conflict(gradient: Sequence[Tensor], reference: Sequence[Tensor], parameters: Sequence[Tensor] = ()) -> Tensor:
    """g . r / r . r where it is negative, else 0: g minus this times r has no conflict with r. No synchronisation."""
    product, norm = dot(gradient, reference, parameters), dot(reference, reference, parameters)
    return torch.where((product < 0) & (norm > 0), product / norm.clamp(min=torch.finfo(norm.dtype).tiny), 0.0)


def dual_weights(products: np.ndarray, gram: np.ndarray, margin: float, ridge: float) -> np.ndarray:
    """argmin_v v^T (G + ridge I) v / 2 + p^T v subject to v >= margin: the weights of the references in GEM.

    `products` p [n] are those of the gradient with each reference, `gram` G [n, n] those of the references.
    """
    from scipy.optimize import nnls  # a package of an extra

    matrix = gram + ridge * np.eye(len(gram))
    linear = products + matrix @ np.full(len(gram), margin)  # of u = v - margin >= 0
    factor = np.linalg.cholesky(matrix)
    free: np.ndarray = nnls(factor.T, -np.linalg.solve(factor, linear))[0]
    return margin + free
