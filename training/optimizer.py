"""
AdamW for all weights, or Muon for the matrices among them.

    optimizer = new_optimizer("muon", drafter.parameters(), lr, betas, weight_decay)

Both are torch's own. AdamW scales each entry of a gradient separately. Muon uses the gradient G of
a matrix as a whole: with the singular value decomposition G = U s V^T, its step is close to U V^T.
So directions with small gradients move as fast as all others. On the nano pair, 2,100 steps of Muon
reach a tau of 9.6 to 9.7, and 2,100 steps of AdamW reach 8.4 (data/nano/readme.md).

Source: Jordan, "Muon: an optimizer for hidden layers in neural networks", 2024. A step is as large
as AdamW's, so a learning rate means the same for both: arXiv 2502.16982, equation 4.
"""
import torch

KINDS = ("adamw", "muon")


def new_optimizer(kind, parameters, lr, betas, weight_decay):
    """An optimizer of one of the KINDS; betas are AdamW's."""
    if kind == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, betas=betas, weight_decay=weight_decay)
    return MuonAndAdamW(parameters, lr, betas, weight_decay)


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon for matrices, AdamW for vectors, which are the gains of norms. A checkpoint sees one
    optimizer, whose moments are in the order of the parameters."""

    def __init__(self, parameters, lr, betas, weight_decay):
        parameters = list(parameters)
        super().__init__(parameters, {"lr": lr})
        matrices = [p for p in parameters if p.dim() == 2]
        vectors = [p for p in parameters if p.dim() != 2]
        muon = torch.optim.Muon(
            matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        adamw = torch.optim.AdamW(vectors, lr=lr, betas=betas, weight_decay=weight_decay)
        self.parts = (muon, adamw)

    @torch.no_grad()
    def step(self):
        for part in self.parts:
            part.state = self.state  # both keep their moments here, by parameter
            part.param_groups[0]["lr"] = self.param_groups[0]["lr"]
            part.step()


def moment_names(kind, parameter):
    """The names of a parameter's moments in a checkpoint."""
    if kind == "muon" and parameter.dim() == 2:
        return {"momentum_buffer"}
    return {"exp_avg", "exp_avg_sq", "step"}
