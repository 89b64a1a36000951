"""`kernels`: the axes of every kernel of a model, read off its layers."""

from __future__ import annotations

from typing import Any, NamedTuple

from flax import nnx

from lowrank_optax.axes import Axes, Rank, fits, matrix_shape, rank_number
from lowrank_optax.linalg import is_floating
from lowrank_optax.lowrank import is_lowrank
from lowrank_optax.nnx.stock import declared

# Modules that normalise each array among the parameters of another one.
_NORMALIZERS = (nnx.WeightNorm, nnx.SpectralNorm)


class Parameter(NamedTuple):
    """A variable with two axes or more, and the modules that own it."""

    variable: Any
    layers: list[Any]
    axes: Axes | str  # how a stock layer uses it, or the reason to stay dense

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.variable.get_raw_value().shape)


class Kernels:
    """A `where` of `factorize`, see `kernels`.

    Attributes:
      axes: for the path of every kernel that can be factored, or is, its axes.
      reasons: for the path of every other parameter with two axes or more, the reason why it stays dense.
    """

    def __init__(self, parameters: dict[str, Parameter]) -> None:
        self.axes = {name: p.axes for name, p in parameters.items() if isinstance(p.axes, Axes)}
        self.reasons = {name: p.axes for name, p in parameters.items() if isinstance(p.axes, str)}

    def __call__(self, path: str, shape: tuple[int, ...]) -> Axes | bool:
        return self.axes.get(path, False)


def kernels(model: Any, rank: Rank | None = None) -> Kernels:
    """The kernels of an nnx model that can be factored, as a `where` of `factorize`, and the reasons for all others.

    `factorize` asks it by itself. Use it to see why a parameter stays dense.

    Args:
      model: an nnx module.
      rank: the rank given to `factorize`, which leaves a kernel dense if its `min(m, n)` is smaller. Default: any rank.

    Returns:
      Callable `(path, shape) -> Axes | False`. Its attribute `axes` is a dict from the paths of kernels to their axes,
      `reasons` a dict from the paths of other parameters with two axes or more to the reason why they stay dense.

    Example:
      >>> from flax import nnx
      >>> import lowrank_optax as lro
      >>> rngs = nnx.Rngs(0)
      >>> grouped = nnx.Conv(6, 6, (3,), feature_group_count=2, rngs=rngs)
      >>> where = lro.nnx.kernels(nnx.Sequential(nnx.Conv(4, 6, (3,), rngs=rngs), grouped))
      >>> where.axes
      {'layers/0/kernel': Axes(batch=0, inputs=2)}
      >>> where.reasons
      {'layers/1/kernel': 'its layer is grouped, feature_group_count=2'}
    """
    found = parameters(model)
    if rank is not None:
        found = {name: p._replace(axes=axes_at(name, p, rank)) for name, p in found.items()}
    return Kernels(found)


def axes_at(name: str, parameter: Parameter, rank: Rank) -> Axes | str:
    """The axes of a parameter whose kernel allows a rank, or the reason why it stays dense."""
    axes, shape = parameter.axes, parameter.shape
    if isinstance(axes, str) or is_lowrank(parameter.variable.get_raw_value()):
        return axes
    if fits(rank, name, shape, axes):
        return axes
    limit = min(matrix_shape(shape, axes))
    return f"rank {rank_number(rank, name, shape, limit)} is above min(m, n) = {limit}"


def parameters(model: Any) -> dict[str, Parameter]:
    """The parameters of a model with two axes or more, by path."""
    modules = dict(nnx.iter_modules(model))
    owners: dict[int, list[tuple[str, Any]]] = {}
    normalized: dict[int, str] = {}
    for path, module in modules.items():
        within = [type(m).__name__ for p, m in modules.items() if isinstance(m, _NORMALIZERS) and p == path[: len(p)]]
        for attribute, x in vars(module).items():
            if isinstance(x, nnx.Variable):
                owners.setdefault(id(x), []).append((attribute, module))
                if within:
                    normalized[id(x)] = within[0]

    found: dict[str, Parameter] = {}
    for path, x in nnx.iter_graph(model):
        # The kernel of a stock layer may be of any type of variable, frozen weights for one.
        if not isinstance(x, nnx.Variable) or len(getattr(x.get_raw_value(), "shape", ())) < 2:
            continue
        used = owners.get(id(x), [])
        stock = bool(used) and all(attribute == "kernel" for attribute, _ in used)
        if not stock and not isinstance(x, nnx.Param):
            continue
        reason = f"its layer runs within {normalized[id(x)]}, which normalises arrays" if id(x) in normalized else None
        layers = [module for _, module in used]
        found["/".join(map(str, path))] = Parameter(x, layers, reason or _axes(x, used))
    return found


def counted(model: Any) -> list[tuple[str, Any]]:
    """The values of a model that count as its parameters, by path: `nnx.Param` and the kernels of stock layers."""
    named = {"/".join(map(str, path)): x for path, x in nnx.iter_graph(model) if isinstance(x, nnx.Param)}
    named |= {name: p.variable for name, p in parameters(model).items()}
    return [(name, x.get_raw_value()) for name, x in named.items()]


def _axes(variable: Any, used: list[tuple[str, Any]]) -> Axes | str:
    """The axes that all layers which own a variable agree on, or a reason."""
    if not used:
        return "it belongs to a container and to no layer"
    value = variable.get_raw_value()
    if not is_lowrank(value) and not is_floating(value):
        return f"its dtype is {value.dtype}"
    answers: list[Axes | str] = []
    for attribute, module in used:
        kernel = declared(module)
        if attribute != "kernel" and not isinstance(kernel, str):
            kernel = f"it is no kernel of its layer, {type(module).__name__}"
        answers.append(kernel if isinstance(kernel, str) else kernel.axes_in(tuple(value.shape)))
    reasons = [x for x in answers if isinstance(x, str)]
    if reasons:
        shared = "its layer shares it with another: " if len(used) > 1 else ""
        return shared + reasons[0]
    if len(set(answers)) > 1:
        return f"layers that share it use different axes: {', '.join(map(str, sorted(set(answers))))}"
    return answers[0]
