"""The cases. `python -m benchmarks.cases '{"kind": "size", ...}'` runs one, in a process of its own, and prints it."""

import dataclasses
import functools
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp

import lowrank_optax as lro
from benchmarks import measure, subjects
from benchmarks.subjects import Size, Subject
from lowrank_optax import linalg
from lowrank_optax import manifold as mf
from lowrank_optax.layout import map_kernel

ALL = ["full", "full_muon", "galore", "factors", "lowrank_adam"]
FEW = ["full", "factors", "lowrank_adam"]


def every(platform: str) -> list[dict[str, Any]]:
    """All cases. The first two have the sizes and methods that the targets name."""
    four_blocks = {"rank": 64, "layers": 4}
    chosen: list[dict[str, Any]] = [
        {
            "kind": "size",
            "d": 512,
            **four_blocks,
            "methods": [*ALL, "lowrank_adam:blocks", "lowrank_adam:coefficient"],
            "repeats": 5,
        },
        {
            "kind": "size",
            "d": 1024,
            **four_blocks,
            "methods": [*FEW, "lowrank_adam:blocks", "lowrank_adam:coefficient"],
            "repeats": 3,
        },
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
    """Where the time of low-rank Adam in the coefficient geometry goes.

    Each part is a program of its own. It works on stacks of kernels of equal shape, as an update does.
    """
    subject = subjects.build("lowrank_adam:coefficient", size)
    gradient = measure.program(lambda p, b: subject.gradient(p, b)[1], subject.params, subject.batch)
    grads = gradient.call(subject.params, subject.batch)
    step = measure.program(subject.step, subject.params, subject.state, subject.batch)
    update = measure.program(subject.update, grads, subject.params, subject.state)

    def each(f: Any) -> Any:
        """`f` of one kernel and of its other arguments, mapped over lists of stacks."""
        return jax.jit(lambda *lists: [map_kernel(f, *xs) for xs in zip(*lists, strict=True)])

    def bases_with_qr(W: lro.LowRank, xi: mf.Tangent) -> Any:
        pairs = ((W.U, xi.Up), (W.V, xi.Vp))
        return [linalg.orthonormalize(jnp.concatenate(pair, axis=1)) for pair in pairs]

    def moved(W: lro.LowRank, bases: mf.Augmented, xi: mf.Tangent) -> jax.Array:
        return mf.weight_coefficients(W, bases) - 1e-3 * jnp.sign(mf.tangent_coefficients(xi, bases))

    project, augment, householder = each(mf.project), each(mf.augment), each(bases_with_qr)
    retract = each(lambda W, y, bases: mf.retract_svd(y, bases, W.width))
    assemble = each(lambda W, bases, point, rank: mf.assemble(bases, point, rank))
    Ws, gs = stacks(subject.params), stacks(grads)
    ranks = [jnp.full(W.batch_shape, W.width, jnp.int32) for W in Ws]
    xis = project(Ws, gs, ranks)
    bases = augment(Ws, xis, ranks)
    ys = each(moved)(Ws, bases, xis)
    points = retract(Ws, ys, bases)
    times = measure.interleaved(
        {
            "step": lambda: step.call(subject.params, subject.state, subject.batch),
            "backward": lambda: gradient.call(subject.params, subject.batch),
            "update": lambda: update.call(grads, subject.params, subject.state),
            "project": lambda: project(Ws, gs, ranks),
            "orthonormalise": lambda: augment(Ws, xis, ranks),
            "Householder QR of the same": lambda: householder(Ws, xis),
            "small SVD": lambda: retract(Ws, ys, bases),
            "new factors": lambda: assemble(Ws, bases, points, ranks),
        },
        repeats,
    )
    return {"phases": {name: measure.summary(t) for name, t in times.items()}}


def stacks(tree: Any) -> list[lro.LowRank]:
    """The kernels of a tree, kernels of equal shape as one stack."""
    groups: dict[tuple[int, ...], list[lro.LowRank]] = {}
    for W in jax.tree.leaves(tree, is_leaf=lro.is_lowrank):
        if lro.is_lowrank(W):
            groups.setdefault(W.shape, []).append(W)
    return [jax.tree.map(lambda *xs: jnp.stack(xs), *group) for group in groups.values()]


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
