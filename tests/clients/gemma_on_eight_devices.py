"""Gemma on an explicit mesh, from birth to a checkpoint on another mesh; `test_gemma_meshes.py` runs this file."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import NamedSharding, reshard
from jax.sharding import PartitionSpec as P

import lowrank_optax as lro

EMBED, HEADS, HEAD_DIM, HIDDEN, VOCAB, RANK, STEPS = 32, 4, 8, 64, 48, 4, 5
TOKENS = np.random.default_rng(0).integers(1, VOCAB, (8, 8)).astype(np.int32)
BATCH = P("fsdp")  # of activations: examples over `fsdp`, everything else whole
pytestmark = pytest.mark.usefixtures("settings_of_a_user")


def make_mesh(fsdp: int, tensor: int) -> Any:
    return jax.make_mesh((fsdp, tensor), ("fsdp", "tensor"))


def sharded(*axes: str | None) -> Any:
    return nnx.with_partitioning(nnx.initializers.normal(0.2), axes)


class Block(nnx.Module):
    """Attention and a gated feed-forward layer; heads and hidden units over `tensor`."""

    def __init__(self, *, rngs: nnx.Rngs):
        into, out = sharded("tensor", "fsdp", None), sharded("tensor", None, "fsdp")
        self.q_einsum, self.k_einsum, self.v_einsum = (
            nnx.Einsum("BTD,NDH->BTNH", (HEADS, EMBED, HEAD_DIM), kernel_init=into, rngs=rngs) for _ in range(3)
        )
        self.attn_vec_einsum = nnx.Einsum("BTNH,NHD->BTD", (HEADS, HEAD_DIM, EMBED), kernel_init=out, rngs=rngs)
        up, down = sharded("fsdp", "tensor"), sharded("tensor", "fsdp")
        self.gate_proj, self.up_proj = (
            nnx.Linear(EMBED, HIDDEN, use_bias=False, kernel_init=up, rngs=rngs) for _ in range(2)
        )
        self.down_proj = nnx.Linear(HIDDEN, EMBED, use_bias=False, kernel_init=down, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        heads, hidden = P("fsdp", None, "tensor"), P("fsdp", None, "tensor")
        q, k, v = (layer(x, out_sharding=heads) for layer in (self.q_einsum, self.k_einsum, self.v_einsum))
        scores = jnp.einsum("BTNH,BSNH->BNTS", q, k) * HEAD_DIM**-0.5
        scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -1e9)
        encoded = jnp.einsum("BNTS,BSNH->BTNH", jax.nn.softmax(scores), v)
        x = x + self.attn_vec_einsum(encoded, out_sharding=BATCH)
        h = nnx.gelu(self.gate_proj(x, out_sharding=hidden)) * self.up_proj(x, out_sharding=hidden)
        return x + self.down_proj(h, out_sharding=BATCH)


class Transformer(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.embedding = nnx.Param(sharded(None, "fsdp")(rngs.params(), (VOCAB, EMBED)))
        self.block = Block(rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        table = reshard(self.embedding[...], P())
        x = self.block(table.at[tokens].get(out_sharding=BATCH))
        return jnp.einsum("BTD,VD->BTV", x, table, out_sharding=BATCH)


@nnx.jit
def train_step(model: Transformer, optimizer: Any, tokens: jax.Array) -> jax.Array:
    def loss_fn(model: Transformer) -> jax.Array:
        logits = model(tokens)
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    return loss


@nnx.jit
def create() -> tuple[Transformer, Any]:
    model = Transformer(rngs=nnx.Rngs(0))
    lro.nnx.factorize(model, RANK)
    # With a larger eps than the default the step is a smooth function of gradients whose sums are in another order.
    return model, lro.nnx.Optimizer(model, lro.lowrank_adam(1e-2, eps=1e-3), wrt=nnx.Param)


def train(model: Transformer, optimizer: Any, mesh: Any, steps: int) -> list[float]:
    tokens = jax.device_put(TOKENS, NamedSharding(mesh, BATCH))
    return [float(train_step(model, optimizer, tokens)) for _ in range(steps)]


def assert_lie_as_the_dense_specs_say(model: Transformer, optimizer: Any, mesh: Any) -> None:
    """The parameters and the state of the optimizer, by the metadata of the model and by a rule."""
    params = nnx.state(model, nnx.Param)
    specs = lro.nnx.get_partition_spec(params)
    by_rule = lro.partition_specs(params, lambda path, shape: DENSE_SPECS[path])
    assert jax.tree.leaves(specs, is_leaf=is_spec) == jax.tree.leaves(by_rule, is_leaf=is_spec)
    state = nnx.state(optimizer.opt_state)
    pairs = [(params, specs), (state, lro.state_specs(state, params, specs))]
    for tree, wanted in pairs:
        for (path, x), spec in zip(
            jax.tree.leaves_with_path(tree), jax.tree.leaves(wanted, is_leaf=is_spec), strict=True
        ):
            name = jax.tree_util.keystr(path)
            assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim), (name, x.sharding.spec, spec)


def is_spec(x: Any) -> bool:
    return isinstance(x, P)


DENSE_SPECS = {
    "embedding": P(None, "fsdp"),
    **{f"block/{name}_einsum/kernel": P("tensor", "fsdp") for name in "qkv"},
    "block/attn_vec_einsum/kernel": P("tensor", None, "fsdp"),
    **{f"block/{name}_proj/kernel": P("fsdp", "tensor") for name in ("gate", "up")},
    "block/down_proj/kernel": P("tensor", "fsdp"),
}


def test_kernels_are_born_sharded_and_their_factors_lie_alike() -> None:
    mesh = make_mesh(2, 4)
    with jax.set_mesh(mesh):
        model = Transformer(rngs=nnx.Rngs(0))
        for path, spec in DENSE_SPECS.items():
            x: Any = model
            for name in path.split("/"):
                x = getattr(x, name)
            assert x.get_value().sharding.is_equivalent_to(NamedSharding(mesh, spec), x.get_value().ndim)
        expected = jax.device_get(nnx.jit(lambda model: model(TOKENS))(model))
        lro.nnx.factorize(model, 1.0)
        found = jax.device_get(nnx.jit(lambda model: model(TOKENS))(model))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert set(lro.nnx.kernels(model).reasons) == {"embedding"}
    assert len(lro.ranks(model)) == len(DENSE_SPECS) - 1


def test_a_run_goes_on_from_a_checkpoint_on_another_mesh(tmp_path: Any) -> None:
    alone = jax.make_mesh((1, 1), ("fsdp", "tensor"), devices=jax.devices()[:1])
    with jax.set_mesh(alone):
        expected = train(*create(), alone, 2 * STEPS)

    first, second = make_mesh(2, 4), make_mesh(4, 2)
    with ocp.CheckpointManager(tmp_path) as manager:
        with jax.set_mesh(first):
            model, optimizer = create()
            assert_lie_as_the_dense_specs_say(model, optimizer, first)
            losses = train(model, optimizer, first, STEPS)
            assert_lie_as_the_dense_specs_say(model, optimizer, first)
            saved = nnx.state((model, optimizer))
            assert lro.checkpoint.save(manager, STEPS, saved)
        with jax.set_mesh(second):
            model, optimizer = create()
            restored = lro.checkpoint.restore(manager, nnx.state((model, optimizer)))
            assert restored is not None and restored.step == STEPS
            nnx.update((model, optimizer), restored.tree)
            assert_lie_as_the_dense_specs_say(model, optimizer, second)
            pairs = zip(jax.tree.leaves(nnx.state((model, optimizer))), jax.tree.leaves(saved), strict=True)
            for x, y in pairs:
                np.testing.assert_array_equal(jax.device_get(x), jax.device_get(y))
            losses += train(model, optimizer, second, STEPS)
            assert_lie_as_the_dense_specs_say(model, optimizer, second)
    assert losses[-1] < 0.9 * losses[0]
    # Sums over devices are in another order, and ten steps amplify their rounding.
    np.testing.assert_allclose(losses, expected, rtol=1e-3)
