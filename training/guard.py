"""
Skips the steps whose gradient spikes. One NaN would ruin the weights of a long run. A spike can
undo hours of training, because a clipped spike still points in a bad direction.
"""
import math
from dataclasses import dataclass

from training.parallel import world_size

SPIKE_FACTOR = 10.0         # skip a step if its gradient norm exceeds this times the average
MAX_CONSECUTIVE_SKIPS = 5   # then the run stops, because the weights or the data are broken


@dataclass
class GradientGuard:
    """The guard's state. Checkpoints contain it, so a resumed run skips the same steps."""
    usual_norm: float = 0.0         # moving average of the norm over the steps not skipped
    skipped: int = 0                # steps
    skipped_in_a_row: int = 0

    def skips(self, grad_norm, in_warmup):
        """Whether to skip the step with this gradient norm. The guard counts the step.

        During warm-up a step is skipped only if its gradient is not finite, because norms still
        change a lot.
        """
        can_compare = self.usual_norm > 0 and not in_warmup
        is_spike = can_compare and grad_norm > SPIKE_FACTOR * self.usual_norm
        if is_spike or not math.isfinite(grad_norm):
            self.skipped += 1
            self.skipped_in_a_row += 1
            return True
        if self.usual_norm == 0:
            self.usual_norm = grad_norm
        self.usual_norm = 0.98 * self.usual_norm + 0.02 * grad_norm
        self.skipped_in_a_row = 0
        return False

    def must_stop(self):
        return self.skipped_in_a_row >= MAX_CONSECUTIVE_SKIPS


def why_stopped(run, grad_norm):
    """The error message of a run that must stop. Prints all samples of the last step."""
    config = run.config
    per_step = config.grad_accum_steps * world_size()
    sample_numbers = []
    for number in range(run.step * per_step, (run.step + 1) * per_step):
        sample_numbers.extend(run.micro_batches.sample_numbers(number).tolist())
    print(f"samples of step {run.step + 1} (split train): {sample_numbers}", flush=True)
    guard = run.guard
    return (f"stopping at step {run.step + 1}: gradient norm {grad_norm:.3g} (average "
            f"{guard.usual_norm:.3g}), {guard.skipped_in_a_row} steps skipped in a row. Check the "
            "samples of this step, which are printed above, or lower lr")
