"""Muon for matrices, AdamW for vectors, as one optimizer."""
import pytest
import torch

from optimizer import new_optimizer

LR = 0.01
SHAPES = ((32, 32), (16, 48), (48, 16), (32,))


def one_step(kind, lr=LR, weight_decay=0.0):
    """The parameters before and after a step, and the gradients of it."""
    generator = torch.Generator().manual_seed(0)
    before = [torch.randn(shape, generator=generator) for shape in SHAPES]
    gradients = [torch.randn(shape, generator=generator) for shape in SHAPES]
    parameters = [torch.nn.Parameter(x.clone()) for x in before]
    optimizer = new_optimizer(kind, parameters, LR, (0.9, 0.999), weight_decay)
    for group in optimizer.param_groups:
        group["lr"] = lr
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = gradient.clone()
    optimizer.step()
    return before, [p.detach() for p in parameters], gradients


def test_muon_steps_along_the_singular_vectors():
    """A step of another direction, or of another size than AdamW's: for a matrix U V^T of its
    gradient, of a root mean square of about 0.2 lr."""
    before, after, gradients = one_step("muon")
    for x, y, gradient in list(zip(before, after, gradients))[:3]:
        step = x - y
        u, _, v = torch.linalg.svd(gradient, full_matrices=False)
        cosine = torch.cosine_similarity(step.flatten(), (u @ v).flatten(), dim=0)
        assert cosine > 0.95
        assert step.square().mean().sqrt() == pytest.approx(0.2 * LR, rel=0.3)


def test_vectors_are_stepped_by_adamw():
    """Gains of norms that Muon refuses, or that nobody steps."""
    _, muon, _ = one_step("muon", weight_decay=0.1)
    _, adamw, _ = one_step("adamw", weight_decay=0.1)
    assert torch.equal(muon[3], adamw[3])
    for a, b in zip(muon[:3], adamw[:3]):
        assert not torch.allclose(a, b)


@pytest.mark.parametrize("kind", ("adamw", "muon"))
def test_the_schedule_reaches_every_parameter(kind):
    """A learning rate that is set in one part of two: with a rate of 0 nothing may move."""
    before, after, _ = one_step(kind, lr=0.0)
    for x, y in zip(before, after):
        assert torch.equal(x, y)


def test_weight_decay_reaches_every_parameter():
    """Weight decay that only vectors, or only matrices, have."""
    _, with_decay, _ = one_step("muon", weight_decay=0.5)
    before, without, _ = one_step("muon")
    for x, y, z in zip(before, with_decay, without):
        assert torch.allclose(y, z - LR * 0.5 * x, atol=1e-6)
