"""Einsum of an activation and a factored kernel, and the axes of a kernel that an equation tells."""

from __future__ import annotations

import functools
import math
import string
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax.axes import Axes
from lowrank_optax.blocks import BlockLowRank
from lowrank_optax.lowrank import absorb, contract, is_lowrank
from lowrank_optax.product import Product, axes_of, is_composed


class _Equation(NamedTuple):
    """The letters of `x,w->y`; W's letters in order: stacked axes, then inputs and outputs or outputs and inputs."""

    x: str
    w: str
    y: str
    stacked: str
    inputs: str
    outputs: str

    @property
    def transposed(self) -> bool:
        """True where W maps its last axes to those before."""
        return self.w == self.stacked + self.outputs + self.inputs

    @property
    def axes(self) -> Axes:
        return Axes(len(self.stacked), len(self.outputs if self.transposed else self.inputs))


def _parse(equation: str, x_ndim: int | None = None) -> _Equation:
    """Raises ValueError, with the reason, for an equation whose W is no (stacked) matrix in its order of axes."""
    text = equation.replace(" ", "")
    operands, arrow, y = text.partition("->")
    x, comma, w = operands.partition(",")
    if not arrow or not comma or "," in w:
        raise ValueError(f"{equation!r} is not of the form 'x,w->y'")
    if x_ndim is not None and "..." in x:  # axes without letters, which come through unchanged
        free = iter(c for c in string.ascii_letters if c not in text)
        letters = "".join(next(free) for _ in range(x_ndim - len(x.replace("...", ""))))
        x, y = x.replace("...", letters), y.replace("...", letters)
    if "..." in w:
        raise ValueError(f"the axes of W in {equation!r} need a letter each")
    if any(len(set(term)) < len(term) for term in (x.replace("...", ""), w, y.replace("...", ""))):
        raise ValueError(f"{equation!r} repeats a letter within one operand")
    if any(c not in x + y for c in w) or any(c not in w + y for c in x if c != "."):
        raise ValueError(f"{equation!r} sums over an axis of one operand alone")
    inputs = "".join(c for c in w if c in x and c not in y)
    start = w.find(inputs) if inputs else -1
    stacked, outputs = w[: max(start, 0)], w[start + len(inputs) :]
    if start > 0 and not outputs:  # as in `x,oi->y`: letters in front that x has too stack kernels
        outputs = w[:start].lstrip(x)
        stacked = w[: start - len(outputs)]
    if start < 0 or not outputs or any(c in x for c in outputs):
        raise ValueError(
            f"W in {equation!r} is no matrix of inputs and outputs: its axes must be stacked ones, then all axes that "
            "are summed over, then the others, or the last two the other way round"
        )
    return _Equation(x, w, y, stacked, inputs, outputs)


def output_sizes(equation: str, x_ndim: int, w_shape: tuple[int, ...]) -> tuple[int | None, ...]:
    """For each axis of y its size if it is an axis of W, else None: the axes of a bias."""
    e = _parse(equation, x_ndim)
    size = dict(zip(e.w, w_shape, strict=True))
    return tuple(size.get(c) for c in e.y)


def einsum_axes(equation: str) -> Axes:
    """The axes of the kernel W in `x,w->y`: summed letters are inputs, letters behind them outputs.

    Letters in front of the inputs stack kernels: letters that x has too, such as experts, and letters of y alone,
    such as the heads in `BTD,NDH->BTNH`, one D x H kernel each. Where W ends with its inputs, as in `BTF,NHF->BTNH`,
    the letters in front of them are outputs of one kernel, and only those that x has too stack kernels. It is stored
    transposed, so that the input axes of the factored kernel, which come first, are the letters of its outputs.

    Args:
      equation: an explicit equation of two operands, W the second.

    Returns:
      The axes as W is stored, for the `where` of `factorize`.

    Raises:
      ValueError: where W is no such matrix.

    Example:
      >>> import lowrank_optax as lro
      >>> lro.einsum_axes("...NH,NHD->...D"), lro.einsum_axes("BTD,NDH->BTNH")
      (Axes(batch=0, inputs=2), Axes(batch=1, inputs=1))
      >>> lro.einsum_axes("BTF,NHF->BTNH")
      Axes(batch=0, inputs=2)
    """
    return _parse(equation).axes


def einsum(
    equation: str, x: jax.Array, W: Any, *, precision: Any = None, preferred_element_type: Any = None, **kwargs: Any
) -> jax.Array:
    r"""`jnp.einsum` whose second operand may be a `LowRank` kernel.

    .. math:: y = ((x\, U)\, S)\, V^\top

    over the letters of the equation. No intermediate is larger than one activation of width r for every stacked
    kernel, see `dot_general`.

    Args:
      equation: `x,w->y`, explicit; x may have an ellipsis.
      x: the activation.
      W: the kernel, with the axes of `einsum_axes(equation)`, or one of `adapters.attach`; anything else goes to
        `jnp.einsum` unchanged.
      precision: passed to each product.
      preferred_element_type: passed to each product.
      **kwargs: passed to the last product, e.g. `out_sharding`.

    Returns:
      The array y.

    Raises:
      ValueError: for an equation that no factored kernel can have, or a kernel with other axes.

    Example:
      >>> import jax.numpy as jnp, lowrank_optax as lro
      >>> equation = "BTD,NDH->BTNH"
      >>> W = lro.factorize(jnp.ones((2, 6, 4)), 3, where=lambda path, shape: lro.einsum_axes(equation))
      >>> lro.einsum(equation, jnp.ones((1, 5, 6)), W).shape
      (1, 5, 2, 4)
    """
    options = dict(precision=precision, preferred_element_type=preferred_element_type)
    if is_composed(W):
        return W.through(product(equation, x, lambda K: einsum(equation, x, K, **options, **kwargs)))
    if not is_lowrank(W):
        return jnp.einsum(equation, x, W, **options, **kwargs)
    e = _parse(equation, jnp.ndim(x))
    found = axes_of(W)
    if found != e.axes or len(e.w) != W.ndim or len(e.x) != jnp.ndim(x):
        raise ValueError(
            f"{equation!r} needs a kernel of {len(e.w)} axes with {e.axes} and an activation of {len(e.x)} axes, got a "
            f"kernel of shape {W.shape} with {found} and an activation of {jnp.ndim(x)} axes: factorize with "
            f"where=lambda path, shape: lro.einsum_axes({equation!r})"
        )
    W = W.T if e.transposed else W
    if isinstance(W, BlockLowRank):
        return _with_grid(e, x, W, options, kwargs.get("out_sharding"))
    size = dict(zip(e.x, jnp.shape(x), strict=True))
    rows = math.prod(size[c] for c in e.x if c not in e.inputs + e.stacked)
    U, S, V = absorb(W, rows, **options)
    free = iter(c for c in string.ascii_letters if c not in e.x + e.y + e.stacked + e.outputs)
    r, s = next(free), next(free)
    letters, z = _product(e.x, x, e.stacked + e.inputs + r, U, e.inputs, **options)
    if S is not None:
        letters, z = _product(letters, z, e.stacked + r + s, S, r, **options)
        r = s
    order = [c for c in letters if c != r]
    in_order = "".join([*order, *e.outputs]) == e.y
    letters, y = _product(letters, z, e.stacked + e.outputs + r, V, r, **options, **(kwargs if in_order else {}))
    return _in_order(y, letters, e.y, kwargs.get("out_sharding"))


def _in_order(y: jax.Array, letters: str, wanted: str, spec: Any) -> jax.Array:
    """The axes of an array in the wanted order; a product in this order has its sharding already."""
    if letters == wanted:
        return y
    y = jnp.transpose(y, [letters.index(c) for c in wanted])
    return y if spec is None else jax.sharding.reshard(y, spec)


def _with_grid(e: _Equation, x: jax.Array, W: BlockLowRank, options: dict[str, Any], spec: Any) -> jax.Array:
    """The product with a grid of blocks, whose stages are not letters of the equation."""
    rest = "".join(c for c in e.x if c not in e.inputs + e.stacked)

    def run(letters: str, stacked: str, x: jax.Array, W: BlockLowRank) -> jax.Array:
        if stacked:  # one kernel after the other; x has an axis for them, or all kernels share it
            axis = letters.find(stacked[0])
            inner = functools.partial(run, letters.replace(stacked[0], ""), stacked[1:])
            return jax.vmap(inner, in_axes=(None if axis < 0 else axis, 0))(x, W)
        return W.product(x, tuple(map(letters.index, e.inputs)), (), **options)

    return _in_order(run(e.x, e.stacked, x, W), e.stacked + rest + e.outputs, e.y, spec)


def product(equation: str, x: Any, times: Callable[[Any], jax.Array]) -> Product:
    """A product `times` with W in an equation, whose outputs a composed kernel may scale."""
    e = _parse(equation, jnp.ndim(x))

    def columns(c: jax.Array, ndim: int) -> jax.Array:
        if e.transposed:
            raise ValueError(f"W in {equation!r} is stored transposed, and its columns are no outputs of the layer")
        letters = e.stacked + e.outputs
        shown = [letter for letter in e.y if letter in letters]
        c = jnp.transpose(c, [letters.index(letter) for letter in shown])
        sizes = dict(zip(shown, c.shape, strict=True))
        return c.reshape([sizes.get(letter, 1) for letter in e.y])

    return Product(times, columns)


def _product(a: str, x: jax.Array, b: str, factor: jax.Array, summed: str, **options: Any) -> tuple[str, jax.Array]:
    """The product of x and a factor over letters, and the letters of its axes: shared ones, x's, others."""
    shared = "".join(c for c in a if c in b and c not in summed)
    rest = lambda term: "".join(c for c in term if c not in shared + summed)  # noqa: E731
    at = lambda term, letters: tuple(term.index(c) for c in letters)  # noqa: E731
    numbers = ((at(a, summed), at(b, summed)), (at(a, shared), at(b, shared)))
    return shared + rest(a) + rest(b), contract(x, factor, numbers, **options)
