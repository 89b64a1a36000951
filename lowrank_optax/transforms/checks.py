"""Messages for misuse, raised before anything has changed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax.factorize import path_name
from lowrank_optax.lowrank import LowRank, flatten, is_lowrank


def check_kernels(params: Any, galerkin: bool = False) -> None:
    """Raises ValueError for a node that is no factorisation; orthonormality is checked where values are known."""

    def one(path: Any, W: Any) -> None:
        if not is_lowrank(W):
            return
        name = path_name(path)
        if not all(hasattr(x, "shape") and hasattr(x, "dtype") for x in (W.U, W.S, W.V)):
            return  # A tree of specs, masks or placeholders.
        batch, r = W.batch_shape, W.rank
        fits = W.U.shape[-1] == W.V.shape[-1] == r and W.S.shape[-2] == r
        batched = W.U.shape[: len(batch)] == batch == W.V.shape[: len(batch)]
        if not (fits and batched and W.in_shape and W.out_shape):
            raise ValueError(
                f"{name!r} is no factorisation U S V^T: shapes {W.U.shape}, {W.S.shape}, {W.V.shape} should be "
                "(batch..., in..., r), (batch..., r, r), (batch..., out..., r)"
            )
        for x in (W.U, W.S, W.V):
            if not jnp.issubdtype(x.dtype, jnp.floating):
                raise ValueError(f"the factors of {name!r} must be floating, got {x.dtype}")
        m, n = int(np.prod(W.in_shape)), int(np.prod(W.out_shape))
        if r > min(m, n):
            raise ValueError(
                f"{name!r} has factors of width {r}, more than min(m, n) = {min(m, n)}: no such basis is "
                "orthonormal; choose a smaller rank in factorize"
            )
        if galerkin and r < 2:
            raise ValueError(
                f"gradient='galerkin' needs factors of width 2 rank or more, {name!r} has width {r}: call "
                "factorize(params, rank, max_rank=2 * rank), or use gradient='projected'"
            )
        _check_orthonormal(name, W)

    jax.tree_util.tree_map_with_path(one, params, is_leaf=is_lowrank)


def _check_orthonormal(name: str, W: LowRank) -> None:
    factors = {"U": flatten(W).U, "V": flatten(W).V} if _concrete(W) else {}
    for label, x in factors.items():
        y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        gram = jnp.swapaxes(y, -1, -2) @ y
        error = float(jnp.max(jnp.abs(gram - jnp.broadcast_to(jnp.eye(W.rank, dtype=y.dtype), gram.shape))))
        # A column of a correct factor is off by rounding; ten times sqrt(eps) tells that from a wrong one.
        allowed = 10 * float(jnp.finfo(x.dtype).eps) ** 0.5
        if not error <= allowed:
            raise ValueError(
                f"the columns of {label} of {name!r} are not orthonormal (|{label}^T {label} - I| = {error:.1e}): "
                "build kernels with factorize or lowrank_init, or call lowrank_optax.orthonormalize(params)"
            )


def _concrete(W: LowRank) -> bool:
    return not any(isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct) for x in (W.U, W.S, W.V))


def check_gradients(grads: Any, params: Any) -> None:
    """Raises ValueError where gradients do not belong to the parameters."""
    if params is None:
        raise ValueError(
            "fixed_rank moves kernels along a manifold and needs to know where they are: call "
            "tx.update(grads, state, params)"
        )
    given: Any = jax.tree.structure(grads)
    expected: Any = jax.tree.structure(params)
    if given != expected:
        raise ValueError(
            "the gradients have another structure than the parameters: differentiate the loss with respect to the "
            f"factored params themselves, jax.grad(loss)(params).\n  gradients: {given}\n  parameters: {expected}"
        )

    def one(path: Any, g: Any, p: Any) -> None:
        if jnp.shape(g) != jnp.shape(p):
            raise ValueError(
                f"the gradient at {path_name(path)!r} has shape {jnp.shape(g)}, the parameter {jnp.shape(p)}"
            )

    jax.tree_util.tree_map_with_path(one, grads, params)
