"""nnx on meshes: metadata of factored kernels, and the tests of `nnx_on_eight_devices.py` in a process with devices."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import lowrank_optax as lro
from tests import distributed as d


@pytest.mark.slow
def test_on_eight_devices():
    d.run_on_eight_devices("tests/models/nnx_on_eight_devices.py")


def with_metadata(**metadata):
    """A model whose variables are annotated without a mesh."""
    with nnx.use_eager_sharding(False):
        return nnx.Linear(8, 6, kernel_metadata=metadata, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("out_sharding", "expected"),
    [
        (("x", "y"), (P("x"), P(), P("y"))),
        (("x",), (P("x"), P(), P())),
        ((None, ("x", "y")), (P(), P(), P(("x", "y")))),
        (P("x", "y"), (P("x"), P(), P("y"))),
    ],
)
def test_factorize_keeps_the_sharding_of_the_dense_kernel(out_sharding, expected):
    model = with_metadata(out_sharding=out_sharding, mine=3)
    lro.nnx.factorize(model, 2)
    assert model.kernel.get_metadata("mine") == 3 and not model.kernel.has_metadata("out_sharding")
    specs = lro.nnx.get_partition_spec(nnx.state(model))
    found = specs["kernel"].get_value()
    assert expected == (found.U, found.S, found.V) and specs["bias"].get_value() == P()
    assert jax.tree.structure(specs, is_leaf=lambda x: isinstance(x, P)) == jax.tree.structure(nnx.state(model))
    # The rule of `partition_specs` gives the same.
    rule = lambda path, shape: P(*out_sharding) if path == "kernel" else P()  # noqa: E731
    by_rule = lro.partition_specs(nnx.state(model), rule)["kernel"].get_value()
    assert expected == (by_rule.U, by_rule.S, by_rule.V)


def test_no_sharding_means_replicated():
    model = with_metadata()
    lro.nnx.factorize(model, 2)
    found = lro.nnx.get_partition_spec(nnx.state(model))["kernel"].get_value()
    assert (P(), P(), P()) == (found.U, found.S, found.V)
    dense = with_metadata(out_sharding=("x", "y"))
    assert lro.nnx.get_partition_spec(nnx.state(dense)) == nnx.get_partition_spec(nnx.state(dense))


def test_stacked_layers_keep_the_axis_of_the_stack():
    axis = {nnx.PARTITION_NAME: "layers"}

    @nnx.split_rngs(splits=3)
    @nnx.vmap(transform_metadata=axis)
    def stack(rngs):
        return nnx.Linear(8, 8, kernel_metadata={"out_sharding": ("x", "y")}, rngs=rngs)

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry, transform_metadata=axis)
    def run(layer, x):
        return layer(x)

    with nnx.use_eager_sharding(False):
        model = stack(nnx.Rngs(0))
    expected = run(model, jnp.ones((2, 8)))
    lro.nnx.factorize(model, 8)
    for _ in range(2):
        found = lro.nnx.get_partition_spec(nnx.state(model))["kernel"].get_value()
        assert (P("layers", "x"), P("layers"), P("layers", "y")) == (found.U, found.S, found.V)
        assert jnp.allclose(run(model, jnp.ones((2, 8))), expected, atol=1e-4)


def test_factorize_on_an_explicit_mesh_of_one_device():
    """Types name axes of size 1, which decompositions refuse as they refuse others."""
    with jax.set_mesh(jax.make_mesh((1, 1), ("x", "y"))):
        model = with_metadata(out_sharding=("x", "y"))
        model.kernel.set_value(jax.sharding.reshard(model.kernel.get_value(), P("x", "y")))
        dense = model.kernel.get_value()
        lro.nnx.factorize(model, 6)
        W = model.kernel.get_value()
        assert (P("x", None), P("y", None)) == (W.U.sharding.spec, W.V.sharding.spec)
        assert jnp.allclose(W.to_dense(), dense, atol=1e-5) and lro.ranks(model)["kernel"] == 6
