"""A run does not depend on the signs that LAPACK chooses."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax import linalg
from tests.one_kernel import kernel, run

slow = pytest.mark.slow


GROWING = {
    "galerkin": lambda: lro.galerkin(optax.adam(0.05, eps=1e-3), 2, rank=lro.tolerance(1e-6)),
    "coefficient": lambda: lro.lowrank_adam(0.05, eps=1e-3, geometry=lro.Coefficient(rank=lro.tolerance(1e-6))),
    "tangent": lambda: lro.lowrank_adam(0.05, eps=1e-3, geometry=lro.Tangent(rank=lro.tolerance(1e-6))),
    "balanced": lambda: lro.lowrank_adam(0.05, eps=1e-3),
    "bug": lambda: lro.lowrank_adam(0.05, eps=1e-3, geometry=lro.Coefficient(retraction="bug")),
}


@slow
@pytest.mark.parametrize("name", GROWING)
def test_a_run_does_not_depend_on_the_signs_that_lapack_chooses(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of singular pairs by which the rank grows: elementwise second moments depend on them."""
    lapack, ends = linalg._svd, []
    for signs in (None, np.random.default_rng(0).choice([-1.0, 1.0], 40)):
        if signs is not None:

            def flipped(x: Any, signs: Any = signs) -> Any:
                u, s, vt = lapack(x)
                sign = jnp.asarray(signs[: s.shape[0]])
                return u * sign[None], s, vt * sign[:, None]

            monkeypatch.setattr(linalg, "_svd", flipped)
        jax.clear_caches()
        tx = GROWING[name]()
        W = kernel((3.0, 2.0), width=8 if name == "galerkin" else 6, m=20, n=16)
        target = jnp.asarray(np.random.default_rng(8).standard_normal((20, 16)))
        loss = lambda W, T=target: jnp.sum((W.to_dense() - T) ** 2) / 2  # noqa: E731
        W, state = run(tx, W, tx.init(W), 9, loss)
        ends.append(np.asarray(W.to_dense()))
        grown = int(lro.diagnostics(state).kernels[""].rank)
    assert name in ("balanced", "bug") or grown > 2
    np.testing.assert_allclose(ends[1], ends[0], atol=1e-7)
