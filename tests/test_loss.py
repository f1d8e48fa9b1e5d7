"""
Anchors, labels, weights and the loss of training blocks.
"""
import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from model import block_labels, block_loss, chunk_loss, dpace_weights, sample_anchors
from tests.common import K, V, apart, random_normal, tokens_of

# ------------------------------------------------------------------------------------------------
# anchors


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
    """Failure 14: shapes that follow a row's length; and anchors outside the response, or twice."""
    anchors, real = sample_anchors(responses(), count, seeded(3), 40)
    again, _ = sample_anchors(responses(), count, seeded(3), 40)
    assert torch.equal(anchors, again)
    assert anchors.shape == real.shape == (5, min(count, 40))  # 40: all tokens of a sequence
    candidates = (0, 0, 1, 16, 39)
    for i, supervised in enumerate(responses()):
        chosen = anchors[i][real[i]]
        assert len(chosen) == min(count, candidates[i])
        assert len(chosen) == len(chosen.unique())
        assert chosen.tolist() == sorted(chosen.tolist())
        assert supervised[chosen].all()
        assert supervised[chosen + 1].all()
        assert not anchors[i][~real[i]].any()  # unreal ones stand at position 0


def test_anchors_follow_the_generator_alone():
    """Failures 12 and 14: anchors from the global generator, or always the same."""
    torch.manual_seed(0)
    anchors, _ = sample_anchors(responses(), 8, seeded(0), 40)
    torch.manual_seed(1)
    again, _ = sample_anchors(responses(), 8, seeded(0), 40)
    assert torch.equal(again, anchors)
    drawn = set()
    for seed in range(200):
        anchors, _ = sample_anchors(responses()[4:], 8, seeded(seed), 40)
        drawn.update(anchors.flatten().tolist())
    assert drawn == set(range(39))


@pytest.mark.parametrize("padding", (1, 24, 100))
def test_failure_12_anchors_do_not_depend_on_padding(padding):
    """Failure 12: a resumed run with another length_multiple draws other anchors."""
    padded = F.pad(responses(), (0, padding))
    for max_length in (40, 64, 1000):
        anchors, real = sample_anchors(responses(), 8, seeded(5), max_length)
        again, real_again = sample_anchors(padded, 8, seeded(5), max_length)
        assert torch.equal(anchors, again)
        assert torch.equal(real, real_again)

# ------------------------------------------------------------------------------------------------
# labels and weights


def labels_after(anchor, tokens, supervised):
    """The labels of a block: the tokens after its anchor, up to the end of its response."""
    labels = []
    for position in range(anchor + 1, anchor + K):
        if position == len(tokens) or not supervised[position]:
            break
        labels.append(tokens[position].item())
    return labels


def test_labels_are_not_shifted_and_end_with_the_response():
    """Failure 2: row k learns the token after its own; or a later response of the row, or padding,
    is learned."""
    tokens = tokens_of(5, 40)
    anchors = torch.tensor([
        [0, 0],
        [5, 0],
        [38, 0],
        [10, 20],
        [0, 30]])
    real = torch.tensor([
        [False, False],
        [False, False],
        [True, False],
        [True, True],
        [True, True]])
    labels, weights = block_labels(tokens, responses(), anchors, real, K, gamma=7.0)
    assert labels.shape == weights.shape == (5, 2, K - 1)
    for b in range(5):
        for a in range(2):
            expected = []
            if real[b, a]:
                expected = labels_after(anchors[b, a].item(), tokens[b], responses()[b])
            n = len(expected)
            decay = [math.exp(-k / 7) for k in range(n)]
            assert labels[b, a, :n].tolist() == expected
            assert weights[b, a, :n].tolist() == pytest.approx(decay)
            assert not weights[b, a, n:].any()


@pytest.mark.parametrize("smoothing", (0.0, 0.25, 0.5, 1.0))
def test_dpace_weights_equal_their_definition(smoothing):
    """A weight w_j that is not the sum over m >= j of s_1 .. s_m with s = (1 - a) q + a, such as
    with 1 - a for a; or that counts slots past the end of the response."""
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


def test_dpace_weights_are_a_gradient():
    """Without smoothing they are the derivative of the expected accepted length by log q."""
    q = torch.rand(4, K - 1, generator=seeded(0), dtype=torch.float64).requires_grad_()
    expected_length = q.cumprod(-1).sum()
    expected_length.backward()
    weights = dpace_weights(q.detach(), torch.ones(4, K - 1), 0.0)
    assert apart(weights, q.grad * q.detach()) < 1e-9

# ------------------------------------------------------------------------------------------------
# the loss


def loss_inputs(dtype=torch.float64):
    """hidden (2, 6, K, 12), a head (V, 12), labels and weights (2, 6, K-1), half of them zero."""
    draw = random_normal(0, torch.float64)
    weights = draw(2, 6, K - 1).abs()
    weights = weights * (draw(2, 6, K - 1) > 0)
    hidden = draw(2, 6, K, 12).to(dtype).requires_grad_()
    head = draw(V, 12).to(dtype)
    labels = tokens_of(2, 6, K - 1)
    return hidden, head, labels, weights


def prefix_of(weights):
    """Weights as D-PACE takes them: 1 for the slots before the first zero, 0 from there on."""
    return (weights > 0).double().cumprod(-1)


def with_smoothing(smoothing):
    """chunk_loss with D-PACE's weights, or as it is (None)."""
    return functools.partial(chunk_loss, dpace_smoothing=smoothing)


@pytest.mark.parametrize("smoothing", (None, 0.5))
@pytest.mark.parametrize("guesses_at_once", (1, 40, 1000))
def test_loss_and_gradient_equal_slow_loop(guesses_at_once, smoothing):
    """The one-pass loss weighs, scales or chunks other than cross entropy over full logits; row 0
    has a loss; D-PACE's weights come from slots of another block, or are differentiated."""
    hidden, head, labels, weights = loss_inputs()
    if smoothing is not None:
        weights = prefix_of(weights)
    inputs = (hidden, head, labels, weights, guesses_at_once, with_smoothing(smoothing))
    loss, nll, correct, used = block_loss(*inputs)
    (3 * loss).backward()
    grad = hidden.grad
    hidden.grad = None
    assert not grad[:, :, 0].any()

    total = 0
    for block in itertools.product(range(2), range(6)):
        logits = hidden[block][1:] @ head.T
        each = F.cross_entropy(logits, labels[block], reduction="none")
        w = weights[block]
        if smoothing is not None:
            probabilities = (-each.detach()).exp()
            w = dpace_weights(probabilities, w, smoothing)
        total = total + (each * w).sum()
        assert apart(nll[block], each.detach()) < 1e-12
        assert torch.allclose(used[block], w)
        assert torch.equal(correct[block], logits.argmax(-1) == labels[block])
    (3 * total).backward()
    assert apart(loss.detach(), total.detach()) < 1e-12
    assert apart(grad, hidden.grad) < 1e-12

    with torch.no_grad():
        again, *_ = block_loss(*inputs)
    assert torch.equal(again, loss)


def test_loss_in_bf16_is_summed_in_fp32():
    """A softmax or a sum of thousands of losses in bf16, which has three digits."""
    hidden, head, labels, weights = loss_inputs(torch.bfloat16)
    loss, nll, _, _ = block_loss(hidden, head, labels, weights.float(), 7)
    loss.backward()
    loss = loss.detach()
    assert loss.dtype == torch.float32
    assert hidden.grad.dtype == torch.bfloat16
    hidden = hidden.detach()
    exact, *_ = block_loss(hidden.double(), head.double(), labels, weights, 7)
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
    """Failure 7: out of memory, as logits of anchors x slots x vocabulary exist at once, forward or
    backward."""
    inputs = loss_inputs()
    with LargestTensor() as largest:
        loss, *_ = block_loss(*inputs, 40, with_smoothing(smoothing))
        loss.backward()
    two_blocks = 2 * (K - 1) * V  # 40 rows, rounded down to whole blocks
    assert two_blocks <= largest.size
    all_inputs = [x.numel() for x in inputs]
    assert largest.size <= max(two_blocks, *all_inputs)
    all_logits = 2 * 6 * (K - 1) * V
    assert largest.size < all_logits / 4
