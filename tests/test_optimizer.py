"""Muon for matrices, AdamW for vectors, as one optimizer."""
import pytest
import torch

from training.optimizer import new_optimizer

LR = 0.01
MATRICES = ((32, 32), (16, 48), (48, 16))
VECTOR = (32,)


def random_tensors(seed):
    """A tensor of each shape, the vector last."""
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for shape in (*MATRICES, VECTOR):
        tensors.append(torch.randn(shape, generator=generator))
    return tensors


def stepped(kind, lr=LR, weight_decay=0.0):
    """The parameters of seed 0 after one step, with the gradients of seed 1."""
    parameters = []
    for value, gradient in zip(random_tensors(0), random_tensors(1)):
        parameter = torch.nn.Parameter(value)
        parameter.grad = gradient
        parameters.append(parameter)
    optimizer = new_optimizer(kind, parameters, LR, (0.9, 0.999), weight_decay)
    for group in optimizer.param_groups:
        group["lr"] = lr  # as a schedule sets it
    optimizer.step()
    return [parameter.detach() for parameter in parameters]


def test_muon_steps_along_the_singular_vectors():
    """A step of another direction, or of another size than AdamW's: for a matrix U V^T of its
    gradient, of a root mean square of about 0.2 lr."""
    before = random_tensors(0)
    after = stepped("muon")
    gradients = random_tensors(1)
    for i in range(len(MATRICES)):
        step = before[i] - after[i]
        u, _, v = torch.linalg.svd(gradients[i], full_matrices=False)
        direction = u @ v
        cosine = torch.cosine_similarity(step.flatten(), direction.flatten(), dim=0)
        assert cosine > 0.95
        root_mean_square = step.square().mean().sqrt()
        assert root_mean_square == pytest.approx(0.2 * LR, rel=0.3)


def test_vectors_are_stepped_by_adamw():
    """Gains of norms that Muon refuses, or that nobody steps."""
    muon = stepped("muon", weight_decay=0.1)
    adamw = stepped("adamw", weight_decay=0.1)
    assert torch.equal(muon[-1], adamw[-1])
    for i in range(len(MATRICES)):
        assert not torch.allclose(muon[i], adamw[i])


@pytest.mark.parametrize("kind", ("adamw", "muon"))
def test_the_schedule_reaches_every_parameter(kind):
    """A learning rate that is set in one part of two: with a rate of 0 nothing may move."""
    for before, after in zip(random_tensors(0), stepped(kind, lr=0.0)):
        assert torch.equal(before, after)


def test_weight_decay_reaches_every_parameter():
    """Weight decay that only vectors, or only matrices, have."""
    before = random_tensors(0)
    with_decay = stepped("muon", weight_decay=0.5)
    without = stepped("muon")
    for i in range(len(before)):
        expected = without[i] - LR * 0.5 * before[i]
        assert torch.allclose(with_decay[i], expected, atol=1e-6)
