"""Turn an nnx model into a low-rank one, train it, cut it to a smaller rank with its optimizer, and train on."""

import jax
import jax.numpy as jnp
from flax import nnx

import lowrank_optax as lro

rngs = nnx.Rngs(0)
model = nnx.Sequential(nnx.Linear(32, 64, rngs=rngs), nnx.tanh, nnx.Linear(64, 32, rngs=rngs))
x = jax.random.normal(jax.random.key(1), (256, 32))
A = jax.random.normal(jax.random.key(2), (32, 2)) @ jax.random.normal(jax.random.key(3), (2, 32)) / 8
y = jnp.tanh(x @ A)  # a target of rank 2

lro.nnx.factorize(model, rank=12, scale=0.2)
optimizer = nnx.Optimizer(model, lro.lowrank_adam(1e-2), wrt=nnx.Param)


@nnx.jit
def step(model, optimizer):
    value, grads = nnx.value_and_grad(lambda model: jnp.mean((model(x) - y) ** 2))(model)
    optimizer.update(model, grads)
    return value


def size():
    return sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param)))


for _ in range(200):
    value = step(model, optimizer)
print(f"rank 12, {size():,} numbers: error {value:.4f}")

lro.nnx.resize(model, optimizer, rank=4)  # the largest four singular values stay, moments change along
print(f"rank 4, {size():,} numbers: error {step(model, optimizer):.4f}")
for _ in range(200):
    value = step(model, optimizer)
print(f"rank 4, after 200 steps more: error {value:.4f}")
