"""Pre-train a small language model that keeps half of its parameters: kernels as grids of low-rank blocks."""

import argparse
import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState

import lowrank_optax as lro

text = np.frombuffer(inspect.getsource(argparse).encode(), np.uint8).astype(np.int32)


class Model(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(256, 64)(tokens)
        x = x + nn.MultiHeadDotProductAttention(num_heads=4)(nn.LayerNorm()(x), mask=nn.make_causal_mask(tokens))
        x = x + nn.Dense(64)(nn.gelu(nn.Dense(256)(nn.LayerNorm()(x))))
        return nn.Dense(256)(x)


model, tokens = Model(), text[None, :32]
dense = model.init(jax.random.key(0), tokens)["params"]
where = lro.linen.kernels(model, tokens)
params = lro.factorize(dense, budget=0.5, blocks="rank", scale=0.5, where=where)
print(lro.summary(params, where))
state = TrainState.create(apply_fn=lro.linen.apply(model), params=params, tx=lro.lowrank_adam(1e-2))


@jax.jit
def step(state, window):
    def loss(params):
        logits = state.apply_fn({"params": params}, window[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, window[:, 1:]).mean()

    value, grads = jax.value_and_grad(loss)(state.params)
    return state.apply_gradients(grads=grads), value


rng = np.random.default_rng(0)
for i in range(101):
    window = text[rng.integers(0, len(text) - 33, 16)[:, None] + np.arange(33)]
    state, value = step(state, jnp.asarray(window))
    if i % 25 == 0:
        print(f"step {i}: {value:.3f} nats/byte")
