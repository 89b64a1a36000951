"""Small problems with known dense gradients, and the kernels of every layout to pose them on."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import lowrank_optax as lro


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a kernel W (m x n, perhaps several) is laid out in axes."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    batch: tuple[int, ...] = ()

    @property
    def m(self) -> int:
        return int(np.prod(self.inputs))

    @property
    def n(self) -> int:
        return int(np.prod(self.outputs))

    @property
    def slices(self) -> int:
        return int(np.prod(self.batch))

    def kernel(self, U: np.ndarray, S: np.ndarray, V: np.ndarray, dtype: jnp.dtype = jnp.float64) -> lro.LowRank:
        """The LowRank node of stacked flat factors (slices, m, r), (slices, r, r), (slices, n, r)."""
        r = S.shape[-1]
        shapes = ((*self.batch, *self.inputs, r), (*self.batch, r, r), (*self.batch, *self.outputs, r))
        return lro.LowRank(*(jnp.asarray(x.reshape(s), dtype) for x, s in zip((U, S, V), shapes, strict=True)))

    def flat(self, W: lro.LowRank) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The inverse of `kernel`, in NumPy and float64."""
        r = W.S.shape[-1]
        shapes = ((self.slices, self.m, r), (self.slices, r, r), (self.slices, self.n, r))
        U, S, V = (np.asarray(x, np.float64).reshape(s) for x, s in zip((W.U, W.S, W.V), shapes, strict=True))
        return U, S, V


LAYOUTS = {
    "tall": Layout((14,), (9,)),
    "wide": Layout((9,), (14,)),
    "square": Layout((10,), (10,)),
    "stack": Layout((10,), (8,), batch=(3,)),
    "axes": Layout((2, 5), (3, 3)),
    "narrow": Layout((5,), (9,)),  # m < 2r for r = 3: the augmented basis is cut off at m columns
}


@dataclasses.dataclass(frozen=True)
class Problem:
    r"""`L(W) = 1/2 sum H (W - T)^2 + c/4 sum (W - T)^4`, entrywise: its gradient leaves every low-rank span.

    H and T are (slices, m, n).
    """

    H: np.ndarray
    T: np.ndarray
    c: float = 0.01

    def gradient(self, W: np.ndarray, i: int = 0) -> np.ndarray:
        """dL/dW of slice i."""
        D = W - self.T[i]
        return self.H[i] * D + self.c * D**3

    @property
    def data(self) -> tuple[np.ndarray, np.ndarray, float]:
        return self.H, self.T, self.c


def loss(params: dict[str, lro.LowRank], data: tuple) -> jax.Array:
    """The same loss of the kernel in axes, for autodiff with respect to its factors."""
    H, T, c = data
    W = params["kernel"].to_dense()
    D = W - jnp.asarray(T, W.dtype).reshape(W.shape)
    return jnp.sum(jnp.asarray(H, W.dtype).reshape(W.shape) * D**2) / 2 + jnp.asarray(c, W.dtype) * jnp.sum(D**4) / 4


def orthonormal(rng: np.random.Generator, m: int, r: int) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((m, r)))[0]


def with_singular_values(rng: np.random.Generator, m: int, n: int, sigma: list[float] | np.ndarray) -> np.ndarray:
    """A random m x n matrix with these singular values."""
    r = len(sigma)
    return orthonormal(rng, m, r) * np.asarray(sigma) @ orthonormal(rng, n, r).T


def weighted(layout: Layout, seed: int = 0, sigma: tuple[float, ...] = (8.0, 5.0, 3.0, 1.5)) -> Problem:
    """Targets with separated singular values and weights that couple all directions."""
    rng = np.random.default_rng(seed)
    T = np.stack([with_singular_values(rng, layout.m, layout.n, sigma) for _ in range(layout.slices)])
    return Problem(rng.uniform(0.7, 1.3, T.shape), T)


def starts(layout: Layout, seed: int = 1, sigma: tuple[float, ...] = (6.0, 4.0, 2.5)) -> list[np.ndarray]:
    """A dense start for every slice."""
    rng = np.random.default_rng(seed)
    return [with_singular_values(rng, layout.m, layout.n, sigma) for _ in range(layout.slices)]
