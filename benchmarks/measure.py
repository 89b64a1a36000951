"""Timing: compiled programs, interleaved repeats, medians and quartiles."""

import dataclasses
import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Settings that a process reads when it starts: name -> environment variable and value.
SETTINGS = {
    "huge pages": ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"),  # Linux with glibc 2.35 or newer; others ignore it
    "memory schedule": ("XLA_FLAGS", "--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"),
}


def machine() -> dict[str, Any]:
    """The machine and the versions that figures belong to."""
    device = jax.devices()[0]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        if cpuinfo.exists()
        else []
    )
    return {
        "device": names[0] if device.platform == "cpu" and names else device.device_kind,
        "platform": device.platform,
        "cores": cores,
        "settings": [name for name, (variable, value) in SETTINGS.items() if value in os.environ.get(variable, "")],
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


@dataclasses.dataclass
class Program:
    """A compiled function with the time it took to trace and to compile, and the memory it needs, in bytes."""

    call: Callable[..., Any]
    trace_s: float
    compile_s: float
    peak: int


def quickly_compiled(f: Callable[..., Any], *args: Any) -> Callable[..., Any]:
    """Compiled `f`, on a CPU without optimisation, for code that is not timed."""
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(f).lower(*args).compile(options)


def program(f: Callable[..., Any], *args: Any, donate: tuple[int, ...] = ()) -> Program:
    """Compiles `f` for arguments like `args`."""
    t0 = time.perf_counter()
    lowered = jax.jit(f, donate_argnums=donate).lower(*args)
    t1 = time.perf_counter()
    compiled = lowered.compile()
    t2 = time.perf_counter()
    m = compiled.memory_analysis()
    peak = m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes
    return Program(compiled, t1 - t0, t2 - t1, int(peak))


def interleaved(calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of every call, in rounds, so that a passing disturbance of the machine meets all calls."""
    for call in calls.values():
        jax.block_until_ready(call())
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            since = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(1e3 * (time.perf_counter() - since))
    return times


def summary(times: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = np.percentile(times, [25, 50, 75])
    return {"median": float(median), "low": float(low), "high": float(high)}


def ratio(times: list[float], to: list[float]) -> dict[str, float]:
    """Median and quartiles of the ratio within each round."""
    return summary((np.asarray(times) / np.asarray(to)).tolist())


def size_of(tree: Any) -> int:
    """Bytes of all leaves."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def matmul_rate(n: int = 1024) -> float:
    """Operations a second in products of n x n matrices, the best of five."""
    x, matmul = jnp.ones((n, n)), jax.jit(jnp.matmul)
    times = interleaved({"matmul": lambda: matmul(x, x)}, 5)["matmul"]
    return 2 * n**3 / (1e-3 * min(times))
