"""Partition specs, and the tests of two files in a process with eight devices."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import lowrank_optax as lro
from lowrank_optax.geometry import base
from tests import distributed as d


@pytest.mark.slow
def test_on_eight_devices():
    d.run_on_eight_devices(
        "tests/eight_devices.py",
        "tests/devices/kernels_on_eight_devices.py",
        "tests/devices/blocks_on_eight_devices.py",
    )


def kernel(inputs: tuple[int, ...], outputs: tuple[int, ...], batch: tuple[int, ...] = (), r: int = 2) -> lro.LowRank:
    shapes = ((*batch, *inputs, r), (*batch, r, r), (*batch, *outputs, r))
    return lro.LowRank(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))


@pytest.mark.parametrize(
    ("W", "dense", "expected"),
    [
        (kernel((8,), (6,)), P("x", "y"), (P("x"), P(), P("y"))),
        (kernel((8,), (6,)), P("x", "x"), (P("x"), P(), P("x"))),
        (kernel((8,), (6,)), P("x"), (P("x"), P(), P())),
        (kernel((8,), (6,)), P(("x", "y")), (P(("x", "y")), P(), P())),
        (kernel((8,), (6,)), None, (P(), P(), P())),
        (kernel((8,), (6,), (4,)), P("z", "x", "y"), (P("z", "x"), P("z"), P("z", "y"))),
        (kernel((8,), (6,), (4,)), P(None, None, "y"), (P(), P(), P(None, "y"))),
        (kernel((8,), (4, 2)), P("x", "y", None), (P("x"), P(), P("y"))),
        (kernel((3, 3, 8), (6,)), P(None, None, "x", "y"), (P(None, None, "x"), P(), P("y"))),
    ],
    ids=["two", "twice", "rows", "product", "none", "stacked", "stacked-columns", "attention", "convolution"],
)
def test_specs_of_a_kernel(W, dense, expected):
    """Rows of U lie as the inputs of W, rows of V as its outputs, stacked kernels as they are."""
    specs = lro.partition_specs({"kernel": W, "bias": W.S}, {"kernel": dense, "bias": P("x")})
    assert same(specs, {"kernel": lro.LowRank(*expected), "bias": P("x")})


def test_rules_see_paths_and_dense_shapes():
    seen = []

    def rule(path, shape):
        seen.append((path, shape))

    params = {"dense": {"kernel": kernel((8,), (3, 2), (4,)), "bias": jnp.zeros(3)}}
    lro.partition_specs(params, rule)
    assert seen == [("dense/bias", (3,)), ("dense/kernel", (4, 8, 3, 2))]


def test_specs_of_a_linen_model_are_those_of_the_dense_model():
    """`nn.get_partition_spec` of the dense model is a tree of dense specs."""
    model = nn.Dense(6, kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), ("x", "y")))
    boxed = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 8)))["params"]
    params = jax.eval_shape(lambda p: lro.factorize(nn.unbox(p), 2), boxed)
    specs = lro.partition_specs(params, nn.get_partition_spec(boxed))
    assert same(specs, {"kernel": lro.LowRank(P("x"), P(), P("y")), "bias": P()})


STACKED = {
    "layers": {"kernel": kernel((8,), (4, 2), (4,))},
    "head": {"kernel": kernel((8,), (6,)), "bias": kernel((6,), (6,)).S},
}
SPECS = {"layers": {"kernel": P("z", "x", "y")}, "head": {"kernel": P("x", "y"), "bias": P("y")}}

ROWS = (P("z", "x"), P("z"), P("z", "y")), (P("x"), P(), P("y"))  # of U, S and V: stacked kernels, and the head
STATES = {
    "coefficient": (
        lro.Coefficient(),
        [lro.geometry.Coefficients(S, (8, n)) for (_, S, _), n in zip(ROWS, (8, 6), strict=True)],
    ),
    "balanced": (lro.Balanced(), [lro.geometry.Pair(U, V) for U, _, V in ROWS]),
    "tangent": (lro.Tangent(), [lro.geometry.TangentVector(*factors) for factors in ROWS]),
}


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: tx(),
        lambda tx: optax.chain(optax.identity(), tx()),
        lambda tx: optax.apply_if_finite(tx(), 3),
        lambda tx: optax.partition({"a": tx(), "b": tx()}, {"layers": "a", "head": "b"}),
    ],
    ids=["plain", "chain", "apply_if_finite", "partition"],
)
def test_specs_of_states(name, wrap):
    """Moments are sharded like their parameters; one row axis stands for several; counters are replicated."""
    geometry, (stacked, head) = STATES[name]
    specs = lro.partition_specs(STACKED, SPECS)
    state = jax.eval_shape(wrap(lambda: lro.lowrank_adam(1e-3, geometry=geometry)).init, STACKED)
    found = lro.state_specs(state, STACKED, specs)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    for path, spec in jax.tree_util.tree_leaves_with_path(found, is_leaf=lro.geometry.is_coordinates):
        keys = [str(getattr(k, "key", getattr(k, "name", None))) for k in path]
        expected = P()
        if "mu" in keys or "nu" in keys:
            expected = stacked if "layers" in keys else P("y") if keys[-1] == "bias" else head
        elif {"aux", "info"} & set(keys) and "layers" in keys:
            expected = P("z")  # A rank for each of the stacked kernels.
        assert same(spec, expected), path


def same(a, b):
    """Equal nodes of specs."""
    leaves = [jax.tree.flatten(x) for x in (a, b)]
    return leaves[0] == leaves[1]


@pytest.mark.parametrize("geometry", [lro.Balanced(), lro.Tangent(), lro.Coefficient()], ids=lambda g: type(g).__name__)
def test_specs_of_states_of_nnx_are_those_of_the_state_itself(geometry):
    """`nnx.state` turns named tuples into mappings."""
    model = nnx.Linear(8, 6, rngs=nnx.Rngs(0))
    lro.nnx.factorize(model, rank=2)
    optimizer = nnx.Optimizer(model, lro.lowrank_adam(1e-3, geometry=geometry), wrt=nnx.Param)
    params = nnx.state(model, nnx.Param)
    specs = lro.partition_specs(params, lambda path, shape: P("x", "y") if len(shape) == 2 else P("y"))
    tree = nnx.to_pure_dict(params)
    own = lro.state_specs(lro.lowrank_adam(1e-3, geometry=geometry).init(tree), tree, nnx.to_pure_dict(specs))
    found = lro.state_specs(nnx.state(optimizer), params, specs)
    expected = optax.tree.get(own, "mu")["kernel"]
    moments = found["opt_state"]["inner_state"]["inner_state"][0]["mu"]["kernel"]
    assert all(spec == getattr(expected, name) for name, spec in nnx.to_pure_dict(moments).items())
    assert P("x") in jax.tree.leaves(expected) or isinstance(geometry, lro.Coefficient)


class Mine(NamedTuple):
    """Coordinates of a user, in an order of their own."""

    columns: Any
    core: Any
    rows: Any


class MyGeometry(lro.Tangent):
    def template(self, weight):
        return Mine(*map(jnp.zeros_like, (weight.V, weight.S, weight.U)))


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(base, "_COORDINATES", base.registered_coordinates())
    lro.geometry.register_coordinates(Mine, MyGeometry(), {"columns": "V", "core": "S", "rows": "U"})


def test_specs_of_coordinates_that_a_user_registered(registered):
    """Each field lies as the factor that it was said to mirror, in states and in those of nnx, which lose the class."""
    specs = lro.partition_specs(STACKED, SPECS)
    tx = lro.lowrank_adam(1e-3, geometry=MyGeometry())
    state = jax.eval_shape(tx.init, STACKED)
    found = lro.state_specs(state, STACKED, specs)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    for name in ("mu", "nu"):
        moments = optax.tree.get(found, name)
        for layer, (U, S, V) in zip(("layers", "head"), ROWS, strict=True):
            assert same(moments[layer]["kernel"], Mine(V, S, U))
    model = nnx.Linear(8, 6, rngs=nnx.Rngs(0))
    lro.nnx.factorize(model, rank=2)
    params = nnx.state(model, nnx.Param)
    specs = lro.partition_specs(params, lambda path, shape: P("x", "y") if len(shape) == 2 else P("y"))
    of_nnx = lro.state_specs(nnx.state(nnx.Optimizer(model, tx, wrt=nnx.Param)), params, specs)
    moments = of_nnx["opt_state"]["inner_state"]["inner_state"][0]["mu"]["kernel"]
    assert nnx.to_pure_dict(moments) == {"columns": P("y"), "core": P(), "rows": P("x")}


@pytest.mark.parametrize(
    ("mirrors", "message"),
    [
        ({"columns": "V", "core": "S", "rows": "W"}, r"Mine\.rows mirrors a factor of a kernel, U, S or V, got 'W'"),
        ({"A": "V"}, r"Mine\.A mirrors V, but Pair\.A mirrors U: choose another name"),
        ({"S": "U"}, r"Mine\.S mirrors U, but LowRank\.S mirrors S: choose another name"),
    ],
)
def test_a_name_means_one_factor_in_all_coordinates(mirrors, message):
    with pytest.raises(ValueError, match=message):
        lro.geometry.register_coordinates(Mine, MyGeometry(), mirrors)
    assert Mine not in base.registered_coordinates()


def test_specs_may_be_written_out_in_full():
    """As the types of arrays on an explicit mesh have them: the rank of a kernel is a scalar all the same."""
    params = {"a": kernel((8,), (6,))}
    specs = {"a": lro.LowRank(P("x", None), P(None, None), P(None, None))}
    state = jax.eval_shape(lro.lowrank_adam(1e-3, geometry=lro.Tangent()).init, params)
    found = lro.state_specs(state, params, specs)
    assert same(optax.tree.get(found, "mu"), {"a": lro.geometry.TangentVector(*jax.tree.leaves(specs))})
    assert all(len(spec) <= x.ndim for x, spec in zip(*map(jax.tree.leaves, (state, found)), strict=True))


def test_accumulated_gradients_lie_as_the_parameters():
    specs = lro.partition_specs(STACKED, SPECS)
    tx = optax.MultiSteps(lro.lowrank_adam(1e-3), 2)
    found = lro.state_specs(jax.eval_shape(tx.init, STACKED), STACKED, specs)
    assert same(found.acc_grads, specs)


def test_a_kernel_that_is_the_whole_tree():
    W = kernel((8,), (6,))
    state = jax.eval_shape(lro.lowrank_adam(1e-3, geometry=lro.Tangent()).init, W)
    found = lro.state_specs(state, W, lro.partition_specs(W, P("x", "y")))
    assert same(optax.tree.get(found, "mu"), lro.geometry.TangentVector(P("x"), P(), P("y")))
    assert optax.tree.get(found, "count") == P()


@pytest.mark.parametrize(
    ("dense", "message"),
    [
        ({"kernel": P("x", "y", "z")}, "more axes than its dense shape"),
        ({"kernel": "x"}, "must be a PartitionSpec"),
        ({"other": P()}, "structure of the parameters"),
    ],
)
def test_errors(dense, message):
    with pytest.raises(ValueError, match=message):
        lro.partition_specs({"kernel": kernel((8,), (6,))}, dense)
