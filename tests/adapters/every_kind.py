"""Every kind with the settings and the rank that suit a kernel of 9 inputs and 18 outputs."""

import itertools
from typing import Any

import jax

import lowrank_optax as lro
from lowrank_optax.adapters.create import KINDS
from tests.models.linen_models import draw

ad = lro.adapters

VARIANTS = {
    "vblora": ad.variant("vblora", vectors=6, length=3),
    "gralora": ad.variant("gralora", k=3),
    "nola": ad.variant("nola", bases=4),
    "rosa": ad.variant("rosa", density=0.1),
    "magnitude over lowrank": ad.magnitude("lowrank"),
    "magnitude over vera": ad.magnitude("vera"),
}
RANKS = {"gralora": 3, "c3a": 3, "oft": 3, "oft_neumann": 3, "boft": 3, "randlora": 4}
NAMES = sorted({*KINDS, *VARIANTS})
# These have positions of entries, or banks, for kernels of one input and one output axis.
OF_MATRICES = ("shira", "fourier", "nola")


def start(name: str, params: Any, **options: Any) -> tuple[Any, Any]:
    """A base and its changes of a kind."""
    return ad.init(jax.random.key(0), params, RANKS.get(name, 2), kind=VARIANTS.get(name, name), **options)


def moved(delta: Any) -> Any:
    """Other values in the trained arrays."""
    seeds = itertools.count(7)
    one = lambda x: x + 0.3 * draw(x.shape, next(seeds))  # noqa: E731
    return jax.tree.map(lambda label, x: jax.tree.map(one, x) if label == "trained" else x, ad.labels(delta), delta)
