"""GPT-2 in the style of HF Flax: a wrapper around a module and parameters, a `Conv1D` of its own."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.core import FrozenDict, freeze, unfreeze
from flax.training import train_state
from flax.training.common_utils import onehot
from flax.traverse_util import flatten_dict, unflatten_dict

import lowrank_optax as lro


@dataclasses.dataclass(frozen=True)
class GPT2Config:
    vocab_size: int = 57
    n_positions: int = 8
    n_embd: int = 26
    n_head: int = 2
    n_inner: int = 51
    n_layer: int = 1
    resid_pdrop: float = 0.05


class FlaxConv1D(nn.Module):
    """A dense layer whose kernel is stored as (outputs, inputs)."""

    features: int

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        kernel = self.param("kernel", nn.initializers.normal(0.1), (self.features, inputs.shape[-1]))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        y = jax.lax.dot_general(inputs, kernel.transpose(), (((inputs.ndim - 1,), (0,)), ((), ())))
        return y + bias


def conv1d(module: Any, W: lro.LowRank, inputs: jax.Array) -> jax.Array:  # lowrank_optax
    return inputs @ W.T + module.param("bias", nn.initializers.zeros, (module.features,))  # lowrank_optax


lro.linen.register(FlaxConv1D, axes=lro.Axes(0, 1), forward=conv1d)  # lowrank_optax


class FlaxGPT2Attention(nn.Module):
    config: GPT2Config

    def setup(self) -> None:
        self.c_attn = FlaxConv1D(features=3 * self.config.n_embd)
        self.c_proj = FlaxConv1D(self.config.n_embd)
        self.resid_dropout = nn.Dropout(rate=self.config.resid_pdrop)

    def __call__(self, hidden_states: jax.Array, deterministic: bool) -> jax.Array:
        split = lambda x: x.reshape(*x.shape[:2], self.config.n_head, -1)  # noqa: E731
        query, key, value = map(split, jnp.split(self.c_attn(hidden_states), 3, axis=2))
        mask = nn.make_causal_mask(hidden_states[..., 0])
        attn_output = nn.dot_product_attention(query, key, value, mask=mask)
        attn_output = self.c_proj(attn_output.reshape(hidden_states.shape))
        return self.resid_dropout(attn_output, deterministic=deterministic)


class FlaxGPT2Block(nn.Module):
    config: GPT2Config

    def setup(self) -> None:
        self.ln_1, self.ln_2 = nn.LayerNorm(), nn.LayerNorm()
        self.attn = FlaxGPT2Attention(self.config)
        self.mlp_c_fc, self.mlp_c_proj = FlaxConv1D(self.config.n_inner), FlaxConv1D(self.config.n_embd)

    def __call__(self, hidden_states: jax.Array, deterministic: bool) -> jax.Array:
        hidden_states = hidden_states + self.attn(self.ln_1(hidden_states), deterministic)
        return hidden_states + self.mlp_c_proj(nn.gelu(self.mlp_c_fc(self.ln_2(hidden_states))))


class FlaxGPT2LMHeadModule(nn.Module):
    config: GPT2Config

    def setup(self) -> None:
        init = nn.initializers.normal(0.1)
        self.wte = nn.Embed(self.config.vocab_size, self.config.n_embd, embedding_init=init)
        self.wpe = nn.Embed(self.config.n_positions, self.config.n_embd, embedding_init=init)
        self.h = [FlaxGPT2Block(self.config, name=str(i)) for i in range(self.config.n_layer)]
        self.ln_f = nn.LayerNorm()
        self.lm_head = nn.Dense(self.config.vocab_size, use_bias=False)

    def __call__(self, input_ids: jax.Array, deterministic: bool = True) -> jax.Array:
        hidden_states = self.wte(input_ids) + self.wpe(jnp.arange(input_ids.shape[1])[None])
        for block in self.h:
            hidden_states = block(hidden_states, deterministic)
        shared_kernel = self.variables["params"]["wte"]["embedding"].T
        return self.lm_head.apply({"params": {"kernel": shared_kernel}}, self.ln_f(hidden_states))


class FlaxGPT2LMHeadModel:
    """No module: it holds one, and its parameters."""

    module_class = FlaxGPT2LMHeadModule

    def __init__(self, config: GPT2Config, seed: int = 0):
        self.config, self.module = config, self.module_class(config)
        random_params = self.module.init(jax.random.key(seed), jnp.zeros((1, config.n_positions), jnp.int32))["params"]
        self.params = freeze(random_params)

    def __call__(self, input_ids: Any, params: Any = None, dropout_rng: Any = None, train: bool = False) -> jax.Array:
        rngs = {} if dropout_rng is None else {"dropout": dropout_rng}
        inputs = {"params": params or self.params}
        return self.module.apply(inputs, jnp.array(input_ids, dtype="i4"), not train, rngs=rngs)


class TrainState(train_state.TrainState):
    dropout_rng: jax.Array


def decay_mask(params: Any) -> Any:
    flat_params = flatten_dict(params)
    names = {path[-2:] for path in flat_params if "ln" in path[-2]}
    return unflatten_dict({path: path[-1] != "bias" and path[-2:] not in names for path in flat_params})


@functools.cache
def from_pretrained() -> FlaxGPT2LMHeadModel:
    return FlaxGPT2LMHeadModel(GPT2Config())


schedule = optax.join_schedules([optax.linear_schedule(0.0, 2e-2, 3), optax.linear_schedule(2e-2, 1e-2, 30)], [3])
tx = lro.lowrank_adamw(schedule, weight_decay=1e-2, mask=decay_mask)  # lowrank_optax


def loss_fn(logits: jax.Array, labels: jax.Array) -> jax.Array:
    shift_logits, shift_labels = logits[..., :-1, :], labels[..., 1:]
    return optax.softmax_cross_entropy(shift_logits, onehot(shift_labels, shift_logits.shape[-1])).mean()


def train_step(state: TrainState, batch: dict[str, Any]) -> tuple[TrainState, dict[str, jax.Array]]:
    dropout_rng, new_dropout_rng = jax.random.split(state.dropout_rng)

    def compute_loss(params: Any) -> jax.Array:
        labels = batch["labels"]
        return loss_fn(state.apply_fn(batch["input_ids"], params=params, dropout_rng=dropout_rng, train=True), labels)

    loss, grad = jax.value_and_grad(compute_loss)(state.params)
    new_state = state.apply_gradients(grads=grad, dropout_rng=new_dropout_rng)
    return new_state, {"loss": loss, "learning_rate": schedule(state.step)}


p_train_step = jax.jit(train_step, donate_argnums=(0,))


def start(rank: float | None) -> TrainState:
    model = from_pretrained()
    params: FrozenDict[str, Any] | dict[str, Any] = unfreeze(jax.tree.map(jnp.copy, model.params))
    if rank is not None:
        params = lro.factorize(params, rank, where=lro.linen.kernels(model.module, BATCH["input_ids"]))  # lowrank_optax
    return TrainState.create(apply_fn=model.__call__, params=params, tx=tx, dropout_rng=jax.random.key(1))


@lro.linen.factored()  # lowrank_optax
def step(state: TrainState, batch: Any) -> tuple[TrainState, jax.Array]:
    state, metrics = p_train_step(state, batch)
    return state, metrics["loss"]


@jax.jit
@lro.linen.factored()  # lowrank_optax
def forward(state: TrainState, batch: Any) -> jax.Array:
    return from_pretrained()(batch["input_ids"], params=state.params)


def params(state: TrainState) -> Any:
    return state.params


def reasons() -> dict[str, str]:
    return lro.linen.kernels(from_pretrained().module, BATCH["input_ids"]).reasons


_ids = np.random.default_rng(0).integers(1, 57, (4, 8)).astype(np.int32)
BATCH = {"input_ids": _ids, "labels": _ids}
RANK = 4
FACTORED = {f"0/{name}/kernel" for name in ("attn/c_attn", "attn/c_proj", "mlp_c_fc", "mlp_c_proj")}
DENSE = {f"{name}/embedding": "nothing is registered for its layer, Embed" for name in ("wte", "wpe")}
