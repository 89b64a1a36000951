"""Pre-train a byte-level GPT with full and with low-rank kernels, and compare them.

    python -m experiments.pretrain                  # the demo
    python -m experiments.pretrain --smoke          # seconds, for tests
    python -m experiments.pretrain --method lowrank_muon --rank 32 --data my_text/ --out runs/mine

Ctrl-C saves after the current step; `--resume` continues to the bit.
"""

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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax.training.train_state import TrainState
from tqdm import tqdm

from experiments import gpt, report, text
from experiments.config import Config, ConfigError, Session, parse
from experiments.methods import METHODS, mean_rank, optimizer
from experiments.metrics import Metrics

INTERRUPTED = 130  # the exit status of a shell command ended by Ctrl-C


@functools.cache  # so that a second session in one process finds its programs compiled
def build(config: Config, name: str) -> tuple[Callable[..., Any], optax.GradientTransformation]:
    """The model's apply function for the method's kernels, and the optimizer."""
    method = METHODS[name]
    return method.apply(gpt.GPT(config.model)), optimizer(method, learning_rate(config, name), config.settings)


def learning_rate(config: Config, name: str) -> float:
    return config.lr or METHODS[name].learning_rate


@functools.partial(jax.jit, static_argnums=0)
def dense_params(config: gpt.GPTConfig, key: jax.Array) -> Any:
    """The weights from which all methods start."""
    tokens = jnp.zeros((1, config.context), jnp.int32)
    return gpt.GPT(config).init(key, tokens)["params"]


def create_state(config: Config, name: str) -> TrainState:
    """The method's own form of the dense weights, and its optimizer."""
    apply_fn, tx = build(config, name)
    key = jax.random.key(config.seed)
    params = METHODS[name].factor(dense_params(config.model, key), config.rank, jax.random.fold_in(key, 1))
    state = TrainState.create(apply_fn=apply_fn, params=params, tx=tx)
    return state.replace(step=jnp.zeros((), jnp.int32))  # Flax's Python 0 would compile twice


def loss_fn(apply_fn: Callable[..., Any], params: Any, windows: jax.Array) -> jax.Array:
    """Mean cross-entropy in nats/byte of each window's bytes after the first."""
    logits = apply_fn({"params": params}, windows[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()


@functools.partial(jax.jit, donate_argnums=0)
def train_step(state: TrainState, windows: jax.Array) -> tuple[TrainState, jax.Array]:
    loss, grads = jax.value_and_grad(functools.partial(loss_fn, state.apply_fn))(state.params, windows)
    return state.apply_gradients(grads=grads), loss


@jax.jit
def eval_step(state: TrainState, windows: jax.Array) -> jax.Array:
    return loss_fn(state.apply_fn, state.params, windows)


def evaluate(state: TrainState, windows: np.ndarray, size: int) -> float:
    """Mean loss over all windows, `size` at a time and the rest last."""
    chunks = [windows[i : i + size] for i in range(0, len(windows), size)]
    return float(np.average([eval_step(state, c) for c in chunks], weights=[len(c) for c in chunks]))


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


def train(config: Config, session: Session, name: str, corpus: text.Corpus, interrupted: Callable[[], bool]) -> bool:
    """Run one method to its end, or to an interruption; returns whether it reached the end."""
    state = create_state(config, name)
    validation = text.validation_windows(corpus, config.eval_windows, config.context)
    header = {
        **dataclasses.asdict(config),
        "method": name,
        "learning_rate": learning_rate(config, name),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state)),
        "corpus": corpus.name,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
    }

    folder = (session.out / "checkpoints" / name).absolute()
    options = ocp.CheckpointManagerOptions(max_to_keep=1, save_interval_steps=config.save_every)
    last = min(config.steps, session.stop_at or config.steps)
    with ocp.CheckpointManager(folder, options=options) as manager:
        if manager.latest_step() is not None:
            state = state.replace(**manager.restore(None, args=ocp.args.StandardRestore(saved(state))))
        start = int(state.step)
        metrics = Metrics(session.out / f"{name}.jsonl", header, start)
        bar = tqdm(
            desc=f"{name:<18}",
            total=config.steps,
            initial=start,
            unit="step",
            mininterval=0.1 if sys.stderr.isatty() else 30,
        )
        with metrics, bar:
            if start == 0:
                metrics.write(step=0, validation_loss=evaluate(state, validation, config.batch))
            clock, since = None, start  # no clock before the first step has compiled
            for step in range(start + 1, last + 1):
                windows = text.batch(corpus.train, config.seed, step, config.batch, config.context)
                state, loss = train_step(state, windows)
                bar.update()

                log = step % config.log_every == 0 or step == config.steps
                if log:
                    jax.block_until_ready(state)
                    now = time.perf_counter()
                    record = {"step": step, "loss": float(loss), "rank": mean_rank(state.params)}
                    if clock is not None:
                        seconds = (now - clock) / (step - since)
                        record["step_ms"] = 1e3 * seconds
                        record["tokens_per_s"] = config.batch * config.context / seconds
                    metrics.write(**record)
                    bar.set_postfix_str(progress(record))
                    if not np.isfinite(record["loss"]):
                        return True  # diverged: no checkpoint, and the next method may run
                check = step % config.eval_every == 0 or step == config.steps
                if check:
                    value = evaluate(state, validation, config.batch)
                    metrics.write(step=step, validation_loss=value)
                leave = step == last or interrupted()
                save = leave or step % config.save_every == 0
                if save:
                    manager.save(step, args=ocp.args.StandardSave(saved(state)), force=True)
                    manager.wait_until_finished()  # the next step donates these buffers
                if leave:
                    return step == config.steps
                if log or check or save or clock is None:
                    jax.block_until_ready(state)
                    clock, since = time.perf_counter(), step
    return start == config.steps


def saved(state: TrainState) -> dict[str, Any]:
    """The part of the state that a checkpoint holds."""
    return {"step": state.step, "params": state.params, "opt_state": state.opt_state}


def progress(record: dict[str, Any]) -> str:
    """The end of the progress bar."""
    speed = f", {record['tokens_per_s']:,.0f} tokens/s" if "tokens_per_s" in record else ""
    return f"loss {record['loss']:.3f}{speed}, rank {record['rank']:.1f}"


def run(config: Config, session: Session) -> None:
    """Train every method in turn, then report."""
    corpus = text.load(config.data or None)
    text.check_length(corpus, config.context)
    if session.overwrite:
        for name in METHODS:
            shutil.rmtree(session.out / "checkpoints" / name, ignore_errors=True)
            (session.out / f"{name}.jsonl").unlink(missing_ok=True)
    session.out.mkdir(parents=True, exist_ok=True)
    (session.out / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=1))
    print(f"{corpus.name}: {len(corpus.train):,} bytes to train, {len(corpus.validation):,} held out")
    with interruptible() as interrupted:
        for name in config.methods:
            if not train(config, session, name, corpus, interrupted):
                resume = f"python -m experiments.pretrain --resume --out {session.out}"
                print(f"stopped and saved; to go on: {resume}", file=sys.stderr)
                sys.exit(INTERRUPTED)
    report.write(session.out)


def main(argv: Sequence[str] | None = None) -> None:
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax narrates every save
    try:
        run(*parse(argv))
    except (ConfigError, text.DataError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        print("interrupted; nothing saved since the last checkpoint", file=sys.stderr)
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
