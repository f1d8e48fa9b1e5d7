"""
Decoding: a token's logits do not depend on how the sequence was cut into blocks, to the bit.
"""
import random

import pytest
import torch
import torch.nn.functional as F

from decode_state import DecodeState, prefill
from tests.common import (K, LAYER_IDS, V, apart, nano, small_target, tokens_of)


@torch.no_grad()
def decode(target, x, prompt_length, cuts, tokens_per_forward=K):
    """Logits and features of x from the prompt's last token on. Blocks of so many tokens as `cuts`
    says are committed; the rows after them hold garbage, as rejected guesses do."""
    generator = torch.Generator().manual_seed(len(cuts))
    B, T = x.shape
    state = DecodeState(target, B, T + tokens_per_forward, tokens_per_forward)
    features, logits = prefill(target, x[:, :prompt_length], state, LAYER_IDS)
    all_features = [features]
    all_logits = [logits[:, None]]
    position = prompt_length
    for n in cuts:
        n = min(n, T - position)
        if n == 0:
            break
        block = torch.randint(0, V, (B, tokens_per_forward), generator=generator)
        block[:, :n] = x[:, position:position + n]
        features, hidden = target(block, state, LAYER_IDS)
        state.commit(n)
        all_features.append(features[:, :n])
        all_logits.append(target.logits(hidden)[:, :n])
        position += n
    assert (state.position == T).all()
    return torch.cat(all_logits, 1), torch.cat(all_features, 1)


def target_named(name):
    if name == "tied":
        return small_target()
    if name == "untied":
        return small_target("untied")
    if name == "bf16":
        return small_target("untied", torch.bfloat16)
    target, _ = nano()
    return target


@pytest.mark.parametrize("prompt_length, T", ((1, 70), (16, 90), (33, 110)))
@pytest.mark.parametrize("name", ("tied", "untied", "bf16", "nano"))
@torch.no_grad()
def test_cuts_do_not_change_a_bit(name, prompt_length, T):
    """Failure 5: verifying sixteen rows sums in another order than one row a step. All bits are
    equal, in 8 random cuts of each sequence."""
    target = target_named(name)
    batch = 1 if name == "nano" else 2
    x = tokens_of(batch, T, seed=prompt_length)
    one_by_one, features_one_by_one = decode(target, x, prompt_length, [1] * T)
    r = random.Random(prompt_length)
    for trial in range(8):
        lengths = (1, 2, 15, 16) if trial < 2 else range(1, 17)
        cuts = [r.choice(lengths) for _ in range(T)]
        logits, features = decode(target, x, prompt_length, cuts)
        assert torch.equal(logits, one_by_one), cuts
        assert torch.equal(features, features_one_by_one), cuts

    # and they are right: those of the whole sequence at once, and of forwards of one row
    if name != "bf16":
        features, hidden = target(x, target_layer_ids=LAYER_IDS)
        logits = target.logits(hidden)[:, prompt_length - 1:]
        assert apart(one_by_one, logits) < 1e-4
        assert apart(features_one_by_one, features) < 1e-4
        logits, _ = decode(target, x, prompt_length, [1] * T, tokens_per_forward=1)
        assert apart(logits, one_by_one) < 1e-4


@pytest.mark.parametrize("name", ("tied", "untied", "bf16", "nano"))
@torch.no_grad()
def test_cuts_of_each_sequence_are_its_own(name):
    """Failure 6: sequences of one batch share a position or a number of adopted rows. Here each has
    a prompt of its own length and adopts another number of rows in each round; it has the bits that
    it has where all adopt one row."""
    target = target_named(name)
    B, T = 3, 70
    x = tokens_of(B, T, seed=1)
    prompt_lengths = (1, 16, 33)
    one_by_one = decode_each(target, x, prompt_lengths, lambda: [1] * B)
    r = random.Random(0)
    for lengths in ((1, 2, 15, 16), (0, 3, 16), range(1, 17)):
        logits = decode_each(target, x, prompt_lengths, lambda: r.choices(lengths, k=B))
        for b in range(B):
            assert torch.equal(logits[b], one_by_one[b]), (lengths, b)


def decode_each(target, x, prompt_lengths, next_cuts):
    """For each sequence its logits from the prompt's last token on. next_cuts() says how many rows
    each one adopts in a round; the rows after them hold garbage."""
    generator = torch.Generator().manual_seed(0)
    B, T = x.shape
    state = DecodeState(target, B, T + K)
    reader = DecodeState(target, 1, T + K)
    all_logits = []
    for b, length in enumerate(prompt_lengths):
        _, logits = prefill(target, x[b:b + 1, :length], reader, LAYER_IDS)
        state.put(b, reader)
        all_logits.append([logits])
    while (state.position < T).any():
        block = torch.randint(0, V, (B, K), generator=generator)
        adopted = []
        for b, cut in enumerate(next_cuts()):
            position = int(state.position[b])
            n = min(cut, T - position)  # 0 for a sequence that is complete
            block[b, :n] = x[b, position:position + n]
            adopted.append(n)
        _, hidden = target(block, state, LAYER_IDS)
        state.commit(torch.tensor(adopted))
        logits = target.logits(hidden)
        for b, n in enumerate(adopted):
            all_logits[b].append(logits[b, :n])
    return [torch.cat(logits) for logits in all_logits]


@torch.no_grad()
def test_cuts_propose_twice():
    """Failure 6: a forward changes the committed sequence, or commit(0) does. One state sees
    forwards that are not adopted, the other does not."""
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
    # one length in all three decodings, as the length decides the order of sums
    state = DecodeState(target, 1, n + 1 + K)
    prefill(target, x[:, :20], state)
    block = tokens_of(1, K, seed=9)
    block[:, :accepted] = x[:, 20:n]
    target(block, state)
    state.commit(accepted)
    _, hidden = target(F.pad(x[:, n:n + 1], (0, K - 1)), state)
    logits = target.logits(hidden)[:, 0]

    one_by_one, _ = decode(target, x[:, :n + 1], 20, [1] * 60)
    assert torch.equal(logits, one_by_one[:, -1])
    _, fresh = prefill(target, x[:, :n + 1], state)
    assert apart(logits, fresh) < 1e-4


def test_state_of_a_bf16_target_is_kept_in_fp32():
    """The recurrent state or the tail of its inputs in bf16: rounded again with every block."""
    state = DecodeState(small_target("untied", torch.bfloat16), 1, 64)
    for name in ("S", "S_chunk_end", "delta_inputs", "cos", "sin"):
        assert getattr(state, name).dtype == torch.float32, name
    for name in ("keys", "values", "conv"):
        assert getattr(state, name).dtype == torch.bfloat16, name


def test_state_of_one_row_has_one_S():
    """Memory for a second S, which forwards of one row neither fill nor read."""
    state = DecodeState(small_target(), 3, 64, tokens_per_forward=1)
    assert state.S.numel() > 0
    assert state.S_chunk_end.numel() == 0
