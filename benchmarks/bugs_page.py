"""
From the report of `bench.py bugs` to the table of docs/bugs.md. The rest of that page is written by
hand.
"""
from statistics import mean
from typing import NamedTuple

from benchmarks.bugs_of_decoding import DECODING
from benchmarks.bugs_of_training import TRAINING
from benchmarks.inject_bug import Bug
from checkpoint import write_whole

BEGIN = "<!-- begin: written by python bench.py figures -->"
END = "<!-- end -->"
HEADER = ("bug", "tau", "training's estimate", "right one early / in place / one late",
          "identical outputs", "margins", "caught by")


class Summary(NamedTuple):
    """One bug's rows of the report, one per seed, and those of the clean runs to compare with."""
    bug: Bug
    is_of_training: bool
    rows: list
    clean_rows: list

    def mean(self, key):
        return mean(row[key] for row in self.rows)

    @property
    def taus(self):
        return [row["tau"] for row in self.rows]

    @property
    def clean_taus(self):
        return [row["tau"] for row in self.clean_rows]

    @property
    def left(self):
        """How much of speculative decoding is left: the fraction of identical outputs times the
        remaining fraction of tau."""
        return self.mean("identical") * self.mean("tau") / mean(self.clean_taus)


def summaries(report):
    """The Summary of each bug in a report, the most harmful first."""
    rows_of = {}
    for row in report["rows"]:
        key = (row["kind"], row.get("bug"), row.get("temperature"))
        rows_of.setdefault(key, []).append(row)
    result = []
    for kind, bugs in (("decoding", DECODING), ("training", TRAINING)):
        for bug in bugs:
            temperature = bug.temperature if kind == "decoding" else None
            rows = rows_of.get((kind, bug.name, temperature))
            if rows:
                clean_rows = rows_of[kind, "clean", temperature]
                result.append(Summary(bug, kind == "training", rows, clean_rows))
    return sorted(result, key=lambda summary: summary.left)


def table(report):
    """The bugs as markdown, the most harmful first."""
    lines = [markdown_row(HEADER), markdown_row(["---"] * len(HEADER))]
    for summary in summaries(report):
        estimates = "-"  # a drafter that was trained without the bug
        if summary.is_of_training:
            clean_estimate = mean(row["estimate"] for row in summary.clean_rows)
            estimates = f"{clean_estimate:.2f} -> {summary.mean('estimate'):.2f}"
        shifts = []
        for place in range(3):
            shifts.append(mean(row["right_at_shift"][place] for row in summary.rows))
        margins = []
        for row in summary.rows:
            margins += [margin for _, margin in row["margins"] if margin is not None]
        caught_by = f"`{summary.bug.caught_by}`" if summary.bug.caught_by else "not a bug"
        lines.append(markdown_row((
            f"`{summary.bug.name}`",
            f"{mean(summary.clean_taus):.2f} -> {summary.mean('tau'):.2f}",
            estimates,
            " / ".join(f"{shift:.2f}" for shift in shifts),
            f"{summary.mean('identical'):.0%}",
            f"{min(margins):.2f} to {max(margins):.2f}" if margins else "-",
            caught_by)))
    return "\n".join(lines)


def markdown_row(cells):
    return f"| {' | '.join(cells)} |"


def write_table(report, path="docs/bugs.md"):
    """Put the table of a report between the two markers of a page."""
    with open(path) as f:
        page = f.read()
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"{path} does not contain {BEGIN!r} and {END!r} once each: "
                         "put them around the table")
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    write_whole(path, f"{before}{BEGIN}\n\n{table(report)}\n\n{END}{after}")
