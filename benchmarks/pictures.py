"""
The plots that the scripts draw, from the figures of a report or of a log.

matplotlib is imported where it is used, as it costs a second that most runs need not pay. A picture
is written whole or not at all.
"""
import os

# colours of tokens
GREY = "#d8d8d8"    # the anchor
GREEN = "#a8dca0"   # accepted guesses
BLUE = "#9cc4f0"    # the target's own
RED = "#f6d5d0"     # rejected guesses
# and of wrong outputs
RED_BAR = "#e08a80"


def pyplot():
    """matplotlib's pyplot, drawing without a screen."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def save(path, figure):
    figure.savefig(path + ".tmp", format="png", dpi=120)
    pyplot().close(figure)
    os.replace(path + ".tmp", path)


# ------------------------------------------------------------------------------------------------
# acceptance


def acceptance(path, report):
    """Acceptance by slot, how long rounds are, and under them the rounds of one answer."""
    rounds = []
    if report["transcript"]:  # random ids have none
        rounds = report["transcript"]["rounds"]
    text_height = 0.42 * len(rounds) + 0.5
    panels = [["slots", "lengths"]]
    heights = [2.6]
    if rounds:
        panels.append(["text", "text"])
        heights.append(text_height)
    figure, axes = pyplot().subplot_mosaic(
        panels, figsize=(13, 2.6 + text_height), height_ratios=heights, width_ratios=(5, 2),
        layout="constrained")

    shares = report["accepted_up_to_slot"]
    slots = range(1, len(shares) + 1)
    axes["slots"].bar(slots, shares, color=GREEN)
    axes["slots"].set(xlabel="slot of the block", ylabel="share of rounds", ylim=(0, 1),
                      xticks=slots, title="accepted up to slot")

    counts = report["rounds_of_length"]
    lengths = range(1, len(counts) + 1)
    axes["lengths"].bar(lengths, counts, color=GREY)
    axes["lengths"].set(xlabel="tokens returned in a round", ylabel="rounds", xticks=lengths[::3],
                        title=f"tau {report['tau_micro']:.2f} over {report['prompts']} prompts")
    if rounds:
        draw_rounds(axes["text"], rounds)
    save(path, figure)


def draw_rounds(axis, rounds):
    """Rounds as rows and slots as columns: the anchor, the guesses, and the target's own token in
    the slot of the first wrong guess, which stands above it."""
    width = 1 + len(rounds[0]["guesses"])
    for y, one_round in enumerate(rounds):
        accepted = one_round["accepted"]
        own = one_round["own"]  # None where the answer ended before it
        draw_token(axis, 0, y, one_round["anchor"], GREY)
        for slot, guess in enumerate(one_round["guesses"], 1):
            if slot <= accepted:
                draw_token(axis, slot, y, guess, GREEN)
            elif slot == accepted + 1 and own is not None:  # the first wrong guess
                draw_token(axis, slot, y - 0.3, guess, RED, color="#b03030")
            else:
                draw_token(axis, slot, y, guess, None, color="#c09090")
        if own is not None:
            slot = accepted + 1
            below = 0.12 if slot < width else 0  # the guess above it
            draw_token(axis, slot, y + below, own, BLUE, weight="bold")
    axis.set(xlim=(-0.6, width + 0.6), ylim=(len(rounds) - 0.4, -0.7), xticks=range(width),
             ylabel="round", yticks=range(len(rounds)), yticklabels=range(1, 1 + len(rounds)),
             xlabel="slot (0: the anchor)",
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


# ------------------------------------------------------------------------------------------------
# speed


def speedup(path, rows, report):
    """The speedup of each prompt against its tau; rows: those of bench.py's speedup."""
    timed = [row for row in rows if row["speedup"] is not None]
    figure, axis = pyplot().subplots(figsize=(6, 4), layout="constrained")
    axis.plot([row["tau"] for row in timed], [row["speedup"] for row in timed], "o", alpha=0.6)
    axis.axhline(1, color="grey", linewidth=0.8)
    axis.set(xlabel="tau of the prompt (tokens a round)",
             ylabel="speedup over the target alone, one row a step",
             title=f"{report['faster']} of {report['prompts']} prompts faster, "
                   f"geometric mean {report['geomean']:.2f}x")
    save(path, figure)


def curve(path, runs):
    """Speedup against tau. runs: {label: rows of bench.py's curve}; a line each through its oracles
    and a star for its trained drafter."""
    figure, axis = pyplot().subplots(figsize=(7, 4), layout="constrained")
    for number, (label, rows) in enumerate(runs.items()):
        color = f"C{number}"
        for drafter, style, size, suffix in (
                ("oracle", "o-", 5, "right by chance"),
                ("trained", "*", 15, "the trained drafter")):
            points = [row for row in rows if row["drafter"] == drafter]
            if points:
                axis.plot([row["tau"] for row in points], [row["speedup"] for row in points], style,
                          color=color, markersize=size, label=f"{label}: {suffix}")
    axis.axhline(1, color="grey", linewidth=0.8)
    axis.set(xlabel="tau (tokens a round)", ylabel="speedup over the target alone, one row a step")
    axis.legend()
    save(path, figure)


def throughput(path, runs):
    """Tokens a second of all sequences and of each, against the number of slots; runs: {label: rows
    of bench.py's throughput}."""
    lines = (
        ("speculative", "o-", "drafter and target"),
        ("target", "s--", "target alone, one row"),
        ("target_same_shape", "^:", "target alone, 16 rows"))
    figure, axes = pyplot().subplots(1, 2, figsize=(11, 4), layout="constrained")
    for number, (label, rows) in enumerate(runs.items()):
        slots = [row["slots"] for row in rows]
        for mode, style, name in lines:
            of_all = [row["tokens_per_s"][mode] for row in rows]
            of_each = [speed / count for speed, count in zip(of_all, slots)]
            for axis, speeds in zip(axes, (of_all, of_each)):
                axis.plot(slots, speeds, style, color=f"C{number}", label=f"{label}: {name}")
    for axis, title in zip(axes, ("tokens/s of all sequences", "tokens/s of each")):
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set(xlabel="slots: sequences decoded at once", title=title)
        axis.set_xticks(slots, slots)
    axes[0].legend(fontsize=8)
    save(path, figure)


def training(path, log, slots):
    """Loss, tau and acceptance up to some slots over the steps; log: the entries of log.jsonl."""
    steps = [entry for entry in log if entry["kind"] == "train"]
    held_out = [entry for entry in log if entry["kind"] == "val"]
    figure, axes = pyplot().subplots(1, 3, figsize=(15, 4), layout="constrained")
    for axis, name in zip(axes, ("loss", "tau")):
        for entries, label, marker in ((steps, "training", None), (held_out, "held out", "o")):
            axis.plot([entry["step"] for entry in entries], [entry[name] for entry in entries],
                      label=label, marker=marker)
    for slot in slots:
        shares = []
        for entry in held_out:
            if slot <= len(entry["accepted_up_to_slot"]):
                shares.append((entry["step"], entry["accepted_up_to_slot"][slot - 1]))
        axes[2].plot([step for step, _ in shares], [share for _, share in shares],
                     label=f"slot {slot}", marker="o")
    labels = ("loss (nats)", "tau, estimated (tokens a round)", "held out: accepted up to slot")
    for axis, label in zip(axes, labels):
        axis.set(xlabel="step", ylabel=label)
        axis.legend()
    save(path, figure)


# ------------------------------------------------------------------------------------------------
# bugs


def bugs(path, summaries):
    """tau with each bug, beside tau without it; summaries: those of benchmarks/bugs_page.py.

    The red share of a bar is that of outputs that are wrong. Of training a point stands for each
    seed, a circle for what training itself estimates, and a grey band for the clean runs.
    """
    panels = []
    for title, is_of_training in (("bugs of decoding", False), ("bugs of training", True)):
        chosen = [summary for summary in summaries if summary.is_of_training == is_of_training]
        if chosen:
            panels.append((title, chosen))
    longest = max(len(chosen) for _, chosen in panels)
    figure, axes = pyplot().subplots(
        1, len(panels), figsize=(7 * len(panels), 1 + 0.24 * longest), squeeze=False,
        layout="constrained")
    for axis, (title, chosen) in zip(axes[0], panels):
        draw_bugs(axis, chosen)
        axis.set(xlabel="tau (tokens a round)", title=title, ylim=(longest - 0.4, -0.6))
    save(path, figure)


def draw_bugs(axis, summaries):
    """One panel: a bar for each bug, the worst on top."""
    names = [summary.bug.name for summary in summaries]
    axis.set_yticks(range(len(names)), names, fontsize=8)
    clean_taus = summaries[0].clean_taus
    axis.axvspan(min(clean_taus) - 0.03, max(clean_taus) + 0.03, color=GREY)
    for y, summary in enumerate(summaries):
        tau = summary.mean("tau")
        axis.barh(y, tau, color=RED_BAR)
        axis.barh(y, tau * summary.mean("identical"), color=GREEN)
        if summary.is_of_training:
            axis.plot(summary.taus, [y] * len(summary.taus), ".", color="black", markersize=4)
            axis.plot(summary.mean("estimate"), y, "o", color="black", fillstyle="none")
