"""From dense parameters to factored ones and back: `factorize`, `densify`, initialisers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax import linalg
from lowrank_optax import manifold as mf
from lowrank_optax.layout import map_kernel, map_matrices
from lowrank_optax.lowrank import LowRank, is_lowrank
from lowrank_optax.paths import path_name
from lowrank_optax.rank import check_number


class Axes(NamedTuple):
    """How the axes of a dense kernel split: `batch` stacked axes, then `inputs` input axes, the rest outputs.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> layers = {"w": jnp.ones((12, 64, 32))}  # twelve stacked 64 x 32 kernels
      >>> lro.factorize(layers, 4, where=lambda path, shape: lro.Axes(batch=1, inputs=1))["w"].U.shape
      (12, 64, 4)
    """

    batch: int = 0
    inputs: int = 1


Rank = int | float | Callable[[str, tuple[int, ...]], int | float]
Where = Callable[[str, tuple[int, ...]], "bool | Axes | None"]

# Kernel axes of nn.MultiHeadDotProductAttention: (features, heads, head_dim) for the projections,
# (heads, head_dim, features) on the way out.
_ATTENTION = {"query": Axes(0, 1), "key": Axes(0, 1), "value": Axes(0, 1), "out": Axes(0, 2)}


def _default_axes(name: str, shape: tuple[int, ...]) -> Axes:
    """The split of a kernel that no `where` describes, where the shape and the name leave no doubt."""
    *_, parent, _leaf = ("", "", *name.split("/"))
    if len(shape) == 2:
        return Axes(0, 1)
    if len(shape) == 3 and parent in _ATTENTION:
        return _ATTENTION[parent]
    if len(shape) in (4, 5) and parent not in _ATTENTION:
        return Axes(0, len(shape) - 1)  # Convolution: (spatial..., channels in, channels out).
    raise ValueError(
        f"cannot tell batch, input and output axes of the kernel {name!r} of shape {shape}: pass "
        "where=lowrank_optax.linen.kernels(model, *inputs), which reads them off a Flax model, or "
        "where=lambda path, shape: Axes(batch, inputs), or return False there to leave it dense"
    )


def _matrix_shape(shape: tuple[int, ...], axes: Axes) -> tuple[int, int]:
    """The shape (m, n) of a kernel as a matrix."""
    inputs = shape[axes.batch : axes.batch + axes.inputs]
    return math.prod(inputs), math.prod(shape[axes.batch + axes.inputs :])


def rank_number(rank: Rank, name: str, shape: tuple[int, ...], limit: int) -> int:
    """Evaluates a rank argument for one kernel whose matrices allow at most `limit`."""
    value = rank(name, shape) if callable(rank) else rank
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise TypeError(f"the rank of {name!r} must be an int or a fraction in (0, 1], got {value!r}")
    if isinstance(value, float | np.floating):
        if not 0.0 < value <= 1.0:
            raise ValueError(f"a fractional rank lies in (0, 1], got {value} for {name!r}; an absolute rank is an int")
        value = max(1, round(float(value) * limit))
    if value < 1:
        raise ValueError(f"the rank must be at least 1, got {value} for {name!r} of shape {shape}")
    return int(value)


def check_where(where: Any) -> None:
    """Raises TypeError for anything but a callable."""
    if where is not None and not callable(where):
        raise TypeError(
            "where is a callable of path and dense shape that returns True, False or Axes, e.g. "
            f"lambda path, shape: path.endswith('kernel'); got {where!r}"
        )


def _split(name: str, shape: tuple[int, ...], where: Where | None, rank: Rank) -> Axes | None:
    """The axes of a leaf that is to be factored, None for one that stays dense."""
    if where is None:
        is_kernel = name.rsplit("/", 1)[-1] in ("kernel", "")
        if not is_kernel or len(shape) < 2:
            return None
        axes = _default_axes(name, shape)
        return axes if fits(rank, name, shape, axes) else None
    chosen = where(name, shape)
    if chosen is None or chosen is False:
        return None
    if len(shape) < 2:
        raise ValueError(
            f"{name!r} has shape {shape}: a kernel has at least one input and one output axis; "
            "let `where` return False for it"
        )
    axes = _default_axes(name, shape) if chosen is True else Axes(*chosen)
    if axes.batch < 0 or axes.inputs < 1 or axes.batch + axes.inputs >= len(shape):
        raise ValueError(f"{axes} leaves no input or no output axis in {name!r} of shape {shape}")
    if getattr(chosen, "optional", False):  # from `linen.kernels`: dense, as by default, where the rank does not fit
        return axes if fits(rank, name, shape, axes) else None
    return axes


def fits(rank: Rank, name: str, shape: tuple[int, ...], axes: Axes) -> bool:
    """Whether the kernel has as many singular values as the rank asks for."""
    limit = min(_matrix_shape(shape, axes))
    return rank_number(rank, name, shape, limit) <= limit


def _factors(U: jax.Array, sigma: jax.Array, V: jax.Array, rank: int) -> LowRank:
    """The kernel of the first `rank` singular triples; the other columns are padding beside exact zeros."""
    return LowRank(U, linalg.diagonal(jnp.where(linalg.rank_mask(rank, sigma.shape[0]), sigma, 0.0)), V)


def _truncated_svd(W: jax.Array, rank: int, width: int) -> LowRank:
    u, sigma, v = linalg.svd(W)
    return _factors(u[:, :width], sigma[:width], v[:, :width], rank)


def _with_axes(W: LowRank, shape: tuple[int, ...], axes: Axes) -> LowRank:
    """The factors of flattened kernels with the axes of the dense kernel."""
    batch, inner = shape[: axes.batch], axes.batch + axes.inputs
    u, v = (*batch, *shape[axes.batch : inner], W.width), (*batch, *shape[inner:], W.width)
    return LowRank(W.U.reshape(u), W.S, W.V.reshape(v))


def _factorize_kernel(W: jax.Array, axes: Axes, rank: int, width: int) -> LowRank:
    """Truncated SVD of one (stacked) kernel in factors of `width` columns."""
    dense = W.astype(linalg.working_dtype(W)).reshape(*W.shape[: axes.batch], *_matrix_shape(W.shape, axes))
    return _with_axes(map_matrices(_truncated_svd, dense, rank=rank, width=width), W.shape, axes).astype(W.dtype)


def factorize(
    params: Any, rank: Rank, *, max_rank: Rank | None = None, where: Where | None = None, scale: float = 1.0
) -> Any:
    r"""Replaces the chosen kernels of a parameter tree by their truncated SVD.

    .. math:: W \approx U S V^\top, \quad S = \mathrm{diag}(\sigma_1, \dots, \sigma_r)

    This is the best approximation of rank r in the Frobenius norm. Leaves that are not chosen, and
    kernels that are factored already, are returned as they are.

    Args:
      params: a tree of arrays, e.g. `model.init(...)["params"]`.
      rank: rank of the start: an int, a fraction of `min(m, n)` in (0, 1], or a callable of the path
        and the dense shape that returns either.
      max_rank: width of the factors, of the same forms, for ranks that may grow. `galerkin` needs at least `2 rank`
        for its augmented bases. Cut to `min(m, n)`. Default: `rank`.
      where: callable of the path (`"block/dense/kernel"`) and the dense shape that returns False to leave a
        leaf dense, True to factor it, or `Axes` to factor it with a given split of its axes. The default
        takes every leaf named `kernel` with at least two axes and `min(m, n) >= rank`.
      scale: factor on the singular values. 1 keeps the function of a trained model. Training from scratch reaches a
        lower loss from about 0.2: a step h turns a pair of singular vectors by about h / sigma, so small singular
        values leave random initial directions sooner (RESULTS.md, pre-training).

    Returns:
      The tree with `LowRank` nodes, in the dtype of the parameters.

    Raises:
      TypeError: for arguments of another type.
      ValueError: if the rank exceeds `min(m, n)` of a kernel chosen by `where`, if no kernel is left to
        factor, or if the axes of a kernel are ambiguous.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> params = {"dense": {"kernel": jnp.ones((8, 6)), "bias": jnp.zeros(6)}}
      >>> params = lro.factorize(params, rank=2, max_rank=4)
      >>> params["dense"]["kernel"].U.shape, lro.ranks(params)["dense/kernel"].tolist()
      ((8, 4), 2)
    """
    check_where(where)
    check_number("scale", scale)
    seen: list[tuple[str, tuple[int, ...]]] = []
    chosen = 0

    def one(path: Any, leaf: Any) -> Any:
        nonlocal chosen
        if is_lowrank(leaf):
            chosen += 1
            return leaf
        name, shape = path_name(path), tuple(jnp.shape(leaf))
        if len(shape) >= 2:
            seen.append((name, shape))
        axes = _split(name, shape, where, rank)
        if axes is None:
            return leaf
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise ValueError(f"{name!r} has dtype {jnp.result_type(leaf)}: only floating kernels are factored")
        chosen += 1
        limit = min(_matrix_shape(shape, axes))
        r = rank_number(rank, name, shape, limit)
        if r > limit:
            raise ValueError(
                f"rank {r} is larger than min(m, n) = {limit} of the kernel {name!r} of shape {shape}: choose a "
                "smaller rank, a fraction, or let `where` return False to leave it dense"
            )
        width = r if max_rank is None else rank_number(max_rank, name, shape, limit)
        if width < r:
            raise ValueError(f"max_rank {width} is below rank {r} for the kernel {name!r}")
        W = _factorize_kernel(jnp.asarray(leaf), axes, r, min(width, limit))
        return LowRank(W.U, (scale * W.S).astype(W.S.dtype), W.V)

    out = jax.tree_util.tree_map_with_path(one, params, is_leaf=is_lowrank)
    if seen and not chosen and (where is None or hasattr(where, "reasons")):
        raise ValueError(
            f"no kernel to factor at rank {rank}: factorize takes leaves named 'kernel' with min(m, n) >= rank, "
            f"and found {seen[:5]}; choose a smaller rank, or other leaves with where=lambda path, shape: ..."
        )
    return out


def densify(params: Any) -> Any:
    """Replaces every `LowRank` node by its dense kernel; the inverse of `factorize` up to truncation.

    Args:
      params: a tree with `LowRank` nodes.

    Returns:
      The tree with arrays of shape `batch + in + out` in their place.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> lro.densify({"kernel": lro.factorize(jnp.eye(3), 3)})["kernel"].shape
      (3, 3)
    """
    return jax.tree.map(lambda x: x.to_dense() if is_lowrank(x) else x, params, is_leaf=is_lowrank)


def lowrank_init(
    rank: Rank,
    base_init: Callable[..., jax.Array] | None = None,
    *,
    max_rank: Rank | None = None,
    axes: Axes | None = None,
) -> Callable[..., LowRank]:
    r"""A Flax-style initialiser that draws a `LowRank` kernel of the scale of a dense initialiser.

    The draw is :math:`W = c\,A B^\top` with Gaussian A (m x r) and B (n x r), orthonormalised, and c such
    that :math:`|W|_F` equals the norm of a draw of `base_init`. Activations and gradients then start at the
    variance of the dense layer; a truncated SVD of the dense draw would shrink it.

    Args:
      rank: int, fraction of `min(m, n)`, or callable of path (here `""`) and shape.
      base_init: dense initialiser that sets the scale; default LeCun normal, the default of `nn.Dense`. Only the
        norm of its draw is used; under `jit` XLA fuses draw and norm, so the dense kernel is not stored.
      max_rank: width of the factors, default `rank`.
      axes: split of the axes of the kernel; default: two axes are (in, out), more are a convolution's
        (everything but the last axis is input).

    Returns:
      Callable `(key, shape, dtype) -> LowRank`.

    Raises:
      ValueError: on call, if the rank exceeds `min(m, n)`.

    Example:
      >>> import jax, lowrank_optax as lro
      >>> W = lro.lowrank_init(4)(jax.random.key(0), (32, 16))
      >>> W.shape, W.width
      ((32, 16), 4)
    """
    base = jax.nn.initializers.lecun_normal() if base_init is None else base_init

    def init(key: jax.Array, shape: Any, dtype: Any = jnp.float32) -> LowRank:
        shape = tuple(shape)
        split = Axes(0, len(shape) - 1) if axes is None else axes
        m, n = _matrix_shape(shape, split)
        r = rank_number(rank, "", shape, min(m, n))
        width = r if max_rank is None else min(rank_number(max_rank, "", shape, min(m, n)), m, n)
        if r > min(m, n) or width < r:
            raise ValueError(
                f"rank {r} (width {width}) does not fit a kernel of shape {shape} with min(m, n) = {min(m, n)}"
            )
        work, batch = linalg.working_dtype(jnp.empty((), dtype)), shape[: split.batch]
        base_key, u_key, v_key = jax.random.split(key, 3)
        dense = base(base_key, shape, work).reshape(*batch, 1, -1)
        a, b = (jax.random.normal(k, (*batch, size, width), work) for k, size in ((u_key, m), (v_key, n)))
        W = map_matrices(_product_of_norm, a, b, map_matrices(linalg.norm, dense), rank=r)
        return _with_axes(W, shape, split).astype(dtype)

    return init


def _product_of_norm(a: jax.Array, b: jax.Array, norm: jax.Array, rank: int) -> LowRank:
    """A B^T, cut to `rank` and scaled to a norm."""
    (u, ru), (v, rv) = linalg.orthonormalize(a), linalg.orthonormalize(b)
    p, sigma, q = linalg.svd(ru @ rv.T)
    sigma = jnp.where(linalg.rank_mask(rank, sigma.shape[0]), sigma, 0.0)
    return _factors(u @ p, sigma * norm / jnp.sqrt(jnp.sum(sigma**2)), v @ q, rank)


def orthonormalize(params: Any) -> Any:
    """Brings factors that are not orthonormal into the canonical gauge without changing W.

    Use it for kernels built by hand, averaged leaf by leaf, or loaded from elsewhere. Singular values of the size of
    rounding become exact zeros, so that `ranks` does not count them.

    Args:
      params: a tree with `LowRank` nodes.

    Returns:
      The tree with orthonormal U and V and diagonal, non-negative, descending S.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> W = lro.LowRank(2 * jnp.eye(4, 2), jnp.eye(2), jnp.eye(3, 2))
      >>> lro.orthonormalize(W).S.diagonal().tolist()
      [2.0, 2.0]
    """

    return jax.tree.map(lambda W: map_kernel(_orthonormalized, W) if is_lowrank(W) else W, params, is_leaf=is_lowrank)


def _orthonormalized(W: LowRank) -> LowRank:
    (u, ru), (v, rv) = linalg.orthonormalize(W.U), linalg.orthonormalize(W.V)
    p, sigma, q = mf.gauge(ru @ W.S @ rv.T)
    return LowRank(u @ p, linalg.diagonal(sigma), v @ q)
