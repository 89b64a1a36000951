"""The table and the picture of a record that `python -m benchmarks` wrote."""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib import ticker

from benchmarks.subjects import LABELS


def write(out: Path) -> None:
    """Writes `bench.md` and `bench.png` beside `bench.json`."""
    result = json.loads((out / "bench.json").read_text())
    groups = {kind: [c for c in result["cases"] if c["kind"] == kind] for kind in ("size", "phases", "depth")}
    parts = ["# Times and memory of training steps", header(result)]
    parts += [size_table(case) for case in groups["size"]]
    parts += [phases_table(case) for case in groups["phases"]]
    if groups["depth"]:
        parts.append(depth_table(groups["depth"]))
    if groups["size"]:
        picture(groups["size"], out / "bench.png")
    (out / "bench.md").write_text("\n\n".join(parts) + "\n")


def header(result: dict[str, Any]) -> str:
    m = result["machine"]
    settings = " and ".join(m["settings"]) or "settings as they come"
    return (
        f"{m['device']}, {m['platform']}, cores: {m['cores']}, {settings}, jax {m['jax']}, "
        f"Python {m['python']}; {result['seconds']} s in all. Times are medians with quartiles; ratios are of one "
        "round. Peak is what the compiled step needs: arguments, results and temporaries."
    )


def _blocks(layers: int) -> str:
    return f"{layers} block{'s' * (layers > 1)}"


def spread(x: dict[str, float], digits: int = 0) -> str:
    return f"{x['median']:.{digits}f} ({x['low']:.{digits}f}-{x['high']:.{digits}f})"


def size_table(case: dict[str, Any]) -> str:
    first = next(iter(case["methods"]))
    sizes = f"d = {case['d']}, r = {case['rank']}, {_blocks(case['layers'])}, {case['tokens']:,} tokens"
    rows = [
        f"## {sizes}, {case['dtype']}",
        "",
        "| method | step, ms | over dense AdamW | update, ms | its share | parameters, MB | state, MB | peak, MB "
        "| compile, s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, m in case["methods"].items():
        over = "1" if name == first else spread(m["ratio"][first], 2)
        mb = [m[key] / 1e6 for key in ("params_bytes", "state_bytes", "peak_bytes")]
        rows.append(
            f"| {LABELS[name]} | {spread(m['step_ms'])} | {over} | {spread(m['update_ms'])} | "
            f"{100 * m['share']['median']:.0f} % | {mb[0]:.1f} | {mb[1]:.2f} | {mb[2]:.0f} | "
            f"{m['trace_s'] + m['compile_s']:.1f} |"
        )
    return "\n".join(rows)


def phases_table(case: dict[str, Any]) -> str:
    phases = case["phases"]
    step = phases["step"]["median"]
    rows = [
        f"## Where a step of low-rank Adam goes: d = {case['d']}, r = {case['rank']}, {_blocks(case['layers'])}",
        "",
        "| part | ms | share of the step |",
        "|---|---|---|",
    ]
    rows += [f"| {k} | {spread(t, 1)} | {100 * t['median'] / step:.0f} % |" for k, t in phases.items()]
    return "\n".join(rows)


def depth_table(cases: list[dict[str, Any]]) -> str:
    rows = [
        f"## Compile time of a whole step against depth: d = {cases[0]['d']}, r = {cases[0]['rank']}",
        "",
        "| blocks | dense, s | low rank, s | ratio | dense step, ms | low-rank step, ms |",
        "|---|---|---|---|---|---|",
    ]
    for case in cases:
        full, low = (case["methods"][name] for name in ("full", "lowrank_adam"))
        seconds = [m["trace_s"] + m["compile_s"] for m in (full, low)]
        rows.append(
            f"| {case['layers']} | {seconds[0]:.1f} | {seconds[1]:.1f} | {seconds[1] / seconds[0]:.2f} | "
            f"{spread(full['step_ms'])} | {spread(low['step_ms'])} |"
        )
    return "\n".join(rows)


def picture(cases: list[dict[str, Any]], path: Path) -> None:
    """Step and update against r (m + n), with the time of the products at the machine's best rate."""
    points = []
    for case in cases:
        low = case["methods"].get("lowrank_adam")
        if low and case["dtype"] == "float32":
            each = 18 * case["d"] * case["rank"] * case["layers"]  # sum of r (m + n): 4 of d x d, 2 of d x 4d
            floor = 1e3 * case["flops"]["low rank"] / case["matmul_rate"]
            model = (case["rank"], case["layers"])
            points.append((each, low["step_ms"]["median"], low["update_ms"]["median"], floor, case["d"], model))
    fig, ax = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for rank, layers in sorted({p[5] for p in points}):
        chosen = sorted(p for p in points if p[5] == (rank, layers))
        xs, name = [p[0] for p in chosen], f"r = {rank}, {_blocks(layers)}"
        (line,) = ax.loglog(xs, [p[1] for p in chosen], "o-", label=f"step, {name}")
        ax.loglog(xs, [p[2] for p in chosen], "s:", color=line.get_color(), label=f"update, {name}")
        for x, y, *_, d, _ in chosen:
            ax.annotate(f"d = {d}", (x, y), (0, 6), textcoords="offset points", ha="center", fontsize=7)
    floor = sorted((p[0], p[3]) for p in points)
    ax.loglog(*zip(*floor, strict=True), "k--", label="products at the matmul rate")
    ax.set(xlabel="sum of r (m + n) over the kernels", ylabel="milliseconds")
    ax.xaxis.set_minor_formatter(ticker.NullFormatter())
    ax.margins(y=0.12)
    ax.legend(fontsize=7, loc="upper left")
    fig.savefig(path, dpi=150)
    plt.close(fig)
