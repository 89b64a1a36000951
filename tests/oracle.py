"""Dense float64 NumPy oracle for low-rank heavy ball and low-rank Adam.

Written from the formulas alone, with dense m x n matrices, and sharing no code with the
library that it checks. Section numbers in comments are those of the project's algorithm
notes; the method is that of arXiv:2506.17475.

Ranks are true shapes here: there is no padding. The counterpart of a padded kernel with
k active singular values (section 7) is the oracle state of rank k.
Elementwise second moments depend on the gauge: compare Adam only from canonical states
(S diagonal, descending) with separated singular values, up to the signs of columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class State:
    """W = U S V^T (section 1) with moments expressed in the bases U, V (section 4)."""

    U: Array  # (m, r), orthonormal columns
    S: Array  # (r, r)
    V: Array  # (n, r), orthonormal columns
    N: Array  # (r, r), heavy-ball trace or first moment
    v: Array  # (r, r), second moment (stays zero for heavy ball)
    t: int  # inner steps taken so far

    @property
    def W(self) -> Array:
        return self.U @ self.S @ self.V.T

    @property
    def rank(self) -> int:
        return len(self.S)


def start(W: Array, rank: int) -> State:
    """Truncated SVD of W in the canonical gauge, zero moments."""
    P, sigma, Qt = np.linalg.svd(np.asarray(W, np.float64), full_matrices=False)
    if not 1 <= rank <= sigma.size:
        raise ValueError(f"rank {rank} is not in 1..{sigma.size}")
    zero = np.zeros((rank, rank))
    S = np.diag(sigma[:rank])
    return State(P[:, :rank], S, Qt[:rank].T, zero, zero, 0)


# --- the inner methods: section 4, step 4 ---------------------------------------------


@dataclass(frozen=True)
class HeavyBall:
    h: float
    beta: float

    def step(self, S: Array, G: Array, N: Array, v: Array, t: int) -> tuple[Array, Array, Array, int]:
        """N <- beta N + G;  S <- S - h N   (optax.sgd(h, momentum=beta))."""
        N = self.beta * N + G
        return S - self.h * N, N, v, t + 1


@dataclass(frozen=True)
class Adam:
    h: float
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8

    def step(self, S: Array, G: Array, N: Array, v: Array, t: int) -> tuple[Array, Array, Array, int]:
        """N <- b1 N + (1-b1) G;  v <- b2 v + (1-b2) G^{o2};
        S <- S - h (N/(1-b1^t)) / (sqrt(v/(1-b2^t)) + eps), t = 1 at the first step."""
        t = t + 1
        N = self.b1 * N + (1 - self.b1) * G
        v = self.b2 * v + (1 - self.b2) * G**2
        N_unbiased = N / (1 - self.b1**t)
        v_unbiased = v / (1 - self.b2**t)
        return S - self.h * N_unbiased / (np.sqrt(v_unbiased) + self.eps), N, v, t


Method = HeavyBall | Adam


# --- geometry: sections 2 and 3 -------------------------------------------------------


def projection(U: Array, V: Array, G: Array) -> Array:
    """P(W) G = U U^T G + G V V^T - U U^T G V V^T: section 2's three terms, summed."""
    left = U @ (U.T @ G)
    right = (G @ V) @ V.T
    both = U @ (U.T @ G @ V) @ V.T
    return left + right - both


def _augmented(state: State, G: Array) -> tuple[Array, Array]:
    """Section 3: thin QR of [U, U_p] and of [V, V_p], with
    U_p = (I - U U^T) G V and V_p = (I - V V^T) G^T U.
    At most m (n) columns; column signs are QR's own; orthonormal whatever the rank."""
    U, V = state.U, state.V
    U_p = G @ V - U @ (U.T @ G @ V)
    V_p = G.T @ U - V @ (V.T @ G.T @ U)
    return _qr(np.hstack([U, U_p])), _qr(np.hstack([V, V_p]))


def _qr(X: Array) -> Array:
    """Q of the thin QR with a non-negative diagonal of R, so that the first columns of
    [U, U_perp] (section 3) are those of U and not their negatives."""
    Q, R = np.linalg.qr(X)
    return Q * np.where(np.diag(R) < 0, -1.0, 1.0)[: Q.shape[1]]


def _carry(N: Array, v: Array, A: Array, B: Array) -> tuple[Array, Array]:
    """Section 4, steps 2 and 6: N <- A N B^T, v <- (A sqrt(v) B^T)^{o2}."""
    return A @ N @ B.T, (A @ np.sqrt(v) @ B.T) ** 2


def _tolerance_rank(sigma: Array, theta: float) -> int:
    """Smallest r' with |sigma_{r'+1:}|_2 <= theta |sigma|_2 (section 4, step 5)."""
    bound = theta * np.linalg.norm(sigma)
    rank = 0
    while np.linalg.norm(sigma[rank:]) > bound:
        rank += 1
    return rank


# --- projected schedule: section 4, steps 1-6, one gradient per step ------------------


def projected_step(
    state: State,
    G: Array,
    method: Method,
    *,
    theta: float | None = None,
    r_min: int = 1,
    r_max: int | None = None,
) -> State:
    """One step, G the dense gradient at state.W. theta None keeps the current rank."""
    U, V = _augmented(state, G)  # step 1
    A, B = U.T @ state.U, V.T @ state.V
    S = A @ state.S @ B.T  # S^ = U^^T U S V^T V^
    N, v = _carry(state.N, state.v, A, B)  # step 2
    coefficient = U.T @ projection(state.U, state.V, G) @ V  # step 3, dense P(W) G
    S, N, v, t = method.step(S, coefficient, N, v, state.t)  # step 4
    rank = state.rank if theta is None else None
    stepped = State(U, S, V, N, v, t)  # S may be rectangular where 2r > m or 2r > n
    return truncate(stepped, rank, theta=theta, r_min=r_min, r_max=r_max)  # steps 5-6


# --- galerkin schedule: augment, then coefficient steps, then truncate ----------------


def augment(state: State, G: Array, width: int | None = None) -> State:
    """Steps 1-2: bases [U, U_perp] and [V, V_perp] of `width` columns in all (2r where
    None; never more than 2r, m or n): U and V themselves, then the first new directions
    in column order. W is unchanged."""
    r = state.rank
    U, V = _augmented(state, G)
    width = min(2 * r if width is None else width, U.shape[1], V.shape[1])
    if width < r:
        raise ValueError(f"width {width} is below the rank {r}")
    U = np.hstack([state.U, U[:, r:width]])
    V = np.hstack([state.V, V[:, r:width]])
    A, B = U.T @ state.U, V.T @ state.V
    N, v = _carry(state.N, state.v, A, B)
    return State(U, A @ state.S @ B.T, V, N, v, state.t)


def coefficient_step(state: State, G: Array, method: Method) -> State:
    """Steps 3-4, bases frozen: the full block U^T G V, G the gradient at state.W."""
    coefficient = state.U.T @ G @ state.V
    S, N, v, t = method.step(state.S, coefficient, state.N, state.v, state.t)
    return State(state.U, S, state.V, N, v, t)


def truncate(
    state: State,
    rank: int | None = None,
    *,
    theta: float | None = None,
    r_min: int = 1,
    r_max: int | None = None,
) -> State:
    """Steps 5-6: to `rank`, or by theta, or (neither) only back to the canonical gauge;
    clamped to [r_min, r_max] in every case."""
    if rank is not None and theta is not None:
        raise ValueError("give rank or theta, not both")
    P, sigma, Qt = np.linalg.svd(state.S, full_matrices=False)  # P diag Q^T
    kept = sigma.size if rank is None else rank
    if theta is not None:
        kept = _tolerance_rank(sigma, theta)
    kept = min(max(kept, r_min), sigma.size if r_max is None else r_max, sigma.size)
    P_1, Q_1 = P[:, :kept], Qt[:kept].T
    N, v = _carry(state.N, state.v, P_1.T, Q_1.T)
    return State(state.U @ P_1, np.diag(sigma[:kept]), state.V @ Q_1, N, v, state.t)


# --- the full-rank reference ----------------------------------------------------------


def heavy_ball_full(W: Array, grad_fn: Callable[[Array], Array], h: float, beta: float, steps: int) -> list[Array]:
    """N <- beta N + grad(W); W <- W - h N from N = 0. Returns [W_0, ..., W_steps]."""
    W = np.asarray(W, np.float64)
    N = np.zeros_like(W)
    trajectory = [W]
    for _ in range(steps):
        N = beta * N + grad_fn(W)
        W = W - h * N
        trajectory.append(W)
    return trajectory
