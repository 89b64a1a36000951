"""lowrank_optax.linen.path_mask: regular expressions written for dense parameters mean the same on factored ones."""

from __future__ import annotations

import re
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import lowrank_optax as lro


def params() -> dict[str, Any]:
    kernel = lambda seed: lro.lowrank_init(2)(jax.random.key(seed), (6, 5))  # noqa: E731
    return {
        "encoder": {"dense": {"kernel": kernel(0), "bias": jnp.ones(5)}, "norm": {"scale": jnp.ones(5)}},
        "head": {"kernel": jnp.ones((5, 3)), "bias": jnp.ones(3)},
        "layers": [{"w": kernel(1)}, {"w": kernel(2)}],
    }


PATTERNS = {
    r".*/kernel$": {"encoder/dense/kernel", "head/kernel"},
    r"kernel$": {"encoder/dense/kernel", "head/kernel"},
    r"^encoder/.*kernel": {"encoder/dense/kernel"},
    r"/(kernel|w)$": {"encoder/dense/kernel", "head/kernel", "layers/0/w", "layers/1/w"},
    r"layers/1/": {"layers/1/w"},
    r"^(?!.*(bias|scale)$)": {"encoder/dense/kernel", "head/kernel", "layers/0/w", "layers/1/w"},
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_finds_the_same_kernels_whether_dense_or_factored(pattern: str) -> None:
    for tree in (params(), lro.densify(params()), {"params": params()}):
        if pattern.startswith("^e") and "params" in tree:
            continue
        mask = lro.linen.path_mask(pattern)(tree)
        found = {
            "/".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in p)
            for p, yes in jax.tree.leaves_with_path(mask)
            if yes
        }
        assert {name.removeprefix("params/") for name in found} == PATTERNS[pattern]


@pytest.mark.parametrize("pattern", [r".*/kernel/U$", r"kernal$", r"^dense/"])
@pytest.mark.parametrize("jit", [False, True])
def test_a_pattern_that_finds_nothing_warns_with_paths(pattern: str, jit: bool) -> None:
    tx = optax.masked(optax.add_decayed_weights(0.1), lro.linen.path_mask(pattern))
    with pytest.warns(UserWarning, match=rf"{re.escape(repr(pattern))}\) finds none of 7 leaves.*encoder/dense/bias"):
        (jax.jit(tx.init) if jit else tx.init)(params())


def test_no_warning_for_a_predicate_an_empty_tree_or_leaves_that_another_mask_hides() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not any(jax.tree.leaves(lro.linen.path_mask(lambda path: False)(params())))
        assert lro.linen.path_mask("kernel")({}) == {}
        hidden = optax.masked(
            optax.identity(), lambda p: jax.tree.map(lambda x: x.ndim == 1, p, is_leaf=lro.is_lowrank)
        )
        decayed = optax.masked(optax.add_decayed_weights(0.1), lro.linen.path_mask("kernel$"))
        dense = lro.densify(params())
        tx = optax.masked(optax.chain(hidden, decayed), jax.tree.map(lambda x: x.ndim == 1, dense))
        tx.update(dense, tx.init(dense), dense)


@pytest.mark.parametrize(
    "make",
    [
        lambda mask: lro.lowrank_adamw(0.1, weight_decay=0.5, mask=mask),
        lambda mask: lro.fixed_rank(
            optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.5, mask=mask), optax.sgd(0.1))
        ),
        lambda mask: optax.partition({True: lro.lowrank_adam(0.1), False: optax.set_to_zero()}, mask),
        lambda mask: optax.multi_transform({True: lro.lowrank_adam(0.1), False: optax.sgd(0.1)}, mask),
    ],
    ids=["lowrank_adamw", "fixed_rank", "partition", "multi_transform"],
)
def test_optimizers_take_the_mask_without_a_warning(make: Any) -> None:
    tree = params()
    tx = make(lro.linen.path_mask(r"^encoder/.*/kernel$"))
    state = tx.init(tree)
    updates, _ = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, tree), state, tree)
    moved = jax.tree.map(
        lambda u: float(jnp.abs(u.to_dense() if lro.is_lowrank(u) else u).max()) > 1e-3, updates, is_leaf=lro.is_lowrank
    )
    assert not moved["layers"][0]["w"] and not moved["head"]["kernel"]
