"""
What each bug did to tau and to the outputs, from the report of `bench.py bugs`: for the picture and
the table in docs/bugs.md.
"""
from statistics import mean
from typing import NamedTuple

from benchmarks.bugs_of_decoding import DECODING
from benchmarks.bugs_of_training import TRAINING
from benchmarks.inject_bug import Bug

HEADER = ("bug", "tau", "training's estimate", "right one early / in place / one late",
          "identical outputs", "margins", "caught by")


class Summary(NamedTuple):
    """One bug's rows of the report, one per seed, and those of the clean runs to compare with."""
    bug: Bug
    kind: str           # decoding or training
    rows: list
    clean_rows: list

    def mean(self, key):
        return mean(row[key] for row in self.rows)

    def clean_mean(self, key):
        return mean(row[key] for row in self.clean_rows)

    def left(self):
        """How much of speculative decoding is left: the fraction of identical outputs times the
        remaining fraction of tau."""
        return self.mean("identical") * self.mean("tau") / self.clean_mean("tau")


def summaries(report):
    """The Summary of each bug in a report, the most harmful first."""
    result = []
    for kind, bugs in (("decoding", DECODING), ("training", TRAINING)):
        of_kind = [row for row in report["rows"] if row["kind"] == kind]
        for bug in bugs:
            rows = [row for row in of_kind if row["bug"] == bug.name]
            clean_rows = [row for row in of_kind if row["bug"] == "clean"
                          and row.get("temperature", 0.0) == bug.temperature]
            if rows:
                result.append(Summary(bug, kind, rows, clean_rows))
    return sorted(result, key=Summary.left)


def table(report):
    """The bugs as markdown, the most harmful first."""
    lines = [HEADER, ["---"] * len(HEADER)]
    for summary in summaries(report):
        bug = summary.bug
        estimates = "-"  # a drafter that was trained without the bug
        if summary.kind == "training":
            estimates = f"{summary.clean_mean('estimate'):.2f} -> {summary.mean('estimate'):.2f}"
        shifts = zip(*[row["right_at_shift"] for row in summary.rows])
        margins = []
        for row in summary.rows:
            margins += [margin for _, margin in row["margins"] if margin is not None]
        lines.append((
            f"`{bug.name}`", f"{summary.clean_mean('tau'):.2f} -> {summary.mean('tau'):.2f}",
            estimates, " / ".join(f"{mean(shift):.2f}" for shift in shifts),
            f"{summary.mean('identical'):.0%}",
            f"{min(margins):.2f} to {max(margins):.2f}" if margins else "-",
            f"`{bug.caught_by}`" if bug.caught_by else "not a bug"))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
