"""Every picture that the scripts draw. Each function takes a path and the figures of a report."""
import os

GREY, GREEN, BLUE, RED = "#d8d8d8", "#a8dca0", "#9cc4f0", "#f6d5d0"  # anchor, accepted, the target's own, rejected


def save(path, draw):
    """The picture that draw(pyplot) returns as a PNG, whole or not at all."""
    import matplotlib  # imported here, as it costs a second that most runs need not pay
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure = draw(plt)
    figure.savefig(path + ".tmp", format="png", dpi=120)
    plt.close(figure)
    os.replace(path + ".tmp", path)


def line(axis, points, *style, **more):
    axis.plot(*zip(*points) if points else ((), ()), *style, **more)


def acceptance(path, report):
    """Acceptance by slot, the histogram of round lengths, and under them, slot by slot, the rounds of one answer;
    report: that of bench.py's acceptance."""
    rounds = report["transcript"]["rounds"] if report["transcript"] else []

    def draw(plt):
        height = 0.42 * len(rounds) + 0.5
        rows, heights = [["slots", "lengths"], ["text", "text"]], [2.6, height]
        if not rounds:  # random ids have no text
            rows, heights = rows[:1], heights[:1]
        figure, axes = plt.subplot_mosaic(rows, figsize=(13, sum(heights)), height_ratios=heights, width_ratios=(5, 2),
                                          layout="constrained")
        slots, lengths = range(1, len(report["slots"]) + 1), range(1, len(report["lengths"]) + 1)
        axes["slots"].bar(slots, report["slots"], color=GREEN)
        axes["slots"].set(xlabel="slot of the block", ylabel="share of rounds", ylim=(0, 1), xticks=slots,
                          title="accepted up to slot")
        axes["lengths"].bar(lengths, report["lengths"], color=GREY)
        axes["lengths"].set(xlabel="tokens returned in a round", ylabel="rounds", xticks=lengths[::3],
                            title=f"tau {report['tau_micro']:.2f} over {report['prompts']} prompts")
        if rounds:
            transcript(axes["text"], rounds)
        return figure
    save(path, draw)


def transcript(axis, rounds):
    """Rounds as rows and slots as columns: the anchor, the guesses, and the target's own token where the first wrong
    guess stood, which is struck out above it."""
    def cell(x, y, text, back, **more):
        shown = text.replace("\n", "\u21b5").replace(" ", "\u00b7")[:10]
        axis.text(x, y, shown, ha="center", va="center", fontsize=8, **more,
                  bbox=back and {"facecolor": back, "edgecolor": "none", "boxstyle": "round,pad=0.25"})

    width = 1 + len(rounds[0]["guesses"])
    for y, made in enumerate(rounds):
        cell(0, y, made["anchor"], GREY)
        for k, guess in enumerate(made["guesses"], 1):
            if k <= made["accepted"]:
                cell(k, y, guess, GREEN)
            elif k > made["accepted"] + (made["own"] is not None):
                cell(k, y, guess, None, color="#c09090")
            else:
                cell(k, y - 0.3, guess, RED, color="#b03030")
        if made["own"] is not None:
            k = made["accepted"] + 1
            cell(k, y + 0.12 * (k < width), made["own"], BLUE, weight="bold")
    axis.set(xlim=(-0.6, width + 0.6), ylim=(len(rounds) - 0.4, -0.7), xticks=range(width), ylabel="round",
             yticks=range(len(rounds)), yticklabels=range(1, 1 + len(rounds)), xlabel="slot (0: the anchor)",
             title="an answer, round by round: anchor (grey), accepted guesses (green), the target's own token (blue), "
                   "rejected guesses (red)")
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)


def speedup(path, points, report):
    """points: (tau, speedup) of each prompt."""
    def draw(plt):
        figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
        line(axis, points, "o", alpha=0.6)
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set(xlabel="tau of the prompt (tokens a round)", ylabel="speedup over the target alone, one row a step",
                 title=f"{report['faster']} of {report['prompts']} prompts faster, geometric mean "
                       f"{report['geomean']:.2f}x")
        return figure
    save(path, draw)


def curve(path, runs):
    """runs: {label: rows of bench.py's curve}, a line each through its oracles, and a star for its trained drafter."""
    def draw(plt):
        figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
        for i, (label, rows) in enumerate(runs.items()):
            oracle, trained = ([(p["tau"], p["speedup"]) for p in rows if p["drafter"] == kind]
                               for kind in ("oracle", "trained"))
            line(axis, oracle, "o-", color=f"C{i}", markersize=5, label=f"{label}: right by chance")
            if trained:
                line(axis, trained, "*", color=f"C{i}", markersize=15, label=f"{label}: the trained drafter")
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set(xlabel="tau (tokens a round)", ylabel="speedup over the target alone, one row a step")
        axis.legend()
        return figure
    save(path, draw)


def report(path, names, found):
    """tau and speedup of runs side by side; found: {figure: number, or (number, low, high), of which that is drawn}."""
    def draw(plt):
        figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
        for axis, keys in zip(axes, (("tau_micro", "tau_macro", "tau"), ("speedup", "geomean"))):
            for i, key in enumerate(keys):
                heights = [each.get(key) for each in found]
                heights = [v[0] if isinstance(v, tuple) else v for v in heights]
                at = [(j + i / 4, v) for j, v in enumerate(heights) if v is not None]
                if at:
                    axis.bar(*zip(*at), 0.2, label=key)
            axis.set_xticks(range(len(names)), names)
            if axis.containers:
                axis.legend()
        return figure
    save(path, draw)


def training(path, log, slots):
    """Loss, tau and acceptance up to some slots over steps; log: the entries of log.jsonl."""
    def draw(plt):
        figure, axes = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
        for axis, name in zip(axes, ("loss", "tau")):
            for kind, label in (("train", "training"), ("val", "held out")):
                line(axis, [(entry["step"], entry[name]) for entry in log if entry["kind"] == kind], label=label,
                     marker="o" if kind == "val" else None)
        for k in slots:
            line(axes[2], [(entry["step"], entry["slots"][k - 1]) for entry in log if entry["kind"] == "val"
                           and k <= len(entry["slots"])], label=f"slot {k}", marker="o")
        labels = ("loss (nats)", "tau, estimated (tokens a round)", "held out: accepted up to slot")
        for axis, label in zip(axes, labels):
            axis.set(xlabel="step", ylabel=label)
            axis.legend()
        return figure
    save(path, draw)
