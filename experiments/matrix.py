"""Complete an ill-conditioned matrix of low rank by heavy ball on W, on its factors and on the manifold.

    python -m experiments matrix                    # four methods, condition 1e4
    python -m experiments matrix --condition 1      # a target with equal singular values
    python -m experiments matrix --rank 8           # more rank than the target has

The loss compares an m x n matrix W with a target T of known singular values,

    L(W) = 1/2 sum w (W - T)^2,   T = P diag(sigma) Q^T,   1 = sigma_1 >= ... >= sigma_r = 1 / condition,

with weights w in [1/2, 1]. It is well conditioned in W and has no noise, so only the form in which a method keeps W
keeps it from T: the gradient of a factor is the gradient of W times the other factors, and a direction of singular
value sigma turns at a speed of about sigma in A B and of sigma^2 in U S V. Only a relative error below 1 / condition
shows that every direction was found. At condition 1e4 expect low rank at the rounding of float32, the factors far
above.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments import trainer
from experiments.config import Config, ConfigError, option, shared
from experiments.task import Batch, Params, Task


@dataclasses.dataclass(frozen=True)
class Matrix(Config):
    """Complete an ill-conditioned matrix of low rank by heavy ball on W, on its factors and on the manifold."""

    name: ClassVar[str] = "matrix"
    smoke: ClassVar[Mapping[str, Any]] = {
        **Config.smoke,
        "batch": 12,
        "columns": 8,
        "target_rank": 3,
        "rank": 3,
    }

    method: str = shared("method", "full_heavy_ball,naive_heavy_ball,factors_heavy_ball,lowrank_heavy_ball")
    steps: int = shared("steps", 800)
    batch: int = option(40, "rows of the matrix; every step sees all of them")
    rank: int = shared("rank", 5)
    weight_decay: float = shared("weight_decay", 0.0)
    columns: int = option(30, "columns of the matrix")
    target_rank: int = option(5, "rank of the target")
    condition: float = option(1e4, "largest singular value of the target over its smallest")

    def __post_init__(self) -> None:
        super().__post_init__()
        limit = min(self.batch, self.columns)
        for flag, rank in (("rank", self.rank), ("target-rank", self.target_rank)):
            if rank > limit:
                raise ConfigError(f"--{flag} {rank}: at most the smaller of --batch and --columns, {limit}")
        if not self.condition >= 1:
            raise ConfigError(f"--condition {self.condition:g}: at least 1")

    def task(self) -> Task:
        data = problem(self)
        model = nn.Dense(
            self.columns,
            use_bias=False,
            kernel_init=nn.initializers.normal((self.batch * self.columns) ** -0.5),  # of norm about 1
            precision="highest",
        )
        return Task(
            data=f"{self.batch} x {self.columns} target of rank {self.target_rank} and condition {self.condition:g}",
            model=model,
            init=lambda key: model.init(key, data["x"])["params"],
            is_kernel=lambda path, shape: path == "kernel",
            loss=loss_fn,
            batch=lambda seed, step: data,
            validation=[data],
            unit="half squared error",
            work=("rows", self.batch),
        )


def problem(config: Matrix) -> Batch:
    """Row i of the identity, whose image is row i of W, with row i of the target and of the weights."""
    rng = np.random.default_rng(config.seed)
    m, n, r = config.batch, config.columns, config.target_rank
    p, q = (np.linalg.qr(rng.standard_normal((size, r)))[0] for size in (m, n))
    target = p * np.geomspace(1.0, 1.0 / config.condition, r) @ q.T
    data = {"x": np.eye(m), "target": target, "weight": rng.uniform(0.5, 1.0, (m, n))}
    return {name: value.astype(np.float32) for name, value in data.items()}


def loss_fn(apply_fn: Callable[..., Any], params: Params, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Half the weighted squared error, and the relative error in the Frobenius norm."""
    residual = apply_fn({"params": params}, batch["x"]) - batch["target"]
    error = jnp.linalg.norm(residual) / jnp.linalg.norm(batch["target"])
    return 0.5 * jnp.sum(batch["weight"] * jnp.square(residual)), {"error": error}


CONFIG = Matrix


def main(argv: Sequence[str] | None = None) -> None:
    trainer.main(CONFIG, argv)


if __name__ == "__main__":
    main()
