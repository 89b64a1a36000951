r"""Where a pair of factors starts: :math:`D = A B` as matrices, and whether W0 gives way to it."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lowrank_optax import linalg
from lowrank_optax.adapters.request import Request
from lowrank_optax.layout import map_replicated
from lowrank_optax.linalg import working_dtype
from lowrank_optax.lowrank import is_lowrank
from lowrank_optax.paths import path_name
from lowrank_optax.rank import check_number


class Start:
    """How a change starts: the base class of all starts."""

    name: str = "zero"
    kinds: ClassVar[str] = "'lowrank', 'lora' and 'dora'"

    def pair(self, request: Request) -> tuple[jax.Array, jax.Array, bool]:
        """A `(batch..., m, r)`, B `(batch..., r, n)`, and whether `s A B` is taken from W0, so that W starts at W0."""
        raise NotImplementedError

    def bases(self, request: Request) -> tuple[jax.Array, jax.Array] | None:
        """U `(batch..., m, r)` and V `(batch..., n, r)` of a change that starts at zero; None to start at `pair`."""
        return None

    def only_zero(self, kind: str) -> None:
        """Refuses other starts than zero for kinds that have no other."""
        if not isinstance(self, Zero):
            raise self.refused(kind)

    def refused(self, kind: str) -> ValueError:
        """The error of a kind that cannot start so."""
        return ValueError(f"kind {kind!r} starts at zero, start={self.name!r} is for {self.kinds}")


@dataclasses.dataclass(frozen=True)
class Zero(Start):
    """A Kaiming uniform, B = 0: LoRA's start."""

    name: str = "zero"

    def pair(self, request: Request) -> tuple[jax.Array, jax.Array, bool]:
        A = request.uniform(0, request.m, request.rank, bound=request.m**-0.5)
        return A, jnp.zeros((*request.batch, request.rank, request.n), request.W.dtype), False

    def bases(self, request: Request) -> tuple[jax.Array, jax.Array] | None:
        return request.normal(1, request.m, request.rank), request.normal(2, request.n, request.rank)


@dataclasses.dataclass(frozen=True)
class PiSSA(Start):
    r"""The leading singular triples of W0: :math:`s\,A B = U_r \Sigma_r V_r^\top`, shared evenly (arXiv:2404.02948)."""

    name: str = "pissa"

    def pair(self, request: Request) -> tuple[jax.Array, jax.Array, bool]:
        return *map_replicated(_pissa, request.W, rank=request.rank, scale=request.scale), True


@dataclasses.dataclass(frozen=True)
class OLoRA(Start):
    """The leading part of a QR decomposition of W0 transposed: B orthonormal, A triangular (arXiv:2406.01775)."""

    name: str = "olora"

    def pair(self, request: Request) -> tuple[jax.Array, jax.Array, bool]:
        return *map_replicated(_olora, request.W, rank=request.rank), True


@dataclasses.dataclass(frozen=True)
class Orthogonal(Start):
    r"""Factors that are not zero and whose product is: :math:`A = X Q_1 / 10`, :math:`B = Q_2^\top Y / 10`.

    The rows of :math:`Q_1` and :math:`Q_2` are the even and the odd ones of an orthogonal r x r matrix, X and Y are
    Gaussian. It is PEFT's `init_lora_weights="orthogonal"`.
    """

    name: str = "orthogonal"

    def pair(self, request: Request) -> tuple[jax.Array, jax.Array, bool]:
        r = request.rank
        if r % 2:
            raise ValueError(f"start='orthogonal' needs an even rank, and {request.name!r} has rank {r}")
        Q = map_replicated(_orthogonal, request.normal(3, r, r))
        X, Y = request.normal(0, request.m, r // 2, std=0.1), request.normal(1, r // 2, request.n, std=0.1)
        A = jnp.einsum("...mp,...pr->...mr", X, Q[..., 0::2, :], precision="highest")
        return A, jnp.einsum("...pr,...pn->...rn", Q[..., 1::2, :], Y, precision="highest"), False

    def bases(self, request: Request) -> tuple[jax.Array, jax.Array] | None:
        raise ValueError("start='orthogonal' is for pairs, and kind 'lowrank' starts at zero between orthonormal bases")


@dataclasses.dataclass(frozen=True)
class Gradient(Start):
    r"""Singular vectors of a gradient G of the loss: with :math:`G = U \Sigma V^\top` of a kernel of n outputs

    .. math:: A = c\,U_{1..r}, \quad B = c\,V_{r+1..2r}^\top, \quad c = n^{1/4} / \sqrt\gamma.

    W0 gives way to the change. A change of kind `lowrank` starts at zero between the r leading singular vectors of both
    sides instead, so that its first step is the steepest of its rank.

    PEFT's `LoraGAConfig()` has these directions and other lengths, :math:`A = U_{1..r}` and
    :math:`B = c\,\Sigma_{r+1..2r} V_{r+1..2r}^\top`, so its first steps are other ones.

    Attributes:
      gradients: gradients of kernels by path.
      gamma: the constant of the stable scale.

    References:
      arXiv:2407.05000, section 3.
    """

    gradients: Any
    gamma: float = 16.0
    name: str = "gradient"

    def of(self, request: Request) -> jax.Array:
        """The gradient of the kernel as matrices."""
        if request.name not in self.gradients:
            raise ValueError(f"start=gradient(...) has no gradient of {request.name!r}")
        G = jnp.asarray(self.gradients[request.name])
        if G.shape != request.shape:
            raise ValueError(f"the gradient of {request.name!r} has shape {G.shape}, the kernel {request.shape}")
        _check_finite(f"the gradient of {request.name!r}", G)
        return G.astype(working_dtype(G)).reshape(request.W.shape).astype(request.W.dtype)

    def pair(self, request: Request) -> tuple[jax.Array, jax.Array, bool]:
        if 2 * request.rank > min(request.m, request.n):
            raise ValueError(
                f"start=gradient(...) uses 2 rank singular vectors, and rank {request.rank} is above half of "
                f"min(m, n) = {min(request.m, request.n)} of {request.name!r}"
            )
        c = request.n**0.25 / self.gamma**0.5
        return *map_replicated(_from_gradient, self.of(request), rank=request.rank, c=c), True

    def bases(self, request: Request) -> tuple[jax.Array, jax.Array] | None:
        return map_replicated(_leading, self.of(request), rank=request.rank)


@dataclasses.dataclass(frozen=True)
class SignStep(Gradient):
    r"""The first step of sign descent, for kind `core`: :math:`-h\,\mathrm{sign}(G)` to rank r, LoRA-SB's start.

    W starts off W0 by this step, on purpose.

    Attributes:
      step: h.
    """

    step: float = 1e-3
    name: str = "sign_step"
    kinds: ClassVar[str] = "'core'"

    def of(self, request: Request) -> jax.Array:
        """The step of the kernel as matrices."""
        return -self.step * jnp.sign(super().of(request))

    def pair(self, request: Request) -> tuple[jax.Array, jax.Array, bool]:
        raise self.refused("lora")

    def bases(self, request: Request) -> tuple[jax.Array, jax.Array] | None:
        raise self.refused("lowrank")


@dataclasses.dataclass(frozen=True)
class Activation(Start):
    r"""The leading right singular vectors of the inputs of a layer less their mean,

    .. math:: X - \bar X = U \Sigma V^\top, \quad A = V_{1..r}, \quad B = 0.

    A change of kind `lowrank` starts at zero with these inputs and random outputs.

    Attributes:
      inputs: inputs of kernels by path, one example in each row.

    References:
      arXiv:2410.07170, without its redistribution of ranks. PEFT adds up batches and takes the mean away
      too.
    """

    inputs: Any
    name: str = "activation"

    def of(self, request: Request) -> jax.Array:
        """The leading directions `(batch..., m, r)` of the inputs."""
        if request.name not in self.inputs:
            raise ValueError(f"start=activation(...) has no inputs of {request.name!r}")
        X = jnp.asarray(self.inputs[request.name])
        batch, m = request.batch, request.m
        inner = request.shape[len(batch) : request.split.batch + request.split.inputs]
        if X.shape[: len(batch)] != batch or X.shape[X.ndim - len(inner) :] != inner or X.ndim <= len(batch + inner):
            raise ValueError(
                f"the inputs of {request.name!r} have shape {X.shape}, and its kernel takes {(*batch, '...', *inner)}"
            )
        _check_finite(f"an input of {request.name!r}", X)
        X = X.astype(request.W.dtype).reshape(*batch, -1, m)
        if X.shape[-2] <= request.rank:
            raise ValueError(
                f"{X.shape[-2]} inputs of {request.name!r} less their mean have no {request.rank} directions"
            )
        return map_replicated(_right, X, rank=request.rank)

    def pair(self, request: Request) -> tuple[jax.Array, jax.Array, bool]:
        zero = jnp.zeros((*request.batch, request.rank, request.n), request.W.dtype)
        return self.of(request), zero, False

    def bases(self, request: Request) -> tuple[jax.Array, jax.Array] | None:
        return self.of(request), request.normal(2, request.n, request.rank)


def gradient(gradients: Any, *, gamma: float = 16.0) -> Gradient:
    """The start from gradients of the loss with respect to the dense kernels, LoRA-GA's, see `Gradient`.

    Args:
      gradients: a tree like the parameters, the mean over a few batches, say.
      gamma: the constant of the stable scale, positive.

    Returns:
      A start for `init`.

    Raises:
      TypeError, ValueError: for a gamma that is no positive number.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> params = {"kernel": jnp.eye(6)}
      >>> grads = jax.grad(lambda p: jnp.sum(jnp.arange(36.0).reshape(6, 6) * p["kernel"] ** 2))(params)
      >>> start = lro.adapters.gradient(grads)
      >>> params, delta = lro.adapters.init(jax.random.key(0), params, rank=2, kind="lora", start=start)
    """
    check_number("gamma", gamma)
    if not gamma > 0:
        raise ValueError(f"gamma is positive, got {gamma}")
    return Gradient(by_path(gradients), gamma)


def sign_step(gradients: Any, step: float = 1e-3) -> SignStep:
    """The start of kind `core` at a first step of sign descent, see `SignStep`.

    Args:
      gradients: a tree like the parameters, the sum over some batches, say.
      step: the size of the step.

    Returns:
      A start for `init`.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> params = {"kernel": jnp.eye(6)}
      >>> start = lro.adapters.sign_step({"kernel": jnp.arange(36.0).reshape(6, 6)})
      >>> params, delta = lro.adapters.init(jax.random.key(0), params, rank=2, kind="core", start=start)
    """
    return SignStep(by_path(gradients), step=step)


def activation(inputs: Any) -> Activation:
    """The start from inputs of the layers, see `Activation`.

    Args:
      inputs: a tree like the parameters that holds, for each kernel, inputs of its layer over a few batches,
        `(batch..., examples..., in...)`.

    Returns:
      A start for `init`.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> params = {"kernel": jnp.eye(6)}
      >>> start = lro.adapters.activation({"kernel": jax.random.normal(jax.random.key(1), (32, 6))})
      >>> params, delta = lro.adapters.init(jax.random.key(0), params, rank=2, kind="lora", start=start)
    """
    return Activation(by_path(inputs))


def _check_finite(what: str, x: jax.Array) -> None:
    """Refuses NaN and Inf, whose singular vectors mean nothing; a traced array has no values to look at."""
    if not isinstance(x, jax.core.Tracer) and not bool(jnp.all(jnp.isfinite(x))):
        raise ValueError(f"{what} is not finite")


def by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their path."""
    return {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_lowrank)}


STARTS: dict[str, Start] = {start.name: start for start in (Zero(), PiSSA(), OLoRA(), Orthogonal())}


def as_start(start: Any) -> Start:
    """The start that an argument means."""
    if isinstance(start, Start):
        return start
    if not isinstance(start, str):
        raise TypeError(
            "start is a name, lro.adapters.gradient(grads), .activation(inputs) or .sign_step(grads), got "
            f"{type(start).__name__}"
        )
    if start in ("gradient", "activation", "sign_step"):
        needs = "inputs" if start == "activation" else "gradients"
        raise ValueError(f"start={start!r} needs {needs}: pass start=lro.adapters.{start}({needs})")
    if start not in STARTS:
        raise ValueError(
            f"start is one of {sorted(STARTS)}, lro.adapters.gradient(grads), .activation(inputs) or "
            f".sign_step(grads), got {start!r}"
        )
    return STARTS[start]


def _pissa(W: jax.Array, rank: int, scale: float) -> tuple[jax.Array, jax.Array]:
    u, sigma, v = linalg.svd(W)
    root = jnp.sqrt(sigma[:rank] / scale)
    return u[:, :rank] * root[None], root[:, None] * v[:, :rank].T


def _olora(W: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    q, r = linalg.orthonormalize(W.T)
    return r[:rank].T, q[:, :rank].T


def _orthogonal(x: jax.Array) -> jax.Array:
    return linalg.orthonormalize(x)[0]


def _from_gradient(G: jax.Array, rank: int, c: float) -> tuple[jax.Array, jax.Array]:
    u, _, v = linalg.svd(G)
    return c * u[:, :rank], c * v[:, rank : 2 * rank].T


def _leading(G: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    u, _, v = linalg.svd(G)
    return u[:, :rank], v[:, :rank]


def _right(X: jax.Array, rank: int) -> jax.Array:
    # From the m x m covariance, whatever the number of examples.
    X = X - jnp.mean(X, axis=0, keepdims=True)
    return linalg.svd(X.T @ X)[2][:, :rank]
