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
        if _known(W):
            _check_orthonormal(name, W)
            if galerkin and r < min(m, n):
                _check_room(name, W)

    jax.tree_util.tree_map_with_path(one, params, is_leaf=is_lowrank)


def _known(W: LowRank) -> bool:
    """Whether values can be looked at: not while tracing, nor where other processes hold a part."""
    factors = (W.U, W.S, W.V)

    def unknown(x: Any) -> bool:
        traced = isinstance(x, jax.core.Tracer) or isinstance(x, jax.ShapeDtypeStruct)  # noqa: SIM101
        return traced or not getattr(x, "is_fully_addressable", True)

    return not any(map(unknown, factors))


def _check_orthonormal(name: str, W: LowRank) -> None:
    for label, x in (("U", flatten(W).U), ("V", flatten(W).V)):
        # NumPy, because inside jit jax.numpy would trace even constants.
        y = np.asarray(x).astype(np.promote_types(np.asarray(x).dtype, np.float32))
        error = np.max(np.abs(np.swapaxes(y, -1, -2) @ y - np.eye(W.rank)))
        # A column of a correct factor is off by rounding; ten times sqrt(eps) tells that from a wrong one.
        allowed = 10 * float(jnp.finfo(x.dtype).eps) ** 0.5
        if not error <= allowed:
            raise ValueError(
                f"the columns of {label} of {name!r} are not orthonormal (|{label}^T {label} - I| = {error:.1e}): "
                "build kernels with factorize or lowrank_init, or call lowrank_optax.orthonormalize(params)"
            )


def _check_room(name: str, W: LowRank) -> None:
    sigma = np.linalg.svd(np.asarray(W.S).astype(np.float64), compute_uv=False)
    rank = int(np.max(np.sum(sigma > 0, axis=-1)))
    if 2 * rank > W.rank or W.rank < 2:
        raise ValueError(
            f"gradient='galerkin' augments the bases within the factors, and {name!r} of rank {rank} has factors of "
            f"width {W.rank}: call factorize(params, rank, max_rank=2 * rank), or use gradient='projected'"
        )


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
