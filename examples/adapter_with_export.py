"""Train an adapter of a frozen model, write it in the format of PEFT, and read it back."""

import tempfile

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import lowrank_optax as lro

model = nn.Sequential([nn.Dense(64), nn.gelu, nn.Dense(64), nn.gelu, nn.Dense(4)])
x = jax.random.normal(jax.random.key(0), (256, 16))
labels = jnp.argmax(x[:, :4], axis=-1)
base = model.init(jax.random.key(1), x)["params"]  # read your pretrained parameters here
apply = lro.linen.apply(model)

base, delta = lro.adapters.init(jax.random.key(2), base, rank=4, kind="lora", alpha=8)
tx = lro.adapters.optimizer(optax.adamw(1e-2))
opt_state = tx.init(delta)


@jax.jit
def step(base, delta, opt_state):
    def loss(delta):
        logits = apply({"params": base, "adapters": delta}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    value, grads = jax.value_and_grad(loss)(delta)
    updates, opt_state = tx.update(grads, opt_state, delta)
    return optax.apply_updates(delta, updates), opt_state, value


for i in range(101):
    delta, opt_state, value = step(base, delta, opt_state)
    if i % 25 == 0:
        print(f"step {i}: {value:.3f} nats")

folder = tempfile.mkdtemp()
lro.adapters.export(folder, delta)
again = lro.adapters.load(folder, base)
merged = lro.adapters.merge(base, again)  # an ordinary model again
difference = np.abs(model.apply({"params": merged}, x) - apply({"params": base, "adapters": delta}, x)).max()
print(f"the merged model differs by {difference:.1e}")
