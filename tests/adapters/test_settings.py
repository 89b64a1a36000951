"""What `variant`, `magnitude`, `alpha` and classes of one's own set, and what they refuse."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lowrank_optax as lro
from lowrank_optax.adapters.create import KINDS
from tests.adapters.every_kind import moved
from tests.models.linen_models import close, draw

KEY = jax.random.key(0)
ad = lro.adapters
W, X, TARGET = {"kernel": draw((8, 6))}, draw((5, 8), 2), draw((5, 6), 3)


def gradients(params, delta, weights=1.0):
    """Of a loss of outputs times weights."""

    def loss(delta):
        y = X @ ad.attach(params, delta)["kernel"]
        return jnp.sum((y * jnp.broadcast_to(weights, y.shape) - TARGET) ** 2)

    return jax.jit(jax.grad(loss))(delta)["kernel"]


# Kinds that multiply in a way of their own, beside one that does not.
OWN = [name for name, kind in KINDS.items() if getattr(kind, "apply", ad.Change.apply) is not ad.Change.apply]


@pytest.mark.parametrize("kind", [*OWN, "lora", ad.variant("allora", eta=0.5)], ids=str)
def test_magnitude_keeps_what_a_kind_does_to_gradients(kind) -> None:
    """Of the change of directions they are those of the kind itself with the lengths as constants on the outputs."""
    params, delta = ad.init(KEY, W, 2, kind=ad.magnitude(kind), alpha=3)
    delta = moved(delta)
    d = delta["kernel"]
    directions = {"kernel": d.change}
    V = np.asarray(ad.merge(params, directions)["kernel"])
    got = gradients(params, delta)
    want = gradients(params, directions, d.magnitude / np.linalg.norm(V, axis=0))
    jax.tree.map(lambda x, y: close(x, y, 1e-10), got.change, want)


@pytest.mark.parametrize("kind", ["dora", ad.magnitude("lora"), ad.magnitude("vera"), ad.variant("dora")], ids=str)
def test_magnitude_of_a_kind_without_a_difference(kind) -> None:
    with pytest.raises(TypeError, match=r"needs a kind that is a difference of kernels, W0 . D, and '.*' is none"):
        ad.magnitude(kind)


def test_eta_of_allora() -> None:
    """The numbers d are eta while B is zero; classes of one's own may have another default."""

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Other(ad.ALLoRA):
        eta: float = dataclasses.field(default=0.5, kw_only=True, metadata={"static": True})

    params, plain = ad.init(KEY, W, 2, kind="lora")
    lora = gradients(params, plain).B
    for kind, eta in (("allora", 2**0.5), (ad.variant("allora", eta=0.5), 0.5), (Other, 0.5)):
        params, delta = ad.init(KEY, W, 2, kind=kind)
        assert delta["kernel"].eta == eta
        close(gradients(params, delta).B, eta * lora, 1e-12)
        restarted = ad.restart(KEY, params, delta)[1]
        assert jax.tree.structure(restarted) == jax.tree.structure(delta)
        assert ad.optimizer(optax.adam(0.1)).init(delta)
    with pytest.raises(ValueError, match="eta of kind 'allora' is positive, got 0"):
        ad.init(KEY, W, 2, kind=ad.variant("allora", eta=0))


def test_top_of_vblora() -> None:
    """With one vector in a mixture the change does not depend on the logits; with h it depends on all of them."""
    for top in (1, 2, 5):
        params, delta = ad.init(KEY, W, 2, kind=ad.variant("vblora", vectors=5, length=2, top=top))
        counts = np.count_nonzero(np.asarray(gradients(params, delta).logits_A), axis=-1)
        assert delta["kernel"].top == top and np.all(counts == (top if top > 1 else 0))
    with pytest.raises(ValueError, match="top of kind 'vblora' is positive, got 0"):
        ad.variant("vblora", vectors=5, length=2, top=0)
    with pytest.raises(ValueError, match=r"kind 'vblora' cannot change .*there are at least 6 vectors"):
        ad.init(KEY, W, 2, kind=ad.variant("vblora", vectors=5, length=2, top=6))


def test_classes_that_are_no_pytrees_are_told_at_once() -> None:
    class Half(ad.ALLoRA):
        eta = 0.5

    with pytest.raises(TypeError, match=r"Half is no pytree: put @jax.tree_util.register_dataclass and"):
        ad.init(KEY, W, 2, kind=Half)


@pytest.mark.parametrize("kind", ["lora", "lowrank", "fourier", "delora"])
@pytest.mark.parametrize("alpha", [0, 0.0, -2.0, float("nan"), float("inf"), "8", [8.0], True, jnp.ones(2)], ids=str)
def test_alphas_that_are_no_scale(kind: str, alpha) -> None:
    with pytest.raises((ValueError, TypeError), match="alpha is a positive number or None, got"):
        ad.init(KEY, W, 2, kind=kind, alpha=alpha)


@pytest.mark.parametrize("alpha", [4, 4.0, np.float32(4), jnp.float32(4)], ids=str)
def test_alphas_that_are(alpha) -> None:
    assert float(ad.init(KEY, W, 2, kind="lora", alpha=alpha)[1]["kernel"].scale) == 2.0


@pytest.mark.parametrize(
    ("what", "options"), {"kind 'svfit'": dict(kind="svfit"), "start='pissa'": dict(kind="lora", start="pissa")}.items()
)
def test_bases_in_integers_are_not_corrected(what: str, options: dict) -> None:
    with pytest.raises(ValueError, match=f"{what} corrects 'kernel', which is quantized: quantize after init"):
        ad.init(KEY, ad.quantize(W), 2, **options)


@pytest.mark.parametrize(
    ("shape", "rank", "pair"),
    [
        ((64, 64), 3, True),
        ((64, 64), 4, False),
        ((64, 512), 6, True),
        ((64, 512), 15, True),
        ((512, 64), 15, True),
        ((64, 512), 16, False),
        ((12, 20), 2, True),
        ((12, 20), 3, False),
    ],
)
def test_the_layout_of_lokr(shape: tuple[int, int], rank: int, pair: bool) -> None:
    """PEFT's: a pair where the rank is below half of the longer side of the second factor."""
    d = jax.eval_shape(lambda: ad.init(KEY, {"kernel": jnp.zeros(shape)}, rank, kind="lokr"))[1]["kernel"]
    m2, n2 = shape[0] // d.C.shape[0], shape[1] // d.C.shape[1]
    assert (d.A is not None) == pair == (rank < max(m2, n2) / 2)
    assert d.B.shape == ((rank, n2) if pair else (m2, n2)) and (d.A is None or d.A.shape == (m2, rank))
