"""LoRA-RITE, Muon and the budget of components against NumPy; Optax's wrappers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from tests.models.linen_models import close, draw

ad = lro.adapters


def power(gram, exponent):
    w, q = np.linalg.eigh(gram)
    return (q * w**exponent) @ q.T


def polar(x):
    u, _, vt = np.linalg.svd(x, full_matrices=False)
    return u @ vt


def gradients(steps):
    return [(np.asarray(draw((2, 8, 2), 10 + t)), np.asarray(draw((2, 2, 6), 20 + t))) for t in range(steps)]


def factors():
    return draw((2, 8, 2), 1), draw((2, 2, 6), 2), jnp.asarray([1.0, 0.5])


def run(tx, steps):
    """The factors after every step of size 0.1 along given gradients, for two stacked pairs."""
    delta = {"kernel": ad.LoRA(*factors())}
    state, path = tx.init(delta), []
    update = jax.jit(tx.update)
    for gA, gB in gradients(steps):
        grads = {"kernel": ad.LoRA(jnp.asarray(gA), jnp.asarray(gB), jnp.ones(2))}
        updates, state = update(grads, state, delta)
        delta = optax.apply_updates(delta, updates)
        path.append(delta["kernel"])
    return path


def rite_in_numpy(i, steps, damping, b1=0.8, b2=0.9):
    """Both factors as tall matrices, by the formulas of the module."""
    X = [np.asarray(factors()[0][i]), np.asarray(factors()[1][i]).T]
    moments = [(np.zeros_like(X[1 - k]), np.zeros_like(X[k]), np.zeros((2, 2)), 0.0) for k in (0, 1)]
    for t, (gA, gB) in enumerate(gradients(steps), start=1):
        d1, d2 = (b * (1 - b ** (t - 1)) / (1 - b**t) for b in (b1, b2))
        moved = []
        for k, g in enumerate((gA[i], gB[i].T)):
            old, M, V, rho = moments[k]
            R = power(X[1 - k].T @ X[1 - k] + damping * np.eye(2), 0.5)
            U, bar = X[1 - k] @ np.linalg.inv(R), g @ np.linalg.inv(R)
            P = U.T @ old
            turned = P @ V @ P.T
            most = np.max(np.linalg.eigvalsh(V) - np.linalg.eigvalsh(turned))
            lost = max(min(most, np.trace(V - turned)), 0)
            rho = d2 * (rho + lost)
            V = d2 * turned + (1 - d2) * bar.T @ bar / len(g)
            M = d1 * M @ P.T + (1 - d1) * bar @ power(V + rho * np.eye(2), -0.5)
            moments[k] = (U, M, V, rho)
            moved.append(X[k] - 0.1 * M @ np.linalg.inv(R))
        X = moved
    return X


def muon_in_numpy(i, steps, damping, b1=0.8):
    X = [np.asarray(factors()[0][i]), np.asarray(factors()[1][i]).T]
    M = [0.0, 0.0]
    for gA, gB in gradients(steps):
        M = [b1 * m + (1 - b1) * g for m, g in zip(M, (gA[i], gB[i].T), strict=True)]
        if damping is None:
            X = [x - 0.1 * polar(m) for x, m in zip(X, M, strict=True)]
        else:
            roots = [power(x.T @ x + damping * np.eye(2), -0.5) for x in X]
            X = [x - 0.05 * polar(m @ root) @ root for x, m, root in zip(X, M, roots[::-1], strict=True)]
    return X


@pytest.mark.parametrize(("rule", "damping"), [("rite", 1e-2), ("muon", None), ("muon", 1e-2)])
def test_trajectories(rule: str, damping: float | None) -> None:
    tx = ad.optimizer(optax.sgd(0.1), rule=rule, damping=damping, b1=0.8, b2=0.9)
    path = run(tx, 4)
    for i, steps in ((0, 4), (1, 4), (1, 2)):
        expected = (rite_in_numpy if rule == "rite" else muon_in_numpy)(i, steps, damping)
        close(path[steps - 1].A[i], expected[0], 1e-10)
        close(path[steps - 1].B[i].T, expected[1], 1e-10)
    close(path[-1].scale, factors()[2], 0)


def test_rite_and_muon_move_the_product_whatever_its_factors() -> None:
    """(A T, T^{-1} B) for (A, B), with the same gradients of W: the products stay equal."""
    T, G = draw((2, 2), 5), [draw((8, 6), 30 + t) for t in range(3)]
    for rule in ("rite", "muon"):
        tx = ad.optimizer(optax.sgd(0.1), rule=rule, damping=0.0)
        update, products = jax.jit(tx.update), []
        turn = T if rule == "rite" else jnp.linalg.qr(T)[0]  # momenta of Muon turn with the factors, and not scale
        for x in (jnp.eye(2), turn):
            delta = {"kernel": ad.LoRA(draw((8, 2), 1) @ x, jnp.linalg.solve(x, draw((2, 6), 2)), jnp.ones(()))}
            state = tx.init(delta)
            for g in G:
                d = delta["kernel"]
                grads = {"kernel": ad.LoRA(g @ d.B.T, d.A.T @ g, jnp.zeros(()))}
                updates, state = update(grads, state, delta)
                delta = optax.apply_updates(delta, updates)
            products.append(delta["kernel"].A @ delta["kernel"].B)
        close(*products, 1e-8)


@pytest.mark.parametrize("rule", ["rite", "muon"])
def test_a_start_at_zero_and_wrappers(rule: str) -> None:
    """A target of the rank of the change is fitted from B = 0, with accumulation and injected numbers."""
    target, W0 = draw((8, 2), 1) @ draw((2, 6), 2), draw((8, 6))
    params, delta = ad.init(jax.random.key(0), {"kernel": W0}, 2, kind="lora")

    def loss(delta):
        return jnp.mean((jnp.eye(8) @ ad.attach(params, delta)["kernel"] - W0 - target) ** 2)

    make = lambda b1: ad.optimizer(optax.sgd(optax.cosine_decay_schedule(0.1, 300)), rule, b1=b1)  # noqa: E731
    tx = optax.apply_if_finite(optax.inject_hyperparams(make)(b1=0.9), 3)

    @jax.jit
    def train(delta):
        def step(carry, _):
            delta, state = carry
            updates, state = tx.update(jax.grad(loss)(delta), state, delta)
            return (optax.apply_updates(delta, updates), state), None

        return jax.lax.scan(step, (delta, tx.init(delta)), None, 300)[0][0]

    assert loss(train(delta)) < 1e-4 * loss(delta)
    counted = []
    optax.tree.map_params(make(0.9), counted.append, make(0.9).init(delta))
    with pytest.raises(ValueError, match="needs the changes"):
        tx.update(delta, tx.init(delta))


def budget_in_numpy(score, deltas, grads, ends, begin, end, every, components):
    """The components that stay after every step, for lists of (A, E, B) after the step without a budget."""
    mean, spread, kept, out = {}, {}, None, []
    for t, (delta, grad) in enumerate(zip(deltas, grads, strict=True)):
        scores = {}
        for name in delta:
            now = [np.abs(w * g) for w, g in zip(delta[name], grad[name], strict=True)]
            if t < end:
                mean[name] = [0.7 * m + 0.3 * x for m, x in zip(mean.get(name, [0.0] * 3), now, strict=True)]
                old = spread.get(name, [0.0] * 3)
                spread[name] = [0.6 * s + 0.4 * np.abs(x - m) for s, x, m in zip(old, now, mean[name], strict=True)]
            both = [m * s for m, s in zip(mean[name], spread[name], strict=True)]
            scores[name] = both[1] + both[0].mean(0) + both[2].mean(1) if score == "adalora" else mean[name][1]
        every_score = np.sort(np.concatenate([scores[name] for name in sorted(scores)]))
        k = len(every_score)
        staying = int((k - components) * (1 - (t - begin) / (end - begin)) ** 3 + components)
        if (begin < t < end and t % every == 0) or t == end:
            least = every_score[k - (components if t == end else staying) - 1]
            chosen = {name: x > least for name, x in scores.items()}
            kept = chosen if t == end else None
        elif t > end:
            chosen = kept
        else:
            chosen = {name: np.ones(len(x), bool) for name, x in scores.items()}
        out.append(chosen)
    return out


@pytest.mark.parametrize("score", ["adalora", "sensitivity"])
def test_the_budget_of_components(score: str) -> None:
    """Ten steps; with zero updates the numbers are known, and the choice is that of the formulas."""
    shapes = {"a": (6, 5), "b": (4, 6)}
    policy = ad.budget(2, begin=2, end=7, every=2, score=score, b1=0.7, b2=0.6)
    tx = ad.optimizer(optax.set_to_zero(), rank=policy)
    start = {
        name: [np.asarray(draw(s, i)) for i, s in enumerate(((m, 3), (3,), (3, n)), 1)]
        for name, (m, n) in shapes.items()
    }
    make = lambda of: {name: {"kernel": ad.Components(*map(jnp.asarray, of[name]), jnp.ones(()))} for name in shapes}  # noqa: E731
    grads = [
        {name: [np.asarray(draw(x.shape, 50 + 7 * t + i)) for i, x in enumerate(xs)] for name, xs in start.items()}
        for t in range(10)
    ]
    # Every step begins with all components, so the numbers are known.
    expected = budget_in_numpy(score, [start] * 10, grads, None, 2, 7, 2, 2)
    delta, update = make(start), jax.jit(tx.update)
    state = tx.init(delta)
    for t in range(10):
        updates, state = update(make(grads[t]), state, delta)
        for name in shapes:
            stays = np.asarray((delta[name]["kernel"].E + updates[name]["kernel"].E) != 0)
            np.testing.assert_array_equal(stays, expected[t][name])
    assert sum(x.sum() for x in expected[-1].values()) == 2


def test_refusals() -> None:
    _, delta = ad.init(jax.random.key(0), {"kernel": draw((8, 6))}, 2, kind="lora")
    policy = ad.budget(2, begin=0, end=4)
    with pytest.raises(ValueError, match=r"rank=budget\(...\) is for changes of kind 'adalora', and the tree has none"):
        ad.optimizer(optax.sgd(1.0), rank=policy).init(delta)
    with pytest.raises(TypeError, match=r"rank is lro\.adapters\.budget"):
        ad.optimizer(optax.sgd(1.0), rank=lro.budget(100))
    with pytest.raises(ValueError, match="score is one of"):
        ad.budget(2, begin=0, end=4, score="energy")
    with pytest.raises(ValueError, match="0 <= begin < end"):
        ad.budget(2, begin=4, end=4)
    with pytest.raises(ValueError, match="rule 'rite' is for changes of kind 'lora' or 'dora'"):
        ad.optimizer(optax.sgd(1.0), rule="rite").init(ad.init(jax.random.key(0), {"kernel": draw((8, 6))}, 2)[1])
