"""Boxed linen parameters, and the tests of `boxes_on_eight_devices.py` in a process with devices."""

import functools
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax.core import FrozenDict, meta
from flax.training.train_state import TrainState
from jax.sharding import PartitionSpec as P

import lowrank_optax as lro
from tests import distributed as d

BOXES = {"partitioned": nn.with_partitioning, "logical": nn.with_logical_partitioning}
LECUN, ZEROS = nn.initializers.lecun_normal(), nn.initializers.zeros


@pytest.mark.slow
def test_on_eight_devices():
    d.run_on_eight_devices("tests/models/boxes_on_eight_devices.py")


@pytest.fixture(params=BOXES)
def boxed(request):
    return BOXES[request.param]


def dense(boxed: Any, **options: Any) -> nn.Module:
    return nn.Dense(6, kernel_init=boxed(LECUN, ("in", "out")), bias_init=boxed(ZEROS, ("out",)), **options)


def attention(boxed: Any) -> nn.Module:
    into, back = boxed(LECUN, ("embed", "heads", None)), boxed(LECUN, ("heads", None, "embed"))
    return nn.MultiHeadDotProductAttention(num_heads=2, use_bias=False, kernel_init=into, out_kernel_init=back)


class Layer(nn.Module):
    boxed: Any

    @nn.compact
    def __call__(self, x, _=None):
        init = self.boxed(LECUN, ("in", "out"))
        return x + nn.tanh(nn.Dense(8, kernel_init=init, use_bias=False, name="dense")(x)), None


class Stack(nn.Module):
    boxed: Any

    @nn.compact
    def __call__(self, x):
        axis = {nn.PARTITION_NAME: "layers"}
        options = dict(variable_axes={"params": 0}, split_rngs={"params": True}, length=3, metadata_params=axis)
        return nn.scan(Layer, **options)(self.boxed, name="layers")(x, None)[0]


# For each model: path of a kernel, the names of U, S and V, and those of both moments of it.
MODELS: dict[str, tuple[Any, str, tuple[Any, ...], tuple[Any, ...]]] = {
    "dense": (dense, "kernel", (("in", None), (None, None), ("out", None)), (("in", None), ("out", None))),
    "general": (
        lambda boxed: nn.DenseGeneral((4, 3), kernel_init=boxed(LECUN, ("in", "out", None)), use_bias=False),
        "kernel",
        (("in", None), (None, None), ("out", None, None)),
        (("in", None), ("out", None)),
    ),
    "conv": (
        lambda boxed: nn.Conv(6, (3,), kernel_init=boxed(LECUN, (None, "in", "out")), use_bias=False),
        "kernel",
        ((None, "in", None), (None, None), ("out", None)),
        (("in", None), ("out", None)),
    ),
    "attention": (
        attention,
        "out/kernel",
        (("heads", None, None), (None, None), ("embed", None)),
        (("heads", None), ("embed", None)),
    ),
    "scan": (
        Stack,
        "layers/dense/kernel",
        (("layers", "in", None), ("layers", None, None), ("layers", "out", None)),
        (("layers", "in", None), ("layers", "out", None)),
    ),
}
X = np.random.default_rng(0).standard_normal((2, 5, 8))


def at(tree: Any, path: str) -> Any:
    return functools.reduce(lambda node, key: node[key], path.split("/"), tree)


def factors(model: Any, **options: Any) -> Any:
    where = lro.linen.kernels(model, X)
    return lro.factorize(model.init(jax.random.key(0), X)["params"], 2, where=where, **options)


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, "partitioned") for name in MODELS), ("general", "logical"), ("scan", "logical")]
)
def test_factors_and_moments_have_the_names_of_their_axes(name, kind):
    """`nn.get_partition_spec` of the whole train state is the specs of the unboxed one."""
    make, path, expected, of_moments = MODELS[name]
    model, boxed = make(BOXES[kind]), {"partitioned": nn.Partitioned, "logical": nn.LogicallyPartitioned}[kind]

    def create() -> TrainState:
        return TrainState.create(apply_fn=model.apply, params=factors(model), tx=lro.lowrank_adam(1e-3))

    state = jax.eval_shape(create)
    W, mu = at(state.params, path), at(optax.tree.get(state.opt_state, "mu"), path)
    assert {type(x) for x in (W.U, W.S, W.V, *mu)} == {boxed}
    assert expected == (W.U.names, W.S.names, W.V.names) and of_moments == (mu.A.names, mu.B.names)

    dense_specs = nn.get_partition_spec(jax.eval_shape(model.init, jax.random.key(0), X)["params"])
    plain, specs = nn.unbox(state), lro.partition_specs(state.params, dense_specs)
    same_specs(specs, lro.partition_specs(plain.params, dense_specs))
    same_specs(specs, nn.get_partition_spec(state.params))
    if kind == "partitioned":
        for each in (state, plain):
            same_specs(lro.state_specs(each, plain.params, specs), nn.get_partition_spec(state))


def same_specs(a: Any, b: Any) -> None:
    """The same but for replicated axes at the end."""

    def one(x: P, y: P) -> None:
        n = max(len(x), len(y))
        assert (*x, *(None,) * (n - len(x))) == (*y, *(None,) * (n - len(y)))

    jax.tree.map(one, a, b)


@pytest.mark.parametrize("name", MODELS)
def test_models_run_on_boxed_factors(name):
    model = MODELS[name][0](nn.with_partitioning)
    params = factors(model)
    expected = model.apply({"params": lro.densify(params)}, X)
    np.testing.assert_allclose(lro.linen.apply(model)({"params": params}, X), expected, rtol=1e-5, atol=1e-6)  # float32
    with lro.linen.factored():
        np.testing.assert_array_equal(model.apply({"params": params}, X), model.apply({"params": nn.unbox(params)}, X))


CHAIN = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(), optax.scale(-0.02))
OPTIMIZERS = {
    "adam": lro.lowrank_adam(0.02),
    "adam tangent": lro.lowrank_adam(0.02, geometry=lro.Tangent()),
    "adamw coefficient": lro.lowrank_adamw(0.02, geometry=lro.Coefficient(rank=lro.tolerance(0.1))),
    "muon": optax.chain(lro.clip_by_tangent_norm(1.0), lro.lowrank_muon(0.02, adam_learning_rate=0.02)),
    "chain": optax.MultiSteps(lro.fixed_rank(CHAIN), 2),
    "pieces": optax.chain(lro.project_to_tangent(), optax.trace(0.0), optax.scale(-0.1), lro.retract()),
    "galerkin": lro.galerkin(optax.adam(0.02)),
    "masked": optax.masked(lro.lowrank_adam(0.02), lro.linen.path_mask("kernel$")),
}


def train_state(model: Any, params: Any, tx: Any) -> TrainState:
    state = TrainState.create(apply_fn=lro.linen.apply(model), params=params, tx=tx)
    return state.replace(step=jnp.zeros((), jnp.int32))


def train_step(state: TrainState) -> TrainState:
    loss = lambda params: jnp.mean((state.apply_fn({"params": params}, X) - 1) ** 2)  # noqa: E731
    return state.apply_gradients(grads=jax.grad(loss)(state.params))


@pytest.mark.parametrize(
    ("name", "optimizer", "kind"),
    [
        ("scan", "adam", "logical"),
        ("general", "muon", "partitioned"),
        *(("dense", name, "partitioned") for name in OPTIMIZERS),
    ],
)
def test_a_step_is_the_program_of_the_step_without_boxes(name, optimizer, kind):
    """Then its numbers are the same too, and only its trees need a look."""
    model, tx = MODELS[name][0](BOXES[kind]), OPTIMIZERS[optimizer]
    params = jax.eval_shape(lambda: factors(model, max_rank=4))
    create = functools.partial(train_state, model, tx=tx)
    state, plain = jax.eval_shape(create, params), jax.eval_shape(create, nn.unbox(params))
    new, old = jax.eval_shape(train_step, state), jax.eval_shape(train_step, plain)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert jax.tree.structure(nn.unbox(new)) == jax.tree.structure(old)
    for f, args in ((create, (params, nn.unbox(params))), (train_step, (state, plain))):
        ours, theirs = (re.sub(r"0x[0-9a-f]+", "", str(jax.make_jaxpr(f)(arg))) for arg in args)
        assert ours == theirs


@pytest.mark.parametrize(("name", "kind"), [("dense", "partitioned"), ("scan", "logical")])
def test_a_run_is_the_run_without_boxes(name, kind):
    model, tx = MODELS[name][0](BOXES[kind]), OPTIMIZERS["adam"]
    params, ends = factors(model, max_rank=4), []
    for start in (params, nn.unbox(params)):
        step, state = jax.jit(functools.partial(train_step)), train_state(model, start, tx)
        for _ in range(4):
            state = step(state)
        assert step._cache_size() == 1
        ends.append(state)
    state, plain = ends
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(x, y)
    assert jax.tree.structure(lro.diagnostics(state)) == jax.tree.structure(lro.diagnostics(plain))
    assert not np.array_equal(jax.tree.leaves(state.params)[0], jax.tree.leaves(params)[0])


def test_functions_of_trees_see_through_boxes():
    model = dense(nn.with_logical_partitioning)
    init = model.init(jax.random.key(0), X)["params"]
    params = lro.factorize(init, 2, max_rank=4)
    plain = nn.unbox(params)
    assert jax.tree.map(np.asarray, lro.ranks(params)) == {"kernel": 2}
    again = lro.densify(params)
    assert again["kernel"].names == ("in", "out") and jax.tree.structure(again) == jax.tree.structure(init)
    np.testing.assert_array_equal(again["kernel"].value, lro.densify(plain)["kernel"])
    twice = jax.tree.map(lambda x: x, params) | {"kernel": jax.tree.map(lambda x: 2 * x, params["kernel"])}
    for f in (lro.orthonormalize, lambda p: lro.incremental_update(p, params if p is twice else plain, 0.5)):
        ours, theirs = f(twice), f(nn.unbox(twice))
        assert jax.tree.structure(ours) == jax.tree.structure(params)
        jax.tree.map(np.testing.assert_array_equal, nn.unbox(ours), theirs)
    tx = lro.lowrank_adam(1e-3)
    small, state = lro.resize(params, tx.init(params))
    expected = lro.resize(plain, tx.init(plain))
    jax.tree.map(np.testing.assert_array_equal, nn.unbox((small, state)), expected)
    assert small["kernel"].U.names == ("in", None) and lro.buckets(params, 4)("kernel", (8, 6)) == 4
    frozen = lro.factorize(FrozenDict(init), 2)
    assert isinstance(frozen, FrozenDict) and frozen["kernel"].V.names == ("out", None)
    np.testing.assert_allclose(lro.tangent_norm(params, params), lro.tangent_norm(plain, plain))


def test_a_box_keeps_its_mesh_and_rules():
    rules = (("in", "x"),)
    init = nn.with_logical_partitioning(LECUN, ("in", "out"), rules=rules)
    W = lro.factorize(nn.Dense(6, kernel_init=init).init(jax.random.key(0), X)["params"], 2)["kernel"]
    assert W.U.rules == W.S.rules == W.V.rules == rules
    on_mesh = nn.logical_to_mesh(nn.get_partition_spec(W), rules)
    assert (P("x", None), P(None, None), P(None, None)) == (on_mesh.U, on_mesh.S, on_mesh.V)


def test_an_axis_of_a_moment_has_the_names_of_all_axes_it_joins():
    """A logical rule maps one name, so the first stands for all."""
    for boxed, expected in ((nn.with_partitioning, ("a", "b")), (nn.with_logical_partitioning, "a")):
        params = {"kernel": boxed(lambda: jnp.ones((4, 2, 3)), ("a", "b", "c"))()}
        params = lro.factorize(params, 2, where=lambda path, shape: lro.Axes(0, 2))
        mu = optax.tree.get(lro.lowrank_adam(1e-3).init(params), "mu")["kernel"]
        assert mu.A.names == (expected, None) and mu.B.names == ("c", None)


class Bare(meta.AxisMetadata):  # type: ignore[type-arg]
    """A box without names."""

    def __init__(self, value: Any) -> None:
        self.content = value

    def unbox(self) -> Any:
        return self.content

    def replace_boxed(self, val: Any) -> Any:
        return Bare(val)

    add_axis = remove_axis = lambda self, index, params: self


jax.tree_util.register_pytree_node(Bare, lambda box: ((box.content,), None), lambda _, children: Bare(*children))


def test_a_box_without_names_is_refused_around_a_kernel_only():
    with pytest.raises(TypeError, match="a Bare around a kernel has no names"):
        lro.factorize({"kernel": Bare(jnp.eye(4))}, 2)
    params = lro.factorize({"kernel": jnp.eye(4), "bias": Bare(jnp.ones(4))}, 2)
    assert isinstance(optax.tree.get(lro.lowrank_adam(1e-3).init(params), "mu")["bias"], Bare)


def test_drawn_factors_have_the_boxes_of_the_dense_initialiser(boxed):
    """Layers with a low rank, stock layers, and the other order, whose box names no factor."""
    init = boxed(LECUN, ("in", "out"))
    model = lro.linen.LowRankDense(6, 2, kernel_init=init, bias_init=boxed(ZEROS, ("out",)))
    params = model.init(jax.random.key(0), X)["params"]
    assert (params["kernel"].U.names, params["kernel"].V.names) == (("in", None), ("out", None))
    lro.linen.kernels(model, X)
    plain = lro.linen.LowRankDense(6, 2).init(jax.random.key(0), X)["params"]
    jax.tree.map(np.testing.assert_array_equal, nn.unbox(params), plain)
    assert model.apply({"params": params}, X).shape == (2, 5, 6)

    wrong = {"kernel": boxed(lro.lowrank_init(2), ("in", "out"))(jax.random.key(0), (8, 6))}
    with pytest.raises(TypeError, match=r"around a whole LowRank kernel.*factorize\(params, rank\)"):
        lro.lowrank_adam(1e-3).init(wrong)
    right = lro.factorize(wrong, 2)
    assert jax.tree.structure(right["kernel"]) == jax.tree.structure(params["kernel"])
    assert lro.densify(wrong)["kernel"].names == ("in", "out")


def test_a_wrong_split_of_boxed_layers_is_named():
    model = Stack(nn.with_partitioning)
    params = model.init(jax.random.key(0), X)["params"]
    params = lro.factorize(params, 2, where=lambda path, shape: lro.Axes(0, 2))
    with pytest.raises(TypeError, match=r"declares batch \(3,\), inputs \(8,\)"):
        lro.linen.apply(model)({"params": params}, X)


@pytest.mark.slow
def test_boxed_states_are_saved_and_restored(tmp_path):
    """Also at another width, and without a target."""
    model, tx = dense(nn.with_partitioning), lro.lowrank_adam(1e-3)
    state = {"params": factors(model, max_rank=4)}
    state["opt"] = tx.init(state["params"])
    narrow = {"params": factors(model)}
    narrow["opt"] = tx.init(narrow["params"])
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        lro.checkpoint.save(manager, 1, state)
        for like in (state, jax.eval_shape(lambda: state), narrow):
            _, again = lro.checkpoint.restore(manager, like)
            assert jax.tree.structure(again) == jax.tree.structure(state)
            jax.tree.map(np.testing.assert_array_equal, again, state)
        adapted = lro.checkpoint.adapt(again, state)
        assert not adapted.new and not adapted.dropped
        _, bare = lro.checkpoint.restore(manager)
        np.testing.assert_array_equal(bare["params"]["kernel"].U, state["params"]["kernel"].U.value)
