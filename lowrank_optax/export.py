"""Low-rank kernels as LoRA adapters, in the files that PEFT loads."""

from __future__ import annotations

import json
import math
import pathlib
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax.boxes import unboxed
from lowrank_optax.lowrank import LowRank, is_lowrank
from lowrank_optax.paths import path_name
from lowrank_optax.resize import resize

Module = Callable[[str, tuple[int, ...]], str]
Convolution = Callable[[str], bool]
PREFIX = "base_model.model."  # of the names of PEFT's tensors


def dotted(path: str, index: tuple[int, ...]) -> str:
    """`"encoder/dense/kernel"` becomes `"encoder.dense"`."""
    if index:
        raise ValueError(f"{path!r} stacks kernels: pass module=lambda path, index: ... to name the layer of each")
    return path.removesuffix("kernel").rstrip("/").replace("/", ".")


def export_lora(
    folder: Any,
    params: Any,
    *,
    module: Module = dotted,
    base_model: str | None = None,
    convolution: Convolution | None = None,
) -> None:
    r"""Writes low-rank changes of a model's kernels as a LoRA adapter, as PEFT stores and loads them.

    PEFT adds `x A^T B^T alpha / r` to the output of a layer. With

    .. math:: A = (U S)^\top, \quad B = V, \quad \alpha = r

    this sum is :math:`x\, U S V^\top`. The folder gets `adapter_model.safetensors` with
    `base_model.model.<module>.lora_A.weight` `(r, in)` and `lora_B.weight` `(out, r)`, and `adapter_config.json`, where
    kernels of another rank than the largest appear in `rank_pattern` and `alpha_pattern`. Ranks are the active ones.

    Args:
      folder: where to write; a missing folder is made.
      params: a tree whose `LowRank` nodes are the changes. Other leaves are not written, and a warning names them: a
        LoRA adapter has no place for trained biases. For a whole kernel kept
        as U S V^T the base of the adapter is a layer with weight zero; to export it as an ordinary layer, use
        `densify`. Several input or output axes become one, but those of convolutions: their factors get the shapes
        `(r, in, window...)` and `(out, r, 1...)`.
      module: callable of the path of a kernel and its index in a stack (`()` if it is not stacked) that returns
        the name of the layer in the model that loads the adapter. Default: the path with dots, without `kernel`.
      base_model: name or path of that model, for the config.
      convolution: callable of the path of a kernel that says whether it is one of a convolution, with the input axes
        `(window..., in)`. Default: kernels of three or four input axes and one output axis are 2-D and 3-D
        convolutions, and those of two are none, because heads and head size are two input axes as well.

    Raises:
      ImportError: if safetensors is not installed (`pip install lowrank-optax[export]`).
      ValueError: if there is no `LowRank` node, a name is empty or is given twice, or no `module` names the layers
        of a stack.

    Example:
      >>> import jax.numpy as jnp, json, pathlib, tempfile, lowrank_optax as lro
      >>> delta = {"dense": {"kernel": lro.factorize(jnp.eye(6), rank=2)}}
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> lro.export_lora(folder, delta, module=lambda path, index: "encoder.layer.0.output.dense")
      >>> json.loads((folder / "adapter_config.json").read_text())["target_modules"]
      'encoder\\.layer\\.0\\.output\\.dense'
    """
    pairs: dict[str, tuple[jax.Array, jax.Array]] = {}
    left_out = []
    for path, W in jax.tree_util.tree_leaves_with_path(resize(unboxed(params)[0])[0], is_leaf=is_lowrank):
        if not is_lowrank(W):
            left_out.append(path_name(path))
            continue
        if not isinstance(W, LowRank):
            raise ValueError(
                f"{path_name(path)!r} is a grid of blocks, which a LoRA adapter cannot hold: export the dense change, "
                "lowrank_optax.densify(params)"
            )
        windowed = is_windowed(path_name(path), W, convolution)
        for index in np.ndindex(W.batch_shape):
            name = module(path_name(path), index)
            if not name or name in pairs:
                raise ValueError(f"module names kernel {path_name(path)!r} {index or ''} {name!r}, a name must be new")
            pairs[name] = lora_pair(W[index] if index else W, windowed)
    if not pairs:
        raise ValueError("there is no LowRank node to export")
    if left_out:
        more = f" and {len(left_out) - 5} more" if len(left_out) > 5 else ""
        warnings.warn(
            f"an adapter holds changes of kernels only: {', '.join(left_out[:5])}{more} are not exported", stacklevel=2
        )

    write(folder, {name: Entry(a, b, float(a.shape[0])) for name, (a, b) in pairs.items()}, base_model=base_model)


class Entry(NamedTuple):
    """The adapter of one layer in the layout of PEFT: lora_A `(r, in)`, lora_B `(out, r)`, DoRA's lengths `(out,)`,
    of convolutions as PEFT has them."""

    A: jax.Array
    B: jax.Array
    alpha: float
    magnitude: jax.Array | None = None


def write(
    folder: Any, entries: Mapping[str, Entry], *, base_model: str | None = None, save: Mapping[str, Any] | None = None
) -> None:
    """Writes `adapter_model.safetensors` and `adapter_config.json`.

    Args:
      folder: where to write; a missing folder is made.
      entries: adapters by the name of their layer.
      base_model: for the config.
      save: further arrays by the name of the parameter that they replace, as `modules_to_save`.
    """
    try:
        from safetensors.flax import save_file
    except ImportError as error:
        raise ImportError("an adapter is written as safetensors: pip install lowrank-optax[export]") from error

    ranks = {name: int(entry.A.shape[0]) for name, entry in entries.items()}
    most = max(ranks.values())
    usual = max(_number(entry.alpha) for name, entry in entries.items() if ranks[name] == most)
    # Anchored, because PEFT looks for a pattern at the end of a module's name.
    of_rank = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != most}
    alphas = {f"^{re.escape(name)}": _number(entry.alpha) for name, entry in entries.items()}
    save = {} if save is None else save
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": most,
        "lora_alpha": usual,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": any(entry.magnitude is not None for entry in entries.values()),
        # One pattern, which PEFT matches with full names. Names in a list also match as ends of other names.
        "target_modules": "|".join(map(re.escape, sorted(ranks))),
        "rank_pattern": of_rank,
        "alpha_pattern": {name: alpha for name, alpha in alphas.items() if alpha != usual},
        "modules_to_save": sorted({name.rpartition(".")[0] for name in save}) or None,
    }
    tensors: dict[str, Any] = {f"{PREFIX}{name}": jnp.asarray(x) for name, x in save.items()}
    for name, entry in entries.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = entry.A
        tensors[f"{PREFIX}{name}.lora_B.weight"] = entry.B
        if entry.magnitude is not None:
            tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = entry.magnitude
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _number(alpha: float) -> int | float:
    """An int where it is one: PEFT's configs have ints."""
    return int(alpha) if float(alpha).is_integer() else float(alpha)


def is_windowed(path: str, W: LowRank, convolution: Convolution | None) -> bool:
    """Whether the input axes of a kernel are the window and the channels of a convolution.

    Raises:
      ValueError: for a convolution with one input axis.
    """
    inputs = len(W.in_shape)
    if convolution is None:
        return inputs in (3, 4) and len(W.out_shape) == 1
    if convolution(path) and inputs < 2:
        raise ValueError(f"convolution names kernel {path!r}, whose inputs {W.in_shape} are no window and channels")
    return bool(convolution(path))


def lora_pair(W: LowRank, windowed: bool) -> tuple[jax.Array, jax.Array]:
    """lora_A and lora_B of one kernel; of a convolution `(r, in, window...)` and `(out, r, 1...)`, as torch has it."""
    a = (W.U @ W.S).astype(W.dtype)
    b = W.V.reshape(math.prod(W.out_shape), W.width)
    if windowed:
        return jnp.moveaxis(a, (-1, -2), (0, 1)), b.reshape(*b.shape, *(1,) * (a.ndim - 2))
    return a.reshape(-1, W.width).T, b
