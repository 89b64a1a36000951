"""A saved state in another optimizer or model: what fits is kept, and everything else is named."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import lowrank_optax as lro

pytestmark = pytest.mark.usefixtures("settings_of_a_user")


def params_of(seed: int, width: int = 4, classes: int = 3) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    kernel = lambda m, n: lro.factorize(draw(m, n), 3, max_rank=width)  # noqa: E731
    return {
        "a": {"kernel": kernel(8, 6), "bias": draw(6)},
        "head": {"kernel": kernel(6, classes + 5), "bias": draw(classes)},
    }


def state_of(tx: Any, seed: int, steps: int = 0, **sizes: int) -> dict[str, Any]:
    params = params_of(seed, **sizes)
    opt_state = tx.init(params)
    update = jax.jit(tx.update)
    for i in range(steps):
        grads = jax.tree.map(lambda x, i=i: jnp.full_like(x, 0.1 * (i + 1)), params)
        updates, opt_state = update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    return {"params": params, "opt_state": opt_state, "step": jnp.int32(steps)}


def same(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))


def without_target(tree: Any) -> Any:
    """As `restore` gives it without a target: NamedTuples are dicts, tuples lists."""

    def plain(x: Any) -> Any:
        if hasattr(x, "_asdict"):
            return {key: plain(value) for key, value in x._asdict().items()}
        if isinstance(x, dict):
            return {key: plain(value) for key, value in x.items()}
        return [plain(each) for each in x] if isinstance(x, list | tuple) else x

    return plain(tree)


ADAM = lro.lowrank_adam(1e-2)


@pytest.mark.parametrize("form", [lambda tree: tree, without_target])
def test_the_same_optimizer_keeps_everything(form: Any) -> None:
    saved = state_of(ADAM, 0, 3)
    adapted = lro.checkpoint.adapt(form(saved), state_of(ADAM, 1))
    same(adapted.tree, saved)
    assert not adapted.new and not adapted.dropped
    assert "params/a/kernel" in adapted.kept and "dropped: nothing" in str(adapted)


CHANGES = {
    "clipping before": optax.chain(optax.clip(1.0), ADAM),
    "schedule": lro.lowrank_adam(optax.linear_schedule(1e-2, 0.0, 10)),
    "decay": lro.lowrank_adamw(1e-2),
    "accumulation": optax.MultiSteps(ADAM, 2),
    "steps outside": optax.chain(ADAM, optax.add_noise(0.0, 0.0, key=jax.random.key(0))),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("back", [False, True])
def test_moments_are_found_in_another_chain(name: str, back: bool) -> None:
    """With the counter that belongs to them; and the other way round."""
    old, new = (CHANGES[name], ADAM) if back else (ADAM, CHANGES[name])
    saved, fresh = state_of(old, 0, 4), state_of(new, 1)
    adapted = lro.checkpoint.adapt(without_target(saved), fresh)
    same(adapted.tree["params"], saved["params"])
    for kind in (optax.ScaleByAdamState, lro.FixedRankState):
        mine, theirs = (node(tree["opt_state"], kind) for tree in (adapted.tree, saved))
        same(*((x.aux, x.info) if kind is lro.FixedRankState else x for x in (mine, theirs)))
    updates, _ = new.update(adapted.tree["params"], adapted.tree["opt_state"], adapted.tree["params"])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(updates))


def node(tree: Any, kind: type) -> Any:
    """The one node of a class."""
    (found,) = (x for x in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, kind)) if isinstance(x, kind))
    return found


GEOMETRIES = [lro.Balanced(), lro.Tangent(), lro.Coefficient()]


@pytest.mark.parametrize("new", GEOMETRIES)
@pytest.mark.parametrize("old", GEOMETRIES)
def test_moments_of_another_geometry_are_new(old: Any, new: Any) -> None:
    saved = state_of(lro.lowrank_adam(1e-2, geometry=old), 0, 3)
    fresh = state_of(lro.lowrank_adam(1e-2, geometry=new), 1)
    adapted = lro.checkpoint.adapt(saved, fresh)
    if old == new:
        assert not adapted.new
        return
    adam, fresh_adam, saved_adam = (node(tree, optax.ScaleByAdamState) for tree in (adapted.tree, fresh, saved))
    same(adam.mu["a"]["kernel"], fresh_adam.mu["a"]["kernel"])
    same(adam.mu["a"]["bias"], saved_adam.mu["a"]["bias"])
    same(adapted.tree["params"], saved["params"])
    (reason,) = {reason for name, reason in adapted.new.items() if name.endswith("mu/a/kernel")}
    assert f"lro.{type(old).__name__}()" in reason and f"lro.{type(new).__name__}()" in reason
    assert any(name.split("/")[-2] == "kernel" and "mu" in name for name in adapted.dropped)


def test_another_method_starts_its_counter_anew() -> None:
    params = {"kernel": params_of(0)["a"]["kernel"]}
    old, new = lro.lowrank_adam(1e-2), lro.lowrank_adam(1e-2, geometry=lro.Tangent())
    saved = {"params": params, "opt_state": old.init(params)}
    saved["opt_state"] = jax.tree.map(lambda x: x + 5 if x.dtype == jnp.int32 else x, saved["opt_state"])
    adapted = lro.checkpoint.adapt(saved, {"params": params, "opt_state": new.init(params)})
    (name,) = [
        name for name in adapted.new if name.endswith("count") and "adam" not in name and "notfinite" not in name
    ]
    assert adapted.new[name] == "the moments beside it are new"


def test_a_new_head_is_named_and_nothing_of_the_old_one_stays() -> None:
    """Its kernel has another shape; ranks, moments and reports that belong to it have not."""
    saved, fresh = state_of(ADAM, 0, 3), state_of(ADAM, 1, classes=4)
    adapted = lro.checkpoint.adapt(saved, fresh)
    same(adapted.tree["params"]["head"], fresh["params"]["head"])
    same(adapted.tree["params"]["a"], saved["params"]["a"])
    mine, theirs = (node(tree, lro.FixedRankState) for tree in (adapted.tree, fresh))
    same(mine.aux["head"]["kernel"], theirs.aux["head"]["kernel"])
    same(mine.info["head"]["kernel"], theirs.info["head"]["kernel"])
    assert adapted.new["params/head/bias"] == "params/head/bias is float32 (3,) in it, not float32 (4,)"
    assert sum("params/head/kernel is new" in reason for reason in adapted.new.values()) >= 3
    assert {"params/head/kernel/U", "params/head/bias"} < {*adapted.dropped}
    assert "new: params/head/bias (" in str(adapted)


def test_another_width_is_kept_with_its_moments() -> None:
    saved = state_of(ADAM, 0, 3)
    adapted = lro.checkpoint.adapt(saved, state_of(ADAM, 1, width=5))
    same(adapted.tree, saved)
    fresh = state_of(lro.lowrank_adam(1e-2, geometry=lro.Tangent()), 1, width=5)
    with pytest.raises(
        ValueError, match=r"params/a/kernel was saved at width 4, `like` has 5, and .*mu/a/kernel is new"
    ):
        lro.checkpoint.adapt(saved, fresh)


def test_moments_of_a_width_that_is_not_their_kernels() -> None:
    saved = state_of(ADAM, 0, 3)
    wide = state_of(ADAM, 0, 3, width=5)
    adapted = lro.checkpoint.adapt({**saved, "opt_state": wide["opt_state"]}, state_of(ADAM, 1))
    reasons = {name: reason for name, reason in adapted.new.items() if name.endswith("mu/a/kernel")}
    assert [*reasons.values()] == [f"{next(iter(reasons))} has width 5 in it, not the width of its kernel"]


def test_parameters_are_never_moved() -> None:
    """Positions in lists of layers are names."""
    layers = lambda n, seed: {"layers": [params_of(seed + i)["a"] for i in range(n)]}  # noqa: E731
    saved, like = layers(3, 0), {**layers(2, 9), "more": {"layers": [params_of(20)["a"]]}}
    adapted = lro.checkpoint.adapt(saved, like)
    same(adapted.tree, {"layers": saved["layers"][:2], "more": like["more"]})
    assert {*adapted.new} == {"more/layers/0/bias", "more/layers/0/kernel"}
    assert {name.rsplit("/", 2)[-2] for name in adapted.dropped} <= {"2", "kernel"}


def test_a_dense_leaf_that_is_called_as_a_new_kernel_is_kept() -> None:
    tx = lro.lowrank_adam(1e-2)
    dense = jnp.ones((4, 4))
    old, new = (
        {"a": {"kernel": params_of(0, classes=c)["head"]["kernel"]}, "b": {"kernel": dense * c}} for c in (3, 4)
    )
    saved, like = ({"params": p, "opt_state": tx.init(p)} for p in (old, new))
    adapted = lro.checkpoint.adapt(saved, like)
    assert np.array_equal(adapted.tree["params"]["b"]["kernel"], dense * 3)
    assert any(name.endswith("mu/b/kernel") for name in adapted.kept)
    assert any(name.endswith("mu/a/kernel") for name in adapted.new)


def test_forms_of_leaves() -> None:
    """A TrainState whose step is a Python number, NumPy, other devices' shardings, shapes without values."""
    params = params_of(0)
    state = TrainState.create(apply_fn=None, params=params, tx=ADAM)
    adapted = lro.checkpoint.adapt(without_target({"params": params, "step": jnp.int32(4)}), state)
    assert adapted.tree.step == 4 and isinstance(adapted.tree, TrainState)
    shapes = jax.eval_shape(lambda: {"a": jnp.ones(3), "b": jnp.ones(2)})
    assert np.array_equal(
        lro.checkpoint.adapt({"a": np.ones(3, np.float32), "b": jnp.zeros(2)}, shapes).tree["a"], np.ones(3)
    )
    with pytest.raises(ValueError, match=r"b is new \(there is no b in it\), and `like` has only its shape"):
        lro.checkpoint.adapt({"a": jnp.ones(3)}, shapes)
    assert lro.checkpoint.adapt({"a": jnp.ones(3, jnp.bfloat16)}, {"a": jnp.zeros(3)}).kept == ()
