"""`init`: changes of the chosen kernels of a parameter tree."""

from __future__ import annotations

import dataclasses
import inspect
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax.adapters.allora import ALLoRA
from lowrank_optax.adapters.blockwise import C3A, GraLoRA, MiSS
from lowrank_optax.adapters.butterfly import BOFT, OFT, NeumannOFT
from lowrank_optax.adapters.change import Change, dense_base, is_parameter, to_dense
from lowrank_optax.adapters.components import Components, DeLoRA
from lowrank_optax.adapters.core import Core, SingularValues
from lowrank_optax.adapters.lora import LoRA
from lowrank_optax.adapters.lowrank import LowRankChange
from lowrank_optax.adapters.magnitude import Over
from lowrank_optax.adapters.nola import NOLA
from lowrank_optax.adapters.randlora import RandLoRA
from lowrank_optax.adapters.request import Request
from lowrank_optax.adapters.rotation import Householder
from lowrank_optax.adapters.shared import VeRA, shared_in
from lowrank_optax.adapters.sparse import Entries, Sparse
from lowrank_optax.adapters.starts import Zero, as_start
from lowrank_optax.adapters.structured import Fourier, HiRA, LoHa, LoKr
from lowrank_optax.adapters.tensor_train import TensorTrain
from lowrank_optax.adapters.trees import nested
from lowrank_optax.adapters.vblora import VBLoRA
from lowrank_optax.axes import Axes, Rank, Where, check_where, matrix_shape, rank_number, split_axes
from lowrank_optax.boxes import closed, opened
from lowrank_optax.linalg import check_floating, highest_precision, working_dtype
from lowrank_optax.lowrank import is_lowrank
from lowrank_optax.paths import listed, path_name, refuse_nnx, refuse_shape
from lowrank_optax.product import is_composed
from lowrank_optax.rank import check_int, check_number

_CLASSES = (
    *(LowRankChange, LoRA, ALLoRA, Components, DeLoRA, Core, SingularValues, Entries, Sparse),
    *(VeRA, RandLoRA, VBLoRA, NOLA),
    *(LoHa, HiRA, LoKr, Fourier, TensorTrain, MiSS, GraLoRA, C3A),
    *(Householder, OFT, NeumannOFT, BOFT),
)
KINDS: dict[str, Any] = {kind.kind: kind for kind in _CLASSES}
KINDS["dora"] = Over(LoRA)

_SCALES = {"alpha/r": lambda alpha, r: alpha / r, "alpha/sqrt(r)": lambda alpha, r: alpha / r**0.5}


def init(
    key: jax.Array,
    params: Any,
    rank: Rank,
    *,
    kind: Any = "lowrank",
    start: Any = "zero",
    alpha: float | None = None,
    scale: str = "alpha/r",
    where: Where | None = None,
) -> tuple[Any, Any]:
    r"""Trained changes of frozen kernels, in a tree of their own.

    .. math:: W = W_0 + s\,D, \quad s = \alpha / r

    Args:
      key: a PRNG key. A kernel draws by its path, whatever other kernels there are.
      params: the parameters of the model, in any floating dtype.
      rank: an int, a fraction of `min(m, n)` in (0, 1], or a callable of path and shape.
      kind: the parametrisation, a name of the table in `lowrank_optax.adapters`, `variant(kind, ...)` for one with
        other settings, or `magnitude(kind)` for DoRA's lengths over another one.
      start: `"zero"`, `"pissa"`, `"olora"`, `"orthogonal"`, `gradient(grads)`, `activation(inputs)`, or
        `sign_step(grads)`.
      alpha: the constant of the scale, positive; None for s = 1. For `"fourier"` and `"delora"` the scale is alpha
        itself, 150 and 15 by default. Kinds without a scale in the table make no use of it.
      scale: `"alpha/r"`, `"alpha/sqrt(r)"`, or `"none"` for s = 1.
      where: callable of the path and the shape that says which kernels change and how their axes split, as in
        `factorize`; `lowrank_optax.linen.kernels(model, x)` reads them off a model. Default: every leaf named `kernel`
        with `min(m, n) >= rank` whose axes leave no doubt.

    Returns:
      `params, delta`. The parameters come back as they are, except that kernels give way to a change that does not
      start at zero. `delta` has nested dicts with one change for each chosen kernel, in float32 or better: it is what
      the optimizer gets.

    Raises:
      TypeError: for a kind, or an alpha, of another type.
      ValueError: for a kernel that the kind cannot change, a rank above `min(m, n)`, an unknown kind, start or scale,
        an alpha that is not positive and finite, or if there is no kernel to change.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, lowrank_optax as lro
      >>> model, x = nn.Dense(6), jnp.ones((2, 8))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> params, delta = lro.adapters.init(jax.random.key(1), params, rank=2, kind="lora", alpha=4)
      >>> delta["kernel"].A.shape, float(delta["kernel"].scale)
      ((8, 2), 2.0)
      >>> lro.linen.apply(model)({"params": params, "adapters": delta}, x).shape
      (2, 6)
    """
    refuse_nnx(params, "adapters.init", "lowrank_optax.nnx.adapt(model, rank)")
    check_where(where)
    of_kind, of_start = as_kind(kind), as_start(start)
    _check_alpha(alpha)
    if scale not in (*_SCALES, "none"):
        raise ValueError(f"scale is one of {[*_SCALES, 'none']}, got {scale!r}")
    found: dict[str, Any] = {}
    requests: list[Request] = []
    seen: list[str] = []

    def one(path: Any, box: Any) -> Any:
        leaf, name = opened(box), path_name(path)
        shape = tuple(jnp.shape(leaf))
        if len(shape) >= 2:
            seen.append(f"  {name} {shape}")
        axes = split_axes(name, shape, where, rank if of_kind.bounded else 1)
        if axes is None:
            return box
        request = _request(key, name, leaf, axes, rank, of_kind, of_start, alpha, scale)
        requests.append(request)
        found[name], taken = of_kind.make(request)
        if jax.tree_util.all_leaves([found[name]]):
            raise TypeError(
                f"{type(found[name]).__name__} is no pytree: put @jax.tree_util.register_dataclass and "
                "@dataclasses.dataclass(frozen=True) above the class, or set what a kind has by lro.adapters.variant"
            )
        if taken is not None and is_composed(leaf):
            what = f"kind {of_kind.kind!r}" if isinstance(of_start, Zero) else f"start={of_start.name!r}"
            raise ValueError(f"{what} corrects {name!r}, which is quantized: quantize after init")
        return box if taken is None else closed(box, _without(request, taken).astype(leaf.dtype))

    params = jax.tree_util.tree_map_with_path(one, params, is_leaf=is_parameter)
    if not found:
        raise ValueError(f"no kernel to change at rank {rank}. Parameters with two axes or more:\n{listed(seen)}")
    return params, _with_bank(key, requests, list(found.values()), nested(found))


def as_kind(kind: Any) -> Any:
    """The kind that an argument means."""
    if isinstance(kind, str):
        if kind not in KINDS:
            raise ValueError(f"kind is one of {sorted(KINDS)} or lro.adapters.magnitude(kind), got {kind!r}")
        return KINDS[kind]
    if not hasattr(kind, "make"):
        raise TypeError(f"kind is a name, one of {sorted(KINDS)}, or a class of changes, got {kind!r}")
    return kind


@dataclasses.dataclass(frozen=True)
class Variant:
    """A kind with other settings than its own."""

    of: Any
    settings: dict[str, Any]

    @property
    def kind(self) -> str:
        """Its name in messages."""
        name: str = self.of.kind
        return name

    @property
    def bounded(self) -> bool:
        """Whether its rank is at most `min(m, n)`."""
        return bool(self.of.bounded)

    @property
    def own_alpha(self) -> float | None:
        """The scale by default of a kind whose scale is `alpha` itself."""
        own: float | None = self.of.own_alpha
        return own

    def make(self, request: Request) -> tuple[Any, Any]:
        """The change at the start."""
        made: tuple[Any, Any] = self.of.make(request, **self.settings)
        return made


def variant(kind: str, **settings: Any) -> Variant:
    """A kind with other settings, for `init`.

    These are `factors` of `boft`, `vectors`, `length` and `top` of `vblora`, `bases` of `nola`, `k` of `gralora`,
    `density` of `rosa`, `eta` of `allora`.

    Args:
      kind: the name of the kind.
      **settings: its settings, the arguments of its `make` beside the kernel.

    Returns:
      A kind for `init`.

    Raises:
      TypeError: for settings that the kind does not have, or of another type.
      ValueError: for settings that are not positive.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> kind = lro.adapters.variant("vblora", vectors=16, length=3)
      >>> params, delta = lro.adapters.init(jax.random.key(0), {"kernel": jnp.eye(6)}, rank=2, kind=kind)
      >>> delta["kernel"].logits_A.shape, delta["vblora_bank"].vectors.shape
      ((2, 2, 16), (16, 3))
    """
    of = as_kind(kind)
    known = list(inspect.signature(of.make).parameters)[1:]
    if not set(settings) <= set(known):
        raise TypeError(f"kind {kind!r} has the settings {known}, got {sorted(settings)}")
    for name, value in settings.items():
        annotation = inspect.signature(of.make).parameters[name].annotation
        check = {"int": check_int, "float": check_number}.get(str(annotation).removesuffix(" | None"))
        if check is None or (value is None and annotation.endswith("None")):
            continue
        check(name, value)
        if not value > 0:
            raise ValueError(f"{name} of kind {kind!r} is positive, got {value}")
    return Variant(of, settings)


def magnitude(kind: Any) -> Over:
    """DoRA's trained lengths of output columns over the change of directions of another kind, for `init`.

    Args:
      kind: the kind of the change of directions, `"lowrank"` say.

    Returns:
      A kind for `init`, see `lowrank_optax.adapters.Magnitude`.

    Raises:
      TypeError: for a kind that is no difference D of W0, as `"dora"` itself.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> kind = lro.adapters.magnitude("lowrank")
      >>> params, delta = lro.adapters.init(jax.random.key(0), {"kernel": jnp.eye(6)}, rank=2, kind=kind)
      >>> delta["kernel"].magnitude.shape
      (6,)
    """
    of = as_kind(kind)
    of_class = of.of if isinstance(of, Variant) else of
    if getattr(of_class, "part", Change.part) is Change.part:
        raise TypeError(f"magnitude needs a kind that is a difference of kernels, W0 + D, and {of.kind!r} is none")
    return Over(of)


def _request(
    key: Any, name: str, leaf: Any, axes: Axes, rank: Rank, kind: Any, start: Any, alpha: float | None, scale: str
) -> Request:
    if is_lowrank(leaf):
        raise ValueError(f"{name!r} is factored: a change needs a dense kernel, which lowrank_optax.densify makes")
    if not is_composed(leaf):
        check_floating(name, leaf, "changed")
        refuse_shape(name, leaf, "lro.adapters.init(key, params, rank)")
    shape = tuple(leaf.shape)
    m, n = matrix_shape(shape, axes)
    r = rank_number(rank, name, shape, min(m, n))
    if kind.bounded and r > min(m, n):
        raise ValueError(f"rank {r} is larger than min(m, n) = {min(m, n)} of the kernel {name!r} of shape {shape}")
    dense = dense_base(leaf)
    W = dense.astype(working_dtype(dense)).reshape(*shape[: axes.batch], m, n)
    of_path = jax.random.fold_in(key, zlib.crc32(name.encode()))
    return Request(of_path, name, W, shape, axes, r, _scale(kind, alpha, scale, r), start)


def _check_alpha(alpha: Any) -> None:
    """Raises unless alpha is a positive number or None."""
    if alpha is None:
        return
    if isinstance(alpha, bool) or not hasattr(alpha, "__float__") or jnp.ndim(alpha):
        raise TypeError(f"alpha is a positive number or None, got {alpha!r}")
    if not 0 < float(alpha) < math.inf:
        raise ValueError(f"alpha is a positive number or None, got {alpha!r}")


def _scale(kind: Any, alpha: float | None, scale: str, rank: int) -> float:
    if kind.own_alpha is not None:
        return float(kind.own_alpha if alpha is None else alpha)
    return 1.0 if alpha is None or scale == "none" else float(_SCALES[scale](alpha, rank))


@highest_precision
def _without(request: Request, taken: Any) -> jax.Array:
    """W0 without what the change takes over."""
    return (request.W - to_dense(taken)).reshape(request.shape)


def _with_bank(key: jax.Array, requests: list[Request], changes: list[Any], delta: dict[str, Any]) -> dict[str, Any]:
    """The tree with the bank that its changes share, if they do."""
    shared = shared_in(changes)
    if not shared:
        return delta
    kind = type(shared[0])
    name = kind.bank_name
    if name in delta:
        raise ValueError(f"the parameters have an entry {name!r}, the name of the bank of kind {kind.kind!r}")
    of_bank = jax.random.fold_in(key, zlib.crc32(name.encode()))
    return {**delta, name: kind.draw_bank(of_bank, requests, shared)}
