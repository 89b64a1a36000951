"""The equations of a traced program, without its text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

DECOMPOSITIONS = {"svd", "cholesky", "qr", "householder_product", "geqrf", "triangular_solve", "eigh"}


def equations(program: Any) -> Iterator[Any]:
    """The equations of a program and of all programs inside it."""
    for equation in program.eqns:
        yield equation
        for value in jax.tree.leaves(tuple(equation.params.values()), is_leaf=_is_program):
            if _is_program(value):
                yield from equations(value.jaxpr if isinstance(value, ClosedJaxpr) else value)


def _is_program(x: Any) -> bool:
    return isinstance(x, Jaxpr | ClosedJaxpr)


def traced(f: Callable[..., Any], *args: Any) -> list[Any]:
    """The equations of a function."""
    return list(equations(jax.make_jaxpr(f)(*args).jaxpr))


def named(found: list[Any], *names: str) -> list[Any]:
    """The equations of these primitives."""
    return [e for e in found if e.primitive.name in names]
