"""
The plot of a training run: loss, tau, and acceptance on held-out samples.
"""
import io

from checkpoint import write_whole


def plot_training(path, log, positions):
    """Draw the entries of log.jsonl; positions: those of the block whose acceptance is shown."""
    from matplotlib.figure import Figure  # takes a second to import

    training = [entry for entry in log if entry["kind"] == "train"]
    held_out = [entry for entry in log if entry["kind"] == "val"]
    figure = Figure(figsize=(15, 4), layout="constrained")
    loss_axis, tau_axis, acceptance_axis = figure.subplots(1, 3)
    draw_lines(loss_axis, "loss", training, held_out)
    draw_lines(tau_axis, "tau", training, held_out)
    for position in positions:
        steps = [entry["step"] for entry in held_out]
        fractions = [entry["accepted_up_to_slot"][position - 1] for entry in held_out]
        acceptance_axis.plot(steps, fractions, label=f"position {position}", marker="o")
    loss_axis.set(xlabel="step", ylabel="loss (nats)")
    tau_axis.set(xlabel="step", ylabel="estimated tau (tokens per round)")
    acceptance_axis.set(xlabel="step", ylabel="held out: accepted up to position")
    for axis in (loss_axis, tau_axis, acceptance_axis):
        axis.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_whole(path, picture.getvalue())


def draw_lines(axis, key, training, held_out):
    steps = [entry["step"] for entry in training]
    values = [entry[key] for entry in training]
    axis.plot(steps, values, label="training")
    steps = [entry["step"] for entry in held_out]
    values = [entry[key] for entry in held_out]
    axis.plot(steps, values, label="held out", marker="o")
