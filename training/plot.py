"""
The plot of a training run: loss, tau, and acceptance on held-out samples.
"""
import os


def plot_training(path, log, positions):
    """Draw the entries of log.jsonl. positions: those of the block whose acceptance is shown."""
    from matplotlib.figure import Figure  # takes a second to import

    training = [entry for entry in log if entry["kind"] == "train"]
    held_out = [entry for entry in log if entry["kind"] == "val"]
    training_steps = [entry["step"] for entry in training]
    held_out_steps = [entry["step"] for entry in held_out]
    figure = Figure(figsize=(15, 4), layout="constrained")
    loss_axis, tau_axis, acceptance_axis = figure.subplots(1, 3)
    for axis, key in ((loss_axis, "loss"), (tau_axis, "tau")):
        values = [entry[key] for entry in training]
        axis.plot(training_steps, values, label="training")
        values = [entry[key] for entry in held_out]
        axis.plot(held_out_steps, values, label="held out", marker="o")
    for position in positions:
        fractions = [entry["accepted_up_to_slot"][position - 1] for entry in held_out]
        acceptance_axis.plot(held_out_steps, fractions, label=f"position {position}", marker="o")
    loss_axis.set(xlabel="step", ylabel="loss (nats)")
    tau_axis.set(xlabel="step", ylabel="estimated tau (tokens per round)")
    acceptance_axis.set(xlabel="step", ylabel="held out: accepted up to position")
    for axis in (loss_axis, tau_axis, acceptance_axis):
        axis.legend()
    figure.savefig(path + ".tmp", format="png", dpi=120)
    os.replace(path + ".tmp", path)
