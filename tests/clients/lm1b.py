"""A language model in the style of flax/examples/lm1b: a config, a cache, and a step that builds the model itself.

The logical names of axes are there if `boxed` is set.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct, traverse_util
from flax.training import common_utils
from flax.training.train_state import TrainState

import lowrank_optax as lro


@struct.dataclass
class TransformerConfig:
    vocab_size: int = 57
    emb_dim: int = 26
    num_heads: int = 2
    num_layers: int = 1
    qkv_dim: int = 22
    mlp_dim: int = 51
    max_len: int = 8
    dropout_rate: float = 0.05
    deterministic: bool = False
    decode: bool = False
    boxed: bool = False

    def init(self, *names: str | None) -> Any:
        init = nn.initializers.xavier_uniform()
        return nn.with_logical_partitioning(init, names) if self.boxed else init


class AddPositionEmbs(nn.Module):
    config: TransformerConfig

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        config, length = self.config, inputs.shape[1]
        shape = (1, config.max_len, inputs.shape[-1])
        table = self.param("pos_embedding", nn.initializers.normal(0.02), shape)
        start = 0
        if config.decode:
            is_initialized = self.has_variable("cache", "cache_index")
            index = self.variable("cache", "cache_index", lambda: jnp.array(0, jnp.uint32))
            if is_initialized:
                start, index.value = index.value, index.value + 1
        return inputs + jax.lax.dynamic_slice_in_dim(table, start, length, axis=1)


class EncoderDecoder1DBlock(nn.Module):
    config: TransformerConfig

    @nn.compact
    def __call__(self, inputs: jax.Array, mask: jax.Array | None) -> jax.Array:
        config = self.config
        dropout = nn.Dropout(config.dropout_rate, deterministic=config.deterministic)
        x = nn.LayerNorm()(inputs)
        attention = nn.MultiHeadDotProductAttention(
            num_heads=config.num_heads,
            qkv_features=config.qkv_dim,
            use_bias=False,
            kernel_init=config.init("embed", "kv"),
            deterministic=config.deterministic,
            dropout_rate=config.dropout_rate,
            decode=config.decode,
        )
        x = dropout(attention(x, mask=mask)) + inputs
        z = nn.Dense(config.mlp_dim, kernel_init=config.init("embed", "mlp"))(nn.LayerNorm()(x))
        return x + dropout(nn.Dense(inputs.shape[-1], kernel_init=config.init("mlp", "embed"))(nn.relu(z)))


class TransformerLM(nn.Module):
    config: TransformerConfig

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        config = self.config
        if config.decode:
            mask = None
        else:
            mask = nn.make_causal_mask(inputs)
            inputs = jnp.pad(inputs, ((0, 0), (1, 0)))[:, :-1]  # to the right: the first input is the start
        y = nn.Embed(config.vocab_size, config.emb_dim, embedding_init=config.init("vocab", "embed"))(inputs)
        y = AddPositionEmbs(config, name="posembed_output")(y)
        for layer in range(config.num_layers):
            y = EncoderDecoder1DBlock(config, name=f"encoderdecoderblock_{layer}")(y, mask)
        y = nn.LayerNorm(name="encoderdecoder_norm")(y)
        return nn.Dense(config.vocab_size, kernel_init=config.init("embed", "vocab"), name="logitdense")(y)


def decay_mask(params: Any) -> Any:
    """Of other people's scripts, as it is: a factored kernel is one leaf of `flatten_dict`."""
    flat = traverse_util.flatten_dict(params)
    return traverse_util.unflatten_dict({path: path[-1] == "kernel" for path in flat})


def setup_initial_state(config: TransformerConfig, tx: Any, rng: jax.Array, rank: float | None) -> TrainState:
    model, inputs = TransformerLM(config), jnp.ones((2, config.max_len), jnp.int32)

    def init_train_state() -> TrainState:
        params = model.init(rng, inputs)["params"]
        if rank is not None:
            params = lro.factorize(params, rank, where=lro.linen.kernels(model, inputs))  # lowrank_optax
        return TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    return jax.jit(init_train_state)()


@functools.partial(jax.jit, static_argnums=(2, 3), donate_argnums=0)
def train_step(state: Any, batch: Any, config: Any, learning_rate_fn: Any, dropout_rng: Any) -> tuple[Any, Any]:
    dropout_rng = jax.random.fold_in(dropout_rng, state.step)

    def loss_fn(params: Any) -> tuple[jax.Array, jax.Array]:
        logits = TransformerLM(config).apply({"params": params}, batch, rngs={"dropout": dropout_rng})
        targets = common_utils.onehot(batch, config.vocab_size)
        return -jnp.sum(targets * nn.log_softmax(logits)) / batch.size, logits

    (loss, _), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    metrics = {"loss": loss, "learning_rate": learning_rate_fn(state.step)}
    return state.apply_gradients(grads=grads), metrics


CONFIG = TransformerConfig()
learning_rate_fn = optax.join_schedules([optax.linear_schedule(0.0, 2e-2, 4), optax.constant_schedule(2e-2)], [4])
tx = lro.lowrank_adamw(learning_rate_fn, b2=0.98, weight_decay=1e-2, mask=decay_mask)  # lowrank_optax


def start(rank: float | None) -> TrainState:
    return setup_initial_state(CONFIG, tx, jax.random.key(0), rank)


@lro.linen.factored()  # lowrank_optax
def step(state: TrainState, batch: jax.Array) -> tuple[TrainState, jax.Array]:
    state, metrics = train_step(state, batch, CONFIG, learning_rate_fn, jax.random.key(1))
    return state, metrics["loss"]


@jax.jit
@lro.linen.factored()  # lowrank_optax
def forward(state: TrainState, batch: jax.Array) -> jax.Array:
    return TransformerLM(CONFIG.replace(deterministic=True)).apply({"params": state.params}, batch)


def params(state: TrainState) -> Any:
    return state.params


def reasons() -> dict[str, str]:
    return lro.linen.kernels(TransformerLM(CONFIG), BATCH).reasons


@lro.linen.factored()  # lowrank_optax
def decode(state: TrainState, batch: jax.Array) -> jax.Array:
    """The logits of one token after the other, with a cache. The first input is the start, as in training."""
    model = TransformerLM(CONFIG.replace(deterministic=True, decode=True))
    cache = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.ones_like(batch)))["cache"]
    cache = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), cache)
    tokens = jnp.pad(batch, ((0, 0), (1, 0)))[:, :-1]

    @jax.jit
    def tokens_to_logits(cache: Any, ids: jax.Array) -> tuple[jax.Array, Any]:
        logits, variables = model.apply({"params": state.params, "cache": cache}, ids, mutable=["cache"])
        return logits, variables["cache"]

    logits = []
    for t in range(batch.shape[1]):
        y, cache = tokens_to_logits(cache, tokens[:, t : t + 1])
        logits.append(y)
    return jnp.concatenate(logits, axis=1)


BATCH = np.random.default_rng(0).integers(1, 57, (4, 8)).astype(np.int32)
RANK = 4
ATTENTION = [f"MultiHeadDotProductAttention_0/{name}/kernel" for name in ("query", "key", "value", "out")]
FACTORED = {"logitdense/kernel"} | {
    f"encoderdecoderblock_0/{name}" for name in (*ATTENTION, "Dense_0/kernel", "Dense_1/kernel")
}
DENSE = {
    "Embed_0/embedding": "nothing is registered for its layer, Embed",
    "posembed_output/pos_embedding": "nothing is registered for its layer, AddPositionEmbs",
}
