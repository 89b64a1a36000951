"""States belong to one geometry, and diagnostics read the truncation off them."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import lowrank_optax as lro
from tests.one_kernel import GEOMETRIES, RANK, TARGET, kernel, run

# --- a state belongs to a geometry -----------------------------------------------------------------------------------

STATEFUL = {
    **{name: lro.lowrank_adam(0.01, geometry=g) for name, g in GEOMETRIES.items() if name != "bug"},
    "galerkin": lro.galerkin(optax.adam(0.01)),
}


@pytest.mark.parametrize(("mine", "other"), [(a, b) for a in STATEFUL for b in STATEFUL if a != b])
def test_the_state_of_another_geometry_is_refused(mine: str, other: str) -> None:
    params = {"kernel": kernel(width=6), "bias": jnp.ones(3)}
    state = STATEFUL[other].init(params)
    with pytest.raises((ValueError, TypeError), match=r"(?i)state"):
        STATEFUL[mine].update(params, state, params)


@pytest.mark.parametrize(
    ("mine", "other"), [("balanced", "tangent"), ("tangent", "balanced"), ("coefficient", "tangent")]
)
def test_the_state_of_another_geometry_is_refused_across_a_checkpoint(mine: str, other: str, tmp_path: Any) -> None:
    params = {"kernel": kernel()}
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        lro.checkpoint.save(manager, 1, STATEFUL[other].init(params))
        manager.wait_until_finished()
        with pytest.raises(ValueError, match=r"there is no .*kernel/|no checkpoint"):
            lro.checkpoint.restore(manager, STATEFUL[mine].init(params))


# --- diagnostics -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_diagnostics_show_a_truncation_where_there_is_one() -> None:
    for geometry, truncates in ((lro.Balanced(), False), (lro.Tangent(), True), (lro.Coefficient(), True)):
        tx = lro.lowrank_adam(0.1, geometry=geometry)
        _, state = run(tx, kernel(), tx.init(kernel()), 1)
        found = lro.diagnostics(state).kernels[""].truncation
        assert (found is not None) == truncates
        if truncates:
            assert float(found) > 1e-6


def test_truncation_is_what_the_retraction_discards() -> None:
    W, h = kernel(), 0.1
    tx = lro.fixed_rank(optax.sgd(h), geometry=lro.Tangent())
    _, state = run(tx, W, tx.init(W), 1)
    G = np.asarray(W.to_dense() - TARGET)
    P = W.U @ (W.U.T @ G) + (G @ W.V) @ W.V.T - W.U @ (W.U.T @ G @ W.V) @ W.V.T
    sigma = np.linalg.svd(W.to_dense() - h * P, compute_uv=False)
    expected = np.linalg.norm(sigma[RANK:]) / np.linalg.norm(sigma)
    np.testing.assert_allclose(lro.diagnostics(state).kernels[""].truncation, expected, rtol=1e-10)
