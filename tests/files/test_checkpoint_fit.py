"""Which targets fit a checkpoint: widths of kernels and their moments, geometries, parts; and what a misfit says."""

import pathlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import lowrank_optax as lro

pytestmark = pytest.mark.usefixtures("settings_of_a_user")


def params_of(width: int) -> dict[str, Any]:
    """Bias and a dense leaf of the sizes that widths have."""
    W = jnp.asarray(np.random.default_rng(0).standard_normal((20, 24)), jnp.float32)
    return {
        "dense": {"kernel": lro.factorize(W, 4, max_rank=width), "bias": jnp.ones(24)},
        "head": {"kernel": jnp.ones((8, 8))},
    }


GEOMETRIES = {"balanced": lro.Balanced(), "tangent": lro.Tangent(), "coefficient": lro.Coefficient()}
OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    **{name: lambda g=g: lro.lowrank_adam(1e-2, geometry=g) for name, g in GEOMETRIES.items()},
    "accumulated": lambda: optax.MultiSteps(lro.lowrank_adam(1e-2), 2),
    "chain": lambda: optax.chain(optax.clip(1.0), lro.fixed_rank(optax.sgd(0.1, momentum=0.9))),
}


def state_of(tx: optax.GradientTransformation, width: int) -> dict[str, Any]:
    params = params_of(width)
    return {"params": params, "opt_state": tx.init(params), "average": params}


@pytest.fixture
def folder(tmp_path: pathlib.Path):
    """Saves a tree as step 3, and restores into others with `folder(like, **options)`."""
    manager = ocp.CheckpointManager(tmp_path)

    def restore(like: Any, **options: Any) -> Any:
        return lro.checkpoint.restore(manager, like, **options).tree

    def save(tree: Any) -> None:
        lro.checkpoint.save(manager, 3, tree)
        manager.wait_until_finished()

    restore.save = save
    yield restore
    manager.close()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_kernels_and_their_moments_may_have_another_width(name: str, folder: Any) -> None:
    tx = OPTIMIZERS[name]()
    saved = state_of(tx, 8)
    folder.save(saved)
    for width in (16, 5):
        found = folder(state_of(tx, width))
        assert jax.tree.structure(found) == jax.tree.structure(saved)
        assert all(map(np.array_equal, jax.tree.leaves(found), jax.tree.leaves(saved)))


OTHERS: dict[str, Callable[[Any], Any]] = {  # of width 16 where 8 was saved, and one more leaf that has 16 for 8
    "bias": lambda s: {**s, "b": jnp.zeros(16)},
    "matrix": lambda s: {**s, "m": jnp.zeros((16, 16))},
    "dense leaf named as a kernel": lambda s: {**s, "head": {"kernel": jnp.zeros((16, 16))}},
    "rows": lambda s: {**s, "rows": lro.factorize(jnp.eye(16), 2, max_rank=16)},
}


@pytest.mark.parametrize("name", OTHERS)
def test_no_other_leaf_may(name: str, folder: Any) -> None:
    saved = {"kernel": lro.factorize(jnp.eye(20), 4, max_rank=8), "b": jnp.zeros(8), "m": jnp.zeros((8, 8))}
    saved |= {"head": {"kernel": jnp.zeros((8, 8))}, "rows": lro.factorize(jnp.eye(8), 2, max_rank=8)}
    folder.save(saved)
    wide = {**saved, "kernel": lro.factorize(jnp.eye(20), 4, max_rank=16)}
    folder(wide)
    leaf = {"bias": "b", "matrix": "m", "rows": "rows/U"}.get(name, "head/kernel")
    with pytest.raises(ValueError, match=rf"checkpoint 3 in [^:]*: {leaf} is float32 \(8.*\) in it, not float32 \(16"):
        folder(OTHERS[name](wide))


def test_a_moment_goes_with_its_own_kernel(folder: Any) -> None:
    """Two kernels of one shape: one went from 8 to 16, and only its moments may."""
    tx = lro.lowrank_adam(1e-2)
    both = lambda a, b: {k: lro.factorize(jnp.eye(20), 4, max_rank=w) for k, w in (("a", a), ("b", b))}  # noqa: E731
    folder.save({"params": both(8, 8), "opt_state": tx.init(both(8, 8))})
    folder({"params": both(16, 8), "opt_state": tx.init(both(16, 8))})
    message = r"opt_state/.*/mu/b has width 8 in it, not 16, and its kernel params/b has not"
    with pytest.raises(ValueError, match=message):
        folder({"params": both(16, 8), "opt_state": tx.init(both(16, 16))})


@pytest.mark.parametrize("mine", GEOMETRIES)
@pytest.mark.parametrize("other", GEOMETRIES)
def test_moments_of_another_geometry_are_named(mine: str, other: str, folder: Any) -> None:
    folder.save(state_of(OPTIMIZERS[other](), 8))
    if mine == other:
        return
    theirs, ours = (type(GEOMETRIES[name]).__name__ for name in (other, mine))
    message = (
        rf"checkpoint 3 .*/mu/dense/kernel/\w+ in it: it holds moments of lro\.{theirs}\(\) at .*, not of lro\.{ours}"
    )
    with pytest.raises(ValueError, match=message):
        folder(state_of(OPTIMIZERS[mine](), 8))


def test_a_misfit_names_several_leaves(folder: Any) -> None:
    folder.save({"a": jnp.zeros(2), "b": jnp.zeros(3), "c": jnp.int32(0), **{f"x{i}": jnp.zeros(1) for i in range(9)}})
    with pytest.raises(ValueError) as caught:
        folder({"a": jnp.zeros(4), "b": jnp.zeros(3, jnp.bfloat16), "c": jnp.int32(0), "d": jnp.zeros(1)})
    for part in (
        r"a is float32 (2,) in it, not float32 (4,)",
        r"b is float32 (3,) in it, not bfloat16 (3,)",
        "there is no d in it",
        "the target has no x0",
        "and 6 more",
        "partial=True",
    ):
        assert part in str(caught.value)


def test_a_misfit_that_orbax_finds_is_told_whole(folder: Any) -> None:
    """Its message goes over many lines, and the first ends in a colon."""
    folder.save({"a": jnp.zeros(2), "b": (jnp.zeros(1), jnp.zeros(1))})
    with pytest.raises(ValueError, match=r"(?s)checkpoint 3 .* does not fit the target.*:.*b") as caught:
        folder({"a": jnp.zeros(2), "b": {"0": jnp.zeros(1), "1": jnp.zeros(1)}})
    assert len(str(caught.value).splitlines()) > 1 and not str(caught.value).endswith(":")


# --- parts ------------------------------------------------------------------------------------------------------


def train_state(width: int = 8) -> TrainState:
    params = params_of(width)
    return TrainState.create(apply_fn=nn.Dense(1).apply, params=params, tx=optax.chain(lro.lowrank_adam(1e-2)))


@pytest.mark.parametrize("width", [8, 16])
def test_parameters_of_a_train_state(width: int, folder: Any) -> None:
    state = train_state()
    folder.save(state)
    wide = params_of(width)
    shapes = jax.eval_shape(lambda: wide)
    for like in (wide, shapes, {"dense": {"bias": wide["dense"]["bias"]}}):
        part = folder({"params": like}, partial=True)["params"]
        whole = state.params if "head" in like else {"dense": {"bias": state.params["dense"]["bias"]}}
        assert jax.tree.structure(part) == jax.tree.structure(whole)
        assert all(map(np.array_equal, jax.tree.leaves(part), jax.tree.leaves(whole)))
    opt_state = folder({"opt_state": state.opt_state}, partial=True)["opt_state"]
    assert jax.tree.structure(opt_state) == jax.tree.structure(state.opt_state)
    with pytest.raises(ValueError, match="partial=True"):
        folder({"params": wide})


def test_a_part_is_checked(folder: Any) -> None:
    folder.save(train_state())
    with pytest.raises(ValueError, match="there is no params/dense/scale in it"):
        folder({"params": {"dense": {"scale": jnp.zeros(1)}}}, partial=True)
    with pytest.raises(ValueError, match=r"params/dense/bias is float32 \(24,\) in it, not float32 \(8,\)"):
        folder({"params": {"dense": {"bias": jnp.zeros(8)}}}, partial=True)
    with pytest.raises(ValueError, match="needs `like`"):
        folder(None, partial=True)


def test_an_optimizer_state_alone_may_have_another_width(folder: Any) -> None:
    tx = lro.lowrank_adam(1e-2)
    folder.save(state_of(tx, 8))
    found = folder({"opt_state": tx.init(params_of(16))}, partial=True)["opt_state"]
    assert optax.tree.get(found, "mu")["dense"]["kernel"].A.shape == (20, 8)


def nnx_run(seed: int, geometry: Any, width: int = 3) -> tuple[nnx.Module, nnx.Optimizer]:
    net = nnx.Linear(6, 5, rngs=nnx.Rngs(seed))
    lro.nnx.factorize(net, 2, max_rank=width)
    return net, nnx.Optimizer(net, lro.lowrank_adam(1e-2, geometry=geometry), wrt=nnx.Param)


def test_the_model_of_an_nnx_run(folder: Any) -> None:
    net, optimizer = nnx_run(0, lro.Balanced())
    folder.save(nnx.state((net, optimizer)))
    other, _ = nnx_run(1, lro.Balanced())
    nnx.update((other,), folder(nnx.state((other,)), partial=True))
    x = jnp.ones((1, 6))
    assert np.array_equal(other(x), net(x))


@pytest.mark.parametrize("name", GEOMETRIES)
def test_widths_and_geometries_of_an_nnx_run(name: str, folder: Any) -> None:
    """Its moments are plain containers of variables."""
    run = nnx_run(0, GEOMETRIES[name])
    saved = nnx.state(run)
    folder.save(saved)
    found = folder(nnx.state(nnx_run(1, GEOMETRIES[name], width=5)))
    assert all(map(np.array_equal, jax.tree.leaves(found), jax.tree.leaves(saved)))
    for other in GEOMETRIES:
        if other != name:
            with pytest.raises(ValueError, match=rf"lro\.{type(GEOMETRIES[name]).__name__}\(\) at .*/mu/kernel"):
                folder(nnx.state(nnx_run(1, GEOMETRIES[other])))
    wide = nnx_run(1, GEOMETRIES[name], width=5)
    wide[0].bias.set_value(jnp.zeros(3))
    with pytest.raises(ValueError, match=r"bias/value is float32 \(5,\) in it, not float32 \(3,\)"):
        folder(nnx.state(wide))


def test_a_part_of_a_checkpoint_of_orbax_alone(tmp_path: pathlib.Path) -> None:
    with ocp.CheckpointManager(tmp_path) as manager:
        state = train_state()
        manager.save(1, args=ocp.args.StandardSave(state))
        part = lro.checkpoint.restore(manager, {"params": params_of(16), "step": 0}, partial=True).tree
        assert part["params"]["dense"]["kernel"].width == 8 and part["step"] == 0
