"""
Training blocks: where they begin, what each position should guess, and the loss.

A block begins at an anchor, a random position of a response. Position k of the block should guess
the k-th token after the anchor. basic.py computes the same loss one block at a time. Here one call
handles up to 512 blocks of a text in chunks, so their logits never exist all at once.

Shapes: B batch, T tokens of a sequence, A anchors in a sequence, K block size, V vocabulary size;
`width` is the residual stream's width.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F

from model import to_fp32

# --------------------------------------------------------------------------------------------------
# anchors, labels, and weights


def sample_anchors(supervised, count, generator, max_length):
    """Draws anchors from the responses: positions (B, A), and whether each is valid, (B, A).

    supervised (B, T) marks the tokens of responses. An anchor and the token after it are both
    supervised. The anchors of a sequence are distinct and ascend. A = min(count, T). Sequences with
    fewer candidates are padded with invalid anchors at position 0.

    The generator draws one random number for each position below max_length. So the anchors of a
    sequence do not depend on its padding.
    """
    B, T = supervised.shape
    candidates = supervised[:, :-1] & supervised[:, 1:]
    candidates = F.pad(candidates, (0, 1))  # the last token has none after it

    # Random numbers, drawn in pinned memory, so that the copy does not wait for the device. There
    # they are padded or cut to T.
    is_pinned = supervised.is_cuda
    random_numbers = torch.rand(B, max_length, generator=generator, pin_memory=is_pinned)
    random_numbers = random_numbers.to(supervised.device, non_blocking=True)
    random_numbers = F.pad(random_numbers, (0, T - max_length))  # a negative width removes some

    # candidates in random order, then all other positions
    random_numbers = random_numbers.masked_fill(~candidates, -1.0)
    order = random_numbers.argsort(dim=1, descending=True)
    drawn = order[:, :count]
    is_candidate = candidates.gather(1, drawn)

    # sorted; T marks invalid anchors, so they come last
    positions = torch.where(is_candidate, drawn, T)
    positions = positions.sort(dim=1).values
    is_valid = positions < T
    anchors = torch.where(is_valid, positions, 0)
    return anchors, is_valid


def block_labels(tokens, supervised, anchors, is_valid, *, K, gamma):
    """Labels x_{anchor+k} and weights exp(-(k-1)/gamma) for k = 1 .. K-1, both (B, A, K-1).

    The weight decays because a guess counts only if all guesses before it are right. The weight is
    zero after the end of the response that contains the anchor, and for invalid anchors.
    Source: arXiv 2602.06036, the position-decayed loss.
    """
    k = torch.arange(1, K, device=tokens.device)
    positions = anchors[:, :, None] + k                                      # (B, A, K-1)

    def at_positions(of_sequence):
        padded = F.pad(of_sequence, (0, K))  # the last blocks extend past the end of the sequence
        gathered = padded.gather(1, positions.flatten(1))
        return gathered.view_as(positions)

    labels = at_positions(tokens)
    # cumprod stays 0 after the response, so a later response of the same text does not count
    in_response = at_positions(supervised).long()
    in_response = in_response.cumprod(-1)
    counted = in_response * is_valid[:, :, None]
    decay = torch.exp(-(k - 1) / gamma)
    weights = counted * decay
    return labels, weights

# --------------------------------------------------------------------------------------------------
# the loss
#
# A micro-batch of two sequences with 512 anchors each has 15,360 guesses. Their logits over 248,320
# tokens would take 7.6 GB in bf16. But the head is frozen, so we do not need its gradient. We need
# only the gradient with respect to the drafter's output h (guesses, width). The logits are
# z = h head^T, and a row of onehot is 1 at the label and 0 elsewhere. With
# loss = sum over guesses of weight * nll,
#
#     d loss / d z = weight * (softmax(z) - onehot)            (weights scale rows)
#     d loss / d h = (d loss / d z) head
#
# Each row of this gradient needs only its own logits. So we multiply h with the head in chunks.
# Each chunk yields its part of the loss and of d loss / d h, and then its logits are dropped.
# Memory: the logits of one chunk (1.0 GB in fp32 for 1,024 guesses, plus half of that for a copy in
# bf16), and until the backward pass the gradient d loss / d h, which is as large as h (31 MB in
# bf16). The backward pass only multiplies this gradient by the incoming scalar.


class Targets(NamedTuple):
    """What blocks should guess: labels and weights, both (..., K-1), from block_labels()."""
    labels: torch.Tensor
    weights: torch.Tensor


def block_loss(hidden, head, targets, *, loss_chunk_size=1024, chunk_loss_function=None):
    """The loss of training blocks: the *sum* of weight * nll.

    The caller divides it by the sum of all weights of a step, over micro-batches and processes. So
    it does not matter how a step is split, up to rounding.

    hidden (B, A, K, width)     from the drafter's forward
    head (V, width)             the target's, frozen
    targets                     Targets (B, A, K-1)
    loss_chunk_size             guesses whose logits exist at once, rounded down to whole blocks,
                                because dpace_weights() needs whole blocks
    chunk_loss_function         None: chunk_loss; or a version of it, compiled or with D-PACE

    Returns the scalar loss and, for each guess, all (B, A, K-1): the nll, whether the greedy guess
    is right, and the weight that was used.
    """
    if chunk_loss_function is None:
        chunk_loss_function = chunk_loss
    guess_hidden = hidden[:, :, 1:]  # position 0 is the anchor, which has no loss
    flat_hidden = guess_hidden.flatten(0, 1)
    flat_targets = Targets(targets.labels.flatten(0, 1), targets.weights.flatten(0, 1))
    loss, nll, correct, used_weights = FrozenHeadLoss.apply(
        flat_hidden, head, flat_targets, loss_chunk_size, chunk_loss_function)
    nll = nll.view_as(targets.weights)
    correct = correct.view_as(targets.weights)
    used_weights = used_weights.view_as(targets.weights)
    return loss, nll, correct, used_weights


class FrozenHeadLoss(torch.autograd.Function):
    """Loss and gradient in one pass over chunks of blocks: hidden (blocks, K-1, width)."""

    @staticmethod
    def forward(ctx, hidden, head, targets, loss_chunk_size, chunk_loss_function):
        head = head.to(hidden.dtype)
        wants_grad = ctx.needs_input_grad[0]
        blocks_at_once = max(1, loss_chunk_size // targets.labels.shape[1])
        chunks = []
        for first in range(0, len(hidden), blocks_at_once):
            part = slice(first, first + blocks_at_once)
            part_targets = Targets(targets.labels[part], targets.weights[part])
            result = chunk_loss_function(hidden[part], head, part_targets, wants_grad)
            chunks.append(result)
        nll, correct, used_weights, grads = zip(*chunks)
        nll = torch.cat(nll)
        correct = torch.cat(correct)
        used_weights = torch.cat(used_weights)
        grad = torch.cat(grads) if wants_grad else None
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(nll, correct, used_weights)
        loss = (nll * used_weights).sum()
        return loss, nll, correct, used_weights

    @staticmethod
    def backward(ctx, loss_grad, *_):
        grad, = ctx.saved_tensors
        return grad * loss_grad, None, None, None, None


def chunk_loss(hidden, head, targets, wants_grad, dpace_smoothing=None):
    """One chunk of N blocks: hidden (N, K-1, width), Targets (N, K-1).

    Returns nll, whether the greedy guess is right, the weights used, all (N, K-1), and the gradient
    of the sum of weights * nll with respect to hidden, or None if it is not needed.

    dpace_smoothing: if given, use the weights of dpace_weights() with this smoothing. Then a guess
    counts if its given weight is above 0.

    The fp32 tensor z (N, K-1, V) is used three times: for the logits, then their exponentials, then
    the gradient with respect to the logits. If hidden is bf16, both products with the head are
    computed in bf16. Only the steps between them are in fp32.
    """
    labels, weights = targets

    # The logits. hidden is flat here, because for three axes a CPU uses a batched product, which is
    # three times slower.
    flat = hidden.flatten(0, 1)
    z = F.linear(flat, head)
    z = to_fp32(z)
    z = z.view(*labels.shape, -1)                                            # (N, K-1, V)
    largest, guess = z.max(-1, keepdim=True)
    correct = guess[..., 0] == labels

    # nll = log(sum of exp(z)) - z of the label. Subtract the largest logit first, so that exp
    # cannot overflow.
    z.sub_(largest)
    z_of_label = z.gather(-1, labels[..., None])
    z.exp_()  # z now holds the exponentials
    total = z.sum(-1, keepdim=True)
    nll = total.log() - z_of_label
    nll = nll[..., 0]

    probability = (-nll).exp()  # of the label
    if dpace_smoothing is not None:
        weights = dpace_weights(probability, weights > 0, dpace_smoothing)
    if not wants_grad:
        return nll, correct, weights, None

    # z becomes weight (softmax - onehot), the gradient with respect to the logits. The entries of
    # the labels are written last, after the conversion to hidden's dtype. So torch.compile can
    # fuse all earlier steps into one kernel, which never stores z in fp32.
    w = weights.to(z.dtype)
    z = z.mul_(w[..., None] / total)
    z = z.to(hidden.dtype)
    of_label = w * (probability - 1)
    of_label = of_label.to(hidden.dtype)
    z.scatter_(-1, labels[..., None], of_label[..., None])
    grad = z.flatten(0, 1) @ head
    grad = grad.view_as(hidden)
    return nll, correct, weights, grad

# --------------------------------------------------------------------------------------------------
# D-PACE: weights from the drafter's confidence instead of the fixed decay (weighting = "dpace")


def dpace_weights(q, in_response, smoothing):
    """D-PACE: weights (N, K-1) that follow the drafter's own confidence.

        s_i = (1 - a) q_i + a            a: smoothing, 0 .. 1
        w_j = sum over m >= j of  s_1 s_2 .. s_m

    q (N, K-1) are the probabilities of the true tokens. in_response (N, K-1) is false after the
    response. With a = 0, w_j is the derivative of the expected accepted length with respect to
    log q_j. The weights are detached.
    Source: arXiv 2605.18810. The paper divides the loss by the batch size, we divide it by the
    sum of all weights.
    """
    smoothed = (1 - smoothing) * q + smoothing
    products = (smoothed * in_response).cumprod(-1)
    # w_j is the sum of all products from j to the end: a cumulative sum from the right
    from_right = products.flip(-1)
    sums = from_right.cumsum(-1)
    return sums.flip(-1)
