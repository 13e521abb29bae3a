"""Numbers that functions of the authors' code of KIF, Recurrent-KIF and the baselines returned, on a CPU."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from clpet.config.schema import Schedule, Training
from clpet.methods.components.importance import (
    Importance,
    ParameterGroups,
    above_quantile,
    accumulate,
    adaptive,
    fuse,
    norm,
    orthogonality,
    unflat,
)
from clpet.methods.components.subspace import extend_basis, threshold
from clpet.methods.gain_lora import Gate, opening, projected_step
from clpet.methods.l2p import L2P
from clpet.methods.mocl import MoCL
from clpet.methods.o_lora import OLoRA
from clpet.methods.recurrent_kif import alternate, fused_step
from clpet.methods.sapt import Query, divergence, scores
from clpet.replay.batch_plan import BatchPlan
from clpet.training.lr_schedules import SchedulePosition, schedule
from tests.conftest import double

# KIF over three tasks: scalars are numbered over x.A, x.B, y.A, y.B row by row
SHAPES = {"x.lora_A.weight": (2, 3), "x.lora_B.weight": (2, 2), "y.lora_A.weight": (2, 3), "y.lora_B.weight": (2, 2)}
UNITS = [
    [2.865288519e-05, 1.37736129e-05, 9.505107377e-05, 3.235921521e-05],
    [7.022963477e-05, 0.0001279129489, 1.324759332e-05, 2.00360775e-05],
    [5.392942347e-05, 4.669178894e-05, 6.038707548e-05, 2.015583265e-05],
]
NEW = [[0.4969420901, 1.0, 0.0, 0.05920257386], [0.839486639, 0.6595857951, 1.0, 0.0]]
OLD = [[0.1830676319, 0.0, 1.0, 0.2286685892], [0.1903612874, 0.2339677328, 1.0, 0.0]]
PERCENTILES = [(0.6981652541, 0.5372011535), (0.9036919834, 0.5403806397)]
ACCUMULATED = [[0.1903612874, 0.2339677328, 1.0, 0.0], [0.3850988929, 0.3616531515, 1.0, 0.0]]
ORTHOGONALITY = [0.1095018479, 0.1115291452, 0.1083824879]
FUSED = [
    [
        [[-0.06695006676, 0.3891250556, -0.01087494437], [-0.289208274, 0.391006895, -0.008993104981]],
        [[-0.2669500668, 0.291006895], [0.03304993324, -0.489208274]],
        [[-0.291006895, 0.389208274, 0.008993104981], [-0.2316309057, 0.09795708683, 0.06836909431]],
        [[-0.491006895, -0.002042913166], [-0.191006895, 0.2979570868]],
    ],
    [
        [[0.2745469036, -0.06607236702, -0.466072367], [0.1245921398, -0.1089006305, 0.4215424535]],
        [[0.07454690361, -0.2089006305], [0.3745469036, -0.0754078602]],
        [[-0.3455034475, 0.344604137, -0.04550344751], [-0.3658154528, 0.1489785434, -0.06581545285]],
        [[0.004496552491, 0.04897854342], [-0.2455034475, 0.3489785434]],
    ],
]


def closed_form(factor: int, shift: int, divisor: int, centre: int, scale: float, count: int) -> Tensor:
    """((factor i + shift) mod divisor - centre) / scale for i < count."""
    return double([((factor * i + shift) % divisor - centre) / scale for i in range(count)])


def named(vector: Tensor) -> dict[str, Tensor]:
    return unflat(vector, {name: torch.empty(shape) for name, shape in SHAPES.items()})


def trained(task: int, step: int = 3) -> Tensor:
    """[20]: the weights after a step."""
    return closed_form(7, 5 * task + 3 * step, 11, 5, 10, 20)


def test_kif_over_three_tasks() -> None:
    """`RankAllocator`, `get_lora_ipt`, `lora_averaging` and `compute_orth_regu`: LoRA units, mix score, tau .25."""
    units = ParameterGroups(named(trained(0)), by_rank=True)
    old, accumulated = named(trained(0)), torch.empty(0)
    for task in range(3):
        importance = Importance(20, "mix", 0.85, 0.85, True, trained(0))
        for step in range(4):
            gradient = closed_form(4, 3 * task + 7 * step, 13, 6, 4, 20)
            importance.update([trained(task, step)], [gradient])
        unit_scores = units.scores(named(importance.elements()))
        assert unit_scores.tolist() == pytest.approx(UNITS[task], rel=1e-7)
        new = named(trained(task))
        factors = [value.mT if ".lora_B." in name else value for name, value in new.items()]
        assert 0.1 * orthogonality(factors).item() == pytest.approx(ORTHOGONALITY[task], rel=1e-7)
        if task == 0:
            accumulated = unit_scores
            continue
        before, now = norm(accumulated), norm(unit_scores)
        assert (now.tolist(), before.tolist()) == (
            pytest.approx(NEW[task - 1], abs=1e-7),
            pytest.approx(OLD[task - 1], abs=1e-7),
        )
        percentiles = [torch.quantile(scores, 0.8).item() for scores in (now, before)]
        assert percentiles == pytest.approx(PERCENTILES[task - 1], abs=1e-7)
        weights = units.broadcast(adaptive(before, now, 0.25))
        old = {name: fuse(old[name], new[name], weights[name]) for name in SHAPES}
        for value, expected in zip(old.values(), FUSED[task - 1], strict=True):
            assert torch.allclose(value, double(expected), atol=1e-7)
        accumulated = accumulate(before, now, 0.7)
        assert accumulated.tolist() == pytest.approx(ACCUMULATED[task - 1], abs=1e-7)


INNER = [0.02280955078, 0.0008490436172, 0.001905264475, 0.05914010363, 0.004573189125, 0.0008304101895, 0.0114981807,
         0.0379650375, 0.002405925, 0.0001625625]  # fmt: skip
OUTER = [0.00541333125, 0.000765, 0.0040640625, 0.0111537, 0.0004303125, 0.003132675, 0.01161246094, 0.0001625625,
         0.00306, 0.00585225]  # fmt: skip


def test_a_round_of_recurrent_kif() -> None:
    """`RankAllocator` of lora_importance_bilevel.py and `update_parameters_with_task_vectors`."""
    start = closed_form(3, 0, 7, 3, 10, 10)
    inner = [(closed_form(3, s, 11, 5, 10, 10), closed_form(5, 2 * s, 9, 4, 2, 10)) for s in range(3)]
    outer = [(closed_form(4, 3 + s, 13, 6, 10, 10), closed_form(2, 5 * s + 1, 7, 3, 2, 10)) for s in range(2)]
    masks = []
    for steps, expected, chosen in ((inner, INNER, {3, 7}), (outer, OUTER, {3, 6})):
        importance = Importance(10, "first", 0.85, 0.85, False, start)
        for weight, gradient in steps:
            importance.update([weight], [gradient])
        assert importance.elements().tolist() == pytest.approx(expected, rel=1e-7)
        masks.append(above_quantile(importance.elements(), 0.8))
        assert set(masks[-1].nonzero().flatten().tolist()) == chosen
    middle, end = inner[-1][0], outer[-1][0]
    fused = start + fused_step(middle - start, end - middle, *masks, "code")
    expected = [-0.25, 0.1, 0.45, -0.1399999976, 0.15, 0.15, -0.7, -0.4, 0.2, -0.1]
    assert fused.tolist() == pytest.approx(expected, abs=1e-7)


def test_learning_rates_of_recurrent_kif() -> None:
    """The script's loop: lr 1, linear, warm-up 2, 16 inner steps, Q = 8, M = 4; outer steps do not advance the schedule."""
    new, old = (BatchPlan(None, steps, lambda epoch, steps=steps: [None] * steps) for steps in (16, 5))
    plan = alternate(new, old, 8, 4)
    assert plan.steps == 24
    settings = Training(lr=1.0, schedule=Schedule.linear, warmup_steps=2)
    rate = schedule(settings, 1.0, SchedulePosition(plan.clock(plan.steps)))
    rates = [rate(plan.clock(step)) for step in range(24)]
    expected = [0.0, 0.5, 1.0, 0.928571, 0.857143, 0.785714, 0.714286, 0.642857, *[0.571429] * 4, 0.571429, 0.5, 0.428571,
                0.357143, 0.285714, 0.214286, 0.142857, 0.0714286, *[0.0] * 4]  # fmt: skip
    assert rates == pytest.approx(expected, abs=1e-6)


def test_o_lora_loss() -> None:
    """`training_step`: layers q and v, CE = 1, lambda1 = .5, lambda2 = .1."""

    def entries(rows: int, columns: int, c: int) -> Tensor:
        return closed_form(5, c, 9, 4, 4, rows * columns).view(rows, columns)

    layers = {}
    for name, extra in (("q", 0), ("v", 2)):
        layer = SimpleNamespace(frozen_A=entries(4, 3, 6 + extra))
        layer.A, layer.B = nn.Parameter(entries(2, 3, 9 + extra)), nn.Parameter(entries(2, 2, 9 + extra))
        layers[name] = layer
    method = OLoRA()
    current = {
        f"{name}.{key}": tensor
        for name, layer in layers.items()
        for key, tensor in zip("AB", (layer.A, layer.B), strict=True)
    }
    method.stack = SimpleNamespace(layers=layers, current=lambda: current)
    method.strengths = 0.5, 0.1
    loss = 1 + method.step_loss(None)
    loss.backward()
    assert loss.item() == pytest.approx(9.169855491, rel=1e-9)
    da = [[-1.185999428, 1.140249857, -1.170749571], [1.155499714, -1.155499714, 1.170749571]]
    db = [[-0.07302967433, 0.01825741858], [-0.05477225575, 0.03651483717]]
    assert torch.allclose(layers["q"].A.grad, double(da), atol=1e-9)
    assert torch.allclose(layers["q"].B.grad, double(db), atol=1e-9)


def test_basis_of_three_tasks() -> None:
    """`update_GPM` and `get_repsentation`: d = 4, T = 3, eps = .95; directions and the projector."""
    covariances = [
        torch.diag(double([4, 2, 1, 0.5])),
        double([[1, 0.5, 0, 0], [0.5, 2, 0.5, 0], [0, 0.5, 3, 0.5], [0, 0, 0.5, 1]]),
        torch.ones(4, 4, dtype=torch.float64) + torch.diag(double([0, 0, 0, 3])),
    ]
    basis = torch.empty(4, 0, dtype=torch.float64)
    projectors = []
    for index, covariance in enumerate(covariances):
        epsilon = threshold(0.95, index, 3)
        assert epsilon == pytest.approx([0.95, 0.96666667, 0.98333333][index], abs=1e-8)
        basis = extend_basis(basis, covariance, epsilon)
        projectors.append(basis @ basis.T)
    for projector, directions in zip(projectors, (2, 4, 4), strict=True):
        assert torch.allclose(projector, torch.diag(double([1.0] * directions + [0.0] * (4 - directions))), atol=1e-12)


def test_gate_and_projected_step() -> None:
    """`cal_attention` of GainLoRA's t5_large.py, and the formula of its training loop."""
    g, key = double([[1, 2, -1], [0, 1, 1], [-1, 0.5, 2]]), double([[0.5, -1, 2]])
    openings = opening(torch.cosine_similarity(g, key))
    assert openings.tolist() == pytest.approx([0.8475020005, 0.5491848569, 0.8153739425], abs=1e-9)
    gate = Gate(3, 2, 0)
    gate.stages, gate.key.data = lambda x: {"gate": x}, key
    assert torch.equal(gate(g), openings)
    before, after, basis = double([[1, 0, 0], [0, 2, 1]]), double([[2, 1, 1], [1, 1, 3]]), double([[0.6], [0.8], [0]])
    exact = double([[1.16, -0.12, 1.0], [1.12, 1.16, 3.0]])
    rescaled = double([[1.849599132, -0.1913378412, 1.59448201], [1.090649917, 1.1296017, 2.921383706]])
    assert torch.allclose(projected_step(before, after, basis, rescale=False), exact, atol=1e-9)
    assert torch.allclose(projected_step(before, after, basis, rescale=True), rescaled, atol=1e-8)


def test_sapt_router() -> None:
    """`cal_attention` and `memory_replay` of SAPT's t5_prompt.py; clpet lists the newest branch last."""
    query = Query(4, 2, 0).double()
    with torch.no_grad():
        query.down.weight.copy_(double([[0.5, -0.25, 1, 0], [0, 0.5, 0.25, -1]]))
        query.up.weight.copy_(double([[1, 0.5], [-1, 1], [0.5, 0.25], [0, 2]]))
    embeddings = double([[((3 * i + 2 * j) % 7 - 3) / 2 for j in range(4)] for i in range(6)])
    pooled = torch.stack([embeddings[ids].amax(0) for ids in ([1, 2, 5], [4, 3, 3])])
    keys = double([[0.5, 0.5, 0, -1], [1, 0, -0.5, 0.25], [-0.5, 1, 1, 0]]).flip(0)
    router_scores = scores(query(pooled), keys)
    weights = [[0.4362250741, 0.4386152957, 0.1251596302], [0.3880931441, 0.5007691801, 0.1111376757]]
    assert torch.allclose(router_scores.softmax(1).flip(1), double(weights), atol=1e-7)
    stored = double([0.3, 0.7])  # of the two older branches
    assert divergence(stored, router_scores).item() == pytest.approx(0.5609182241, abs=1e-7)


def test_mocl_composition() -> None:
    """key_encoder.py: cosines, weights at scale 8, and the matching loss of the third task."""
    method = MoCL()
    method.keys = [nn.Parameter(double(key)) for key in ([0.2, 0.9, 0.1], [0.5, 0.5, 0.7], [1, 0, 0.3])]
    cosines = method.cosines(double([[1, 2, 2], [0, -1, 1]]))
    expected = [[0.7907736702, 0.9715365548, 0.5108406855], [-0.6099942813, 0.1421338109, 0.2031856384]]
    weights = [[0.1868094097, 0.7932924749, 0.01989811533], [0.0009258185177, 0.3799150553, 0.6191591262]]
    assert torch.allclose(cosines, double(expected), atol=1e-9)
    assert torch.allclose(method.branch_weights(cosines), double(weights), atol=1e-9)
    rows = torch.arange(2)
    method.query_row, method.queries = rows, double([[1, 2, 2], [0, -1, 1]])
    method.routed_loss = lambda batch, weights: torch.zeros((), dtype=torch.float64)
    loss = method.loss(SimpleNamespace(batch=SimpleNamespace(rows=rows.numpy())))
    assert loss.item() == pytest.approx(0.6429868381, abs=1e-9)


def test_l2p_choice() -> None:
    """prompt.py of l2p-pytorch: chosen keys, and the sum of their cosines over the batch."""
    embeddings = double([[[1, 0, 1], [1, 2, 1]], [[0, 3, 0], [0, 1, -1]]])
    method = L2P(pool=4, top_k=2, key_loss_weight=1.0)
    method.keys = nn.Parameter(double([[1, 0, 0], [1, 1, 0], [0, 1, 1], [-1, 2, 0]]).float())
    model = SimpleNamespace(get_input_embeddings=lambda: lambda ids: embeddings)
    method.objective = SimpleNamespace(
        adapters=SimpleNamespace(model=model), loss=lambda batch: torch.zeros((), dtype=torch.float64)
    )
    batch = SimpleNamespace(
        input_ids=torch.zeros(2, 2, dtype=torch.long), attention_mask=torch.ones(2, 2, dtype=torch.long)
    )
    assert method.nearest(batch)[1].tolist() == [[1, 2], [3, 1]]
    assert -method.loss(SimpleNamespace(batch=batch)).item() == pytest.approx(1.593354667, abs=1e-6)
