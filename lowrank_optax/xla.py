"""How a step is laid out for the compiler: what is made once, what runs rarely, and what goes together."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.xla_metadata import set_xla_metadata


def together(f: Callable[..., Any], *columns: Sequence[Any]) -> list[Any]:
    """`[f(*row) for row in zip(*columns)]`, where rows of equal matrices are one call on a batch.

    A small matrix costs the compiler as much as a large one: all decompositions of one size are one piece of code.
    They go together along the first axis, on which the members of a group lie; other batch axes may be sharded. What
    has no batch axis is one member.

    Args:
      f: function of matrices with any number of leading batch axes, which its results have too.
      *columns: as many arrays `(n, batch..., a, b)` or `(a, b)`, or trees of them, in each as there are calls.

    Example:
      >>> import jax.numpy as jnp
      >>> eyes = [jnp.stack([jnp.eye(2)] * 2), jnp.eye(2)]
      >>> [x.shape for x in together(jnp.linalg.inv, eyes)]
      [(2, 2, 2), (2, 2)]
    """

    def batch(members: list[Any]) -> list[Any]:
        return unjoin(f(*join(members)), members)

    rows = list(zip(*columns, strict=True))
    return in_groups(batch, rows, rows)


def in_groups(f: Callable[[list[Any]], list[Any]], rows: Sequence[Any], trees: Sequence[Any]) -> list[Any]:
    """The results, in the order of the rows, of `f(members)` for each group of rows whose trees are `alike`."""
    results: list[Any] = [None] * len(rows)
    for indices in alike(trees):
        for i, y in zip(indices, f([rows[i] for i in indices]), strict=True):
            results[i] = y
    return results


def members_of(x: jax.Array) -> tuple[int, ...]:
    """The length of the axis along which matrices go together; empty for a single matrix."""
    return x.shape[:1] if x.ndim > 2 else ()


def alike(trees: Sequence[Any]) -> list[list[int]]:
    """The positions of trees in groups that `join` takes: of equal shapes but for the axis of members."""
    groups: dict[Any, list[int]] = {}
    for i, tree in enumerate(trees):
        key = tuple((x.shape[len(members_of(x)) :], x.dtype) for x in jax.tree.leaves(tree))
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def join(trees: Sequence[Any]) -> Any:
    """One tree from equal trees of arrays, after each other along their first axis; one alone stays as it is."""
    if len(trees) == 1:
        return trees[0]
    return jax.tree.map(lambda *xs: jnp.concatenate([x if members_of(x) else x[None] for x in xs]), *trees)


def unjoin(tree: Any, members: Sequence[Any]) -> list[Any]:
    """The inverse of `join` for a tree that was made from the joined `members`, which may differ from them."""
    if len(members) == 1:
        return [tree]
    (parts,) = apart([(tree, [members_of(jax.tree.leaves(member)[0]) for member in members])])
    return parts


def apart(joined: Sequence[tuple[Any, Sequence[tuple[int, ...]]]]) -> list[list[Any]]:
    """Of each `(tree, batches)`, arrays `(N, any...)`, the trees of `(batch..., any...)` that lie in it in order."""
    if not joined:
        return []
    (first, *others), batches = zip(*joined, strict=True)
    starts = [list(itertools.accumulate(map(math.prod, each[:-1]), initial=0)) for each in batches]
    # Positions from behind a barrier, on accelerators XLA's own, are values, not constants: all slices of one shape are
    # the same compiled code. They share it with an array, because a call on constants alone is one too.
    # Without a sign they need no code that counts negative ones from the end.
    numbers = {start: jnp.uint32(start) for start in sorted({start for each in starts for start in each})}
    first, positions = barrier((first, numbers), elsewhere=lambda x: (x[0], jax.lax.optimization_barrier(x[1])))

    def part(x: jax.Array, start: int, batch: tuple[int, ...]) -> jax.Array:
        if math.prod(batch) != x.shape[0]:
            at = [positions[start]] + [jnp.zeros_like(positions[start])] * (x.ndim - 1)
            x = jax.lax.dynamic_slice(x, at, (math.prod(batch), *x.shape[1:]))
        return jax.lax.reshape(x, (*batch, *x.shape[1:]))

    return [
        [jax.tree.map(functools.partial(part, start=i, batch=batch), tree) for i, batch in zip(at, each, strict=True)]
        for tree, at, each in zip([first, *map(barrier, others)], starts, batches, strict=True)
    ]


def apply_if(when: jax.Array, f: Callable[[Any], Any], x: Any) -> Any:
    """`f(x)` where `when`, else x, as a loop of one pass or none: a branch that returns x would copy it."""

    def body(carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        return jnp.zeros_like(carry[0]), f(carry[1])

    with jax.named_scope("apply_if"):  # in compiled programs tells this from a loop that runs
        return jax.lax.while_loop(lambda carry: carry[0], body, (when, x))[1]


def barrier(tree: Any, elsewhere: Callable[[Any], Any] = lambda tree: tree) -> Any:
    """The same arrays; on CPU code that uses them is not fused with code that makes them.

    XLA on CPU fuses what makes a small array into every loop over a large one that reads it, and a slice into every
    user of it, together with what made the array it is taken from. Masks are then made again at every element, and
    the position of a slice is a constant, so that code that is the same for all kernels is compiled once for each. Its
    own barriers are gone before it fuses; a call that is not inlined stays. On accelerators it is `elsewhere(tree)`.
    """

    def call(tree: Any) -> Any:
        with set_xla_metadata(inlineable="false"):
            return _same(tree)

    if not jax.tree.leaves(tree):
        return tree
    return jax.lax.platform_dependent(tree, cpu=call, default=elsewhere)


@jax.jit
def _same(tree: Any) -> Any:
    return tree
