"""Other people's code: models and loops in the style of public code bases, with a few lines of this library."""

from __future__ import annotations

import math
from types import ModuleType

import numpy as np
import pytest

import lowrank_optax as lro
from tests.clients import (
    big_vision,
    companions,
    gemma_linen,
    gemma_nnx,
    harness,
    hf_gpt2,
    llama_nnx,
    lm1b,
    nanodo,
    resnet,
    t5x,
)

FAST = [nanodo]
SLOW = [lm1b, gemma_nnx, big_vision, t5x, gemma_linen, hf_gpt2, llama_nnx, resnet]
ROWS = [*FAST, *(pytest.param(client, marks=pytest.mark.slow) for client in SLOW)]
pytestmark = [
    pytest.mark.usefixtures("settings_of_a_user"),  # Other people's code promotes ranks and knows float32.
    pytest.mark.filterwarnings("ignore:there is no LowRank kernel"),  # The dense client has the same optimizer.
]


@pytest.fixture(scope="module", params=ROWS, ids=lambda client: client.__name__.rpartition(".")[2])
def client(request: pytest.FixtureRequest) -> ModuleType:
    return request.param


def test_every_parameter_is_factored_or_has_a_reason(client: ModuleType) -> None:
    found = harness.parameters(client, harness.run(client).state)
    assert {path for path, x in found.items() if lro.is_lowrank(x)} == client.FACTORED
    dense = {path: x for path, x in found.items() if not lro.is_lowrank(x) and x.ndim > 1}
    assert set(dense) == set(client.DENSE)
    reasons = client.reasons()
    for path, reason in client.DENSE.items():
        if reason.startswith("min(m, n)"):  # `kernels` of linen knows no rank; the table of reasons is for any rank
            assert path not in reasons and min(dense[path].shape) < client.RANK
        else:
            assert reason in reasons[path]


def test_at_full_rank_the_function_is_the_dense_one(client: ModuleType) -> None:
    dense, full = harness.start(client, None), harness.start(client, 1.0)
    assert not harness.kernel_sizes(client, dense) and harness.kernel_sizes(client, full)
    expected, found = client.forward(dense, client.BATCH), client.forward(full, client.BATCH)
    # Three products in the place of one, each rounded to 6e-8, through layers that normalise; 9e-6 was the largest.
    np.testing.assert_allclose(found, expected, atol=5e-5 * float(np.abs(expected).max()))


def test_a_step_compiles_once(client: ModuleType) -> None:
    assert harness.run(client).compiled_late == []


def test_the_loss_falls(client: ModuleType) -> None:
    losses = harness.run(client).losses
    assert np.all(np.isfinite(losses)) and losses[-1] < 0.8 * losses[0]


def test_no_array_of_a_step_has_the_size_of_a_kernel(client: ModuleType) -> None:
    sizes = harness.kernel_sizes(client, harness.run(client).state)
    assert harness.kernels_inside(client, client.RANK, sizes) == set()
    # The check sees them where they are: in the step of the dense model.
    whole = {
        math.prod(W.shape) for W in harness.parameters(client, harness.run(client).state).values() if lro.is_lowrank(W)
    }
    assert {math.prod(shape) for shape in harness.kernels_inside(client, None, sizes)} >= whole


def test_what_comes_with_the_loop_works(client: ModuleType) -> None:
    for check in companions.CHECKS[client]:
        check(client)
