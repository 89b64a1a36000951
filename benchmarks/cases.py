"""The cases. `python -m benchmarks.cases '{"kind": "size", ...}'` runs one, in a process of its own, and prints it."""

import dataclasses
import functools
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import measure, subjects
from benchmarks.subjects import Size, Subject
from lowrank_optax import linalg
from lowrank_optax import manifold as mf
from lowrank_optax.transforms.split import Split
from lowrank_optax.xla import together

ALL = ["full", "full_muon", "galore", "factors", "lowrank_adam"]
FEW = ["full", "factors", "lowrank_adam"]


def every(platform: str) -> list[dict[str, Any]]:
    """All cases. The first two have the sizes and methods that the targets name."""
    four_blocks = {"rank": 64, "layers": 4}
    chosen: list[dict[str, Any]] = [
        {"kind": "size", "d": 512, **four_blocks, "methods": [*ALL, "lowrank_adam:coefficient"], "repeats": 5},
        {"kind": "size", "d": 1024, **four_blocks, "methods": [*FEW, "lowrank_adam:coefficient"], "repeats": 3},
        {"kind": "phases", "d": 512, **four_blocks, "repeats": 3},
    ]
    one_block = {"kind": "size", "layers": 1, "repeats": 3}
    chosen += [{**one_block, "d": d, "rank": 32, "methods": ALL} for d in (256, 512, 1024)]
    chosen += [{**one_block, "d": 512, "rank": 128, "methods": FEW}]
    chosen += [{"kind": "depth", "d": 128, "rank": 16, "layers": n, "repeats": 3} for n in (1, 48)]
    if platform == "gpu":
        chosen += [{**case, "dtype": "bfloat16"} for case in chosen if case["kind"] == "size"]
    return chosen


def smoke(platform: str) -> list[dict[str, Any]]:
    """One small case of each kind."""
    small = {"d": 32, "rank": 4, "layers": 1, "tokens": 64, "context": 32, "repeats": 2}
    return [
        {"kind": "size", "methods": ["full", "lowrank_adam"], **small},
        {"kind": "depth", **small},
        {"kind": "phases", **small},
    ]


def run(case: dict[str, Any]) -> dict[str, Any]:
    """The record of a case."""
    fields = {f.name for f in dataclasses.fields(Size)}
    size = Size(**{key: value for key, value in case.items() if key in fields})
    kinds = {"size": size_case, "phases": phases_case, "depth": depth_case}
    record = kinds[case["kind"]](size, **{key: case[key] for key in ("methods", "repeats") if key in case})
    return {**dataclasses.asdict(size), "kind": case["kind"], **record}


def size_case(size: Size, methods: list[str], repeats: int) -> dict[str, Any]:
    """Time of a whole step and of the update alone, memory and compile time of every method."""
    records, calls = {}, {}
    for name in methods:
        subject = subjects.build(name, size)
        few = subject.batch[:1]  # An update takes as long with the gradients of one sequence.
        _, grads = measure.quickly_compiled(subject.gradient, subject.params, few)(subject.params, few)
        size_of_state, size_of_params = measure.size_of(subject.state), measure.size_of(subject.params)
        step = measure.program(subject.step, subject.params, subject.state, subject.batch, donate=(0, 1))
        update = measure.program(subject.update, grads, subject.params, subject.state, donate=(1, 2))
        records[name] = {
            "trace_s": step.trace_s,
            "compile_s": step.compile_s,
            "peak_bytes": step.peak,
            "params_bytes": size_of_params,
            "state_bytes": size_of_state,
        }
        calls[name] = functools.partial(_step, step, subject)
        calls[f"{name} update"] = functools.partial(_update, update, subject, grads)
    times = measure.interleaved(calls, repeats)
    for name, record in records.items():
        step, update = times[name], times[f"{name} update"]
        record["step_ms"], record["update_ms"] = measure.summary(step), measure.summary(update)
        record["share"] = measure.ratio(update, step)
        record["ratio"] = {other: measure.ratio(step, times[other]) for other in records if other != name}
    forms = ("dense", "pair", "low rank")
    products = {form: subjects.flops(size, form) for form in forms}
    return {"methods": records, "flops": products, "matmul_rate": measure.matmul_rate()}


def _step(step: measure.Program, subject: Subject) -> jax.Array:
    subject.params, subject.state, loss = step.call(subject.params, subject.state, subject.batch)
    return loss


def _update(update: measure.Program, subject: Subject, grads: Any) -> Any:
    subject.params, subject.state = update.call(grads, subject.params, subject.state)
    return subject.params


def phases_case(size: Size, repeats: int) -> dict[str, Any]:
    """Where the time of low-rank Adam with coefficient momentum goes.

    The parts are programs of their own; what is left is called the rest.
    """
    subject = subjects.build("lowrank_adam:coefficient", size)
    gradient = measure.program(lambda p, b: subject.gradient(p, b)[1], subject.params, subject.batch)
    grads = gradient.call(subject.params, subject.batch)
    step = measure.program(subject.step, subject.params, subject.state, subject.batch)
    update = measure.program(subject.update, grads, subject.params, subject.state)
    split = Split(subject.params)
    Ws, gs = split.kernels(subject.params), split.kernels(grads)
    active = [jnp.ones((*W.batch_shape, W.rank), bool) for W in Ws]
    ranks = [jnp.full(W.batch_shape, W.rank, jnp.int32) for W in Ws]

    def each(f: Any) -> Any:
        return jax.jit(lambda *lists: [f(*xs) for xs in zip(*lists, strict=True)])

    project, augment = each(mf.project), jax.jit(functools.partial(mf.augment, times=2))
    householder = each(lambda x: linalg.orthonormalize(x))
    xis = project(Ws, gs, active)
    frames = augment(Ws, xis, ranks)
    ys = each(lambda W, f, xi: mf.congruence(W.S, *f[2:4]) - 1e-3 * jnp.sign(mf.coefficients(xi.S, *f[2:])))(
        Ws, frames, xis
    )
    retract = jax.jit(lambda ys: together(lambda y: mf.retract_svd(y, size.rank), ys))
    assemble = each(mf.assemble)
    points = retract(ys)
    both = [jnp.concatenate(pair, -1) for W, xi in zip(Ws, xis, strict=True) for pair in ((W.U, xi.U), (W.V, xi.V))]
    times = measure.interleaved(
        {
            "step": lambda: step.call(subject.params, subject.state, subject.batch),
            "backward": lambda: gradient.call(subject.params, subject.batch),
            "update": lambda: update.call(grads, subject.params, subject.state),
            "project": lambda: project(Ws, gs, active),
            "orthonormalise": lambda: augment(Ws, xis, ranks),
            "Householder QR of the same": lambda: householder(both),
            "small SVD": lambda: retract(ys),
            "new factors": lambda: assemble(frames, points, ranks),
        },
        repeats,
    )
    return {"phases": {name: measure.summary(t) for name, t in times.items()}}


def depth_case(size: Size, repeats: int) -> dict[str, Any]:
    """Compile time against the number of layers.

    A compiled step is called on its own results, which it would refuse had they other shapes or types: a second step
    never compiles.
    """
    size = dataclasses.replace(size, tokens=256, context=64)
    records, calls = {}, {}
    for name in ("full", "lowrank_adam"):
        subject = subjects.build(name, size)
        step = measure.program(subject.step, subject.params, subject.state, subject.batch, donate=(0, 1))
        records[name] = {"trace_s": step.trace_s, "compile_s": step.compile_s}
        calls[name] = functools.partial(_step, step, subject)
    for name, times in measure.interleaved(calls, repeats).items():
        records[name]["step_ms"] = measure.summary(times)
    return {"methods": records}


if __name__ == "__main__":
    print(json.dumps(run(json.loads(sys.argv[1]))))
