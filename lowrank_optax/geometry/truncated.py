"""The second half of a step that augments the bases: retract in coefficients, choose the rank, truncate."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from lowrank_optax import manifold as mf
from lowrank_optax.geometry.base import Info
from lowrank_optax.geometry.factored import Factored
from lowrank_optax.lowrank import LowRank
from lowrank_optax.rank import RankPolicy, Spectrum, relative_tail


class Proposal(NamedTuple):
    """A point in augmented bases, before its rank is chosen."""

    bases: mf.Augmented
    point: mf.Retraction


@dataclasses.dataclass(frozen=True)
class Truncated(Factored):
    """Common part of `Tangent` and `Coefficient`, whose steps lead out of the manifold and are truncated."""

    rank: RankPolicy | None = None
    retraction: Literal["svd", "bug"] = "svd"

    def __post_init__(self) -> None:
        if self.rank is not None and not isinstance(self.rank, RankPolicy):
            raise ValueError(
                "rank takes a policy, lro.tolerance(theta) or lro.budget(parameters), or None to keep the ranks that "
                f"factorize chose; got {self.rank!r}"
            )
        if self.retraction not in ("svd", "bug"):
            raise ValueError(f"retraction must be 'svd' or 'bug', got {self.retraction!r}")
        if self.retraction == "bug" and self.rank is not None:
            raise ValueError("retraction='bug' keeps the rank of every kernel: use retraction='svd' with a rank policy")

    def retract(self, bases: mf.Augmented, y: jax.Array, rank: jax.Array, width: int) -> Proposal:
        """The retraction of the coefficient matrix y."""
        if self.retraction == "bug":
            return Proposal(bases, mf.retract_bug(y, bases, rank))
        return Proposal(bases, mf.retract_svd(y, bases, width))

    def spectrum(self, frame: Any, proposal: Proposal) -> Spectrum:
        """Singular values before truncation."""
        W = frame.kernel
        return Spectrum(proposal.point.sigma, frame.rank, W.width, (W.U.shape[0], W.V.shape[0]))

    def truncate(self, frame: Any, proposal: Proposal, rank: jax.Array | None) -> tuple[LowRank, jax.Array, Info]:
        """The new kernel, its rank, and diagnostics."""
        rank = frame.rank if rank is None else jnp.minimum(rank, frame.kernel.width).astype(jnp.int32)
        tail = relative_tail(proposal.point.sigma, rank)
        info = Info(rank, frame.gradient_norm, tail)
        return mf.assemble(proposal.bases, proposal.point, rank), rank, info
