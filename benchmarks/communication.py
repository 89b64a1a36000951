"""The bytes that devices exchange in a step, read off the compiled program.

    python -m benchmarks.communication

prints, for layouts on eight devices (virtual ones on a CPU), the collectives of one update and of one training step.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import os
import re
from typing import Any

_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast|ragged-all-to-all"
_COLLECTIVE = re.compile(rf"= (?P<type>.*?) (?P<kind>{_KINDS})(-start)?\(")
_ARRAY = re.compile(r"(?P<dtype>[a-z]+\d*)\[(?P<shape>[\d,]*)\]")
_HEADER = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) .*\{$")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|true_computation=%?([\w.-]+), false_computation=%?([\w.-]+)")
_CALLED = re.compile(r"(?:body|to_apply|calls)=%?([\w.-]+)")
_RARE = re.compile(r"cond_without_copy\)?/while")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation.

    Attributes:
      kind: its name in HLO, "all-reduce" for example.
      arrays: dtype and shape of every array it makes on a device.
      source: the operation in the program that it comes from.
    """

    kind: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    source: str

    @property
    def largest(self) -> int:
        """Elements of the largest array."""
        return max(math.prod(shape) for _, shape in self.arrays)

    @property
    def bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(math.prod(shape) * _bytes(dtype) for dtype, shape in self.arrays)


def collectives(compiled: Any, worst: bool = False) -> list[Collective]:
    """The collectives of one execution of a compiled function (`jax.jit(f).lower(...).compile()`).

    Of the branches of a conditional the one that moves fewest bytes is taken, which is the common path, or with `worst`
    the one that moves most. Bodies of loops count as often as they run, once where that is not known.
    """
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    entry = ""
    for line in compiled.as_text().splitlines():
        if header := _HEADER.match(line):
            lines = computations.setdefault(header["name"], [])
            entry = header["name"] if header["entry"] else entry
        else:
            lines.append(line.strip())

    def walk(name: str) -> list[Collective]:
        found: list[Collective] = []
        for line in computations[name]:
            if made := _COLLECTIVE.search(line):
                arrays = tuple(
                    (a["dtype"], tuple(map(int, filter(None, a["shape"].split(",")))))
                    for a in _ARRAY.finditer(made["type"])
                )
                source = re.search(r'op_name="([^"]*)"', line)
                found.append(Collective(made["kind"], arrays, source[1] if source else ""))
            elif branches := _BRANCHES.search(line):
                names = branches[1].replace("%", "").split(", ") if branches[1] else branches.groups()[1:]
                pick = max if worst else min
                found += pick((walk(b) for b in names), key=lambda c: sum(x.bytes for x in c))
            elif called := _CALLED.search(line):
                trips = _TRIPS.search(line)
                often = int(trips[1]) if trips else 1
                # A loop in the place of a branch, see `lowrank_optax.linalg.cond_without_copy`, usually does not run.
                found += walk(called[1]) * (often if worst or not _RARE.search(line) else 0)
        return found

    return walk(entry)


def _bytes(dtype: str) -> int:
    bits = re.sub(r"\D", "", dtype)
    return max(1, int(bits) // 8) if bits else 1


def summary(found: list[Collective]) -> str:
    """Number and bytes of the collectives of each kind."""
    kinds: dict[str, list[Collective]] = collections.defaultdict(list)
    for c in found:
        kinds[c.kind].append(c)
    return ", ".join(f"{len(cs)} {kind} of {sum(c.bytes for c in cs):,} bytes" for kind, cs in kinds.items()) or "none"


def measure(tx: Any, m: int, n: int, r: int, mesh: Any, spec: Any, batch: Any = None) -> list[Collective]:
    """The collectives of one update of an m x n kernel of rank r, or with `batch` (rows, spec) of a training step."""
    import jax
    import jax.numpy as jnp
    import optax
    from jax.sharding import NamedSharding, PartitionSpec

    import lowrank_optax as lro

    params = {"kernel": jax.eval_shape(lambda key: lro.lowrank_init(r)(key, (m, n)), jax.random.key(0))}
    specs = lro.partition_specs(params, {"kernel": spec})
    state = jax.eval_shape(tx.init, params)

    def placed(shapes: Any, specs: Any) -> Any:
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, s)), shapes, specs
        )

    params, state = placed(params, specs), placed(state, lro.state_specs(state, params, specs))

    def step(params: Any, state: Any, x: Any) -> Any:
        grads = params if batch is None else jax.grad(lambda p: jnp.mean((x @ p["kernel"]) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    rows, rows_spec = batch or (1, PartitionSpec())
    x = placed(jax.ShapeDtypeStruct((rows, m), jnp.float32), PartitionSpec(rows_spec) if batch else rows_spec)
    out = jax.tree.map(lambda x: x.sharding, (params, state))
    return collectives(jax.jit(step, out_shardings=out).lower(params, state, x).compile())


def main() -> None:
    import jax
    from jax.sharding import AxisType
    from jax.sharding import PartitionSpec as P

    import lowrank_optax as lro

    devices = jax.device_count()
    print(f"{devices} devices ({jax.devices()[0].device_kind}), jax {jax.__version__}, float32")
    optimizers = {
        "adam": lro.lowrank_adam(1e-3),
        "adam, coefficient": lro.lowrank_adam(1e-3, geometry=lro.Coefficient()),
        "adam, tangent": lro.lowrank_adam(1e-3, geometry=lro.Tangent()),
        "muon": lro.lowrank_muon(1e-3),
        "muon, coefficient": lro.lowrank_muon(1e-3, geometry=lro.Coefficient()),
        "muon, tangent": lro.lowrank_muon(1e-3, geometry=lro.Tangent()),
    }
    mesh = jax.make_mesh((devices // 2, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    layouts = {
        "replicated": (P(), "fsdp"),
        "FSDP": (P("fsdp", "fsdp"), "fsdp"),
        "FSDP x tensor": (P("fsdp", "tensor"), "fsdp"),
    }
    for m, n, r in ((1024, 768, 16), (2048, 768, 16), (1024, 768, 32)):
        print(f"\nkernel {m} x {n}, rank {r}: dense {4 * m * n:,} bytes, factors {4 * r * (m + n + r):,}")
        for name, tx in optimizers.items():
            print(f"  update, {name}: {summary(measure(tx, m, n, r, mesh, P('fsdp', 'tensor')))}")
        for name, (spec, batch) in layouts.items():
            found = measure(optimizers["adam"], m, n, r, mesh, spec, (256, batch))
            print(f"  training step, {name}, adam: {summary(found)}")


if __name__ == "__main__":
    os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    main()
