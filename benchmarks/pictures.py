"""
The plots, drawn from the figures of a report. matplotlib is imported only when it is used, because
the import takes a second.
"""
from formats.files import whole_file

GREY = "#d8d8d8"        # the anchor
GREEN = "#a8dca0"       # accepted guesses, right outputs
BLUE = "#9cc4f0"        # the target's own tokens
PALE_RED = "#f6d5d0"    # rejected guesses
RED = "#e08a80"         # wrong outputs


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


# --------------------------------------------------------------------------------------------------
# acceptance


def acceptance(path, report):
    """Acceptance per position, the lengths of rounds, and below them the rounds of one answer."""
    rounds = []
    if report["transcript"]:  # random ids have none
        rounds = report["transcript"]["rounds"]
    text_height = 0.42 * len(rounds) + 0.5
    figure, axes = pyplot().subplot_mosaic(
        [["positions", "lengths"], ["text", "text"]], figsize=(13, 2.6 + text_height),
        height_ratios=(2.6, text_height), width_ratios=(5, 2), layout="constrained")

    shares = report["accepted_up_to_slot"]
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


# --------------------------------------------------------------------------------------------------
# throughput


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


# --------------------------------------------------------------------------------------------------
# bugs


def bugs(path, summaries):
    """tau with each bug, next to tau without it; summaries: those of benchmarks/bugs_page.py. The
    red part of a bar is the fraction of wrong outputs."""
    figure, axes = pyplot().subplots(1, 2, figsize=(14, 6), layout="constrained")
    for axis, title, is_of_training in ((axes[0], "decoding bugs", False),
                                        (axes[1], "training bugs", True)):
        chosen = [summary for summary in summaries if summary.is_of_training == is_of_training]
        if chosen:
            draw_bugs(axis, chosen)
        axis.set(xlabel="tau (tokens per round)", title=title)
    save(path, figure)


def draw_bugs(axis, summaries):
    """A bar for each bug, the worst at the top. For training also a point for each seed, a circle
    for training's own estimate, and a grey band for the runs without a bug."""
    names = [summary.bug.name for summary in summaries]
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.invert_yaxis()
    clean_taus = [row["tau"] for row in summaries[0].clean_rows]
    axis.axvspan(min(clean_taus) - 0.03, max(clean_taus) + 0.03, color=GREY)
    for y, summary in enumerate(summaries):
        tau = summary.mean("tau")
        axis.barh(y, tau, color=RED)
        axis.barh(y, tau * summary.mean("identical"), color=GREEN)
        if summary.is_of_training:
            for row in summary.rows:
                axis.plot(row["tau"], y, ".", color="black", markersize=4)
            axis.plot(summary.mean("estimate"), y, "o", color="black", fillstyle="none")
