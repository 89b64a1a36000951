r"""Where a pair of factors starts: :math:`D = A B` as matrices, and whether W0 gives way to it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_optax import linalg
from lowrank_optax.adapters.request import Request
from lowrank_optax.layout import map_replicated
from lowrank_optax.linalg import working_dtype
from lowrank_optax.lowrank import is_lowrank
from lowrank_optax.paths import path_name


class Start:
    """How a change starts: the base class of all starts."""

    name: str = "zero"

    def pair(self, request: Request) -> tuple[jax.Array, jax.Array, bool]:
        """A `(batch..., m, r)`, B `(batch..., r, n)`, and whether `s A B` is taken from W0, so that W starts at W0."""
        raise NotImplementedError

    def bases(self, request: Request) -> tuple[jax.Array, jax.Array] | None:
        """U `(batch..., m, r)` and V `(batch..., n, r)` of a change that starts at zero; None to start at `pair`."""
        return None

    def only_zero(self, kind: str) -> None:
        """Refuses other starts than zero for kinds that are no pairs."""
        if not isinstance(self, Zero):
            raise ValueError(f"kind {kind!r} starts at zero, start={self.name!r} is for 'lowrank', 'lora' and 'dora'")


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
class Gradient(Start):
    r"""Singular vectors of a gradient G of the loss: with :math:`G = U \Sigma V^\top` of a kernel of n outputs

    .. math:: A = c\,U_{1..r}, \quad B = c\,V_{r+1..2r}^\top, \quad c = n^{1/4} / \sqrt\gamma.

    W0 gives way to the change. A change of kind `lowrank` starts at zero between the r leading singular vectors of both
    sides instead, so that its first step is the steepest of its rank.

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


def gradient(gradients: Any, *, gamma: float = 16.0) -> Gradient:
    """The start from gradients of the loss with respect to the dense kernels, see `Gradient`.

    Args:
      gradients: a tree like the parameters, the mean over a few batches, say.
      gamma: the constant of the stable scale.

    Returns:
      A start for `init`.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro
      >>> params = {"kernel": jnp.eye(6)}
      >>> grads = jax.grad(lambda p: jnp.sum(jnp.arange(36.0).reshape(6, 6) * p["kernel"] ** 2))(params)
      >>> start = lro.adapters.gradient(grads)
      >>> params, delta = lro.adapters.init(jax.random.key(0), params, rank=2, kind="lora", start=start)
    """
    leaves = jax.tree_util.tree_leaves_with_path(gradients, is_leaf=is_lowrank)
    return Gradient({path_name(path): x for path, x in leaves}, gamma)


STARTS: dict[str, Start] = {start.name: start for start in (Zero(), PiSSA(), OLoRA())}


def as_start(start: Any) -> Start:
    """The start that an argument means."""
    if isinstance(start, Start):
        return start
    if start == "gradient":
        raise ValueError("start='gradient' needs gradients: pass start=lro.adapters.gradient(grads)")
    if start not in STARTS:
        raise ValueError(f"start is one of {sorted(STARTS)} or lro.adapters.gradient(grads), got {start!r}")
    return STARTS[start]


def _pissa(W: jax.Array, rank: int, scale: float) -> tuple[jax.Array, jax.Array]:
    u, sigma, v = linalg.svd(W)
    root = jnp.sqrt(sigma[:rank] / scale)
    return u[:, :rank] * root[None], root[:, None] * v[:, :rank].T


def _olora(W: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    q, r = linalg.orthonormalize(W.T)
    return r[:rank].T, q[:, :rank].T


def _from_gradient(G: jax.Array, rank: int, c: float) -> tuple[jax.Array, jax.Array]:
    u, _, v = linalg.svd(G)
    return c * u[:, :rank], c * v[:, rank : 2 * rank].T


def _leading(G: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    u, _, v = linalg.svd(G)
    return u[:, :rank], v[:, :rank]
