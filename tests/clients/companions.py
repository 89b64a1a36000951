"""What comes with a training loop: caches, accumulated gradients, averages of parameters, masks, batch statistics."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict

import lowrank_optax as lro
from tests.clients import big_vision, gemma_linen, gemma_nnx, harness, hf_gpt2, llama_nnx, lm1b, nanodo, resnet, t5x


def close(a: Any, b: Any, tolerance: float = 1e-5) -> None:
    """Up to float32: relative to the largest number of each array."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=tolerance * float(np.abs(y).max()))


def decoding_with_a_cache_is_the_forward_pass(client: ModuleType) -> None:
    state = harness.run(client).state
    close(client.decode(state, client.BATCH), client.forward(state, client.BATCH))


def gradients_added_in_a_loop_are_those_of_the_batch(client: ModuleType) -> None:
    @jax.jit
    @lro.linen.factored()
    def gradients(params: Any) -> Any:
        return [client.accumulate_grads_microbatched(client.model, params, client.BATCH, n) for n in (1, 4)]

    whole, parts = gradients(client.params(harness.run(client).state))
    close(parts, whole)


def gradients_added_as_trees_are_those_of_the_batch(client: ModuleType) -> None:
    whole, parts = (client.Trainer(*harness.run(client).state, n).gradients(client.BATCH) for n in (1, 2))
    close(parts, whole)


def every_second_step_moves_the_parameters(client: ModuleType) -> None:
    """`optax.MultiSteps`: the loss on one batch stays for two calls."""
    losses = np.reshape(harness.run(client).losses, (-1, 2))
    np.testing.assert_allclose(losses[:, 0], losses[:, 1], rtol=1e-6)
    assert np.all(losses[1:, 0] != losses[:-1, 0])


def two_accumulated_steps_are_one(client: ModuleType) -> None:
    once, _ = client.get_train_step(client.single)(client.start(client.RANK, client.single), client.BATCH)
    twice = client.start(client.RANK)
    for _ in range(2):
        twice, _ = client.step(twice, client.BATCH)
    close(lro.densify(twice[0]), lro.densify(once[0]))


def the_average_is_the_best_approximation_of_the_dense_average(client: ModuleType) -> None:
    before = jax.tree.map(jnp.copy, harness.run(client).state)  # The step donates.
    old = flatten_dict(jax.device_get(lro.densify(before["ema"])), sep="/")
    after, _ = client.step(before, client.BATCH)
    new = flatten_dict(jax.device_get(lro.densify(after["params"])), sep="/")
    for path, average in flatten_dict(after["ema"], sep="/").items():
        mean = 0.9 * old[path] + 0.1 * new[path]
        if lro.is_lowrank(average):
            u, s, vt = np.linalg.svd(mean.reshape(np.prod(average.in_shape), -1), full_matrices=False)
            r = average.width
            mean, average = ((u[:, :r] * s[:r]) @ vt[:r]).reshape(mean.shape), average.to_dense()
        np.testing.assert_allclose(average, mean, atol=1e-5)


def masks_choose_what_they_choose_of_a_dense_model(client: ModuleType) -> None:
    """They are prefix trees, with one bool for a kernel."""
    states = harness.start(client, None), harness.run(client).state
    dense, factored = (flatten_dict(client.decay_mask(client.params(state))) for state in states)
    assert dense == factored and True in dense.values() and False in dense.values()


def decay_by_the_mask_moves_what_it_chooses(client: ModuleType) -> None:
    params = client.params(harness.run(client).state)
    tx = lro.lowrank_adamw(0.1, weight_decay=0.1, mask=client.decay_mask)
    updates, _ = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    new = flatten_dict(lro.densify(optax.apply_updates(params, updates)))
    for path, x in flatten_dict(lro.densify(params)).items():
        if "/".join(path) in client.FACTORED:
            assert jnp.linalg.norm(new[path]) < 0.999 * jnp.linalg.norm(x)
        else:
            np.testing.assert_array_equal(new[path], x)


def batch_statistics_at_full_rank_are_the_dense_ones(client: ModuleType) -> None:
    @jax.jit
    def statistics(state: Any) -> Any:
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        return state.apply_fn(variables, client.BATCH["image"], mutable=["batch_stats"])[1]

    dense, full = harness.start(client, None), harness.start(client, 1.0)
    close(statistics(full), statistics(dense))
    trained = harness.run(client).state.batch_stats
    pairs = zip(jax.tree.leaves(trained), jax.tree.leaves(dense.batch_stats), strict=True)
    assert all(not np.allclose(x, y) for x, y in pairs)


def the_metric_has_seen_every_step(client: ModuleType) -> None:
    run = harness.run(client)
    np.testing.assert_allclose(run.state[2].compute(), np.mean(run.losses), rtol=1e-5)


CHECKS: dict[ModuleType, list[Callable[[ModuleType], None]]] = {
    lm1b: [
        decoding_with_a_cache_is_the_forward_pass,
        masks_choose_what_they_choose_of_a_dense_model,
        decay_by_the_mask_moves_what_it_chooses,
    ],
    nanodo: [every_second_step_moves_the_parameters, two_accumulated_steps_are_one],
    big_vision: [
        masks_choose_what_they_choose_of_a_dense_model,
        the_average_is_the_best_approximation_of_the_dense_average,
    ],
    t5x: [gradients_added_in_a_loop_are_those_of_the_batch],
    gemma_linen: [decoding_with_a_cache_is_the_forward_pass],
    hf_gpt2: [masks_choose_what_they_choose_of_a_dense_model],
    gemma_nnx: [decoding_with_a_cache_is_the_forward_pass, gradients_added_as_trees_are_those_of_the_batch],
    llama_nnx: [every_second_step_moves_the_parameters, the_metric_has_seen_every_step],
    resnet: [batch_statistics_at_full_rank_are_the_dense_ones],
}
