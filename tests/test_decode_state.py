"""
Decoding: the bits of a token's logits do not depend on how the sequence was cut into blocks.
"""
import random

import pytest
import torch
import torch.nn.functional as F

from decode_state import DecodeState, prefill
from tests.common import K, LAYER_IDS, V, apart, nano, small_target, tokens_of


@torch.no_grad()
def decode(target, x, prompt_lengths, next_cuts, tokens_per_forward=K):
    """(logits, features) of each sequence of x (B, T): logits from its prompt's last token on, and
    features of all tokens. next_cuts() says how many tokens each sequence commits in a round. The
    tokens after them are garbage, as rejected guesses are."""
    generator = torch.Generator().manual_seed(0)
    B, T = x.shape
    state = DecodeState(target, B, T + tokens_per_forward, tokens_per_forward)
    reader = DecodeState(target, 1, T + tokens_per_forward, tokens_per_forward)
    all_logits = []
    all_features = []
    for b, length in enumerate(prompt_lengths):
        features, logits = prefill(target, x[b:b + 1, :length], reader, LAYER_IDS)
        state.put([b], reader, [0])
        all_logits.append([logits])
        all_features.append([features[0]])
    while (state.position < T).any():
        block = torch.randint(0, V, (B, tokens_per_forward), generator=generator)
        committed = []
        for b, cut in enumerate(next_cuts()):
            position = int(state.position[b])
            n = min(cut, T - position)  # 0 for a sequence that is complete
            block[b, :n] = x[b, position:position + n]
            committed.append(n)
        features, hidden = target(block, state, LAYER_IDS)
        state.commit(torch.tensor(committed))
        logits = target.logits(hidden)
        for b, n in enumerate(committed):
            all_logits[b].append(logits[b, :n])
            all_features[b].append(features[b, :n])
    return [(torch.cat(a), torch.cat(b)) for a, b in zip(all_logits, all_features)]


def target_named(name):
    if name == "tied":
        return small_target()
    if name == "untied":
        return small_target("untied")
    if name == "bf16":
        return small_target("untied", torch.bfloat16)
    target, _ = nano()
    return target


@pytest.mark.parametrize("name", ("tied", "untied", "bf16", "nano"))
@torch.no_grad()
def test_cuts_do_not_change_a_bit(name):
    """Failures 5 and 6: 16 tokens in one forward are summed in a different order than one token per
    forward, or sequences of a batch share a position or a number of committed tokens. Here each
    sequence has its own prompt length and its own random cuts."""
    target = target_named(name)
    B, T = 3, 110
    x = tokens_of(B, T, seed=1)
    prompt_lengths = (1, 16, 33)
    one_by_one = decode(target, x, prompt_lengths, lambda: [1] * B)
    r = random.Random(0)
    for lengths in ((1, 2, 15, 16), (1, 2, 15, 16), (0, 3, 16), range(1, 17), range(1, 17)):
        cut = decode(target, x, prompt_lengths, lambda: r.choices(lengths, k=B))
        for b in range(B):
            for given, expected in zip(cut[b], one_by_one[b]):
                assert torch.equal(given, expected), (lengths, b)

    # and they are right: those of the whole sequence at once, and of 1-token forwards
    if name == "bf16":
        return
    features, hidden = target(x, target_layer_ids=LAYER_IDS)
    logits = target.logits(hidden)
    one_token = decode(target, x, prompt_lengths, lambda: [1] * B, tokens_per_forward=1)
    for b, n in enumerate(prompt_lengths):
        for given_logits, given_features in (one_by_one[b], one_token[b]):
            assert apart(given_logits, logits[b, n - 1:]) < 1e-4, b
            assert apart(given_features, features[b]) < 1e-4, b


@torch.no_grad()
def test_cuts_propose_twice():
    """Failure 6: a forward changes the committed sequence, or commit(0) does. One state sees
    forwards that are not committed, the other does not."""
    target = small_target("untied")
    x = tokens_of(1, 60)
    disturbed = DecodeState(target, 1, 100)
    clean = DecodeState(target, 1, 100)
    prefill(target, x[:, :20], disturbed, LAYER_IDS)
    prefill(target, x[:, :20], clean, LAYER_IDS)
    for position in range(20, 60, 10):
        if position > 20:
            disturbed.commit(0)
        target(tokens_of(1, K, seed=position), disturbed, LAYER_IDS)
        target(tokens_of(1, K, seed=position + 1), disturbed, LAYER_IDS)
        disturbed.commit(0)

        block = F.pad(x[:, position:position + 10], (0, 6))
        features, hidden = target(block, disturbed, LAYER_IDS)
        features_clean, hidden_clean = target(block, clean, LAYER_IDS)
        assert torch.equal(features, features_clean), position
        assert torch.equal(hidden, hidden_clean), position
        disturbed.commit(torch.tensor(10))  # a number on the device
        clean.commit(10)                    # or here


@pytest.mark.parametrize("accepted", (1, 5, 12, 15))
@torch.no_grad()
def test_cuts_rejected_block(accepted):
    """Failure 6: the keys and values are cropped after a rejection, but the recurrent state or the
    convolution's memory is not; or reset() leaves something for the next prompt."""
    target = small_target()
    x = tokens_of(1, 60)
    n = 20 + accepted
    # one length in all three decodings, because the length decides the order of sums
    state = DecodeState(target, 1, n + 1 + K)
    prefill(target, x[:, :20], state)
    block = tokens_of(1, K, seed=9)
    block[:, :accepted] = x[:, 20:n]
    target(block, state)
    state.commit(accepted)
    _, hidden = target(F.pad(x[:, n:n + 1], (0, K - 1)), state)
    logits = target.logits(hidden)[:, 0]

    (one_by_one, _), = decode(target, x[:, :n + 1], (20,), lambda: [1])
    assert torch.equal(logits[0], one_by_one[-1])
    _, fresh = prefill(target, x[:, :n + 1], state)
    assert apart(logits, fresh) < 1e-4


def test_state_of_a_bf16_target_is_kept_in_fp32():
    """The recurrent state or the tail of its inputs is bf16, so it is rounded with every block."""
    state = DecodeState(small_target("untied", torch.bfloat16), 1, 64)
    for name in ("S", "delta_inputs", "cos", "sin"):
        assert getattr(state, name).dtype == torch.float32, name
    for name in ("keys", "values", "conv"):
        assert getattr(state, name).dtype == torch.bfloat16, name


def test_state_of_one_token_forwards_is_smaller():
    """Memory for a second S or a window, which 1-token forwards neither fill nor read."""
    state = DecodeState(small_target(), 3, 64, tokens_per_forward=1)
    sizes = [state.S.numel(), state.delta_inputs.numel()]
    assert sizes == [6 * 3 * 4 * 16 * 16, 0]
