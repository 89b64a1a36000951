"""Every leaf that orbax keeps comes back, with a fingerprint, whether JAX computes in 64 bits or not."""

import os
import pathlib
import subprocess
import sys
import textwrap
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

import lowrank_optax as lro
from lowrank_optax.checkpoint import fingerprint

pytestmark = pytest.mark.usefixtures("settings_of_a_user")

RNG = np.random.default_rng(0)
LEAVES: dict[str, Any] = {
    "numpy float64": RNG.standard_normal((3, 2)),
    "numpy int64": np.arange(4) + 2**40,
    "numpy uint64": np.array([2**64 - 1], np.uint64),
    "numpy complex128": np.array([1 + 1e-12j]),
    "numpy bool": np.array([True, False]),
    "numpy bfloat16": np.ones(3, ml_dtypes.bfloat16),
    "numpy big-endian": np.arange(3.0).astype(">f8"),
    "numpy 0-d": np.array(1 / 3),
    "number of numpy": np.float64(1 / 3),
    "large number of numpy": np.int64(2**40),
    "bool of numpy": np.bool_(True),
    "python int": 2**40,
    "python float": 1 / 3,
    "python bool": True,
    "int4": lambda: jnp.arange(-4, 4).astype(jnp.int4),
    "int2": lambda: jnp.array([-2, 1]).astype(jnp.int2),
    "float4": lambda: jnp.array([0.5, -6.0]).astype(jnp.float4_e2m1fn),
    "float8": lambda: jnp.array([0.5, -6.0]).astype(jnp.float8_e4m3fn),
    "complex64": lambda: jnp.array([1 + 2j, -1j], jnp.complex64),
    "bool": lambda: jnp.array([True, False]),
    "0-d": lambda: jnp.float32(3),
    "key": lambda: jax.random.key(3),
    "keys": lambda: jax.random.split(jax.random.key(3, impl="rbg"), 2),
    "raw key": lambda: jax.random.PRNGKey(3),
}


def number(x: Any) -> int:
    """The fingerprint in a description."""
    return fingerprint.describe({"x": x})["x"]["fingerprint"]


@pytest.mark.parametrize("name", LEAVES)
def test_a_leaf_comes_back(name: str, tmp_path: pathlib.Path) -> None:
    """Into the same tree, with another value in it, to the bit and of the same type; without a target too."""
    x = LEAVES[name]() if callable(LEAVES[name]) else LEAVES[name]
    other = type(x)(0) if isinstance(x, int | float | np.generic) else x
    if isinstance(x, np.ndarray | jax.Array) and is_plain(x):
        other = np.zeros_like(x) if isinstance(x, np.ndarray) else jnp.zeros_like(x)
    with ocp.CheckpointManager(tmp_path) as manager:
        lro.checkpoint.save(manager, 1, {"x": x, "w": jnp.ones(2)})
    with ocp.CheckpointManager(tmp_path) as manager:
        found = lro.checkpoint.restore(manager, {"x": other, "w": jnp.zeros(2)}).tree["x"]
        part = lro.checkpoint.restore(manager, {"x": other}, partial=True).tree["x"]
    with ocp.CheckpointManager(tmp_path) as manager:
        free = lro.checkpoint.restore(manager).tree["x"]
    for y in (found, part):
        assert type(y) is type(x) and getattr(y, "shape", ()) == getattr(x, "shape", ())
        assert fingerprint.dtype_name(getattr(y, "dtype", 0)) == fingerprint.dtype_name(getattr(x, "dtype", 0))
    assert number(found) == number(part) == number(free) == number(x)


def is_plain(x: Any) -> bool:
    return not jnp.issubdtype(x.dtype, jax.dtypes.prng_key) and x.dtype.itemsize > 1


@pytest.mark.parametrize("name", [name for name in LEAVES if "python" not in name])
def test_a_changed_value_is_seen(name: str) -> None:
    x = LEAVES[name]() if callable(LEAVES[name]) else LEAVES[name]
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    data = np.array(jax.random.key_data(x) if is_key else x)
    raw = bytearray(data.tobytes())
    raw[len(raw) // 2] ^= 1
    changed = np.frombuffer(bytes(raw), data.dtype).reshape(data.shape)
    assert fingerprint.host_fingerprint(changed) != number(x) == fingerprint.host_fingerprint(data)


def test_python_numbers_and_arrays_of_one_kind_go_into_each_other(tmp_path: pathlib.Path) -> None:
    """As the step of a fresh TrainState, a Python 0, and one that has trained."""
    with ocp.CheckpointManager(tmp_path) as manager:
        lro.checkpoint.save(manager, 1, {"i": 3, "j": jnp.int32(4), "f": 0.1})
        _, tree = lro.checkpoint.restore(manager, {"i": jnp.int32(0), "j": 0, "f": jnp.float32(0)})
        assert tree["i"].dtype == jnp.int32 and tree["i"] == 3 and tree["f"] == np.float32(0.1)
        assert tree["j"] == 4 and type(tree["j"]) is int
        for bad in ({"i": 0.0}, {"j": 0.0}, {"f": jnp.int32(0)}, {"i": jnp.zeros(2, jnp.int32)}, {"f": True}):
            with pytest.raises(ValueError, match=rf"checkpoint 1 in .*: {next(iter(bad))} is "):
                lro.checkpoint.restore(manager, bad, partial=True)


def test_arrays_of_64_bits_are_read_without_them(tmp_path: pathlib.Path) -> None:
    """Written with x64. JAX would cut them, and the fingerprint call it damage."""
    with jax.enable_x64(True), ocp.CheckpointManager(tmp_path) as manager:
        params = {"kernel": lro.factorize(jnp.eye(4) / 3, 2), "key": jax.random.key(0), "n": jnp.arange(2), "k": 3}
        lro.checkpoint.save(manager, 1, params)
        manager.wait_until_finished()
    assert not jax.config.jax_enable_x64
    for like in (
        None,
        jax.tree.map(
            lambda x: np.asarray(x) if hasattr(x, "dtype") and x.dtype.itemsize == 8 and is_plain(x) else x, params
        ),
    ):
        with ocp.CheckpointManager(tmp_path) as manager:
            tree = lro.checkpoint.restore(manager, like).tree
        assert isinstance(tree["kernel"].U, np.ndarray) and tree["kernel"].U.dtype == np.float64
        assert np.array_equal(tree["n"], [0, 1]) and tree["k"] == 3 and tree["key"] == params["key"]
    with ocp.CheckpointManager(tmp_path) as manager, pytest.raises(ValueError, match=r"n is int64 .* in it, not int32"):
        lro.checkpoint.restore(manager, {"n": jnp.arange(2)}, partial=True)


def test_two_leaves_of_one_name_are_refused(tmp_path: pathlib.Path) -> None:
    with ocp.CheckpointManager(tmp_path) as manager, pytest.raises(ValueError, match=r"two leaves .* 'a/b'"):
        lro.checkpoint.save(manager, 1, {"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}})


SHARDED = """
    import sys, jax, jax.numpy as jnp, orbax.checkpoint as ocp, lowrank_optax as lro
    from jax.sharding import NamedSharding, PartitionSpec as P
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    w = jax.device_put(jnp.arange(16.0), NamedSharding(mesh, P("x")))
    with ocp.CheckpointManager(sys.argv[1]) as manager:
        lro.checkpoint.save(manager, 1, {"w": w, "kernel": lro.factorize(jnp.eye(4), 2)})
"""


@pytest.mark.slow
def test_devices_that_are_not_here(tmp_path: pathlib.Path) -> None:
    """Saved on 8 devices, read on one without saying where."""
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SHARDED), str(tmp_path)],
        env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
        cwd=pathlib.Path(__file__).parents[2],
        check=True,
        capture_output=True,
    )
    for like in (None, {"w": jax.ShapeDtypeStruct((16,), jnp.float32)}):
        with ocp.CheckpointManager(tmp_path) as manager:
            _, tree = lro.checkpoint.restore(manager, like, partial=like is not None)
        assert np.array_equal(tree["w"], np.arange(16)) and tree["w"].devices() == {jax.devices()[0]}
