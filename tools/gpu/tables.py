"""The tables of the benchmark, from its records."""

from __future__ import annotations

from typing import Any

PUBLISHED = {"compiled": (2.25, 2.78, 2.90), "eager": (7.9, 4.9, 4.5)}
"""A product over a gradient by curvlinops, as its authors publish it for three networks of theirs
on an NVIDIA RTX A6000: both compiled, and both eager. Quoted, not measured here."""


def markdown(records: list[dict[str, Any]]) -> str:
    """Return what the records say, and on which card."""
    if not records:
        return "Nothing was measured.\n"
    settings = records[0]["environment"]
    packages = ", ".join(f"{n} {v}" for n, v in settings["packages"].items() if v)
    card = settings.get("card")
    where = f"{card}, CUDA {settings['cuda']}" if card else "Not run on a card: CPU"
    if records[0]["small"]:
        where += "; small networks, whose numbers mean nothing"
    lines = [f"{where}; Python {settings['python']}, {packages}.", ""]
    lines += products_table([r["found"] for r in records if r["piece"].startswith("products-")])
    for record in records:
        if not record["piece"].startswith("products-"):
            lines += ["", f"{record['piece']}:", "", "| what | value |", "|---|---|"]
            lines += [f"| {name} | {value} |" for name, value in flat(record["found"])]
    unfinished = [f"{r['piece']} ({r['state']})" for r in records if r["state"] != "done"]
    if unfinished:
        lines += ["", f"Not done: {', '.join(unfinished)}."]
    return "\n".join(lines) + "\n"


def products_table(found: list[dict[str, Any]]) -> list[str]:
    """Return the table of products over gradients: one over the eager, one over the compiled."""
    lines = [
        "| network | parameters | product | build, s | product, ms | over eager gradient | "
        "over compiled gradient | peak, GB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in found:
        gradient = one.get("gradient_seconds", {})
        rows: dict[str, Any] = dict(one.get("engines", {}))
        if isinstance(one.get("curvlinops"), dict):
            rows["curvlinops"] = one["curvlinops"]
        for engine, numbers in rows.items():
            head = f"| {one['network']} | {one['parameters']:,} | {engine}"
            if "failed" in numbers:
                lines.append(f"{head} | | {numbers['failed']} | | | |")
                continue
            lines.append(f"{head} | {_row(numbers['seconds'], gradient, numbers)}")
            for name, seconds in numbers.items():
                if name.startswith("seconds_each_of_") and isinstance(seconds, float):
                    count = name.rpartition("_")[2]
                    lines.append(f"{head}, each of {count} | {_row(seconds, gradient, {})}")
    for kind, ratios in PUBLISHED.items():
        eager = ", ".join(f"{ratio:g}" for ratio in ratios) if kind == "eager" else ""
        compiled = ", ".join(f"{ratio:g}" for ratio in ratios) if kind == "compiled" else ""
        lines.append(
            f"| three of its own, A6000 (published) | | curvlinops, {kind} | | | {eager} | "
            f"{compiled} | |"
        )
    return lines


def _row(seconds: float, gradient: dict[str, Any], numbers: dict[str, Any]) -> str:
    ratios = []
    for kind in ("eager", "compiled"):
        base = gradient.get(kind)
        ratios.append(f"{seconds / base:.2f}" if isinstance(base, float) else "")
    build = f"{numbers['build_seconds']:.1f}" if "build_seconds" in numbers else ""
    memory = f"{numbers['peak_bytes'] / 1e9:.2f}" if numbers.get("peak_bytes") else ""
    return f"{build} | {1000 * seconds:.3g} | {ratios[0]} | {ratios[1]} | {memory} |"


def flat(found: dict[str, Any], name: str = "") -> list[tuple[str, str]]:
    """Return the numbers of a record, each with its path."""
    rows: list[tuple[str, str]] = []
    for key, value in found.items():
        path = f"{name}, {key}" if name else key
        if isinstance(value, dict):
            rows += flat(value, path)
        else:
            rows.append((path, f"{value:.4g}" if isinstance(value, float) else str(value)))
    return rows
