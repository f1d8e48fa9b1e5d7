"""
From the report of `bench.py bugs` to the tables of docs/bugs.md and docs/troubleshooting.md. What a
bug is and which test catches it is taken from the code, all figures from the report.
"""
from statistics import mean
from typing import NamedTuple

from benchmarks.bugs_of_decoding import DECODING
from benchmarks.bugs_of_training import TRAINING
from benchmarks.exactness import WRONG, verdict
from benchmarks.slips import Bug
from checkpoint import write_whole

SHOWN_SLOTS = (1, 2, 8, 15)
FREE = 0.97     # of the clean tau: a bug of decoding that leaves so much costs nothing
FOUND = 0.3     # of all guesses: if so many are right elsewhere, the drafter is off by one
KEPT = 0.8      # of the clean ratio of tau to its estimate: below that, training promised too much

# The leaves of the decision tree, in its order
WRONG_OUTPUT = "the output is not the target's own, by more than rounding"
SHIFTED = "decoding is low, and the guesses are right one token before or after their place"
BROKEN_PROMISE = ("decoding is lower than training promised: its estimate is as high as without "
                  "the bug, or far above tau")
BOTH_LOW = "tau is low, as training said"
NO_COST = "it costs nothing that could be measured here"
LEAVES = (WRONG_OUTPUT, SHIFTED, BROKEN_PROMISE, BOTH_LOW, NO_COST)


class Summary(NamedTuple):
    """The figures of one bug, over all seeds, and of the clean runs beside it."""
    bug: Bug
    is_of_training: bool
    rows: list          # of the report
    clean_rows: list
    estimates: list     # of tau, by training itself; empty: not known
    clean_estimates: list

    def mean(self, key):
        return mean(row[key] for row in self.rows)

    @property
    def taus(self):
        return [row["tau"] for row in self.rows]

    @property
    def clean_taus(self):
        return [row["tau"] for row in self.clean_rows]

    @property
    def margins(self):
        """The margins at the first differences of outputs, ascending."""
        margins = []
        for row in self.rows:
            margins += [margin for _, margin in row["margins"] if margin is not None]
        return sorted(margins)

    @property
    def verdict(self):
        largest_margin = max(self.margins, default=None)
        return verdict(self.mean("identical") == 1, largest_margin, self.rows[0]["dtype"])

    @property
    def right_at_shift(self):
        """The share of all guesses that are the token one before their place, at it, one after."""
        early, in_place, late = zip(*[row["right_at_shift"] for row in self.rows])
        return mean(early), mean(in_place), mean(late)

    @property
    def left(self):
        """What the bug leaves of speculative decoding: the share of right outputs, times the share
        of tau."""
        return self.mean("identical") * self.mean("tau") / mean(self.clean_taus)

    @property
    def leaf(self):
        """Where the bug is in the decision tree."""
        least_tau = min(self.clean_taus)  # training differs from seed to seed
        if not self.is_of_training:
            least_tau = FREE * least_tau
        if self.verdict == WRONG:
            return WRONG_OUTPUT
        if self.mean("tau") >= least_tau:
            return NO_COST
        early, in_place, late = self.right_at_shift
        if max(early, late) > max(in_place, FOUND):
            return SHIFTED
        if self.is_promise_broken:
            return BROKEN_PROMISE
        return BOTH_LOW

    @property
    def is_promise_broken(self):
        """Whether training's estimate says that all is well, or at least much better than tau."""
        if not self.is_of_training:
            return True  # it was trained without the bug
        estimate = mean(self.estimates)
        ratio = self.mean("tau") / estimate
        clean_ratio = mean(self.clean_taus) / mean(self.clean_estimates)
        return estimate >= min(self.clean_estimates) or ratio < KEPT * clean_ratio


def summaries(report):
    """The Summary of each bug in a report; the one that leaves least comes first."""
    rows_of = {}
    for row in report["rows"]:
        rows_of.setdefault((row["kind"], row.get("bug"), row.get("temperature")), []).append(row)
    estimates = [row["tau"] for row in rows_of.get(("estimate", None, None), ())]
    result = []
    for bug in DECODING:
        rows = rows_of.get(("decoding", bug.name, bug.temperature))
        if rows:
            clean_rows = rows_of["decoding", "clean", bug.temperature]
            result.append(Summary(bug, False, rows, clean_rows, estimates, estimates))
    clean_rows = rows_of.get(("training", "clean", None))
    for bug in TRAINING:
        rows = rows_of.get(("training", bug.name, None))
        if rows:
            result.append(Summary(
                bug, True, rows, clean_rows, [row["estimate"] for row in rows],
                [row["estimate"] for row in clean_rows]))
    return sorted(result, key=lambda summary: summary.left)

# --------------------------------------------------------------------------------------------------
# tables


def tables(report):
    """The generated part of docs/bugs.md: the decision tree and the tables, as markdown."""
    every = summaries(report)
    of_decoding = [summary for summary in every if not summary.is_of_training]
    of_training = [summary for summary in every if summary.is_of_training]
    parts = [tree(every)]
    if of_decoding:
        parts.append(table_of_decoding(of_decoding))
    wrong = [summary for summary in of_decoding if summary.leaf == WRONG_OUTPUT]
    if wrong:
        parts.append(table_of_outputs(wrong))
    if of_training:
        parts.append(table_of_training(of_training))
    return "\n\n".join(parts)


def table_of_decoding(of_decoding):
    summary = min(of_decoding, key=temperature_of)  # greedy decoding, if there is any
    clean = (f"Bugs of decoding, {summary.rows[0]['prompts']} prompts. Without a bug tau is "
             f"{summary.clean_taus[0]:.2f}, and the guesses are right up to slot 1 / 2 / 8 / 15 in "
             f"{slots_text(summary.clean_rows)} of the rounds.")
    if summary.estimates:
        clean += (f" Training's own estimate for this drafter is {summary.estimates[0]:.2f}, "
                  "whatever decoding does.")
    header = ("bug", "tau", "right up to slot 1 / 2 / 8 / 15", "shifted -1 / 0 / 1", "same output",
              "margins", "verdict", "right answers", "caught by")
    table = []
    for summary in of_decoding:
        table.append((
            f"`{summary.bug.name}`",
            change_of_tau(summary),
            slots_text(summary.rows),
            shifts_text(summary),
            f"{summary.mean('identical'):.0%}",
            margins_text(summary.margins),
            summary.verdict,
            accuracy_text(summary),
            test_text(summary.bug)))
    return f"{clean}\n\n{markdown(header, table)}"


def table_of_outputs(wrong):
    """The bugs that make outputs wrong, by who guesses."""
    header = ("share of outputs that are the target's own", "the pair's drafter",
              "guesses always right", "guesses always wrong")
    table = []
    for summary in wrong:
        always_right, always_wrong = summary.rows[0]["identical_by_oracle"]
        table.append((
            f"`{summary.bug.name}`", f"{summary.mean('identical'):.0%}", f"{always_right:.0%}",
            f"{always_wrong:.0%}"))
    return markdown(header, table)


def table_of_training(of_training):
    summary = of_training[0]
    seeds = [row["seed"] for row in summary.rows]
    clean_taus = " / ".join(f"{tau:.2f}" for tau in summary.clean_taus)
    clean_estimates = " / ".join(f"{tau:.2f}" for tau in summary.clean_estimates)
    clean = (f"Bugs of training, seeds {', '.join(map(str, seeds))}, {summary.rows[0]['prompts']} "
             f"prompts; all outputs are the target's own. Without a bug tau is {clean_taus}, by "
             f"training's own estimate {clean_estimates}, and the guesses are right up to slot "
             f"1 / 2 / 8 / 15 in {slots_text(summary.clean_rows)} of the rounds.")
    header = ("bug", "tau", "by seed", "estimate", "right up to slot 1 / 2 / 8 / 15",
              "shifted -1 / 0 / 1", "right answers", "caught by")
    table = []
    for summary in of_training:
        table.append((
            f"`{summary.bug.name}`",
            change_of_tau(summary),
            " / ".join(f"{tau:.2f}" for tau in summary.taus),
            f"{mean(summary.clean_estimates):.2f} -> {mean(summary.estimates):.2f}",
            slots_text(summary.rows),
            shifts_text(summary),
            accuracy_text(summary),
            test_text(summary.bug)))
    return f"{clean}\n\n{markdown(header, table)}"


def tree(every):
    """The bugs by the answers to the questions of the decision tree."""
    lines = []
    for leaf in LEAVES:
        names = [f"`{summary.bug.name}`" for summary in every if summary.leaf == leaf]
        lines.append(f"- {leaf}: {', '.join(names) or 'none'}")
    return "\n".join(lines)


def table_of_failures(report):
    """The generated part of docs/troubleshooting.md: what the failures of its table cost here."""
    by_failure = {}
    for summary in summaries(report):
        cost = f"`{summary.bug.name}` {change_of_tau(summary)}"
        if summary.leaf == WRONG_OUTPUT:
            cost += f", and {1 - summary.mean('identical'):.0%} of the outputs are wrong"
        by_failure.setdefault(summary.bug.failure, []).append(cost)
    by_failure.pop(None, None)  # what nobody reported
    table = [(str(failure), "; ".join(by_failure[failure])) for failure in sorted(by_failure)]
    return markdown(("#", "made on purpose: tau without and with it"), table)


def markdown(header, table):
    """A table as markdown, from cells."""
    lines = []
    for cells in (header, ["---"] * len(header), *table):
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def temperature_of(summary):
    return summary.bug.temperature


def change_of_tau(summary):
    return f"{mean(summary.clean_taus):.2f} -> {summary.mean('tau'):.2f}"


def slots_text(rows):
    """The share of rounds that are right up to some slots, the mean over rows."""
    shares = []
    for slot in SHOWN_SLOTS:
        share = mean(row["accepted_up_to_slot"][slot - 1] for row in rows)
        shares.append(f"{share:.2f}")
    return " / ".join(shares)


def shifts_text(summary):
    return " / ".join(f"{share:.2f}" for share in summary.right_at_shift)


def margins_text(margins):
    if not margins:
        return "-"
    return f"{margins[0]:.2f} to {margins[-1]:.2f}"


def accuracy_text(summary):
    if None in [row["accuracy"] for row in summary.rows]:
        return "unknown"
    return f"{summary.mean('accuracy'):.0%}"


def test_text(bug):
    return f"`{bug.caught_by}`" if bug.caught_by else "no bug"

# --------------------------------------------------------------------------------------------------
# pages


def rewrite(path, text):
    """Put a text between the two marks of a page. ValueError for a page without them."""
    with open(path) as f:
        page = f.read()
    try:
        before, rest = page.split(BEGIN)
        _, after = rest.split(END)
    except ValueError:
        raise ValueError(f"{path} has not once {BEGIN!r} and {END!r}: put them where the tables "
                         "belong") from None
    write_whole(path, f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


BEGIN = "<!-- begin: written by python bench.py figures -->"
END = "<!-- end -->"
