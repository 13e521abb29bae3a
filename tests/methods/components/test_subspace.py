"""InfLoRA, GainLoRA and OSF: bases of the directions earlier tasks use, and updates orthogonal to them."""

import pytest
import torch
from torch import nn

from clpet.methods import gain_lora
from clpet.methods.components.subspace import extend_basis, threshold
from clpet.methods.inf_lora import projected
from clpet.models.stacked_lora import low_rank_product
from tests.conftest import double


def test_projected_rows() -> None:
    """Rows have no component along e1 and norm 1 / sqrt(3)."""
    a, basis = double([[1, 1, 0], [0, 2, 2]]), double([[1], [0], [0]])
    rows = projected(a, basis)
    assert rows.tolist() == [
        pytest.approx([0, 0.57735027, 0], abs=1e-8),
        pytest.approx([0, 0.40824829, 0.40824829], abs=1e-8),
    ]
    assert (rows @ basis).abs().max().item() == 0


@pytest.mark.parametrize(("epsilon", "count"), [(0.5, 1), (0.9, 1), (0.995, 2)])
def test_first_basis(epsilon: float, count: int) -> None:
    """Cumulative shares .642, .928, .9993, 1 of sigma = 3, 2, 1, .1: those below epsilon, at least one."""
    extended = extend_basis(torch.empty(4, 0, dtype=torch.float64), torch.diag(double([3, 2, 1, 0.1])), epsilon)
    assert extended.shape == (4, count)
    assert torch.allclose(extended.T @ extended, torch.eye(count, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize(("epsilon", "added"), [(0.75, 0), (0.9, 1), (0.97, 2), (0.995, 3)])
def test_basis_growth(epsilon: float, added: int) -> None:
    """e1 explains .753 of diag(4, 2, 1, .5); directions are added while the share is below epsilon."""
    e1 = double([[1], [0], [0], [0]])
    extended = extend_basis(e1, torch.diag(double([4, 2, 1, 0.5])), epsilon)
    assert torch.equal(extended[:, :1], e1)
    assert torch.allclose(extended.abs(), torch.eye(4, dtype=torch.float64)[:, : 1 + added], atol=1e-12)


def test_threshold_grows_with_the_tasks() -> None:
    thresholds = [threshold(0.995, index, 15) for index in (0, 1, 7, 14)]
    assert thresholds == pytest.approx([0.995, 0.99533333, 0.99733333, 0.99966667], abs=1e-8)


@pytest.mark.parametrize("design", ["random", "svd"])
@pytest.mark.parametrize("name", ["inf_lora", "gain_lora"])
def test_new_branches_do_not_read_old_directions(name: str, design: str, make) -> None:
    """On trained layers: in span(M) the new branch gives 0, M stays orthonormal, and only B has changed."""
    run = make(f"method={name}", f"method.design={design}", "train.lr=1e-2", "method.epsilon=0.9")
    method = run.method
    run.learn(0)
    old = {key: basis.clone() for key, basis in method.bases.items()}
    run.learn(1)
    for key, layer in method.stack.layers.items():
        basis = old[method.source[key]]
        x = torch.randn(20, basis.shape[1]) @ basis.T
        assert layer.B.abs().max() > 1e-4
        assert low_rank_product(x, layer.A.detach(), layer.B.detach(), None).abs().max() < 1e-5
        assert layer.A.grad is None
        norms = layer.A.norm(dim=1)
        assert torch.allclose(norms, torch.full_like(norms, 3**-0.5), atol=1e-4)
    for key, basis in method.bases.items():
        assert torch.allclose(basis.T @ basis, torch.eye(basis.shape[1]), atol=1e-5), key
        assert basis.shape[1] >= old[key].shape[1]
        assert torch.equal(basis[:, : old[key].shape[1]], old[key])


def test_layers_that_read_the_same_input_share_a_basis(make) -> None:
    """Query and value of one attention share a basis and, with svd, the same rows; other layers have other bases."""
    run = make("method=inf_lora", "method.design=svd")
    run.learn(0)
    method = run.method
    assert len(method.stack.layers) == 4
    assert len(method.bases) == 2
    pairs = [[layer for key, layer in method.stack.layers.items() if f"layer.{i}." in key] for i in range(2)]
    assert all(torch.equal(query.A, value.A) for query, value in pairs)
    assert not torch.equal(pairs[0][0].A, pairs[1][0].A)


def test_covariances_leave_out_padding(make) -> None:
    """C over padded batches equals the mean over the rows one by one."""
    run = make("method=inf_lora")
    method = run.method
    method.stack.add(0)
    method.grow_head(0)
    full, _ = method.covariances(0)
    method.objective.eval_batch_size = 1
    alone, _ = method.covariances(0)
    assert all(torch.allclose(full[key], alone[key], atol=1e-5) for key in full)


def test_gate_opening() -> None:
    openings = gain_lora.opening(double([0, 0.25, -0.5, 1]))
    assert openings.tolist() == pytest.approx([0, 0.4621171573, 0.7615941560, 0.9640275801], abs=1e-10)


def test_gate_step_leaves_old_inputs_alone() -> None:
    """Without rescaling dW x = 0 for x in span(M); with it each row has the plain step's norm."""
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(6, 2, dtype=torch.float64))[0]
    before, step = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    after = gain_lora.projected_step(before, before + step, basis, rescale=False)
    x = basis @ double([0.3, -2])
    assert torch.allclose((after - before) @ x, double([0, 0, 0]), atol=1e-12)
    assert not torch.allclose(after, before)
    rescaled = gain_lora.projected_step(before, before + step, basis, rescale=True)
    assert torch.allclose(rescaled.norm(dim=1), (before + step).norm(dim=1))
    assert torch.allclose(nn.functional.normalize(rescaled), nn.functional.normalize(after))


def test_gates_of_old_tasks_keep_their_bits(make) -> None:
    """The new gate starts from the old one, and training changes it only orthogonally to its bases."""
    run = make("method=gain_lora", "method.rescale=false", "method.epsilon=0.9", "train.lr=1e-2")
    method = run.method
    run.learn(0)
    old = {name: tensor.clone() for name, tensor in method.gates[0].state_dict().items()}
    bases = {name: basis.clone() for name, basis in method.bases.items()}
    run.learn(1)
    assert all(torch.equal(old[name], tensor) for name, tensor in method.gates[0].state_dict().items())
    for name in ("down", "up"):
        moved = method.gates[1].get_parameter(name).detach() - old[name]
        assert moved.abs().max() > 1e-3
        assert (moved @ bases[gain_lora.INPUT_OF[name]]).abs().max() < 1e-4
    assert (method.gates[1].key @ bases["gate"]).abs().max() < 1e-4


def test_parameters_of_a_gate() -> None:
    """A gate has 205,824 parameters at the width of T5-large."""
    assert sum(p.numel() for p in gain_lora.Gate(1024, 100, 0).parameters()) == 205_824


def test_osf_protects_strong_directions_and_decomposes_again(make) -> None:
    """A task hardly changes W within its strongest half of singular directions; then the new W is decomposed."""
    run = make("method=osf", "train.lr=1e-2")
    method = run.method
    first = {name: weight.detach().clone() for name, weight in method.weights().items()}
    assert len(first) == 4
    run.learn(0)
    changes = {name: layer.get_delta_weight("default").detach() for name, layer in method.layers().items()}
    run.learn(1)
    for name, weight in method.weights().items():
        assert torch.allclose(weight, first[name] + changes[name], atol=1e-6)
        u, _, v = torch.linalg.svd(first[name])
        assert changes[name].abs().max() > 1e-4
        protected = u[:, :16].T @ changes[name] @ v[:16].T
        assert protected.norm() < 0.1 * changes[name].norm()  # of a random change it would have half the norm
    assert method.objective.adapters.names == ["default"]
