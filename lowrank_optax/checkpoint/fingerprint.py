"""Names, shapes, dtypes and fingerprints of the leaves of a tree: how a checkpoint is known again."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Description = dict[str, dict[str, Any]]  # name of a leaf -> shape, dtype, fingerprint; python: True for a Python number

_PART = 2**22  # words of an array that are added up at a time on the host


def leaf_name(path: Any) -> str:
    """One name for a leaf of the tree that was saved and for the same leaf in the dicts and lists of orbax."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by name.

    Raises:
      ValueError: if two leaves have the same name, because a key holds a slash.
    """
    named: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if leaf_name(path) in named:
            raise ValueError(f"two leaves of the tree are named {leaf_name(path)!r}: use keys without slashes")
        named[leaf_name(path)] = leaf
    return named


def dtype_name(dtype: Any) -> str:
    """The name of a dtype of JAX or NumPy, the same for either byte order."""
    return str(dtype.newbyteorder("=") if getattr(dtype, "byteorder", "") in ("<", ">") else dtype)


def is_python(x: Any) -> bool:
    """True for a Python number, which is no number of NumPy."""
    return isinstance(x, bool | int | float) and not isinstance(x, np.generic)


def describe(tree: Any) -> Description:
    """Shape, dtype and fingerprint of every leaf, by name. Leaves that are no numbers are left to orbax to refuse."""
    given = named_leaves(tree)
    leaves = {name: leaf if isinstance(leaf, jax.Array) else np.asarray(leaf) for name, leaf in given.items()}
    leaves = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, jax.Array) or _is_numeric(leaf)}
    numbers = fingerprints(leaves)
    return {
        name: {
            "shape": list(leaf.shape),
            "dtype": dtype_name(leaf.dtype),
            "fingerprint": numbers[name],
            **({"python": True} if is_python(given[name]) else {}),
        }
        for name, leaf in leaves.items()
    }


def changed_leaves(tree: Any, saved: Description, names: Iterable[str]) -> list[str]:
    """The names of leaves that are not as they were saved, or not there. Leaves without a fingerprint pass.

    Args:
      tree: what orbax returned.
      saved: the description that was saved.
      names: of the leaves to look at.
    """
    leaves, found = named_leaves(tree), {}
    wanted = {name: saved[name] for name in names if "fingerprint" in saved[name]}
    for name, entry in wanted.items():
        leaf = leaves.get(name)
        if leaf is None:
            continue
        if not isinstance(leaf, jax.Array) or dtype_name(leaf.dtype) != entry["dtype"]:
            leaf = np.asarray(leaf)
            leaf = leaf if entry["dtype"].startswith("key<") else leaf.astype(np.dtype(entry["dtype"]))
        is_data_of_keys = isinstance(leaf, np.ndarray) and entry["dtype"].startswith("key<")
        if is_data_of_keys or list(leaf.shape) == entry["shape"]:
            found[name] = leaf
    numbers = fingerprints(found)
    return sorted(name for name, entry in wanted.items() if numbers.get(name) != entry["fingerprint"])


def checksum(saved: Description) -> int:
    """Of a description, by which damage to the file that holds it is found."""
    return zlib.crc32(json.dumps(saved, sort_keys=True).encode())


def fingerprints(leaves: dict[str, Any]) -> dict[str, int]:
    """Fingerprints of arrays: of JAX arrays on their devices, in one compiled call, of NumPy arrays on the host."""
    on_devices = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, jax.Array)}
    numbers = {name: int(number) for name, number in jax.device_get(_fingerprints(on_devices)).items()}
    return numbers | {name: host_fingerprint(leaf) for name, leaf in leaves.items() if name not in on_devices}


@jax.jit
def _fingerprints(leaves: dict[str, Any]) -> dict[str, jax.Array]:
    return {name: fingerprint(leaf) for name, leaf in leaves.items()}


def fingerprint(x: jax.Array) -> jax.Array:
    r"""The sum of `(2 i + 1) b_i` modulo 2^32 over the words of an array, `b_i` the bits of word i.

    A word is a value of at most 4 bytes; 8 bytes are two words, a complex number is its real and its imaginary part. An
    odd number has an inverse modulo 2^32, so any one changed word changes the sum; a damaged block keeps it with a
    chance of 2^-32. A sum of integers does not depend on the order, hence not on the devices that hold x, and a sharded
    axis costs an all-reduce of one number.
    """
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], axis=-1)
    size = _bits(x.dtype)
    words = {2: jnp.uint2, 4: jnp.uint4, 8: jnp.uint8, 16: jnp.uint16}.get(size, jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, words).astype(jnp.uint32)  # 8 bytes are two words on a new axis
    weight, stride = jnp.uint32(1), 2
    for axis in reversed(range(bits.ndim)):
        weight = weight + jnp.uint32(stride % 2**32) * jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        stride *= bits.shape[axis]
    return jnp.sum(bits * weight, dtype=jnp.uint32)


def host_fingerprint(x: np.ndarray) -> int:
    """The number of `fingerprint` for an array of NumPy, which JAX would cut to 32 bits."""
    x = np.ascontiguousarray(x)
    if x.dtype.byteorder == ">":
        x = x.astype(x.dtype.newbyteorder("="))
    words = x.reshape(-1).view({1: np.uint8, 2: np.uint16}.get(x.dtype.itemsize, np.uint32))
    kept = np.uint32(2 ** min(32, _bits(x.dtype)) - 1)  # 4 bits lie in one byte, whose other half is anything
    total = 0
    for start in range(0, words.size, _PART):
        part = words[start : start + _PART].astype(np.uint32) & kept
        weight = 2 * np.arange(start, start + part.size, dtype=np.uint64) + 1
        total += int(np.sum(part * weight.astype(np.uint32), dtype=np.uint32))
    return total % 2**32


def _bits(dtype: Any) -> int:
    """Bits of a value; of one part of a complex number."""
    if jnp.issubdtype(dtype, jnp.bool_):
        return 8
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return int(dtype.itemsize) * 4
    return int((jnp.iinfo if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo)(dtype).bits)


def _is_numeric(x: np.ndarray) -> bool:
    return x.dtype == bool or jnp.issubdtype(x.dtype, jnp.number)
