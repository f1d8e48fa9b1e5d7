"""
Anchors, labels, weights, and the loss of training blocks. test_basic compares the loss with its
definition.
"""
import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from loss import Targets, block_labels, block_loss, chunk_loss, dpace_weights, sample_anchors
from tests.common import K, V, apart, random_normal, tokens_of


def responses():
    """Supervised tokens (5, 40): none, one, two at the end, two responses, everything."""
    supervised = torch.zeros(5, 40, dtype=torch.bool)
    supervised[1, 5] = True
    supervised[2, 38:] = True
    supervised[3, 4:12] = True
    supervised[3, 20:30] = True
    supervised[4, :] = True
    return supervised


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("count", (1, 8, 39, 64))
def test_anchors_are_supervised_distinct_and_static(count):
    """Failure 14: a shape depends on the data; or an anchor is outside the response, or there
    twice."""
    anchors, real = sample_anchors(responses(), count, seeded(3), 40)
    assert anchors.shape == real.shape == (5, min(count, 40))  # 40: all tokens of a sequence
    candidates = (0, 0, 1, 16, 39)
    for i, supervised in enumerate(responses()):
        chosen = anchors[i][real[i]]
        assert len(chosen) == min(count, candidates[i])
        assert len(chosen) == len(chosen.unique())
        assert chosen.tolist() == sorted(chosen.tolist())
        assert supervised[chosen].all()
        assert supervised[chosen + 1].all()
        assert not anchors[i][~real[i]].any()  # invalid ones are at position 0


def test_failure_12_anchors_follow_the_generator_alone():
    """Failures 12 and 14: anchors come from the global generator, some are never drawn, or a run
    that resumes with a new pad_to_multiple_of draws different ones."""
    drawn = set()
    for seed in range(200):
        anchors, _ = sample_anchors(responses()[4:], 8, seeded(seed), 40)
        drawn.update(anchors.flatten().tolist())
    assert drawn == set(range(39))
    for max_length in (40, 64, 1000):
        anchors, real = sample_anchors(responses(), 8, seeded(5), max_length)
        for padding in (0, 1, 24, 100):
            torch.manual_seed(padding)
            padded = F.pad(responses(), (0, padding))
            again, real_again = sample_anchors(padded, 8, seeded(5), max_length)
            assert torch.equal(anchors, again)
            assert torch.equal(real, real_again)


def test_padding_anchors_and_texts_end_without_weight():
    """An anchor that is padding has a weight, or labels come from after the end of the text."""
    tokens = tokens_of(1, 40)
    supervised = torch.ones(1, 40, dtype=torch.bool)
    is_real = torch.tensor([[True, True, False]])
    anchors = torch.tensor([[10, 38, 0]])
    labels, weights = block_labels(tokens, supervised, anchors, is_real, K=K, gamma=7.0)
    assert torch.equal(labels[0, 0], tokens[0, 11:10 + K])
    assert labels[0, 1, 0] == tokens[0, 39]
    counted = (weights > 0).sum(-1)
    assert counted.tolist() == [[K - 1, 1, 0]]


@pytest.mark.parametrize("smoothing", (0.0, 0.25, 0.5, 1.0))
def test_dpace_weights_equal_their_definition(smoothing):
    """w_j is not the sum over m >= j of s_1 .. s_m with s = (1 - a) q + a, or it counts positions
    after the end of the response."""
    draws = torch.rand(9, K - 1, generator=seeded(0), dtype=torch.float64)
    lengths = torch.tensor([0, 1, 2, 5, 9, 15, 15, 15, 15])
    inside = (torch.arange(K - 1) < lengths[:, None]).double()
    weights = dpace_weights(draws, inside, smoothing)
    for q, length, row in zip(draws, lengths, weights):
        products = []
        product = 1.0
        for probability in q[:length].tolist():
            product *= (1 - smoothing) * probability + smoothing
            products.append(product)
        expected = [sum(products[j:]) for j in range(K - 1)]
        assert row.tolist() == pytest.approx(expected)


def loss_inputs(dtype=torch.float64):
    """hidden (2, 6, K, 12), a head (V, 12), labels and weights (2, 6, K-1), half of them zero."""
    draw = random_normal(0, torch.float64)
    weights = draw(2, 6, K - 1).abs()
    weights = weights * (draw(2, 6, K - 1) > 0)
    hidden = draw(2, 6, K, 12).to(dtype).requires_grad_()
    head = draw(V, 12).to(dtype)
    labels = tokens_of(2, 6, K - 1)
    return hidden, head, Targets(labels, weights)


def with_smoothing(smoothing):
    """chunk_loss with D-PACE's weights, or as it is (None)."""
    return functools.partial(chunk_loss, dpace_smoothing=smoothing)


@pytest.mark.parametrize("smoothing", (None, 0.5))
@pytest.mark.parametrize("loss_chunk_size", (1, 40, 1000))
def test_loss_and_gradient_are_those_of_autograd(loss_chunk_size, smoothing):
    """A chunk affects the weights or the scale of others, or is left out; D-PACE's weights come
    from the guesses of a different block, or have a gradient; or a gradient is computed that nobody
    needs."""
    hidden, head, (labels, weights) = loss_inputs()
    if smoothing is not None:
        weights = (weights > 0).double().cumprod(-1)
    loss, nll, correct, used = block_loss(
        hidden, head, Targets(labels, weights), loss_chunk_size=loss_chunk_size,
        chunk_loss_function=with_smoothing(smoothing))
    gradient, = torch.autograd.grad(3 * loss, hidden)

    logits = hidden[:, :, 1:] @ head.T  # position 0, the anchor, has no loss
    each = F.cross_entropy(logits.flatten(0, 2), labels.flatten(), reduction="none")
    each = each.view_as(labels)
    if smoothing is not None:
        for block in itertools.product(range(2), range(6)):
            probability = (-each[block]).detach().exp()
            weights[block] = dpace_weights(probability, weights[block], smoothing)
    expected = (each * weights).sum()
    expected_gradient, = torch.autograd.grad(3 * expected, hidden)
    for a, b in ((loss, expected), (gradient, expected_gradient), (nll, each), (used, weights)):
        assert apart(a.detach(), b.detach()) < 1e-12
    assert torch.equal(correct, logits.argmax(-1) == labels)

    def without_gradient(hidden, head, targets, wants_grad):
        assert not wants_grad
        return with_smoothing(smoothing)(hidden, head, targets, wants_grad)

    alone, *_ = block_loss(
        hidden.detach(), head, Targets(labels, weights), loss_chunk_size=loss_chunk_size,
        chunk_loss_function=without_gradient)
    if smoothing is None:
        assert torch.equal(alone, loss.detach())


def test_loss_in_bf16_is_summed_in_fp32():
    """A softmax or a sum of thousands of losses is in bf16, which has three digits."""
    hidden, head, (labels, weights) = loss_inputs(torch.bfloat16)
    loss, nll, _, _ = block_loss(
        hidden, head, Targets(labels, weights.float()), loss_chunk_size=7)
    loss.backward()
    loss = loss.detach()
    assert loss.dtype == torch.float32
    assert hidden.grad.dtype == torch.bfloat16
    hidden = hidden.detach()
    exact, *_ = block_loss(
        hidden.double(), head.double(), Targets(labels, weights), loss_chunk_size=7)
    assert apart(loss, exact) < 5e-3
    # the products are bf16's, but nothing after them
    logits = F.linear(hidden[:, :, 1:], head).double()
    each = F.cross_entropy(logits.flatten(0, 2), labels.flatten(), reduction="none")
    assert apart(nll.flatten(), each) < 1e-6
    total = (each * weights.flatten()).sum()
    assert apart(loss, total) < 1e-6


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation made."""
    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        outputs = out if isinstance(out, (tuple, list)) else (out,)
        for x in outputs:
            if isinstance(x, torch.Tensor):
                self.size = max(self.size, x.numel())
        return out


@pytest.mark.parametrize("smoothing", (None, 0.5))
def test_loss_never_holds_all_logits(smoothing):
    """Failure 7: out of memory, because all logits of a micro-batch exist at once, or because the
    default needs more than the logits of 1,024 guesses that loss.py promises."""
    targets = Targets(torch.zeros(1, 150, K - 1).long(), torch.ones(1, 150, K - 1))
    hidden = torch.zeros(1, 150, K, 2, requires_grad=True)
    with LargestTensor() as largest:
        loss, *_ = block_loss(
            hidden, torch.zeros(V, 2), targets, chunk_loss_function=with_smoothing(smoothing))
        loss.backward()
    assert largest.size == 1024 // 15 * 15 * V  # rounded down to whole blocks
