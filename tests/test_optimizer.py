"""Muon for matrices, AdamW for vectors, as one optimizer."""
import pytest
import torch

from training.optimizer import new_optimizer

LR = 0.01
SHAPES = ((32, 32), (16, 48), (48, 16), (32,))  # the last one is a vector


def random_tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def stepped(kind, betas=(0.9, 0.999), weight_decay=0.0, scheduled=LR):
    """The parameters of seed 0 after two steps with the gradients of seeds 1 and 1."""
    parameters = [torch.nn.Parameter(value) for value in random_tensors(0)]
    optimizer = new_optimizer(kind, parameters, LR, betas, weight_decay)
    for group in optimizer.param_groups:
        group["lr"] = scheduled
    for _ in range(2):
        for parameter, gradient in zip(parameters, random_tensors(1)):
            parameter.grad = gradient
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


def test_muon_steps_along_the_singular_vectors():
    """A step in a different direction than U V^T of the gradient, or of a different size than
    AdamW's: a root mean square of about 0.2 lr."""
    for before, after, gradient in list(zip(
            random_tensors(0), stepped("muon"), random_tensors(1)))[:3]:
        step = before - after
        u, _, v = torch.linalg.svd(gradient, full_matrices=False)
        assert torch.cosine_similarity(step.flatten(), (u @ v).flatten(), dim=0) > 0.95
        assert step.square().mean().sqrt() == pytest.approx(2 * 0.2 * LR, rel=0.3)


@pytest.mark.parametrize("betas", ((0.9, 0.999), (0.5, 0.6)))
def test_vectors_are_stepped_by_adamw(betas):
    """Gains of norms that Muon refuses, that nobody steps, or whose settings are the defaults."""
    parameter = torch.nn.Parameter(random_tensors(0)[-1])
    adamw = torch.optim.AdamW([parameter], lr=LR, betas=betas, weight_decay=0.1)
    for seed in (1, 1):
        parameter.grad = random_tensors(seed)[-1]
        adamw.step()
    for kind in ("adamw", "muon"):
        assert torch.equal(stepped(kind, betas, weight_decay=0.1)[-1], parameter)


@pytest.mark.parametrize("kind", ("adamw", "muon"))
def test_schedule_and_weight_decay_reach_every_parameter(kind):
    """A learning rate or a weight decay that only one part of the optimizer gets."""
    for before, unmoved, after, decayed in zip(
            random_tensors(0), stepped(kind, scheduled=0.0), stepped(kind),
            stepped(kind, weight_decay=0.5)):
        assert torch.equal(unmoved, before)
        moved = (after - decayed) / (2 * LR * 0.5)
        assert torch.allclose(moved, before, atol=0.1)
