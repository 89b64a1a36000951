"""The methods in NumPy, float64, for a sequence of m x n gradients with m <= n: independent of the library.

Each function yields the direction of every step, to be subtracted times the learning rate. Random bases are arguments.
"""

import numpy as np


def qf(x):
    return np.linalg.qr(x)[0]


def top(x, r):
    return np.linalg.svd(x, full_matrices=False)[0][:, :r]


class Adam:
    """Adam on coordinates. `hf`: epsilon beside the root that is not corrected, and no correction in `plain`."""

    def __init__(self, b1=0.9, b2=0.999, eps=1e-8):
        self.b1, self.b2, self.eps, self.t, self.m, self.v = b1, b2, eps, 0, 0.0, 0.0

    def moments(self, g):
        self.t += 1
        self.m = self.b1 * self.m + (1 - self.b1) * g
        self.v = self.b2 * self.v + (1 - self.b2) * g**2

    def step(self, g):
        self.moments(g)
        return self.m / (1 - self.b1**self.t) / (np.sqrt(self.v / (1 - self.b2**self.t)) + self.eps)

    def plain(self, g):
        self.moments(g)
        return self.m / (np.sqrt(self.v) + self.eps)

    @property
    def correction(self):
        return np.sqrt(1 - self.b2**self.t) / (1 - self.b1**self.t)

    def rotate(self, C):
        if not self.t:
            return
        k1, k2 = 1 - self.b1**self.t, 1 - self.b2**self.t
        m, v = self.m / k1, self.v / k2
        self.m, self.v = C @ self.m, k2 * np.abs(C**2 @ (v - m**2) + (C @ m) ** 2)


def limited(D, before, gamma):
    size = np.linalg.norm(D)
    q = max(size / (before + 1e-8), gamma) / gamma if before else 1.0
    return D / q, size / q


def apollo(grads, bases, scale, tensor=False, gamma=1.01):
    adam, before = Adam(eps=1e-6), 0.0
    for G, P in zip(grads, bases, strict=True):
        R = P.T @ G
        N = adam.plain(R)
        axis = None if tensor else 0
        f = np.linalg.norm(N, axis=axis) / (np.linalg.norm(R, axis=axis) + 1e-8)
        D, before = limited(G * f, before, gamma)
        yield adam.correction * np.sqrt(scale) * D


def ldadam(grads, r, rho=0.908, b1=0.908, b2=0.99):
    adam, P, E = Adam(b1, b2), None, 0.0
    for G in grads:
        A = G + E
        if P is None:
            P, lost = top(A, r), 0.0
        else:
            old, m = P, adam.m
            B = rho * old @ m / (1 - b1**adam.t) + (1 - rho) * A
            P = qf(B @ (B.T @ old))
            adam.rotate(P.T @ old)
            lost = old @ m - P @ adam.m
        g = P.T @ A
        E = A - P @ g + b1 / (1 - b1) * lost
        yield P @ adam.step(g)


def adarankgrad(grads, r, lost, ratio, at_most, scale):
    """With exact singular vectors. Moments turn by the rule of LDAdam."""
    adam, P, since, reference = Adam(), None, 0, 0.0
    for G in grads:
        if P is None or np.linalg.norm(P.T @ G) <= ratio * reference or since >= at_most:
            full = top(G, r)
            tail = np.sum(G**2) - np.cumsum(np.sum((full.T @ G) ** 2, axis=1))
            k = 1 + np.argmax(tail <= lost * np.sum(G**2)) if np.any(tail <= lost * np.sum(G**2)) else r
            new = full * (np.arange(r) < k)
            if P is not None:
                adam.rotate(new.T @ P)
            P, since, reference = new, 0, np.linalg.norm(new.T @ G)
        since += 1
        yield scale * P @ adam.step(P.T @ G)


def online_subspace(grads, r, lr, scale, eps=1e-6):
    adam, of_basis, P = Adam(eps=eps), Adam(), None
    for G in grads:
        fresh = P is None
        P = top(G, r) if fresh else P
        N = adam.plain(P.T @ G)
        yield scale * adam.correction * P @ N
        if fresh:  # the authors' code has no slope yet
            continue
        S = G @ G.T / np.sum(G**2)
        # The derivative of tr(S) - 2 tr(P^T S P) + tr(P^T S P P^T P), which the loss of X = G / |G| is.
        P = P - lr * of_basis.step(-4 * S @ P + 2 * S @ P @ P.T @ P + 2 * P @ P.T @ S @ P)


def numerical(f, x, h=1e-6):
    """The gradient by central differences."""
    out = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        e = np.zeros_like(x)
        e[i] = h
        out[i] = (f(x + e) - f(x - e)) / (2 * h)
    return out


def coap(grads, r, period, every, lr, start, inputs):
    """From the Gaussian matrix `start`; the axis `inputs` of a gradient is that of the inputs of the kernel."""
    adam, P = Adam(eps=1e-6), None
    for t, G in enumerate(grads):
        if t % (period * every) == 0:
            old = start if P is None else P
            new = top(G @ qf(G.T @ old), r)
            P = new if P is None else new * np.where(np.sum(new * P, axis=0) < 0, -1, 1)
        elif t % period == 0:
            M = adam.m

            def loss(P, G=G, M=M):
                Y = P @ M
                norms = np.linalg.norm(Y, axis=inputs) * np.linalg.norm(G, axis=inputs)
                cos = np.sum(Y * G, axis=inputs) / norms
                return np.mean((P @ P.T @ G - G) ** 2) * (1 - np.mean(cos))

            D = numerical(loss, P)
            P = P - lr * D * min(1, 1 / (np.linalg.norm(D) + 1e-6))
        N = adam.plain(P.T @ G)
        yield adam.correction * P @ N


def subtrack(grads, r, lr, period, scale, gamma=1.01):
    adam, P, before = Adam(eps=1e-6), None, 0.0
    for t, G in enumerate(grads):
        if P is None:
            P = top(G, r)
        elif t % period == 0:
            A = P.T @ G
            D = -2 * (G - P @ A) @ A.T
            D = D - P @ P.T @ D
            U, s, Vt = np.linalg.svd(D, full_matrices=False)
            u, v = U[:, :1], Vt[:1].T
            new = (P @ v * np.cos(lr * s[0]) - u * np.sin(lr * s[0])) @ v.T + P - P @ v @ v.T
            adam.rotate(new.T @ P)
            P = new
        R = P.T @ G
        N = adam.plain(R)
        D, before = limited((G - P @ R) * np.linalg.norm(N, axis=0) / (np.linalg.norm(R, axis=0) + 1e-8), before, gamma)
        yield adam.correction * (scale * P @ N + D)


def cosines(p):
    i, j = np.mgrid[:p, :p]
    D = np.sqrt(2 / p) * np.cos(np.pi * i * (2 * j + 1) / (2 * p))
    D[0] /= np.sqrt(2)
    return D


def dct_adam(grads, r, kind):
    adam, P, E = Adam(), None, 0.0
    for G in grads:
        A = G + E
        D = cosines(len(G))
        D = D.T if kind == 2 else D  # its columns are the dictionary
        new = D[:, np.sort(np.argsort(-np.sum(np.abs(D.T @ A), axis=1))[:r])]
        if P is not None:
            # The authors' rule: R = new^T old is a matrix of zeros and ones, and v = |R v|.
            R = np.round(new.T @ P)
            adam.m, adam.v = R @ adam.m, np.abs(R @ adam.v)
        P = new
        a = P.T @ A
        E = A - P @ a
        yield P @ adam.step(a)


def flora_momentum(grads, bases, b1, with_present=False):
    old, C = bases[0], np.zeros((bases[0].shape[1], grads[0].shape[1]))
    for u, P in zip(grads, bases, strict=True):
        before = old @ C
        C = b1 * (P.T @ before if not np.array_equal(P, old) else C) + (1 - b1) * P.T @ u
        old = P
        yield (1 - b1) * u + b1 * (P @ C if with_present else before)


def sumo(grads, r, period, b1):
    M, P = 0.0, None
    for t, G in enumerate(grads):
        if t % period == 0:
            new = top(G, r)
            M = new.T @ P @ M if P is not None else 0.0
            P = new
        M = b1 * M + (1 - b1) * P.T @ G
        U, _, Vt = np.linalg.svd(M, full_matrices=False)
        yield 0.2 * np.sqrt(max(G.shape)) * P @ (U @ Vt)


def snsm(grads, r, period, b1=0.9, b2=0.999, eps=1e-6):
    M, P, v = 0.0, None, 0.0
    for t, G in enumerate(grads):
        if t % period == 0:
            P, M = top(G, r), 0.0
        R = P.T @ G
        M = b1 * M + (1 - b1) * R
        v = b2 * v + (1 - b2) * np.sum(G**2, axis=0)
        correction = np.sqrt(1 - b2 ** (t + 1)) / (1 - b1 ** (t + 1))
        yield correction * (P @ M + G - P @ R) / (np.sqrt(v) + eps)


def mofasgd(grads, r, beta, outside, most=None, old_bases=False, nesterov=False):
    """With dense matrices."""

    def followed(U, s, V, G):
        left, right = U @ U.T, V @ V.T
        return truncated(beta * U * s @ V.T + left @ G + G @ right - left @ G @ right)

    def truncated(M):
        U, s, Vt = np.linalg.svd(M, full_matrices=False)
        return U[:, :r], s[:r], Vt[:r].T

    at = None
    for G in grads:
        old, at = at, truncated(G) if at is None else followed(*at, G)
        U, s, V = followed(*at, G) if nesterov else at
        direction = U * (1 if most is None else np.minimum(1 / s, most)) @ V.T
        U, _, V = old if old_bases and old is not None else at
        yield direction + outside * (G - U @ U.T @ G) @ (np.eye(len(V)) - V @ V.T)


def dion(grads, Q, mu):
    """For m <= n: P on the longer side. Without the factor of the shape."""
    M = 0.0
    for G in grads:
        M = M + G.T
        P = qf(M @ Q)
        R = M.T @ P
        M = M - (1 - mu) * P @ R.T
        Q = R / (np.linalg.norm(R, axis=0) + 1e-8)
        yield (P @ Q.T).T


def trion(grads, r, mu, steps):
    M = 0.0
    for G in grads:
        M = M + G
        D = cosines(len(G)).T
        P = D[:, np.sort(np.argsort(-np.sum(np.abs(D.T @ M), axis=1))[:r])]
        low = P.T @ M
        M = M - (1 - mu) * P @ low
        X = low / np.linalg.norm(low)
        for _ in range(steps):
            S = X @ X.T
            X = 3.4445 * X + (-4.7750 * S + 2.0315 * S @ S) @ X
        yield P @ X
