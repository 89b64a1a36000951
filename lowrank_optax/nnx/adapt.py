"""Changes of the frozen kernels of nnx models, in variables of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from lowrank_optax import adapters as ad
from lowrank_optax.adapters.change import Change, array_fields
from lowrank_optax.adapters.create import as_kind
from lowrank_optax.adapters.lowrank import as_change
from lowrank_optax.adapters.shared import shared_in
from lowrank_optax.adapters.trees import changes, is_bank, nested, with_banks
from lowrank_optax.axes import Axes, Rank, Where, check_where
from lowrank_optax.einsum import product as einsum_product
from lowrank_optax.lowrank import is_lowrank
from lowrank_optax.nnx.inplace import axes_or_reason, nothing
from lowrank_optax.nnx.stock import declared, hook_of
from lowrank_optax.nnx.where import Parameter, parameters
from lowrank_optax.product import Product, trailing_columns


class AdapterParam(nnx.Variable):  # type: ignore[type-arg]
    """The trained arrays of the change of a kernel: `wrt=AdapterParam` trains them and nothing else."""


class AdapterBuffer(nnx.Variable):  # type: ignore[type-arg]
    """Arrays of a change that are not trained: scales, frozen frames, random banks."""


class Fields(nnx.Module):
    """The arrays of a change, each in a variable of its own, so that every optimizer of Optax may keep copies.

    The scale of a pair is there twice: rules of optimizers read an `AdapterParam`, and the product an `AdapterBuffer`,
    which no optimizer can decay.
    """

    def __init__(self, change: Change) -> None:
        self.kind = nnx.static(type(change))
        arrays = array_fields(change)
        for field in dataclasses.fields(change):  # type: ignore[arg-type]
            name, value = field.name, getattr(change, field.name)
            if name not in arrays:
                setattr(self, name, nnx.static(value))
            elif isinstance(value, Change):
                setattr(self, name, Fields(value))
            elif value is not None:
                setattr(self, name, (AdapterBuffer if name in change.frozen else AdapterParam)(value))
        if isinstance(change, ad.LoRA):
            self.scale_of_product = AdapterBuffer(change.scale)
            self.scale = AdapterParam(change.scale)

    def value(self) -> Change:
        """The change."""
        kind: Any = self.kind
        values: dict[str, Any] = {field.name: getattr(self, field.name, None) for field in dataclasses.fields(kind)}
        for name in array_fields(kind):
            x = values[name]
            values[name] = x.value() if isinstance(x, Fields) else None if x is None else x.get_value()
        if issubclass(kind, ad.LoRA):
            values["scale"] = self.scale_of_product.get_value()
        change: Change = kind(**values)
        return change


class Adapter(nnx.Module):
    """The product of a layer whose kernel has a change; `adapt` puts it into the layer's hook.

    Attributes:
      change: the `Fields` of the change, or an `AdapterParam` with a `LowRank`.
      bank: the bank that layers share, in one variable for all of them; None for kinds without one.
      bank_name: its name in the tree of changes.
      name: the hook, as in `nnx.Linear.dot_general`.
    """

    def __init__(self, change: Any, banks: dict[str, Any], name: str, times: Any, replaced: Any) -> None:
        self.change = AdapterParam(change) if is_lowrank(change) else Fields(change)
        shared = shared_in(change)
        self.bank_name = nnx.static(shared[0].bank_name if shared else None)
        self.bank = nnx.data(banks[shared[0].bank_name] if shared else None)
        self.name = name
        self.times = nnx.static(times)
        self.replaced = nnx.static(replaced)

    def without_bank(self) -> Any:
        """The change in the form that `init` gives it."""
        return self.change.value() if isinstance(self.change, Fields) else self.change.get_value()

    def value(self) -> Change:
        """The change with all its arrays."""
        change = as_change(self.without_bank())
        with_bank: Change = with_banks(change, self.banks())
        return with_bank

    def banks(self) -> dict[str, Any]:
        """The bank by its name, if there is one."""
        return {} if self.bank is None else {str(self.bank_name): self.bank.get_value()}

    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        at = 2 if self.name == "einsum_op" else 1
        base, change = args[at], self.value()

        def times(K: Any) -> jax.Array:
            return self.times(*args[:at], K, *args[at + 1 :], **kwargs)

        columns = trailing_columns(change.batch)
        product = einsum_product(args[0], args[1], times) if self.name == "einsum_op" else Product(times, columns)
        return change.apply(base, product)


def adapt(
    model: Any,
    rank: Rank | None = None,
    *,
    delta: Any = None,
    rngs: nnx.Rngs | None = None,
    kind: Any = "lowrank",
    start: Any = "zero",
    alpha: float | None = None,
    scale: str = "alpha/r",
    where: Where | None = None,
) -> None:
    r"""Gives kernels of an nnx model a trained change, in place; the kernels themselves stay as they are.

    .. math:: y = x W_0 + s\,x D + b

    The changes are `AdapterParam` variables below the hooks of stock layers: `nnx.Linear`, `nnx.LinearGeneral` (hence
    `nnx.MultiHeadAttention`), `nnx.Einsum`, and `nnx.Conv` without groups and mask. Take gradients with
    `nnx.DiffState(0, lro.nnx.AdapterParam)` and optimise with `wrt=lro.nnx.AdapterParam`.

    Args:
      model: an nnx module.
      rank: as in `lowrank_optax.adapters.init`, like all arguments below.
      delta: in place of `rank`, a tree of changes, from `lowrank_optax.adapters.load` say.
      rngs: the stream `params` draws the changes, default `nnx.Rngs(0)`.
      kind: the parametrisation.
      start: the start; other starts than zero correct the kernels.
      alpha: the constant of the scale.
      scale: the scale.
      where: callable of path and shape that returns False to leave a kernel as it is.

    Raises:
      TypeError: unless either `rank` or `delta` is given, or for anything but a module.
      ValueError: as in `lowrank_optax.adapters.init`, and for changes without a layer that can run them.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp, lowrank_optax as lro, optax
      >>> model = nnx.Linear(8, 6, rngs=nnx.Rngs(0))
      >>> lro.nnx.adapt(model, rank=2, kind="lora", alpha=4)
      >>> tx = lro.adapters.optimizer(optax.adamw(1e-2), rule="plus")
      >>> optimizer = nnx.Optimizer(model, tx, wrt=lro.nnx.AdapterParam)
      >>> loss = lambda model: jnp.mean(model(jnp.ones((3, 8))) ** 2)
      >>> grads = nnx.grad(loss, argnums=nnx.DiffState(0, lro.nnx.AdapterParam))(model)
      >>> _ = optimizer.update(model, grads)
    """
    if not any(True for _ in nnx.iter_modules(model)):
        raise TypeError(f"nnx.adapt changes an nnx module in place, got {type(model).__name__}")
    if (rank is None) == (delta is None):
        raise TypeError(f"nnx.adapt takes either rank or delta, got {'neither' if rank is None else 'both'}")
    if rngs is not None and not isinstance(rngs, nnx.Rngs):
        raise TypeError(f"rngs is nnx.Rngs(...), got {type(rngs).__name__}")
    check_where(where)
    found = parameters(model)
    corrected: dict[str, Any] = {}
    if delta is None:
        assert rank is not None
        axes, reasons = _chosen(found, rank if as_kind(kind).bounded else 1, where)
        if not axes:
            raise ValueError(nothing(rank, found, reasons, "change"))
        key = (nnx.Rngs(0) if rngs is None else rngs).params()
        kernels = {name: found[name].variable.get_value() for name in axes}
        options = dict(kind=kind, start=start, alpha=alpha, scale=scale)
        corrected, delta = ad.init(key, kernels, rank, where=lambda name, shape: axes[name], **options)
        corrected = {name: kernel for name, kernel in corrected.items() if kernel is not kernels[name]}
    _install(found, delta)
    for name, kernel in corrected.items():
        found[name].variable.set_value(kernel)


def adapters(model: Any) -> Any:
    """The tree of changes of an adapted model, by the path of their kernels: what `lowrank_optax.adapters` takes.

    Args:
      model: an nnx module.

    Returns:
      Nested dicts of changes, for `lowrank_optax.adapters.export` say. Empty if there are none.

    Example:
      >>> from flax import nnx
      >>> import lowrank_optax as lro
      >>> model = nnx.Linear(8, 6, rngs=nnx.Rngs(0))
      >>> lro.nnx.adapt(model, rank=2)
      >>> lro.nnx.adapters(model)["kernel"].shape
      (8, 6)
    """
    found = {name: _adapter(parameter) for name, parameter in parameters(model).items()}
    of_kernels = {name: adapter for name, adapter in found.items() if adapter is not None}
    tree = nested({name: adapter.without_bank() for name, adapter in of_kernels.items()})
    for adapter in of_kernels.values():
        tree |= adapter.banks()
    return tree


def merge_adapters(model: Any) -> None:
    """Replaces the kernels of an adapted model by the kernels that it computes with, in place; see `adapters.merge`.

    Args:
      model: an nnx module.

    Example:
      >>> from flax import nnx
      >>> import lowrank_optax as lro
      >>> model = nnx.Linear(8, 6, rngs=nnx.Rngs(0))
      >>> lro.nnx.adapt(model, rank=2)
      >>> lro.nnx.merge_adapters(model)
      >>> lro.nnx.adapters(model)
      {}
    """
    for name, parameter in parameters(model).items():
        adapter = _adapter(parameter)
        if adapter is None:
            continue
        base = parameter.variable.get_value()
        merged = ad.merge({name: base}, {name: adapter.value()})
        parameter.variable.set_value(merged[name])
        for layer in parameter.layers:
            setattr(layer, adapter.name, nnx.static(adapter.replaced))


def _chosen(found: dict[str, Parameter], rank: Rank, where: Where | None) -> tuple[dict[str, Axes], dict[str, str]]:
    """The axes of kernels that get a change, and the reasons of the others."""
    axes: dict[str, Axes] = {}
    reasons: dict[str, str] = {}
    for name, parameter in found.items():
        given = axes_or_reason(name, parameter, rank, where)
        if isinstance(given, Axes) and is_lowrank(parameter.variable.get_raw_value()):
            given = "it is factored"
        if isinstance(given, Axes) and any(isinstance(declared(layer), str) for layer in parameter.layers):
            given = "it belongs to a module of your own"
        if isinstance(given, Axes):
            axes[name] = given
        else:
            reasons[name] = given
    return axes, reasons


def _install(found: dict[str, Parameter], delta: Any) -> None:
    """Puts changes into the hooks of layers, all of them or none."""
    if not isinstance(delta, Mapping):
        raise TypeError(f"delta is a tree of changes made by lro.adapters.init, got {type(delta).__name__}")
    of_tree = {key: x for key, x in delta.items() if is_bank(x)}
    of_kernels = changes({key: x for key, x in delta.items() if not is_bank(x)})
    if not of_kernels:
        raise ValueError("delta has no changes, so nothing would be adapted")
    for name, change in of_kernels.items():
        _check_layer(name, found.get(name), change, of_tree)
    there = {key for parameter in found.values() if (x := _adapter(parameter)) is not None for key in x.banks()}
    if again := sorted(there & of_tree.keys()):
        raise ValueError(
            f"the model has a bank {again[0]!r} already, which all layers of its kind share: adapt them in one call"
        )
    banks = {key: (AdapterParam if x.label == "trained" else AdapterBuffer)(x) for key, x in of_tree.items()}
    for name, change in of_kernels.items():
        layers = found[name].layers
        hook, ours = hook_of(layers[0])
        adapter = Adapter(change, banks, hook, ours, getattr(layers[0], hook))
        for layer in layers:
            setattr(layer, hook, nnx.data(adapter))


def _check_layer(name: str, parameter: Parameter | None, change: Any, banks: dict[str, Any]) -> None:
    """Raises ValueError where the layers of a kernel cannot run its change."""
    if parameter is None or isinstance(parameter.axes, str):
        reason = "the model has no such kernel" if parameter is None else parameter.axes
        raise ValueError(f"no layer can run the change of {name!r}: {reason}")
    if not as_change(with_banks(change, banks)).fits(parameter.shape):
        raise ValueError(f"the change of {name!r} is for a kernel of another shape than {parameter.shape}")
    shared = shared_in(change)
    if shared and as_change(change).batch:
        kind = shared[0].kind
        raise ValueError(f"the layers of {name!r} are stacked and cannot share the bank of kind {kind!r}: use linen")


def _adapter(parameter: Parameter) -> Adapter | None:
    """The adapter of the layers whose kernel a parameter is."""
    layers = [layer for layer in parameter.layers if getattr(layer, "kernel", None) is parameter.variable]
    values = [value for layer in layers for value in vars(layer).values()]
    return next((x for x in values if isinstance(x, Adapter)), None)
