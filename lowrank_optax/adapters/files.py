"""Changes in the folders of PEFT: `adapter_model.safetensors` and `adapter_config.json`."""

from __future__ import annotations

import json
import math
import pathlib
import re
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_optax.adapters.change import is_parameter
from lowrank_optax.adapters.core import Core, SingularValues
from lowrank_optax.adapters.lora import LoRA
from lowrank_optax.adapters.lowrank import LowRankChange, as_change
from lowrank_optax.adapters.magnitude import Magnitude
from lowrank_optax.adapters.trees import changes, nested
from lowrank_optax.axes import Axes, Where, check_where, split_axes
from lowrank_optax.boxes import opened
from lowrank_optax.export import PREFIX, Convolution, Entry, Module, dotted, is_windowed, lora_pair, write
from lowrank_optax.lowrank import LowRank
from lowrank_optax.paths import path_name

_LETTERS = {"lora_A.weight": "A", "lora_B.weight": "B", "lora_magnitude_vector": "m"}
_LETTERS["lora_magnitude_vector.weight"] = "m"  # in older files
_DEFAULTS = {"r": 8, "lora_alpha": 8}  # of PEFT, for configs that do not say
_SWITCHES = ("use_rslora", "use_dora", "lora_bias", "use_qalora")  # all booleans that are read
# Fields of a config with which a layer computes something else than LoRA does, or a model has other layers.
_OTHER_METHODS = (
    "lora_bias",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "layer_replication",
    "trainable_token_indices",
    "monteclora_config",
    "arrow_config",
    "kasa_config",
)


def export(
    folder: Any,
    delta: Any,
    *,
    module: Module = dotted,
    base_model: str | None = None,
    save: Mapping[str, Any] | None = None,
    convolution: Convolution | None = None,
) -> None:
    r"""Writes changes of kinds `lowrank`, `lora`, `core`, `svfit` and `dora` as PEFT stores and loads them.

    `lora_A` and `lora_B` are A and B transposed and :math:`\alpha = s r`. A change :math:`s\,U S V^\top` is written as
    :math:`A = U S`, :math:`B = V^\top`. The config has the largest rank, to which programs that serve adapters set
    their buffers, and the largest alpha at this rank; layers with others are in `rank_pattern` and `alpha_pattern`.
    Target names are exact: no other layer is adapted.

    A change that did not start at zero belongs to the base that `init` returned. To write it for the base as it was,
    export `add(delta, start, weights=(1, -1))`, with `start` the tree that `init` returned.

    Args:
      folder: where to write; a missing folder is made.
      delta: the tree of changes.
      module: callable of the path of a kernel and its index in a stack (`()` if it is not stacked) that returns the
        name of the layer in the model that loads the adapter. Default: the path with dots, without `kernel`.
      base_model: name or path of that model, for the config.
      save: other trained parameters that go along, by their names in that model and in its layout, e.g.
        `{"classifier.weight": W.T, "classifier.bias": b}`; the config names them as `modules_to_save`.
      convolution: callable of the path of a kernel that says whether it is one of a convolution, as in `export_lora`:
        needed for 1-D convolutions, `lambda path: "conv" in path` say.

    Raises:
      ImportError: if safetensors is not installed (`pip install lowrank-optax[export]`).
      ValueError: for changes of other kinds, a mixture of `dora` and others, names that are empty or given twice, or a
        folder that cannot be made.

    Example:
      >>> import jax, jax.numpy as jnp, lowrank_optax as lro, tempfile
      >>> params = {"dense": {"kernel": jnp.eye(6)}}
      >>> params, delta = lro.adapters.init(jax.random.key(0), params, rank=2, kind="lora", alpha=4)
      >>> folder = tempfile.mkdtemp()
      >>> lro.adapters.export(folder, delta)
      >>> lro.adapters.load(folder, params)["dense"]["kernel"].A.shape
      (6, 2)
    """
    entries: dict[str, Entry] = {}
    found = changes(delta)
    if not found:
        raise ValueError("there is no change to export")
    if 0 < sum(isinstance(x, Magnitude) for x in found.values()) < len(found):
        raise ValueError("the config says of all layers at once whether they are of kind 'dora': export them apart")
    for path, change in found.items():
        for index in np.ndindex(_batch(change)):
            name = module(path, index)
            if not name or name in entries:
                raise ValueError(f"module names kernel {path!r} {index or ''} {name!r}, a name must be new")
            entries[name] = _entry(path, jax.tree.map(lambda x, at=index: x[at], change), convolution)
    try:
        write(folder, entries, base_model=base_model, save=save)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"{folder} cannot be made a folder, because it is a file or lies below one") from error


def _batch(change: Any) -> tuple[int, ...]:
    change = as_change(change)
    return tuple(jax.tree.leaves(change)[0].shape[: change.batch])


def _entry(path: str, change: Any, convolution: Convolution | None) -> Entry:
    """One layer as PEFT has it."""
    if isinstance(change, Magnitude):
        entry = _entry(path, change.change, convolution)
        return entry._replace(magnitude=change.magnitude.reshape(_lengths_shape(entry.B.shape[0], entry.A.ndim)))
    change = as_change(change)
    if isinstance(change, LoRA):
        W = LowRank(change.A, jnp.eye(change.A.shape[-1], dtype=change.A.dtype), jnp.moveaxis(change.B, 0, -1))
        alpha = _alpha(np.asarray(change.scale), W.width)
    elif isinstance(change, LowRankChange | Core | SingularValues):
        W = change.part(None)
        alpha = float(W.width)
    else:
        raise ValueError(
            f"the change of {path!r} is a {type(change).__name__}, which has no LoRA file: merge it, or "
            "make it a pair by as_lora(params, delta)"
        )
    a, b = lora_pair(W, is_windowed(path, W, convolution))
    return Entry(a, b, alpha)


def _alpha(scale: np.ndarray, rank: int) -> float:
    """The shortest decimal that has this scale at this rank, which undoes the rounding of the scale to its dtype."""
    alpha = float(scale) * rank
    shorter = (float(f"{alpha:.{digits}g}") for digits in range(1, 17))
    return next((x for x in shorter if np.asarray(x / rank, scale.dtype) == scale), alpha)


def _lengths_shape(n: int, ndim: int) -> tuple[int, ...]:
    """The shape of DoRA's lengths of n outputs beside factors of so many axes."""
    return (n,) if ndim == 2 else (1, n, *(1,) * (ndim - 2))


class _File(NamedTuple):
    """What a folder holds: the config, factors by layer, and other tensors by name."""

    config: dict[str, Any]  # checked, with PEFT's r and lora_alpha where they are missing
    layers: dict[str, dict[str, np.ndarray]]
    others: list[str]

    def scale(self, name: str, rank: int) -> float:
        """The factor of a layer, whose patterns PEFT matches with the end of its name."""
        config = self.config
        alpha = _matching(config.get("alpha_pattern"), name, config["lora_alpha"])
        said = _matching(config.get("rank_pattern"), name, config["r"])
        if said != rank:
            raise ValueError(
                f"lora_A of {name!r} has rank {rank}, and adapter_config.json says {said} by r, which is "
                f"{_DEFAULTS['r']} where it is missing, or rank_pattern"
            )
        return float(alpha / rank**0.5 if config.get("use_rslora") else alpha / rank)


def _matching(patterns: Any, name: str, default: Any) -> Any:
    return next((v for key, v in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", name)), default)


def load(folder: Any, params: Any, *, module: Module = dotted, where: Where | None = None) -> Any:
    """Reads a LoRA or DoRA adapter that PEFT wrote as a tree of changes, to be used, trained on or merged.

    Args:
      folder: the folder with `adapter_config.json` and `adapter_model.safetensors`.
      params: the parameters of the base model, which tell the kernels.
      module: as in `export`: the name in the file of the layer of a kernel.
      where: as in `init`, for kernels whose axes leave a doubt; needed for stacked layers.

    Returns:
      A tree of changes of kind `lora` or `dora`, in float32 or better. Layers of a stack that the file leaves out get
      a zero change, smaller ranks are padded with zeros. Other parameters of the file (`modules_to_save`) are named in
      a warning.

    Raises:
      ImportError: if safetensors is not installed.
      ValueError: for a folder that is incomplete, damaged, a pickle, of another method than LoRA and DoRA, or does not
        fit the parameters. A config without `r` or `lora_alpha` has 8, as in PEFT.

    Example:
      See `export`.
    """
    check_where(where)
    file = _read(pathlib.Path(folder))
    rest = set(file.layers)
    found: dict[str, Any] = {}

    def one(path: Any, box: Any) -> None:
        leaf, kernel = opened(box), path_name(path)
        shape = tuple(jnp.shape(leaf))
        axes = split_axes(kernel, shape, where, 1) if where is not None and len(shape) > 1 else None
        if (where is not None and axes is None) or len(shape) < 2:
            return
        batch = shape[: axes.batch] if axes is not None else ()
        names = {index: module(kernel, index) for index in np.ndindex(batch)}
        here = {index: name for index, name in names.items() if name in file.layers}
        if not here:
            return
        axes = split_axes(kernel, shape, None, 1) if axes is None else axes
        assert axes is not None
        rest.difference_update(here.values())
        read = {index: _change(file, name, shape, axes) for index, name in here.items()}
        found[kernel] = _stacked(read, batch)

    for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_parameter):
        one(path, leaf)
    if rest:
        raise ValueError(
            f"{folder}: the parameters have no kernels for {len(rest)} layers of the file, pass module=... to map the "
            f"names: {', '.join(sorted(rest)[:5])}"
        )
    if file.others:
        warnings.warn(f"{folder}: not loaded, because they are no adapters: {', '.join(file.others[:5])}", stacklevel=2)
    return nested(found)


def _read(folder: pathlib.Path) -> _File:
    """The contents of a folder, checked."""
    try:
        import safetensors
        from safetensors.flax import load_file
    except ImportError as error:
        raise ImportError("an adapter is read from safetensors: pip install lowrank-optax[export]") from error
    config_path, path = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if not config_path.is_file():
        raise ValueError(f"{folder} has no adapter_config.json")
    try:
        config = json.loads(config_path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{config_path} is no JSON: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{config_path} has peft_type {kind!r}, and only LORA is read")
    config = _checked(config, config_path)
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").exists()
        why = ", but a pickle, which may run code when it is read: save it again as safetensors" if pickled else ""
        raise ValueError(f"{folder} has no adapter_model.safetensors{why}")
    try:
        tensors = load_file(path)
    except (safetensors.SafetensorError, ValueError, OSError) as error:
        raise ValueError(f"{path} is damaged or no safetensors: {error}") from error
    return _sorted(path, config, tensors)


def _checked(config: dict[str, Any], path: pathlib.Path) -> dict[str, Any]:
    """The config with all that is read of it there and of its type."""

    def check(field: str, good: bool, what: str) -> None:
        if not good:
            raise ValueError(f"{path} has {field} {config[field]!r}, which is no {what}")

    for field in _SWITCHES:
        check(field, isinstance(config.get(field, False), bool), "true or false")
    for field in _OTHER_METHODS:
        if config.get(field):
            raise ValueError(f"{path} has {field}, which has no counterpart here")
    config = {**_DEFAULTS, **config}
    check("r", _is_rank(config["r"]), "rank")
    check("lora_alpha", _is_number(config["lora_alpha"]), "finite number")
    for field, is_value, what in (("rank_pattern", _is_rank, "rank"), ("alpha_pattern", _is_number, "finite number")):
        pattern = config.get(field) or {}
        check(field, isinstance(pattern, dict), "object of names and values")
        for name, value in pattern.items():
            try:
                re.compile(name)
            except re.error as error:
                raise ValueError(f"{path} has {field} with {name!r}, which is no pattern: {error}") from error
            if not is_value(value):
                raise ValueError(f"{path} has {field} with {name!r}: {value!r}, which is no {what}")
    saved = config.get("modules_to_save") or []
    check("modules_to_save", isinstance(saved, list) and all(isinstance(x, str) for x in saved), "list of names")
    return config


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def _is_rank(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x > 0


def _sorted(path: pathlib.Path, config: dict[str, Any], tensors: Mapping[str, Any]) -> _File:
    """Tensors by layer and letter, all of them finite floating numbers."""
    layers: dict[str, dict[str, Any]] = {}
    others: list[str] = []
    saved = tuple(config.get("modules_to_save") or ())
    wrong = []
    for key, x in tensors.items():
        name = key.removeprefix(PREFIX)
        ending = next((ending for ending in _LETTERS if name.endswith(f".{ending}")), None)
        if ending is not None:
            if not jnp.issubdtype(x.dtype, jnp.floating) or not bool(jnp.isfinite(x).all()):
                raise ValueError(f"{path} has {key!r} in {x.dtype}, not all of it finite floating numbers")
            if _LETTERS[ending] != "m" and x.ndim < 2:
                raise ValueError(f"{path} has {key!r} of shape {x.shape}, which is no matrix")
            layers.setdefault(name.removesuffix(f".{ending}"), {})[_LETTERS[ending]] = np.asarray(x)
        elif name.rpartition(".")[0].endswith(saved) and saved:
            others.append(name)
        else:
            wrong.append(name)
    if wrong:
        raise ValueError(f"{path} has tensors that are no LoRA of a layer: {', '.join(sorted(wrong)[:5])}")
    if not layers:
        raise ValueError(f"{path} has no lora_A and lora_B")
    needed = "ABm" if config.get("use_dora") else "AB"
    for name, letters in layers.items():
        if set(letters) != set(needed):
            raise ValueError(f"{path} has not all of, or more than, {_names(needed)} for {name!r}")
    return _File(config, layers, others)


def _names(letters: str) -> str:
    return ", ".join({"A": "lora_A", "B": "lora_B", "m": "lora_magnitude_vector"}[letter] for letter in letters)


def _change(file: _File, name: str, shape: tuple[int, ...], axes: Axes) -> Any:
    """The change of one kernel of a stack."""
    inner = axes.batch + axes.inputs
    inputs, outputs = shape[axes.batch : inner], shape[inner:]
    of = {key: jnp.asarray(x) for key, x in file.layers[name].items()}
    of = {key: x.astype(jnp.promote_types(x.dtype, jnp.float32)) for key, x in of.items()}
    A, B = of["A"], of["B"]
    rank, n = int(A.shape[0]), math.prod(outputs)
    # A matrix, or a convolution of torch, (r, in, window...), whose axes are those of a kernel (window..., in, out).
    rows = (math.prod(inputs),) if A.ndim == 2 else (inputs[-1], *inputs[:-1])
    needed = (rank, *rows), (n, rank, *(1,) * (A.ndim - 2))
    if (A.shape, B.shape) != needed:
        raise ValueError(
            f"lora_A and lora_B of {name!r} have shapes {A.shape} and {B.shape}, and its kernel of {inputs} inputs and "
            f"{outputs} outputs needs {needed[0]} and {needed[1]}"
        )
    scale = jnp.asarray(file.scale(name, rank), A.dtype)
    A = jnp.moveaxis(A, (1, 0), (-2, -1)).reshape(*inputs, rank)
    change = LoRA(A, B.reshape(n, rank).T.reshape(rank, *outputs), scale)
    if "m" not in of:
        return change
    if of["m"].shape not in ((n,), _lengths_shape(n, B.ndim)):
        raise ValueError(f"lora_magnitude_vector of {name!r} has shape {of['m'].shape}, its kernel {outputs} outputs")
    return Magnitude(change, of["m"].reshape(outputs))


def _stacked(read: dict[tuple[int, ...], Any], batch: tuple[int, ...]) -> Any:
    """The changes of a stack as one, with the largest rank; missing ones are zero."""
    if not batch:
        return read[()]
    pairs = {index: x.change if isinstance(x, Magnitude) else x for index, x in read.items()}
    has_lengths = any(isinstance(x, Magnitude) for x in read.values())
    if has_lengths and len(read) < math.prod(batch):
        raise ValueError("an adapter of kind 'dora' has all layers of a stack or none")
    rank = max(x.A.shape[-1] for x in pairs.values())

    def padded(x: LoRA) -> LoRA:
        more = rank - x.A.shape[-1]
        A = jnp.pad(x.A, [(0, 0)] * (x.A.ndim - 1) + [(0, more)])
        return LoRA(A, jnp.pad(x.B, [(0, more)] + [(0, 0)] * (x.B.ndim - 1)), x.scale)

    pairs = {index: padded(x) for index, x in pairs.items()}
    zero = jax.tree.map(jnp.zeros_like, next(iter(pairs.values())))
    stack = lambda xs: jax.tree.map(lambda *x: jnp.stack(x).reshape(*batch, *x[0].shape), *xs)  # noqa: E731
    change = stack([pairs.get(index, zero) for index in np.ndindex(batch)])
    if not has_lengths:
        return change
    return Magnitude(change, stack([read[index].magnitude for index in np.ndindex(batch)]))
