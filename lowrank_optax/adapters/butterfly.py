r"""`oft` and `boft`: :math:`W = R\,W_0` with R orthogonal and made of blocks."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax.adapters.change import Flattened, dense_base, node, scaled_identity
from lowrank_optax.adapters.request import Request
from lowrank_optax.layout import map_matrices
from lowrank_optax.linalg import highest_precision, working_dtype


class _Rotated(Flattened):
    """A rotation of the inputs by square blocks: subclasses say `rows`, `dense` and `undo`."""

    frozen: ClassVar[frozenset[str]] = frozenset()
    bounded: ClassVar[bool] = False

    @property
    def rows(self) -> int:
        """The number of inputs."""
        raise NotImplementedError

    @property
    def sides(self) -> tuple[int, None]:
        return self.rows, None

    def part(self, base: Any) -> jax.Array:
        W = dense_base(base)
        return self.dense(W) - W.astype(working_dtype(W))

    def _matrices(self, W: jax.Array) -> jax.Array:
        """`(batch..., m, n)` in the working dtype."""
        return W.astype(working_dtype(W)).reshape(*W.shape[: self.batch], self.rows, -1)

    @classmethod
    def blocks(cls, request: Request) -> int:
        """The number of blocks; the rank is their size."""
        request.start.only_zero(cls.kind)
        if request.rank < 2 or request.m % request.rank:
            raise request.refuse(
                cls.kind, f"the rank is the size of its blocks, from 2 and a divisor of m = {request.m}"
            )
        return request.m // request.rank


@node
class OFT(_Rotated):
    r"""A rotation of blocks of b inputs, :math:`W = \mathrm{diag}(R_1, R_2, \dots)\, W_0`, which keeps singular values.

    .. math:: R_i = (I - Q_i)(I + Q_i)^{-1}, \quad Q_i = -Q_i^\top

    is Cayley's map. A layer adds :math:`x\,(R - I) W_0` to :math:`x W_0`, so that a base in few digits keeps small
    rotations; the difference is an array of the size of the kernel.

    Attributes:
      Q: `(batch..., m / b, b (b - 1) / 2)`, the entries of each Q above its diagonal, row by row. Zero at the start.
      inputs: the number of input axes of the kernel, 1 by default; static.

    References:
      arXiv:2306.07280. PEFT's `OFTConfig(use_cayley_neumann=False)`.
    """

    kind: ClassVar[str] = "oft"

    Q: jax.Array

    @classmethod
    def make(cls, request: Request) -> tuple[Any, Any]:
        b = request.rank
        Q = jnp.zeros((*request.batch, cls.blocks(request), b * (b - 1) // 2), request.W.dtype)
        return cls(Q, inputs=request.split.inputs), None

    @property
    def batch(self) -> int:
        return self.Q.ndim - 2

    @property
    def size(self) -> int:
        """b."""
        return (1 + math.isqrt(1 + 8 * self.Q.shape[-1])) // 2

    @property
    def rows(self) -> int:
        return self.Q.shape[-2] * self.size

    def rotations(self) -> jax.Array:
        """`(batch..., m / b, b, b)`."""
        return _cayley(self.skew())

    def skew(self) -> jax.Array:
        """The blocks Q `(batch..., m / b, b, b)`."""
        i, j = np.triu_indices(self.size, 1)
        Q = self.Q.astype(working_dtype(self.Q))
        upper = jnp.zeros((*Q.shape[:-1], self.size, self.size), Q.dtype).at[..., i, j].set(Q)
        return upper - jnp.swapaxes(upper, -1, -2)

    def dense(self, base: jax.Array) -> jax.Array:
        return map_matrices(_rotate, self._matrices(base), self.rotations()).reshape(base.shape)

    def undo(self, merged: jax.Array) -> jax.Array:
        inverse = jnp.linalg.inv(self.rotations())
        return map_matrices(_rotate, self._matrices(merged), inverse).reshape(merged.shape)


@node
class NeumannOFT(OFT):
    r"""`OFT` with five terms of a series in the place of the inverse, orthogonal up to :math:`|Q|^5`,

    .. math:: R_i = I + 2 Q_i + 2 Q_i^2 + 2 Q_i^3 + Q_i^4 \approx (I + Q_i)(I - Q_i)^{-1}.

    The sign of Q is the opposite of the one in `OFT`, in PEFT too.

    References:
      arXiv:2506.19847. PEFT's default `OFTConfig()`.
    """

    kind: ClassVar[str] = "oft_neumann"

    Q: jax.Array

    @highest_precision
    def rotations(self) -> jax.Array:
        Q = self.skew()
        Q2 = Q @ Q
        return _identity(Q) + 2.0 * (Q + Q2 + Q2 @ Q) + Q2 @ Q2


@node
class BOFT(_Rotated):
    r"""A product of block rotations between permutations, and a factor for each output,

    .. math:: W = B_f \cdots B_1 W_0\, \mathrm{diag}(s), \quad B_i = P_i\, \mathrm{diag}(R_{i1}, R_{i2}, \dots)\,
      P_i^\top,

    where R is Cayley's map of the skew part of a square block and P_i the i-th butterfly permutation, which leads
    inputs that are 2^i blocks apart into one block. With one factor there is no permutation.

    Attributes:
      R: `(batch..., f, m / b, b, b)`, of which the skew part :math:`(R - R^\top) / 2` counts. Zero at the start.
      s: `(batch..., out...)`, one at the start.
      inputs: the number of input axes of the kernel, 1 by default; static.

    References:
      arXiv:2311.06243.
    """

    kind: ClassVar[str] = "boft"

    R: jax.Array
    s: jax.Array

    @classmethod
    def make(cls, request: Request, factors: int = 1) -> tuple[Any, Any]:
        blocks, b = cls.blocks(request), request.rank
        if factors > 1 and (b % 2 or blocks % 2 ** (factors - 1)):
            raise request.refuse(
                cls.kind,
                f"{factors} factors need blocks of even size and a number of them that 2^{factors - 1} divides, got "
                f"{blocks} of size {b}",
            )
        R = jnp.zeros((*request.batch, factors, blocks, b, b), request.W.dtype)
        s = request.columns(jnp.ones((*request.batch, request.n), R.dtype))
        return cls(R, s, inputs=request.split.inputs), None

    @property
    def batch(self) -> int:
        return self.R.ndim - 4

    @property
    def rows(self) -> int:
        return self.R.shape[-3] * self.R.shape[-1]

    def fits(self, shape: tuple[int, ...]) -> bool:
        return super().fits(shape) and shape[self.batch + self.inputs :] == self.s.shape[self.batch :]

    def _factors(self) -> jax.Array:
        R = self.R.astype(working_dtype(self.R))
        return _cayley(0.5 * (R - jnp.swapaxes(R, -1, -2)))

    def _outputs(self, W: jax.Array) -> jax.Array:
        s = self.s.astype(W.dtype)
        return s.reshape(*s.shape[: self.batch], *(1,) * (W.ndim - s.ndim), *s.shape[self.batch :])

    def dense(self, base: jax.Array) -> jax.Array:
        W = map_matrices(_through_factors, self._matrices(base), self._factors(), back=False).reshape(base.shape)
        return W * self._outputs(W)

    def undo(self, merged: jax.Array) -> jax.Array:
        W = merged.astype(working_dtype(merged))
        W = self._matrices(W / self._outputs(W))
        return map_matrices(_through_factors, W, self._factors(), back=True).reshape(merged.shape)


@highest_precision
def _cayley(Q: jax.Array) -> jax.Array:
    """(I - Q)(I + Q)^{-1} of stacked blocks."""
    eye = _identity(Q)
    return jnp.linalg.solve(eye + Q, eye - Q)  # both factors commute


def _identity(Q: jax.Array) -> jax.Array:
    return scaled_identity(jnp.ones(Q.shape[:-2], Q.dtype), Q.shape[-1])


def _rotate(W: jax.Array, R: jax.Array) -> jax.Array:
    """diag(R_1, R_2, ...) W, block by block."""
    blocks, b = R.shape[:2]
    return jnp.einsum("kij,kjn->kin", R, W.reshape(blocks, b, -1)).reshape(W.shape)


def _through_factors(W: jax.Array, R: jax.Array, back: bool) -> jax.Array:
    """B_f ... B_1 W, or its inverse."""
    factors, blocks, b = R.shape[:3]
    for i in reversed(range(factors)) if back else range(factors):
        order = butterfly(blocks * b, blocks // 2**i, b // 2) if factors > 1 else np.arange(blocks * b)
        inverse = np.argsort(order)  # (P x)_i = x_{order(i)}
        W = _rotate(W[inverse], jnp.swapaxes(R[i], -1, -2) if back else R[i])[order]
    return W


def butterfly(m: int, groups: int, half: int) -> np.ndarray:
    """The order of a block butterfly permutation: in each group the even runs of `half` inputs before the odd ones."""
    runs = np.arange(m).reshape(groups, -1, half)
    return np.concatenate([runs[:, 0::2], runs[:, 1::2]], axis=1).reshape(-1)
