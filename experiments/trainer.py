"""The one training loop: every method of a run in turn, with metrics, checkpoints and resume."""

import contextlib
import dataclasses
import functools
import json
import logging
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax.training.train_state import TrainState
from tqdm import tqdm

import lowrank_optax as lro
from experiments import methods, metrics, table, timing
from experiments.config import Config, ConfigError, Session, parse
from experiments.task import Batch, DataError, Params, Task

INTERRUPTED = 130  # the exit status of a shell command ended by Ctrl-C


# Cached, so that a second session in one process finds its data loaded and its programs compiled.
@functools.cache
def load(config: Config) -> Task:
    return config.task()


@functools.cache
def build(config: Config, name: str) -> tuple[Task, Callable[..., Any], Any]:
    """The task, the model's apply function for the method's kernels, and the optimizer."""
    task, method = load(config), methods.METHODS[name]
    return task, methods.apply(method, task.model), methods.optimizer(name, task, config)


def create_state(config: Config, name: str) -> tuple[TrainState, Params]:
    """The method's own form of the dense weights, from which all methods start, and its optimizer.

    Returns:
      The state, with the trained parameters alone, and the frozen ones, which may be the task's own arrays.
    """
    task, apply_fn, tx = build(config, name)
    key, factor_key = jax.random.key(config.seed), jax.random.fold_in(jax.random.key(config.seed), 1)
    method, dense = methods.METHODS[name], task.init(key)
    trained, frozen = methods.split(task, methods.factor(method, task, dense, config, factor_key))
    # Copies, because a train step donates its state and the task may hold pretrained weights.
    state = TrainState.create(apply_fn=apply_fn, params=jax.tree.map(jnp.copy, trained), tx=tx)
    return state.replace(step=jnp.zeros((), jnp.int32)), frozen  # Flax's Python 0 would compile twice


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def train_step(
    loss_fn: Callable[..., Any], state: TrainState, frozen: Params, batch: Batch
) -> tuple[TrainState, jax.Array]:
    def loss(params: Params) -> Any:
        return loss_fn(state.apply_fn, methods.join(params, frozen), batch)

    (value, _), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads), value


@functools.partial(jax.jit, static_argnums=0)
def eval_step(loss_fn: Callable[..., Any], state: TrainState, frozen: Params, batch: Batch) -> dict[str, jax.Array]:
    loss, values = loss_fn(state.apply_fn, methods.join(state.params, frozen), batch)
    return {"loss": loss, **values}


def evaluate(task: Task, state: TrainState, frozen: Params) -> dict[str, float]:
    """Loss and metrics, averaged over all examples of the validation batches."""
    sizes = [len(jax.tree.leaves(batch)[0]) for batch in task.validation]
    values = [jax.device_get(eval_step(task.loss, state, frozen, batch)) for batch in task.validation]
    return {f"validation_{k}": float(np.average([v[k] for v in values], weights=sizes)) for k in values[0]}


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Yields a function that is true once Ctrl-C or SIGTERM came; a second Ctrl-C stops at once."""
    received: list[int] = []

    def handle(number: int, frame: Any) -> None:
        received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(config: Config, session: Session, name: str, interrupted: Callable[[], bool]) -> bool:
    """Run one method to its end, or to an interruption; returns whether it reached the end."""
    task, _, _ = build(config, name)
    state, frozen = create_state(config, name)
    first = jax.tree.map(np.array, state.params) if task.export else None  # a copy, because steps donate the state
    header = {
        "experiment": config.name,
        **dataclasses.asdict(config),
        "method": name,
        "learning_rate": config.learning_rate(name),
        "parameters": methods.trained_parameters(state.params),
        "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state)),
        "data": task.data,
        "unit": task.unit,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
    }

    folder = (session.out / "checkpoints" / name).absolute()
    last = min(config.steps, session.stop_at or config.steps)
    options = ocp.CheckpointManagerOptions(
        preservation_policy=ocp.checkpoint_managers.LatestN(2),  # the older one in case the newest is damaged
        cleanup_tmp_directories=True,  # of saves that a kill cut off
        lightweight_initialize=True,  # reads no metadata, which may be damaged
    )
    with ocp.CheckpointManager(folder, options=options) as manager:
        state = restore(manager, state)
        start = int(state.step)
        events = session.out / "tensorboard" / name if session.tensorboard else None
        log_file = metrics.Metrics(session.out / f"{name}.jsonl", header, start, events)
        bar = tqdm(
            desc=f"{name:<18}",
            total=config.steps,
            initial=start,
            unit="step",
            mininterval=0.1 if sys.stderr.isatty() else 30,
            postfix="compiling",
        )
        with log_file, bar:
            if start == 0:
                show_kernels(config, session, name, state.params)
                log_file.write(step=0, **evaluate(task, state, frozen))
                log_spectrum(log_file, task, state)
            clock, since = None, start  # no clock before the first step has compiled
            for step in range(start + 1, last + 1):
                state, loss = train_step(task.loss, state, frozen, task.batch(config.seed, step))
                if clock is None:
                    jax.block_until_ready(state)
                    bar.set_postfix_str("", refresh=False)
                    bar.unpause()  # speed and remaining time count from the second step
                bar.update()

                if config.resize_every and step % config.resize_every == 0:
                    state = follow_ranks(config, name, state)
                log = step % config.log_every == 0 or step == config.steps
                if log:
                    jax.block_until_ready(state)
                    now = time.perf_counter()
                    record = {"step": step, "loss": float(loss)}
                    rank = methods.mean_rank(state.params, state.opt_state)
                    if rank is not None:
                        record["rank"] = rank
                    if config.resize_every:
                        record["parameters"] = methods.trained_parameters(state.params)
                    if clock is not None:
                        seconds = (now - clock) / (step - since)
                        record["step_ms"] = 1e3 * seconds
                        record[f"{task.work[0]}_per_s"] = task.work[1] / seconds
                    log_file.write(**record)
                    bar.set_postfix_str(progress(record, task.work[0]), refresh=False)
                    if not np.isfinite(record["loss"]):
                        return True  # diverged: no checkpoint, and the next method may run
                check = step % config.eval_every == 0 or step == config.steps
                if check:
                    if step == config.steps:
                        log_spectrum(log_file, task, state)
                    log_file.write(step=step, **evaluate(task, state, frozen))
                leave = step == last or interrupted()
                save = config.save_every and (leave or step % config.save_every == 0)
                if save:
                    lro.checkpoint.save(manager, step, saved(state), force=True)
                    manager.wait_until_finished()  # the next step donates these buffers
                if step == config.steps and task.export:
                    task.export(session.out / f"{name}-adapter", first, state.params)
                if leave:
                    return step == config.steps
                if log or check or save or clock is None:
                    jax.block_until_ready(state)
                    clock, since = time.perf_counter(), step
    return start == config.steps


def log_spectrum(log_file: metrics.Metrics, task: Task, state: TrainState) -> None:
    """Records the singular values of kernels or of their changes, where these have any."""
    if values := methods.spectrum(task, state.params):
        log_file.write(step=int(state.step), spectrum=values)


def show_kernels(config: Config, session: Session, name: str, params: Params) -> None:
    """Prints how much of the model is left, and keeps the table of all parameters; an adapted model is kept whole."""
    if methods.METHODS[name].form != "low rank" or config.adapt:
        return
    summary = lro.summary(params, load(config).is_kernel)
    path = session.out / f"{name}.parameters.txt"
    metrics.replace(path, f"{summary}\n")
    tqdm.write(f"{name}: {summary.share:.1%} of {summary.before:,} parameters are left, see {path}")


def follow_ranks(config: Config, name: str, state: TrainState) -> TrainState:
    """The same state with factors about as wide as their ranks; the next step compiles if a width changed."""
    if not methods.METHODS[name].on_manifold:
        return state
    widths = lro.buckets(state.params, config.bucket, max_rank=config.max_rank or config.rank)
    params, opt_state = lro.resize(state.params, state.opt_state, widths)
    return state.replace(params=params, opt_state=opt_state)


def restore(manager: ocp.CheckpointManager, state: TrainState) -> TrainState:
    """The state of the newest checkpoint that is whole, or the one given if there is none."""
    try:
        found = lro.checkpoint.restore(manager, saved(state))
    except (ValueError, OSError) as error:
        raise DataError(str(error)) from error
    return state.replace(**found.tree) if found else state


def saved(state: TrainState) -> dict[str, Any]:
    """The part of the state that a checkpoint holds."""
    return {"step": state.step, "params": state.params, "opt_state": state.opt_state}


def progress(record: dict[str, Any], work: str) -> str:
    """The end of the progress bar."""
    parts = [f"loss {record['loss']:.3f}"]
    if f"{work}_per_s" in record:
        parts.append(f"{record[f'{work}_per_s']:,.0f} {work}/s")
    if "rank" in record:
        parts.append(f"rank {record['rank']:.1f}")
    return ", ".join(parts)


def run(config: Config, session: Session) -> None:
    """Train every method in turn, then report."""
    task = load(config)
    if session.overwrite:
        for name in methods.METHODS:
            shutil.rmtree(session.out / "checkpoints" / name, ignore_errors=True)
            (session.out / f"{name}.jsonl").unlink(missing_ok=True)
        (session.out / table.TIMES).unlink(missing_ok=True)
    session.out.mkdir(parents=True, exist_ok=True)
    metrics.replace(session.out / "config.json", json.dumps(dataclasses.asdict(config), indent=1))
    print(task.data)
    with interruptible() as interrupted:
        for name in config.methods:
            if not train(config, session, name, interrupted):
                again = f"{python()} -m experiments {config.name} --resume --out {session.out}"
                print(f"stopped and saved; to go on: {again}", file=sys.stderr)
                sys.exit(INTERRUPTED)
    time_steps(config, session)
    table.write(session.out)
    if config == type(config)():
        for what, flags in config.next_runs.items():
            print(f"next, {what}:\n  {python()} -m experiments {config.name} {flags}")


def time_steps(config: Config, session: Session) -> None:
    """Times the methods in turns; one method alone, or one whose width changes, keeps the times of its training."""
    path = session.out / table.TIMES
    if len(config.methods) == 1 or config.resize_every or path.exists():
        return
    print("timing the methods in turns")
    task = load(config)

    def step(state: tuple[TrainState, Params], i: int) -> tuple[TrainState, Params]:
        moving, frozen = state
        return train_step(task.loss, moving, frozen, task.batch(config.seed, i))[0], frozen

    states = {name: create_state(config, name) for name in config.methods}
    metrics.replace(path, json.dumps(timing.in_turns(dict.fromkeys(states, step), states)))


def python() -> str:
    """This interpreter, as one types it here."""
    executable = Path(sys.executable)
    return str(executable.relative_to(Path.cwd()) if executable.is_relative_to(Path.cwd()) else executable)


def main(base: type[Config] | Path, argv: Sequence[str] | None = None) -> None:
    """The command line of an experiment, or of a configuration file."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax narrates every save
    try:
        run(*parse(base, argv))
    except (ConfigError, DataError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        print("interrupted; nothing saved since the last checkpoint", file=sys.stderr)
        sys.exit(INTERRUPTED)
