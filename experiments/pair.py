"""Plain two-factor kernels W = A B, the baseline without geometry, for unmodified linen models."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Pair:
    """W = A B with A (inputs, r) and B (r, outputs)."""

    A: jax.Array
    B: jax.Array


def lora(key: jax.Array, kernel: jax.Array, rank: int) -> Pair:
    """LoRA's start without its frozen weight: A random with unit gain, B = 0."""
    inputs, outputs = kernel.shape
    A = jax.random.normal(key, (inputs, rank), kernel.dtype) / jnp.sqrt(inputs)
    return Pair(A, jnp.zeros((rank, outputs), kernel.dtype))


def balanced(kernel: jax.Array, rank: int) -> Pair:
    """The truncated SVD of `kernel`, its singular values shared evenly."""
    u, s, vt = jnp.linalg.svd(kernel, full_matrices=False)
    root = jnp.sqrt(s[:rank])
    return Pair(u[:, :rank] * root, root[:, None] * vt[:rank])


def apply(model: nn.Module) -> Callable[..., Any]:
    """`model.apply` in which an `nn.Dense` without bias may hold a Pair as its kernel."""

    def product(run: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        module = context.module
        if isinstance(module, nn.Dense) and context.method_name == "__call__":
            kernel = module.get_variable("params", "kernel")
            if isinstance(kernel, Pair):
                x, A, B = nn.dtypes.promote_dtype(*args, kernel.A, kernel.B, dtype=module.dtype)
                return x @ A @ B
        return run(*args, **kwargs)

    def applied(variables: Any, *args: Any, **kwargs: Any) -> Any:
        with nn.intercept_methods(product):
            return model.apply(variables, *args, **kwargs)

    return applied
