"""Every transformation of Optax inside every geometry: it trains, or `init` refuses it by name."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import lowrank_optax as lro
from tests.one_kernel import step_of

slow = pytest.mark.slow
GEOMETRIES = {"balanced": lro.Balanced(), "tangent": lro.Tangent(), "coefficient": lro.Coefficient()}
H = 0.02


# --- all of them -----------------------------------------------------------------------------------------------------


def _in_front_of_sgd(*args: Any, **kwargs: Any) -> Callable[..., Any]:
    return lambda f: optax.chain(f(*args, **kwargs), optax.sgd(H))


def _matrices(tree: Any) -> Any:
    return jax.tree.map(lambda x: contrib.MuonDimensionNumbers(), tree)


# How those are made that need more than a learning rate.
MAKE: dict[str, Callable[..., Any]] = {
    "adaptive_grad_clip": _in_front_of_sgd(0.1),
    "add_decayed_weights": _in_front_of_sgd(1e-3),
    "add_noise": _in_front_of_sgd(0.01, 0.55, key=jax.random.key(0)),
    "apply_every": _in_front_of_sgd(2),
    "apply_if_finite": lambda f: f(optax.adam(H), 3),
    "centralize": _in_front_of_sgd(),
    "chain": lambda f: f(optax.adam(H), optax.scale(1.0)),
    "clip": _in_front_of_sgd(1.0),
    "clip_by_block_rms": _in_front_of_sgd(1.0),
    "clip_by_global_norm": _in_front_of_sgd(1.0),
    "conditionally_mask": lambda f: f(optax.adam(H), lambda step: True),
    "conditionally_transform": lambda f: f(optax.adam(H), lambda step: True),
    "differentially_private_aggregate": lambda f: f(1.0, 0.1, key=jax.random.key(0)),
    "dpsgd": lambda f: f(H, 1.0, 0.1, 0),
    "ema": lambda f: optax.chain(f(0.9), optax.scale(-H)),
    "flatten": lambda f: f(optax.adam(H)),
    "freeze": lambda f: optax.chain(optax.adam(H), f({"kernel": False, "bias": False})),
    "identity": _in_front_of_sgd(),
    "inject_hyperparams": lambda f: f(optax.adam)(learning_rate=H),
    "inject_stateful_hyperparams": lambda f: f(optax.adam)(learning_rate=H),
    "keep_params_nonnegative": lambda f: optax.chain(optax.sgd(H), f()),
    "lookahead": lambda f: f(optax.adam(H), 5, 0.5),
    "masked": lambda f: f(optax.adam(H), {"kernel": True, "bias": True}),
    "mechanize": lambda f: f(optax.adam(1.0)),
    "multi_transform": lambda f: f({"all": optax.adam(H)}, {"kernel": "all", "bias": "all"}),
    "named_chain": lambda f: f(("adam", optax.adam(H))),
    "normalize": lambda f: optax.chain(f(), optax.scale(-H)),
    "normalize_by_update_norm": _in_front_of_sgd(),
    "partition": lambda f: f({"all": optax.adam(H)}, {"kernel": "all", "bias": "all"}),
    "reduce_on_plateau": lambda f: optax.chain(optax.adam(H), f()),
    "sam": lambda f: f(optax.adam(H), optax.sgd(0.01), opaque_mode=False),
    "scale": lambda f: f(-H),
    "scale_by_backtracking_linesearch": lambda f: optax.chain(optax.sgd(1.0), f(10)),
    "scale_by_distance_over_gradients": lambda f: optax.chain(f(), optax.scale(-1.0)),
    "scale_by_learning_rate": lambda f: f(H),
    "scale_by_muon": lambda f: optax.partition(
        {"kernel": optax.chain(f(weight_dimension_numbers=_matrices), optax.scale(-H)), "ordinary": optax.sgd(H)},
        lro.kernel_labels,
    ),
    "scale_by_param_block_norm": _in_front_of_sgd(),
    "scale_by_param_block_rms": _in_front_of_sgd(),
    "scale_by_polyak": _in_front_of_sgd(),
    "scale_by_rprop": lambda f: f(H),
    "scale_by_schedule": lambda f: f(lambda step: -H),
    "scale_by_trust_ratio": _in_front_of_sgd(),
    "scale_by_zoom_linesearch": lambda f: optax.chain(optax.sgd(1.0), f(10)),
    "schedule_free": lambda f: f(optax.sgd(H), H),
    "scale_by_simplified_ademamix": lambda f: optax.chain(f(), optax.scale(-H / 20)),
    "selective_transform": lambda f: f(optax.adam(H), freeze_mask={"kernel": False, "bias": False}),
    "set_to_zero": lambda f: optax.chain(
        optax.adam(H), optax.partition({"a": optax.identity(), "b": f()}, lambda t: "a")
    ),
    "simplified_ademamix": lambda f: f(H / 20),
    "snapshot": lambda f: optax.chain(f("norm", optax.tree.norm), optax.adam(H)),
    "split_real_and_imaginary": lambda f: f(optax.adam(H)),
    "stateless": lambda f: f(lambda updates, params: jax.tree.map(lambda x: -H * x, updates)),
    "stateless_with_tree_map": lambda f: f(lambda update, params: -H * update),
    "trace": lambda f: optax.chain(f(0.9), optax.scale(-H / 5)),
    "with_extra_args_support": lambda f: f(optax.adam(H)),
    "zero_nans": _in_front_of_sgd(),
}


def _all() -> dict[str, Callable[..., Any]]:
    """All functions of Optax that return a transformation, by name."""
    found = {}
    for module in (optax, contrib):
        for name, f in vars(module).items():
            if (
                inspect.isfunction(f)
                and not name.startswith("_")
                and "GradientTransformation" in str(inspect.signature(f).return_annotation)
            ):
                found[name] = f
    return found


TRANSFORMATIONS = _all()
del TRANSFORMATIONS["measure_with_ema"]  # Its updates are measurements: it is a part of `optax.monitor`.


def make(name: str) -> Any:
    f = TRANSFORMATIONS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a missing random key
        if name in MAKE:
            return MAKE[name](f)
        known = {"learning_rate": H, "key": jax.random.key(0)}
        tx = f(**{k: v for k, v in known.items() if k in inspect.signature(f).parameters})
    return optax.chain(tx, optax.scale(-H)) if name.startswith("scale_by") else tx


X = jax.random.normal(jax.random.key(0), (32, 6), jnp.float64)
TARGET = 2 * jax.random.normal(jax.random.key(1), (6, 5), jnp.float64)
PARAMS = {
    "kernel": lro.factorize(jax.random.normal(jax.random.key(2), (6, 5), jnp.float64), 2, where=lambda p, s: True),
    "bias": jnp.zeros(5),
}


def loss(params: Any) -> jax.Array:
    return jnp.mean((X @ params["kernel"] + params["bias"][None] - X @ TARGET - 1) ** 2)


ENDS: dict[tuple[str, str], Any] = {}


def train(tx: Any, params: Any, state: Any, steps: int = 100) -> tuple[Any, Any]:
    tx = optax.with_extra_args_support(tx)

    def step(carry: Any, _: Any) -> Any:
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params, value=value)
        return (optax.apply_updates(params, updates), state), None

    leaves, tree = jax.tree.flatten((params, state))

    def run(*leaves: Any) -> Any:
        return jax.tree.leaves(jax.lax.scan(step, tree.unflatten(leaves), None, length=steps)[0])

    lowered = jax.jit(run).lower(*leaves)
    # `adam(h)` and `scale_by_adam()` in front of `scale(-h)` are one program, and so are others.
    if (program := (lowered.as_text(), repr(leaves))) not in ENDS:
        ENDS[program] = lowered.compile()(*leaves)
    return tree.unflatten(ENDS[program])


# Those that change nothing of Adam here: one test has them all, because most of them are one program with it.
AROUND_ADAM = """chain conditionally_mask conditionally_transform flatten freeze inject_hyperparams masked
    multi_transform named_chain partition selective_transform set_to_zero snapshot split_real_and_imaginary
    with_extra_args_support"""


def _families() -> dict[str, list[str]]:
    families: dict[str, list[str]] = {}
    for name in TRANSFORMATIONS:
        family = "adam" if name in AROUND_ADAM.split() else name.removeprefix("scale_by_")
        families.setdefault(family, []).append(name)
    return families


FAMILIES = _families()
QUICK = {("rmsprop", "balanced"), ("lamb", "balanced"), ("stddev", "tangent"), ("acprop", "coefficient")}


@pytest.mark.parametrize(
    ("family", "geometry"),
    [pytest.param(n, g, marks=() if (n, g) in QUICK else slow) for n in FAMILIES for g in GEOMETRIES],
)
def test_every_transformation_trains_or_is_refused_by_name(family: str, geometry: str) -> None:
    for name in FAMILIES[family]:
        trains_or_is_refused(name, geometry)


def trains_or_is_refused(name: str, geometry: str) -> None:
    tx = lro.fixed_rank(make(name), geometry=GEOMETRIES[geometry])
    try:
        state = tx.init(PARAMS)
    except ValueError as error:
        message = str(error)
        assert "does not work inside fixed_rank: " in message or "cannot carry" in message
        assert "use " in message.lower()  # the way out
        return
    params, state = train(tx, PARAMS, state)
    assert float(loss(params)) < 0.997 * float(loss(PARAMS))  # adadelta starts slowly: 0.4 % with dense kernels
    assert int(state.notfinite_count) == 0
    squares = [x for _, nu in optax.tree.get_all_with_path(state, "nu") for x in jax.tree.leaves(nu)]
    assert all(np.all(x >= 0) for x in squares)


REFUSED = {
    "lamb": "scale_by_trust_ratio",
    "lars": "scale_by_trust_ratio",
    "fromage": "scale_by_trust_ratio",
    "rprop": "scale_by_rprop",
    "adafactor": "scale_by_factored_rms",
    "sm3": "scale_by_sm3",
    "lbfgs": "scale_by_",
    "prodigy": "prodigy",
    "dadapt_adamw": "dadapt_adamw",
    "momo": "momo",
    "momo_adam": "momo_adam",
    "cocob": "scale_by_cocob",
    "mechanize": "mechanize",
    "schedule_free_adamw": "schedule_free",
    "schedule_free_sgd": "schedule_free",
    "sam": "sam",
    "galore": "scale_by_galore",
    "madgrad": "scale_by_madgrad",
    "sophia": "scale_by_sophia",
    "scale_by_stddev": "scale_by_stddev",
}


@functools.cache
def wide() -> Any:
    """The parameters with the room that a galerkin loop needs."""
    return lro.resize(PARAMS, None, 4)[0]


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("name", REFUSED)
def test_those_that_fail_in_coordinates_are_refused(name: str, geometry: str) -> None:
    for wrapped in (make(name), optax.chain(optax.clip(1.0), make(name)), optax.masked(make(name), lambda p: True)):
        for tx in (lro.fixed_rank(wrapped, geometry=GEOMETRIES[geometry]), lro.galerkin(wrapped)):
            with pytest.raises(ValueError, match=f"{REFUSED[name]}.* does not work inside fixed_rank: .*use "):
                tx.init(wide())


def test_centred_rmsprop_is_refused() -> None:
    with pytest.raises(ValueError, match="scale_by_stddev does not work inside fixed_rank"):
        lro.fixed_rank(optax.rmsprop(H, centered=True)).init(PARAMS)


def test_those_refused_may_still_train_ordinary_leaves() -> None:
    lro.lowrank_adam(H, ordinary=optax.lamb(H)).init(PARAMS)
    inner = optax.partition({"a": optax.adam(H), "b": optax.lamb(H)}, {"kernel": "a", "bias": "b"})
    lro.fixed_rank(inner).init(PARAMS)
    with pytest.raises(ValueError, match="scale_by_trust_ratio"):
        swapped = optax.partition({"b": optax.adam(H), "a": optax.lamb(H)}, {"kernel": "a", "bias": "b"})
        lro.fixed_rank(swapped).init(PARAMS)


# --- moments by the state's own fields -------------------------------------------------------------------------------


class MyState(NamedTuple):
    velocity: Any
    energy: Any


def my_adam() -> optax.GradientTransformation:
    """Adam under names that no library knows."""

    def init(params: Any) -> MyState:
        return MyState(*(jax.tree.map(jnp.zeros_like, params) for _ in range(2)))

    def update(grads: Any, state: MyState, params: Any = None) -> Any:
        velocity = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, state.velocity, grads)
        energy = jax.tree.map(lambda v, g: 0.99 * v + 0.01 * g**2, state.energy, grads)
        steps = jax.tree.map(lambda m, v: -H * m / (jnp.sqrt(v) + 1e-3), velocity, energy)
        return steps, MyState(velocity, energy)

    return optax.GradientTransformation(init, update)


def optax_adam() -> optax.GradientTransformation:
    return optax.chain(optax.scale_by_adam(0.9, 0.99, 1e-3), optax.scale(-H))


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        ({}, "MyState.energy, MyState.velocity"),
        ({"first_moments": ("velocity",)}, "MyState.energy"),
        ({"second_moments": ("energy",)}, "MyState.velocity"),
    ],
)
def test_unknown_fields_are_refused_by_name(options: Any, fields: str) -> None:
    with pytest.raises(ValueError, match=f"cannot carry {fields} between.*first_moments=.*second_moments="):
        lro.fixed_rank(my_adam(), **options).init(PARAMS)


@slow
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("width", [None, 4])
def test_named_fields_are_carried_in_steps_and_by_resize(geometry: str, width: int | None) -> None:
    """As those of the same method whose fields are known, but for Adam's correction of the bias."""

    class Known(NamedTuple):
        mu: Any
        nu: Any

    inner = my_adam()
    known = optax.GradientTransformation(
        lambda p: Known(*inner.init(p)),
        lambda g, s, p=None: (lambda u, t: (u, Known(*t)))(*inner.update(g, MyState(*s), p)),
    )
    ends = []
    for tx, options in ((inner, {"first_moments": ("velocity",), "second_moments": ("energy",)}), (known, {})):
        low = lro.fixed_rank(tx, geometry=GEOMETRIES[geometry], **options)
        params, state = train_more(low, PARAMS, low.init(PARAMS), 5)
        params, state = lro.resize(params, state, width)
        ends.append(lro.densify(train_more(low, params, state, 5)[0]))
    for a, b in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


def train_more(tx: Any, params: Any, state: Any, steps: int) -> tuple[Any, Any]:
    step = step_of(tx, loss)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


# --- keys of the user's tree -----------------------------------------------------------------------------------------

# Every field name in the states of Optax.
NAMES = ("w", "mu", "nu", "nu_max", "n", "m", "v", "g", "trace", "ema", "e_g", "sum_of_squares", "count", "inner_state")


def named_tuple(values: dict[str, Any]) -> Any:
    return NamedTuple("Params", [(name, Any) for name in values])(**values)  # type: ignore[misc]


def data_class(values: dict[str, Any]) -> Any:
    cls = dataclasses.make_dataclass("Params", list(values), frozen=True)
    return jax.tree_util.register_dataclass(cls, list(values), [])(**values)


CONTAINERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "dict": dict,
    "named tuple": named_tuple,
    "dataclass": data_class,
    "nested": lambda values: named_tuple({k: {k: [named_tuple({k: x})]} for k, x in values.items()}),
    "list": lambda values: [*values.values()],
}
BY_NAME = {
    "heavy ball": lro.lowrank_heavy_ball(H),
    "adam coefficient": lro.lowrank_adam(H, eps=1e-3, geometry=lro.Coefficient()),
}


def kernels_of(params: Any) -> list[Any]:
    return jax.tree.leaves(params, is_leaf=lro.is_lowrank)


@pytest.mark.parametrize(
    ("container", "optimizer"),
    [pytest.param(c, "heavy ball", marks=() if c == "named tuple" else slow) for c in CONTAINERS]
    + [pytest.param(c, "adam coefficient", marks=slow) for c in ("named tuple", "dict")],
)
def test_names_of_parameters_do_not_matter(container: str, optimizer: str) -> None:
    """A kernel called like a field of a state moves as the one called `w`, by itself and beside it."""
    tx = BY_NAME[optimizer]
    ends = []
    for names in (NAMES[:1], NAMES):
        params = CONTAINERS[container](dict.fromkeys(names, PARAMS["kernel"]))
        state = tx.init(params)
        objective = lambda p: sum(loss({"kernel": W, "bias": jnp.zeros(5)}) for W in kernels_of(p))  # noqa: E731
        step = step_of(tx, objective)
        for _ in range(5):
            params, state = step(params, state)
        ends.append([W.to_dense() for W in kernels_of(params)])
    (alone,), together = ends
    assert len(together) == len(NAMES) and not np.allclose(alone, PARAMS["kernel"].to_dense(), atol=1e-2)
    for W in together:
        np.testing.assert_allclose(W, alone, rtol=1e-10, atol=1e-12)


# --- extra arguments -------------------------------------------------------------------------------------------------


def test_extra_arguments_reach_the_inner_transformation_unchanged() -> None:
    seen: dict[str, Any] = {}

    def update(grads: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        seen.update(extra)
        return grads, state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    for tx in (lro.fixed_rank(inner), lro.fixed_rank(optax.chain(inner, optax.scale(-1.0)))):
        seen.clear()
        given = {"momentum": 0.5, "kernels": [1, 2], "value_fn": print, "params_": PARAMS}
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, **given)
        assert set(seen) == set(given) and all(seen[k] is given[k] for k in given)


def test_an_inner_transformation_with_a_jitted_update() -> None:
    """All that it is given are arrays."""
    inner = optax.adam(H)
    jitted = optax.GradientTransformation(inner.init, jax.jit(inner.update))
    tx = lro.fixed_rank(jitted)
    updates, _ = jax.jit(tx.update)(PARAMS, tx.init(PARAMS), PARAMS)
    plain = lro.fixed_rank(inner)
    for a, b in zip(
        jax.tree.leaves(updates), jax.tree.leaves(plain.update(PARAMS, plain.init(PARAMS), PARAMS)[0]), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)
