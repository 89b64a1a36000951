"""Messages for misuse, raised before anything has changed."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lowrank_optax.geometry import Factored, Geometry
from lowrank_optax.layout import Layout, map_kernel
from lowrank_optax.lowrank import LowRank
from lowrank_optax.moments import Moments
from lowrank_optax.paths import path_name


def arrays_of(params: Any) -> Any:
    """Zeros in the place of shapes, which `init` accepts as Optax does."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x, params)


# --- options --------------------------------------------------------------------------


def check_geometry(geometry: Any) -> None:
    """Raises TypeError for anything but a geometry."""
    if isinstance(geometry, Geometry):
        return
    given = f"{geometry.__name__} without parentheses" if isinstance(geometry, type) else repr(geometry)
    raise TypeError(
        f"geometry takes an object, lro.Balanced(), lro.Tangent() or lro.Coefficient() for kernels U S V^T, got {given}"
    )


# --- parameters and gradients ---------------------------------------------------------


def check_kernels(params: Any, geometry: Geometry) -> None:
    """Raises ValueError for a kernel that is no valid factorisation; values are looked at where they are known.

    Warns of parameters without a kernel, which somebody forgot to factor, unless a mask has hidden some of them.
    """
    kernels = []
    for path, W in jax.tree_util.tree_leaves_with_path(params, is_leaf=geometry.owns):
        if geometry.owns(W):
            geometry.of(W).check(path_name(path), W)
            if isinstance(geometry, Factored):
                kernels.append((path_name(path), W))
    if isinstance(geometry, Factored) and not kernels:
        _warn_of_dense(params)
    check_orthonormal(kernels)


def _warn_of_dense(params: Any) -> None:
    is_hidden = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731
    leaves = jax.tree.leaves(params, is_leaf=is_hidden)
    matrices = sum(jnp.ndim(x) >= 2 for x in leaves if not is_hidden(x))
    if matrices and not any(map(is_hidden, leaves)):
        warnings.warn(
            f"there is no LowRank kernel among the parameters, whose {matrices} leaves with two axes or more all move "
            "as ordinary ones: factor them first, params = lowrank_optax.factorize(params, rank)",
            stacklevel=2,
        )


def check_orthonormal(kernels: list[tuple[str, LowRank]]) -> None:
    """Raises ValueError where U or V is far from orthonormal. One number comes from the device if all are well."""
    kernels = [(name, W) for name, W in kernels if is_known(W)]
    if not kernels:
        return
    with jax.ensure_compile_time_eval():  # also inside jit, where parameters may be constants
        errors = [map_kernel(_orthonormality, W) for _, W in kernels]
        # A column of a correct factor is off by rounding; ten times sqrt(eps) tells that from a wrong one.
        allowed = [min(0.1, 10 * float(jnp.finfo(W.dtype).eps) ** 0.5) for _, W in kernels]
        worst = max(jnp.max(error) / most for error, most in zip(errors, allowed, strict=True))
        if float(worst) <= 1:
            return
        for (name, _), error, most in zip(kernels, errors, allowed, strict=True):
            for label, x in zip("UV", jnp.max(error.reshape(-1, 2), axis=0), strict=True):
                if not float(x) <= most:
                    raise ValueError(
                        f"the columns of {label} of {name!r} are not orthonormal (|{label}^T {label} - I| = "
                        f"{float(x):.1e}): build kernels with factorize or lowrank_init, or call "
                        "lowrank_optax.orthonormalize(params)"
                    )


def _orthonormality(W: LowRank) -> jax.Array:
    eye = jnp.eye(W.width, dtype=W.S.dtype)
    errors = jnp.stack([jnp.max(jnp.abs(x.T @ x - eye)) for x in (W.U, W.V)])
    return jnp.where(jnp.isnan(errors), jnp.inf, errors)


def is_known(W: LowRank) -> bool:
    """Whether values can be looked at: no factor is traced, and no other process holds a part of one."""

    def known(x: Any) -> bool:
        traced = isinstance(x, jax.core.Tracer) or isinstance(x, jax.ShapeDtypeStruct)  # noqa: SIM101
        return not traced and getattr(x, "is_fully_addressable", True)

    return all(map(known, (W.U, W.S, W.V)))


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


# --- states ---------------------------------------------------------------------------


def check_moments(layout: Layout, moments: Moments, state: Any) -> list[int]:
    """The degrees of the copies that hold moments of kernels. ValueError if the state cannot be carried."""
    try:
        copies, _ = moments.open(state)
        mirrored = [copy for copy in copies if layout.check_copy(copy.tree)]
    except (ValueError, TypeError) as error:
        raise ValueError(
            "fixed_rank cannot carry the state of this inner transformation between bases: its leaves must mirror the "
            "parameters in shape, or be scalars. Factored second moments (adafactor, sm3) do not; use adam, rmsprop, "
            f"lion, sgd or another elementwise transformation. Cause: {error}"
        ) from error
    unknown = sorted({f"{copy.owner}.{copy.field}" for copy in mirrored if copy.degree is None})
    if unknown:
        raise ValueError(
            f"fixed_rank cannot carry {', '.join(unknown)} between bases: it knows no such field. If it is linear in "
            "gradients, name it in first_moments=(...), if it is a mean of squares, in second_moments=(...); anything "
            "else, such as a copy of the parameters, cannot be carried. Use adam, rmsprop, lion, sgd or another "
            "elementwise transformation"
        )
    return [copy.degree for copy in mirrored if copy.degree is not None]


def check_state(layout: Layout, moments: Moments, state: Any, kind: type) -> None:
    """Raises ValueError for a state that belongs to other parameters or to another optimizer."""
    try:
        if not isinstance(state, kind):
            raise ValueError(f"it holds a {type(state).__name__} and no {kind.__name__}")
        loop: Any = getattr(state, "loop", state)
        layout.gather_kernels(loop.aux)
        for copy in moments.open(loop.inner_state)[0]:
            layout.check_copy(copy.tree)
    except (ValueError, TypeError) as error:
        raise ValueError(
            "the optimizer state does not belong to these parameters and this optimizer: make it with tx.init(params), "
            f"and change the width of factors with lowrank_optax.resize, which changes both. Cause: {error}"
        ) from error
