"""Checkpoints: every bit comes back, elsewhere and at other widths too, and damage is never taken for a checkpoint."""

import os
import pathlib
import re
import subprocess
import sys
import textwrap
import warnings

import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import lowrank_optax as lro
from lowrank_optax.checkpoint import _fingerprint, restore, save

pytestmark = pytest.mark.usefixtures("settings_of_a_user")
MODEL = nn.Dense(6)
X = np.random.default_rng(1).standard_normal((16, 10), np.float32)
OPTIMIZERS = {
    "adam-tolerance": lambda: lro.lowrank_adam(0.02, geometry=lro.Tangent(rank=lro.tolerance(0.02))),
    "adam-tangent": lambda: optax.chain(lro.lowrank_adam(0.02, geometry=lro.Tangent())),
    "multi-steps": lambda: optax.MultiSteps(lro.lowrank_heavy_ball(0.02), 2),
}


def same(a: object, b: object) -> None:
    """The same structure, dtypes and bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


def train_state(tx: optax.GradientTransformation, seed: int = 0, max_rank: int = 5) -> TrainState:
    params = lro.factorize(MODEL.init(jax.random.key(seed), X)["params"], 2, max_rank=max_rank)
    state = TrainState.create(apply_fn=APPLY, params=params, tx=tx)
    return state.replace(step=jnp.zeros((), jnp.int32))


APPLY = lro.linen.apply(MODEL)


@jax.jit
def train_step(state: TrainState) -> TrainState:
    loss = lambda params: jnp.mean((state.apply_fn({"params": params}, X) - 1) ** 2)  # noqa: E731
    return state.apply_gradients(grads=jax.grad(loss)(state.params))


@pytest.fixture
def manager(tmp_path: pathlib.Path):
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        yield manager


def saved(manager: ocp.CheckpointManager, **trees: object) -> None:
    """Saves trees named step_1, step_2."""
    for name, tree in trees.items():
        assert save(manager, int(name[5:]), tree)
    manager.wait_until_finished()


@pytest.mark.parametrize(
    "name", ["adam-tolerance", *(pytest.param(n, marks=pytest.mark.slow) for n in [*OPTIMIZERS][1:])]
)
def test_a_train_state_continues_to_the_bit(name: str, manager: ocp.CheckpointManager) -> None:
    """Ranks, moments and, for MultiSteps, half a batch of gradients included."""
    tx = OPTIMIZERS[name]()
    state = train_state(tx)
    for _ in range(3):
        state = train_step(state)
    saved(manager, step_3=state)
    step, restored = restore(manager, train_state(tx, seed=9))
    assert step == 3
    same(restored, state)
    same(train_step(restored), train_step(state))


class Net(nnx.Module):
    def __init__(self, seed: int) -> None:
        rngs = nnx.Rngs(seed)
        self.linear, self.dropout = nnx.Linear(10, 8, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
        lro.nnx.factorize(self, 2, max_rank=3)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.dropout(self.linear(x))


def net_and_optimizer(seed: int) -> tuple[Net, nnx.Optimizer]:
    net = Net(seed)
    return net, nnx.Optimizer(
        net, lro.lowrank_adam(0.02, geometry=lro.Tangent(rank=lro.tolerance(0.02))), wrt=nnx.Param
    )


@nnx.jit
def net_step(net: Net, optimizer: nnx.Optimizer) -> None:
    optimizer.update(net, nnx.grad(lambda net: jnp.mean((net(X) - 1) ** 2))(net))


@pytest.mark.slow
def test_an_nnx_model_and_its_optimizer_continue_to_the_bit(manager: ocp.CheckpointManager) -> None:
    """The random stream of the dropout too, which is a typed key."""
    pair, other = net_and_optimizer(0), net_and_optimizer(9)
    net_step(*pair)
    saved(manager, step_1=nnx.state(pair))
    nnx.update(other, restore(manager, nnx.state(other)).tree)
    for _ in range(2):
        bits = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x  # noqa: E731
        same(*(jax.tree.map(bits, nnx.to_pure_dict(nnx.state(each))) for each in (other, pair)))
        net_step(*pair)
        net_step(*other)


def test_without_a_target_kernels_are_rebuilt(manager: ocp.CheckpointManager) -> None:
    state = train_state(lro.lowrank_adam(0.02, geometry=lro.Tangent()))
    saved(manager, step_0=state)
    step, tree = restore(manager)
    assert step == 0
    same(tree["params"], state.params)
    mu = optax.tree.get(state.opt_state, "mu")
    restored = tree["opt_state"]["inner_state"]["inner_state"][0]["mu"]
    same(restored, {**mu, "kernel": mu["kernel"]._asdict()})  # nodes of the optimizer state are dicts
    assert np.array_equal(APPLY({"params": tree["params"]}, X), APPLY({"params": state.params}, X))
    same(lro.checkpoint.rebuild(manager.restore(0)["params"]), state.params)
    # Modules may have these names: only dicts of arrays are kernels.
    modules = {"U": {"bias": X}, "S": {"bias": X}, "V": {"bias": X}}
    assert lro.checkpoint.rebuild({"a": modules}) == {"a": modules}


@pytest.mark.slow
@pytest.mark.parametrize("width", [5, 1])
def test_another_width(width: int, manager: ocp.CheckpointManager) -> None:
    """Saved at width 3, wanted at another: the target has the new one already."""
    tx = lro.lowrank_adam(0.02, geometry=lro.Tangent())  # which truncates
    state = train_step(train_state(tx, max_rank=3))
    saved(manager, step_1=state)
    wanted = train_state(tx, seed=9, max_rank=max(2, width))
    restored = restore(manager, wanted).tree
    same(restored, state)
    params, opt_state = lro.resize(restored.params, restored.opt_state, width)
    assert params["kernel"].width == width
    dense, report = state.params["kernel"].to_dense(), lro.diagnostics(state.opt_state).kernels["kernel"]
    P, sigma, Qt = np.linalg.svd(dense)
    lost = np.linalg.norm(sigma[width:]) / np.linalg.norm(sigma)
    # Growing keeps W and what the last step reported; shrinking gives the best approximation and reports its error.
    best = dense if width == 5 else (P[:, :width] * sigma[:width]) @ Qt[:width]
    np.testing.assert_allclose(params["kernel"].to_dense(), best, atol=1e-6)  # float32, entries below 1
    after = lro.diagnostics(opt_state).kernels["kernel"].truncation
    np.testing.assert_allclose(after, report.truncation if width == 5 else lost, atol=1e-6)


MISFITS = {
    "shape": (lambda p: {**p, "bias": jnp.zeros(4)}, r"bias is float32 \(5,\) in it, not float32 \(4,\)"),
    "rows": (lambda p: {**p, "kernel": lro.factorize(jnp.eye(9, 5), 2)}, r"kernel/U is float32 \(6, 3\) in it, not"),
    "dtype": (lambda p: {**p, "bias": jnp.zeros(5, jnp.bfloat16)}, "bias is float32"),
    "leaf": (lambda p: {**p, "scale": jnp.zeros(5)}, "there is no scale in it"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_target_that_does_not_fit_is_an_error_and_moves_nothing(name: str, manager: ocp.CheckpointManager) -> None:
    params = {"kernel": lro.factorize(jnp.eye(6, 5), 2, max_rank=3), "bias": jnp.zeros(5)}
    saved(manager, step_1=params, step_2=params)
    change, message = MISFITS[name]
    with pytest.raises(ValueError, match=rf"does not fit checkpoint 2 in .*: {message}"):
        restore(manager, change(params))
    same(restore(manager, params).tree, params)


def test_options_of_the_manager_are_obeyed(tmp_path: pathlib.Path) -> None:
    params = {"w": jnp.arange(3.0)}
    policy = ocp.checkpoint_managers.FixedIntervalPolicy(2)
    with ocp.CheckpointManager(tmp_path, options=ocp.CheckpointManagerOptions(save_decision_policy=policy)) as manager:
        assert restore(manager, params) is None
        kept = [step for step in range(5) if save(manager, step, params, custom_metadata={"seed": 7})]
        assert kept == [0, 2, 4] and save(manager, 5, params, force=True)
        manager.wait_until_finished()
        assert manager.metadata(2).custom_metadata["seed"] == 7
        assert restore(manager, params).step == 5 and restore(manager, params, step=2).step == 2
        manager.save(7, args=ocp.args.StandardSave(params), force=True)  # without our metadata: read, not checked
        manager.wait_until_finished()
        same(restore(manager, params).tree, params)


# --- damage -----------------------------------------------------------------------------------------------------


def turn_a_bit(path: pathlib.Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def cut(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def another_key(path: pathlib.Path) -> None:
    """One bit, for which orbax will not even open a manager that reads all metadata first."""
    path.write_bytes(path.read_bytes().replace(b"init_timestamp", b"hnit_timestamp"))


DAMAGES = {"bit": turn_a_bit, "end": cut, "file": pathlib.Path.unlink}


# Orbax leaves coroutines behind when it meets damaged files.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("kind", "file"),
    [(kind, file) for kind in DAMAGES for file in ("values", "_METADATA", "manifest.ocdbt")]
    + [("key", "../_CHECKPOINT_METADATA")],
)
def test_a_damaged_checkpoint_is_named_and_skipped(
    kind: str, file: str, tmp_path: pathlib.Path, manager: ocp.CheckpointManager
) -> None:
    # Random numbers do not compress: orbax alone reads a turned bit of theirs without a complaint.
    params = {"kernel": lro.factorize(jax.random.normal(jax.random.key(0), (64, 48)), 16), "bias": jnp.zeros(5)}
    saved(manager, step_1=params, step_2=jax.tree.map(lambda x: x + 1, params))
    folder = tmp_path / "run" / "2" / "default"
    largest = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    {**DAMAGES, "key": another_key}[kind](largest if file == "values" else folder / file)
    options = ocp.CheckpointManagerOptions(lightweight_initialize=True)
    with ocp.CheckpointManager(tmp_path / "run", options=options) as later:
        with pytest.warns(UserWarning, match=rf"checkpoint 2 in {re.escape(str(tmp_path))}/run is skipped: \w"):
            step, restored = restore(later, params)
        assert step == 1
        same(restored, params)
        assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["1", "2"]  # restoring writes nothing
        saved(later, step_2=params)  # the step is free again
        assert sorted(path.name[:9] for path in (tmp_path / "run").iterdir()) == ["1", "2", "2.damaged"]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert restore(later, params).step == 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_when_all_are_damaged_nothing_starts_from_scratch(
    tmp_path: pathlib.Path, manager: ocp.CheckpointManager
) -> None:
    params = {"w": jnp.arange(3.0)}
    saved(manager, step_1=params, step_2=params)
    for step in "12":
        cut(tmp_path / "run" / step / "default" / "manifest.ocdbt")
    with ocp.CheckpointManager(tmp_path / "run") as later, pytest.raises(ValueError, match=r"restored\. 2: .*; 1: "):
        restore(later, params)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["1", "2"]


def oracle(x: np.ndarray) -> int:
    """sum (2 i + 1) b_i modulo 2^32, in Python's integers."""
    unsigned = {1: np.uint8, 2: np.uint16}.get(x.dtype.itemsize, np.uint32)
    bits = np.frombuffer(x.tobytes(), unsigned)
    return sum((2 * i + 1) * int(b) for i, b in enumerate(bits)) % 2**32


DTYPES = [np.float32, ml_dtypes.bfloat16, np.float16, np.int32, np.int8, np.bool_]


@hypothesis.given(
    dtype=st.sampled_from(DTYPES),
    shape=st.sampled_from([(), (5,), (2, 3, 4)]),
    seed=st.integers(0, 2**32 - 1),
    position=st.floats(0, 1, exclude_max=True),
)
@hypothesis.settings(max_examples=30)
def test_the_fingerprint_is_its_formula_and_sees_every_bit(dtype, shape, seed, position) -> None:
    rng = np.random.default_rng(seed)
    content = bytearray(rng.bytes(int(np.prod(shape)) * np.dtype(dtype).itemsize))
    if dtype is np.bool_:
        content = bytearray(b & 1 for b in content)
    array = lambda content: np.frombuffer(bytes(content), dtype).reshape(shape)  # noqa: E731
    number = int(FINGERPRINT(array(content)))
    assert number == oracle(array(content))
    bit = int(position * len(content) * 8)
    content[bit // 8] ^= 1 if dtype is np.bool_ else 1 << bit % 8
    assert int(FINGERPRINT(array(content))) != number


FINGERPRINT = jax.jit(_fingerprint)


def test_the_fingerprint_of_eight_bytes() -> None:
    with jax.enable_x64(True):
        x = np.random.default_rng(0).standard_normal((3, 4))
        assert int(_fingerprint(jnp.asarray(x))) == oracle(x)


# --- another mesh -----------------------------------------------------------------------------------------------

ELSEWHERE = """
    import sys
    import jax, jax.numpy as jnp, numpy as np, orbax.checkpoint as ocp
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    import lowrank_optax as lro

    tx = lro.lowrank_adam(1e-3, geometry=lro.Tangent())
    kernel = lro.factorize(jax.random.normal(jax.random.key(0), (16, 24)), 4)
    params = {"dense": {"kernel": kernel, "bias": jnp.ones(24)}}
    state = {"params": params, "opt_state": tx.init(params)}

    def placed(tree, mesh, rows):
        def shard(path, x):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            return NamedSharding(mesh, P(rows) if name.endswith(("/U", "/V")) else P())
        return jax.tree_util.tree_map_with_path(shard, tree)

    def mesh(*shape):
        names = ("data", "model")[: len(shape)]
        return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape))

    there = jax.device_put(state, placed(state, mesh(8), "data"))
    with ocp.CheckpointManager(sys.argv[1]) as manager:
        lro.checkpoint.save(manager, 3, there)
    for shape, rows in (((4, 2), "model"), ((2, 4), ("data", "model")), ((1,), None)):
        shardings = placed(state, mesh(*shape), rows)
        like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)
        with ocp.CheckpointManager(sys.argv[1]) as manager:
            step, here = lro.checkpoint.restore(manager, like)
        assert step == 3
        for a, b, s in zip(*map(jax.tree.leaves, (here, state, shardings)), strict=True):
            assert a.sharding == s and np.array_equal(a, b)
        U = here["params"]["dense"]["kernel"].U
        print(shape, U.addressable_shards[0].data.shape)
"""


@pytest.mark.slow
def test_another_mesh(tmp_path: pathlib.Path) -> None:
    """Saved from 8 devices, restored on meshes of 4 x 2, 2 x 4 and on one device."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(ELSEWHERE), str(tmp_path / "run")],
        env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
        cwd=pathlib.Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == ["(4, 2) (8, 4)", "(2, 4) (2, 4)", "(1,) (16, 4)"]


@pytest.mark.parametrize("target", ["whole", "part", "none"])
def test_a_manager_that_has_not_saved_restores_without_warnings(
    target: str, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Orbax would log that it does not know how to restore the item. Metrics are another item."""
    tree = {"params": lro.factorize({"kernel": jnp.eye(6)}, 2), "step": jnp.int32(1)}
    options = ocp.CheckpointManagerOptions(best_fn=lambda metrics: metrics["loss"], lightweight_initialize=True)
    with ocp.CheckpointManager(tmp_path, options=options) as manager:
        save(manager, 1, tree, metrics={"loss": 0.5})
    like = {"whole": tree, "part": {"params": tree["params"]}, "none": None}[target]
    with (
        caplog.at_level("WARNING", logger="absl"),
        ocp.CheckpointManager(tmp_path, options=ocp.CheckpointManagerOptions(lightweight_initialize=True)) as manager,
    ):
        assert restore(manager, like, partial=target == "part").step == 1
    assert [record.getMessage() for record in caplog.records] == []


@pytest.mark.parametrize("call", ["restore", "save", "set_aside"])
def test_a_folder_in_the_place_of_a_manager_is_refused(call: str, tmp_path: pathlib.Path) -> None:
    arguments = {"restore": ({},), "save": (1, {}), "set_aside": ()}[call]
    with pytest.raises(TypeError, match=rf"{call} takes an orbax CheckpointManager, got '"):
        getattr(lro.checkpoint, call)(str(tmp_path), *arguments)
