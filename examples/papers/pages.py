"""Write docs/papers/ from the results: the papers' digits beside those measured here.

    python examples/papers/pages.py

What the numbers mean is written by hand, in `meaning.md`, and copied into the summary.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import charts
import hpl
import sg
from made import (
    PROTOCOLS,
    RESULTS,
    STUDIED,
    Made,
    is_at_chance,
    is_beyond_seed,
    read,
    seed_spread,
    slope_agrees,
    verdict,
)
from rows import Gradients, Hessian, Row

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs" / "papers"
TITLES = {
    "hpl": '"Investigating the Overlooked Hessian Structure" (HPL; Tang et al., ICML 2025)',
    "sg": '"On the Overlooked Structure of Stochastic Gradients" (SG; Xie et al., NeurIPS 2023)',
}
WRITTEN = (
    "Written by `python examples/papers/pages.py`; change the results or the tables, not this."
)


def setting(made: Made) -> str:
    """Return what differs from the paper's setting, and what it leaves open."""
    about, row = made.own[0]["about"], made.row
    said = []
    trained_on, published = about["num_train"], about["num_published"]
    if row.network.data.count is None and trained_on < published:
        said.append(f"{trained_on:,} of {published:,} training samples.")
    if isinstance(row.measure, Hessian) and about["probe"] < trained_on:
        said.append(f"H of {about['probe']:,} of {trained_on:,} samples.")
    if is_at_chance(made):
        network = "At seed 0 the network" if len(made.own) > 1 else "The network"
        said.append(
            f"{network} has hardly trained: {about['test_accuracy']:.1%} of the test right, "
            f"{1 / row.network.data.num_classes:.0%} by guessing."
        )
    if row.note:
        said.append(row.note)
    by_rank = {
        protocol: found["rank_slope"]
        for protocol, found in made.own[0]["numbers"].items()
        if "rank_slope" in found
    }
    if by_rank:
        slopes = ", ".join(f"{slope:.3f} ({protocol})" for protocol, slope in by_rank.items())
        said.append(f"Slope of the gaps by original rank: {slopes}.")
    return " ".join(said)


# Cells and tables --------------------------------------------------------------------------------


def _mean(values: Sequence[float], digits: str = ".4f") -> str:
    """Return the mean of the seeds and their range; the number alone where there is one."""
    if not values:
        return ""
    mean = format(sum(values) / len(values), digits)
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):{digits}} to {max(values):{digits}})"


def _yes(value: bool | None) -> str:
    return {True: "yes", False: "no", None: ""}[value]


def _same(value: bool | None) -> str:
    return {True: "same", False: "**other**", None: ""}[value]


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    body = ["| " + " | ".join(line) + " |" for line in (head, *lines)]
    return [body[0], "|" + "---|" * len(head), *body[1:], ""]


def _spectra(made: Sequence[Made], protocols: Sequence[str]) -> list[str]:
    """Return the table of rows about spectra: a line for the paper, and one a protocol."""
    head = ["row", "values", "d_ks", "d_c", "power law", "verdict", "p", "s", "beta", "K",
            "least d_ks at K", "test accuracy", "proven", "copies"]  # fmt: skip
    lines = []
    for one in made:
        printed = one.row.printed
        beta = "" if printed.beta is None else f"{printed.beta} ± {printed.sigma}"
        lines.append([
            f"`{one.row.id}`", "paper", printed.d_ks or "", printed.d_c,
            (printed.verdict or "").lower(), "", "", printed.s or "", beta, str(one.row.measure.k),
            *[""] * 4,
        ])  # fmt: skip
        found = (result["about"].get("test_accuracy") for result in one.own)
        accuracy = _mean([value for value in found if value is not None], ".1%")
        for protocol in protocols:
            said = accuracy if protocol == protocols[0] else ""
            lines.append(["", protocol, *_found(one, protocol, said)])
    if protocols == PROTOCOLS["sg"]:  # exact, each once
        head, lines = head[:-2], [line[:-2] for line in lines]
    return _table(head, lines)


def _found(made: Made, protocol: str, accuracy: str) -> list[str]:
    found = made.first(protocol)
    if "d_ks" not in found:
        return [found.get("reason", ""), *[""] * 8, accuracy, "", ""]
    values: Callable[[str], list[float]] = lambda name: made.values(protocol, name)  # noqa: E731
    s = _mean(values("s"), ".3f")
    if slope_agrees(made, protocol):
        s += " (agrees)"
    return [
        _mean(values("d_ks")), f"{found['d_c']:.4f}", _yes(found["power_law"]),
        _same(verdict(made, protocol)), f"{found['p_value']:.4f}", s,
        f"{found['beta']:.3f} ± {found['sigma']:.3f}", str(found["k"]),
        str(found["k_of_least_d_ks"]), accuracy, str(found.get("num_converged", "")),
        str(found.get("num_copies", "")),
    ]  # fmt: skip


def _entries(made: Sequence[Made]) -> list[str]:
    """Return the table of rows about the entries of the gradients."""
    head = ("row", "values", "mean d_ks", "power-law rate", "mean p", "Gaussian rate", "verdict")
    lines = []
    for one in made:
        printed = one.row.printed
        lines.append([
            f"`{one.row.id}`", "paper", printed.d_ks or "", f"{printed.rate} %",
            printed.p_value or "", f"{printed.gaussian_rate} %", "",
        ])  # fmt: skip
        found = one.first("gradients")
        lines.append([
            "", "gradients", "" if found["d_ks"] is None else f"{found['d_ks']:.4f}",
            "" if found["rate"] is None else f"{found['rate']:.3%}",
            "" if found["p_value"] is None else f"{found['p_value']:.3g}",
            "" if found["gaussian_rate"] is None else f"{found['gaussian_rate']:.2%}",
            _same(verdict(one, "gradients")),
        ])  # fmt: skip
    return _table(head, lines)


def _is_entries(row: Row) -> bool:
    return isinstance(row.measure, Gradients) and row.measure.statistic in (
        "dimension",
        "iteration",
    )


def page(paper: str, rows: Sequence[Made]) -> str:
    """Return the page of a paper."""
    lines = [f"# {TITLES[paper]}", "", WRITTEN, "", _LEGEND[paper], ""]
    lines += _figures(paper, rows)
    for table in dict.fromkeys(one.row.table for one in rows):
        of_table = [one for one in rows if one.row.table == table]
        done = [one for one in of_table if one.own]
        title = table if table.startswith("figure") else f"table {table}"
        lines += [f"## {title.capitalize()}", ""]
        entries = [one for one in done if _is_entries(one.row)]
        spectra = [one for one in done if not _is_entries(one.row)]
        if spectra:
            lines += _spectra(spectra, PROTOCOLS[paper])
        if entries:
            lines += _entries(entries)
        lines += [f"- `{one.row.id}`: {setting(one)}" for one in done if setting(one)]
        lines += [""] * bool(done)
        lost = [f"`{one.row.id}`" for one in of_table if one.diverged]
        if lost:
            lines += [f"Training by the recipe diverges (NaN): {', '.join(lost)}.", ""]
        left = [
            f"`{one.row.id}`" + " (GPU)" * one.row.gpu
            for one in of_table
            if not one.own and not one.diverged
        ]
        if left:
            lines += [f"Not made yet: {', '.join(left)}.", ""]
    lines += _other_settings(rows, PROTOCOLS[paper])
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines).rstrip()) + "\n"


def _figures(paper: str, rows: Sequence[Made]) -> list[str]:
    """Return the links to the figures that there are results for, and the names of the others."""
    drawn, left = charts.sorted_out(paper, rows)
    lines = ["## Figures", ""] * bool(drawn or left)
    for chart in drawn:
        lines += [f"![{chart.title}]({chart.name}.png)", "", f"{chart.caption}", ""]
    if left:
        names = ", ".join(f"{chart.title} ({chart.source})" for chart in left)
        lines += [f"Not drawn yet, for want of results: {names}.", ""]
    return lines


def _other_settings(rows: Sequence[Made], protocols: Sequence[str]) -> list[str]:
    """Return the rows that were made with another precision or another probe, too."""
    lines = []
    for one in rows:
        for result in (*one.own[:1], *one.others) if one.others else ():
            for protocol in protocols:
                found = result["numbers"].get(protocol, {})
                if "d_ks" in found:
                    lines.append([
                        f"`{one.row.id}`", result["settings"], result["about"]["precision"],
                        protocol, f"{found['d_ks']:.6f}", _yes(found["power_law"]),
                        f"{found['s']:.4f}", str(found.get("num_converged", "")),
                    ])  # fmt: skip
    if not lines:
        return []
    head = ("row", "settings", "precision", "values", "d_ks", "power law", "s", "proven")
    return ["## The same rows in other settings", "", *_table(head, lines)]


_LEGEND = {
    "hpl": """\
A row's first line is what the paper prints. `converged` are eigenvalues, each counted as often as
it occurs. `pooled` are the Ritz values of three Lanczos runs of 1000 steps in one list, where an
eigenvalue stands once for each run that found it ([what that does](../protocols.md)). HPL pools
for Transformers; for CNNs it names Lanczos and says nothing of pooling. `verdict` compares "power
law" with the paper's, by the same rule, d_ks < d_c. `p` is that of Lilliefors' test, which takes
notice of the fit. `proven` is how many values have a residual below 1e-3 of themselves. "agrees"
behind s: within two standard errors of the paper's. A row says where its network has hardly
trained, that is, where it is right less than twice as often as by guessing. Of several seeds
d_ks, s and the accuracy are mean and range, the other columns those of seed 0.""",
    "sg": """\
A row's first line is what the paper prints. Spectra are those of T = 5000 gradients at fixed
parameters, exact up to rounding ([how](../gradients.md)); eigenvalues below ten times the
rounding of the gradients are left out. `verdict` compares "power law" with the paper's, by the
same rule, d_ks < d_c; in the tables of entries it compares on which side of a half both rates
lie. `p` is that of Lilliefors' test, which takes notice of the fit. "agrees" behind s: within two
standard errors of the paper's.""",
}


# The summary -------------------------------------------------------------------------------------


def counts(rows: Sequence[Made], protocol: str) -> dict[str, int]:
    """Return how many rows there are, are made, agree in verdict and in slope.

    Those whose verdict another seed would hardly turn over, and slopes with what the seed moves
    them by, are counted where that was studied.
    """
    done = [one for one in rows if one.own]
    verdicts = [verdict(one, protocol) for one in done]
    slopes = [slope_agrees(one, protocol) for one in done]
    found = {
        "rows": len(rows),
        "made": len(done),
        "with verdict": sum(found is not None for found in verdicts),
        "same verdict": sum(found is True for found in verdicts),
        "with slope": sum(found is not None for found in slopes),
        "slope within two sigma": sum(found is True for found in slopes),
    }
    of_d_ks, of_s = (seed_spread(rows, protocol, name) for name in ("d_ks", "s"))
    if of_d_ks is not None and of_s is not None:
        sure = [
            same
            for one, same in zip(done, verdicts, strict=True)
            if same is not None and is_beyond_seed(one, protocol, of_d_ks)
        ]
        with_seed = (slope_agrees(one, protocol, of_s) for one in done)
        found |= {"beyond the seed": len(sure), "same beyond the seed": sum(sure),
                  "slope with the seed": sum(map(bool, with_seed))}  # fmt: skip
    return found


def summary(by_paper: dict[str, list[Made]], meaning: str) -> str:
    """Return the page that sums up."""
    lines = ["# The papers, row by row", "", WRITTEN, ""]
    lines += [f"- [{TITLES[paper]}]({paper}.md)" for paper in by_paper]
    lines += ["", "How to make rows: [examples/papers](../../examples/papers/README.md).", ""]
    table = []
    for paper, rows in by_paper.items():
        for protocol in PROTOCOLS[paper]:
            found = counts(rows, protocol)
            pairs = (("made", "rows"), ("same verdict", "with verdict"),
                     ("same beyond the seed", "beyond the seed"),
                     ("slope within two sigma", "with slope"),
                     ("slope with the seed", "with slope"))  # fmt: skip
            cells = (f"{found[a]} of {found[b]}" if a in found else "" for a, b in pairs)
            table.append([paper.upper(), protocol, *cells])
    head = ("paper", "values", "rows made", "verdict same", "beyond the seed",
            "slope within two sigma", "with the seed")  # fmt: skip
    lines += _table(head, table)
    hardly = [f"`{one.row.id}`" for rows in by_paper.values() for one in rows
              if one.own and is_at_chance(one)]  # fmt: skip
    if hardly:
        lines += [f"Counted, though their networks have hardly trained: {', '.join(hardly)}.", ""]
    lines += _seeds([one for rows in by_paper.values() for one in rows])
    return "\n".join([*lines, "## What it means", "", meaning.strip()]) + "\n"


def _seeds(rows: Sequence[Made]) -> list[str]:
    """Return how far d_ks and s move by the seed alone."""
    lines = []
    for one in rows:
        if len(one.own) < STUDIED:
            continue
        for protocol in PROTOCOLS[one.row.paper]:
            distances, slopes = one.values(protocol, "d_ks"), one.values(protocol, "s")
            laws = one.values(protocol, "power_law")
            if len(slopes) == len(one.own):
                lines.append([
                    f"`{one.row.id}`", protocol, str(len(one.own)), _mean(distances),
                    _mean(slopes, ".3f"), f"{sum(laws)} of {len(laws)}",
                ])  # fmt: skip
    if not lines:
        return []
    spread = [
        f"{protocol} values' d_ks by {seed_spread(rows, protocol, 'd_ks'):.1%} and their s by "
        f"{seed_spread(rows, protocol, 's'):.1%}"
        for protocol in dict.fromkeys(line[1] for line in lines)
    ]
    head = ("row", "values", "seeds", "d_ks", "s", "power law")
    return ["## What the seed alone does", "", *_table(head, lines), _SEED, "",
            f"It moves {'; '.join(spread)}.", ""]  # fmt: skip


_SEED = """\
Initialisation, the order of the samples and the vectors that Lanczos starts from have another
seed. What a number moves by is the standard deviation of its logarithm, the root of the mean
variance over these rows. In the table above, a verdict is "beyond the seed" where d_ks is
further from d_c than twice that; "with the seed" counts slopes that lie within two standard
errors of the printed ones when both errors have what the seed does in them."""


def pages(folder: Path = RESULTS) -> dict[str, str]:
    """Return all pages by file name."""
    by_paper = {"hpl": read(hpl.ROWS, folder), "sg": read(sg.ROWS, folder)}
    found = {f"{paper}.md": page(paper, rows) for paper, rows in by_paper.items()}
    found["README.md"] = summary(by_paper, (HERE / "meaning.md").read_text())
    return found


def main() -> None:
    """Write the pages and the figures, and remove figures that nothing stands behind any more."""
    DOCS.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (DOCS / name).write_text(text)
        print(DOCS / name)
    pictures = charts.pictures({"hpl": read(hpl.ROWS), "sg": read(sg.ROWS)})
    for path in set(DOCS.glob("*.png")) - {DOCS / name for name in pictures}:
        path.unlink()
    for name, content in pictures.items():
        (DOCS / name).write_bytes(content)
        print(DOCS / name)


if __name__ == "__main__":
    main()
