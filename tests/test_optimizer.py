"""Muon for matrices, AdamW for vectors, as one optimizer."""
import pytest
import torch

from training.optimizer import new_optimizer

LR = 0.01
BETAS = (0.9, 0.999)
MATRICES = ((32, 32), (16, 48), (48, 16))
VECTOR = (32,)


def random_tensors(seed):
    """A tensor of each shape, the vector last."""
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for shape in (*MATRICES, VECTOR):
        tensors.append(torch.randn(shape, generator=generator))
    return tensors


def stepped(kind, lr=LR, betas=BETAS, weight_decay=0.0, steps=1):
    """The parameters of seed 0 after some steps with the gradients of seeds 1, 2, ..."""
    parameters = [torch.nn.Parameter(value) for value in random_tensors(0)]
    optimizer = new_optimizer(kind, parameters, LR, betas, weight_decay)
    for group in optimizer.param_groups:
        group["lr"] = lr  # like a schedule
    for step in range(steps):
        for parameter, gradient in zip(parameters, random_tensors(step + 1)):
            parameter.grad = gradient
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


def test_muon_steps_along_the_singular_vectors():
    """A step in a different direction than U V^T of the gradient, or of a different size than
    AdamW's: a root mean square of about 0.2 lr."""
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


@pytest.mark.parametrize("betas", (BETAS, (0.5, 0.6)))
def test_vectors_are_stepped_by_adamw(betas):
    """Gains of norms that Muon refuses, that nobody steps, or whose betas are the defaults."""
    muon = stepped("muon", betas=betas, weight_decay=0.1, steps=2)
    adamw = stepped("adamw", betas=betas, weight_decay=0.1, steps=2)
    assert torch.equal(muon[-1], adamw[-1])
    for i in range(len(MATRICES)):
        assert not torch.allclose(muon[i], adamw[i])
    is_default = torch.equal(adamw[-1], stepped("adamw", weight_decay=0.1, steps=2)[-1])
    assert is_default == (betas == BETAS)


@pytest.mark.parametrize("kind", ("adamw", "muon"))
def test_the_schedule_reaches_every_parameter(kind):
    """A learning rate that only one part of the optimizer gets: at a rate of 0 nothing moves."""
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
