"""
The pictures of reports. The command draws those of README and docs again, from the reports in
benchmarks/results/, and prints the table of docs/bugs.md. matplotlib is imported only when it is
used, because the import takes a second.
"""
import os

from benchmarks import bugs_page
from formats.files import read_json, whole_file

RESULTS = "benchmarks/results"
GREY = "#d8d8d8"        # the anchor
GREEN = "#a8dca0"       # accepted guesses, right outputs
BLUE = "#9cc4f0"        # the target's own tokens
PALE_RED = "#f6d5d0"    # rejected guesses
RED = "#e08a80"         # wrong outputs


def run(config):
    paths = draw("docs/img")
    print(bugs_page.table(read_report("bugs_nano.json")))
    print(f"drew {', '.join(paths)} from the reports in {RESULTS}")
    return {"wrote": paths}


def draw(folder):
    """Draw the three pictures in a folder. Returns their paths."""
    paths = [os.path.join(folder, f"{name}.png") for name in ("acceptance", "throughput", "bugs")]
    acceptance(paths[0], read_report("acceptance_nano.json"))
    throughput(paths[1], {
        "nano pair, two CPU cores": read_report("throughput_nano.json")["rows"],
        "0.8B shape, random weights, one H200": read_report("throughput_h200.json")["rows"]})
    bugs(paths[2], bugs_page.summaries(read_report("bugs_nano.json")))
    return paths


def read_report(name):
    return read_json(os.path.join(RESULTS, name))


def pyplot():
    """matplotlib's pyplot, which draws without a screen."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def save(path, figure):
    with whole_file(path) as f:
        figure.savefig(f, format="png", dpi=120)
    pyplot().close(figure)


def acceptance(path, report):
    """Acceptance per position, the lengths of rounds, and below them the rounds of one answer."""
    rounds = []
    if report["transcript"]:  # random ids have none
        rounds = report["transcript"]["rounds"]
    text_height = 0.42 * len(rounds) + 0.5
    figure, axes = pyplot().subplot_mosaic(
        [["positions", "lengths"], ["text", "text"]], figsize=(13, 2.6 + text_height),
        height_ratios=(2.6, text_height), width_ratios=(5, 2), layout="constrained")

    shares = report["accepted_up_to_position"]
    positions = range(1, len(shares) + 1)
    axes["positions"].bar(positions, shares, color=GREEN)
    axes["positions"].set(xlabel="position in the block", ylabel="fraction of rounds", ylim=(0, 1),
                      xticks=positions, title="accepted up to this position")

    counts = report["rounds_of_length"]
    lengths = range(1, len(counts) + 1)
    axes["lengths"].bar(lengths, counts, color=GREY)
    axes["lengths"].set(xlabel="tokens per round", ylabel="rounds", xticks=lengths[::3],
                        title=f"tau {report['tau_micro']:.2f} over {report['prompts']} prompts")
    draw_rounds(axes["text"], rounds)
    save(path, figure)


def draw_rounds(axis, rounds):
    """One line per round and one column per position: the anchor, the guesses, and the target's own
    token below the first wrong guess."""
    width = 16
    for y, one_round in enumerate(rounds):
        width = 1 + len(one_round["guesses"])
        accepted = one_round["accepted"]
        own = one_round["own"]  # None where the answer ended before it
        draw_token(axis, 0, y, one_round["anchor"], GREY)
        for position, guess in enumerate(one_round["guesses"], 1):
            if position <= accepted:
                draw_token(axis, position, y, guess, GREEN)
            elif position == accepted + 1 and own is not None:  # the first wrong guess
                draw_token(axis, position, y - 0.3, guess, PALE_RED, color="#b03030")
            else:
                draw_token(axis, position, y, guess, None, color="#c09090")
        if own is not None:
            position = accepted + 1
            below = 0.12 if position < width else 0  # the guess above it
            draw_token(axis, position, y + below, own, BLUE, weight="bold")
    axis.set(xlim=(-0.6, width + 0.6), ylim=(len(rounds) - 0.4, -0.7), xticks=range(width),
             ylabel="round", yticks=range(len(rounds)), yticklabels=range(1, 1 + len(rounds)),
             xlabel="position in the block (0: the anchor)",
             title="an answer, round by round: anchor (grey), accepted guesses (green), "
                   "the target's own token (blue), rejected guesses (red)")
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)


def draw_token(axis, x, y, text, background, **style):
    """The text of a token, its white space visible, in a box if there is a background."""
    text = text.replace("\n", "\u21b5").replace(" ", "\u00b7")
    box = None
    if background:
        box = {"facecolor": background, "edgecolor": "none", "boxstyle": "round,pad=0.25"}
    axis.text(x, y, text[:10], ha="center", va="center", fontsize=8, bbox=box, **style)


def throughput(path, runs):
    """Left: tokens/s of all sequences together against the batch size. Right: the speedup against
    tau for the smallest and the largest batch, with a star at the tau of the run.

    runs: {label: rows of bench.py's throughput}. The time of a round does not depend on tau, so one
    run gives the whole curve.
    """
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(13, 5), layout="constrained")
    taus = range(1, 17)
    for number, (label, rows) in enumerate(runs.items()):
        color = f"C{number}"
        slots = [row["slots"] for row in rows]
        for mode, style, name in (("speculative", "o-", "drafter and target"),
                                  ("target", "s--", "target alone")):
            speeds = [row["tokens_per_s"][mode] for row in rows]
            left.plot(slots, speeds, style, color=color, label=f"{label}: {name}")
        left.set_xscale("log", base=2)
        left.set_xticks(slots, slots)
        for row, style in ((rows[0], "-"), (rows[-1], "--")):
            speedups = [tau / row["break_even_tau"] for tau in taus]
            right.plot(taus, speedups, style, color=color, label=f"{label}: {row['slots']} at once")
            right.plot(row["tau"], row["speedup"], "*", color=color, markersize=15)
    right.axhline(1, color="grey", linewidth=0.8, label="as fast as the target alone")
    left.set(xlabel="sequences decoded at once", ylabel="tokens/s of all", yscale="log")
    right.set(xlabel="tau (tokens per round)", ylabel="speedup over the target alone")
    for axis in (left, right):  # below the curves, so that it covers none
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), fontsize=9)
    save(path, figure)


def bugs(path, summaries):
    """A bar of tau for each bug, the worst at the top; summaries: those of bugs_page.py. The red
    part of a bar is the fraction of wrong outputs. A grey band covers the runs without a bug. For
    training bugs there is also a point for each seed and a circle for training's own estimate."""
    figure, axes = pyplot().subplots(1, 2, figsize=(14, 6), layout="constrained")
    for axis, kind in zip(axes, ("decoding", "training")):
        axis.set(xlabel="tau (tokens per round)", title=f"{kind} bugs")
        chosen = [summary for summary in summaries if summary.kind == kind]
        axis.set_yticks(range(len(chosen)), [summary.bug.name for summary in chosen], fontsize=8)
        axis.invert_yaxis()
        for y, summary in enumerate(chosen):
            tau = summary.mean("tau")
            axis.barh(y, tau, color=RED)
            axis.barh(y, tau * summary.mean("identical"), color=GREEN)
            if kind == "training":
                taus = [row["tau"] for row in summary.rows]
                axis.plot(taus, [y] * len(taus), ".", color="black", markersize=4)
                axis.plot(summary.mean("estimate"), y, "o", color="black", fillstyle="none")
        if chosen:
            clean_taus = [row["tau"] for row in chosen[0].clean_rows]
            axis.axvspan(min(clean_taus) - 0.03, max(clean_taus) + 0.03, color=GREY, zorder=0)
    save(path, figure)
