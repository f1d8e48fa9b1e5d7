"""
Decoding: the bits of a token's logits do not depend on how the sequence was cut into blocks. The
prefill of a prompt in segments of one shape computes the same as the whole sequence at once.
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


@pytest.mark.parametrize("name", ("untied", "bf16", "nano"))
@torch.no_grad()
def test_cuts_do_not_change_a_bit(name):
    """Failures 5, 6, and 8: 16 tokens in one forward are summed in a different order than one token
    per forward, or sequences of a batch share a position or a number of committed tokens. Here each
    sequence has its own prompt length and its own random cuts."""
    if name == "nano":
        target, _ = nano()
    else:
        target = small_target("untied", torch.bfloat16 if name == "bf16" else torch.float32)
    B, T = 3, 70
    x = tokens_of(B, T, seed=1)
    prompt_lengths = (1, 16, 33)
    one_by_one = decode(target, x, prompt_lengths, lambda: [1] * B)
    r = random.Random(0)
    for lengths in ((1, 2, 15, 16), (1, 2, 15, 16), (0, 3, 16), range(1, 17)):
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


@pytest.mark.parametrize("accepted", (1, 5, 12, 15))
@torch.no_grad()
def test_cuts_rejected_block(accepted):
    """Failure 6: the keys and values are cropped after a rejection, but the recurrent state or the
    convolution's memory is not."""
    target = small_target()
    x = tokens_of(1, 60)
    n = 20 + accepted
    # one length in both decodings, because the length decides the order of sums
    state = DecodeState(target, 1, n + 1 + K)
    prefill(target, x[:, :20], state)
    block = tokens_of(1, K, seed=9)
    block[:, :accepted] = x[:, 20:n]
    target(block, state)
    state.commit(accepted)
    _, hidden = target(F.pad(x[:, n:n + 1], (0, K - 1)), state)
    (one_by_one, _), = decode(target, x[:, :n + 1], (20,), lambda: [1])
    assert torch.equal(target.logits(hidden)[0, 0], one_by_one[-1])


def test_state_has_the_dtypes_and_sizes_that_it_needs():
    """The recurrent state or the tail of its inputs is bf16, so it is rounded with every block; or
    1-token forwards have memory for a second S or a window, which they neither fill nor read; or a
    CPU pads segments, so a question of 50 tokens takes the time of a thousand."""
    state = DecodeState(small_target("untied", torch.bfloat16), 1, 64)
    for name in ("S", "delta_inputs", "cos", "sin"):
        assert getattr(state, name).dtype == torch.float32, name
    for name in ("keys", "values", "conv"):
        assert getattr(state, name).dtype == torch.bfloat16, name
    state = DecodeState(small_target(), 3, 64, tokens_per_forward=1)
    sizes = [state.S.numel(), state.delta_inputs.numel()]
    assert sizes == [6 * 3 * 4 * 16 * 16, 0]
    assert not state.pads_segments

# ------------------------------------------------------------------------------------------------
# prefill

P = 32  # tokens of a segment, two chunks of the small target's delta rule
LENGTHS = [(n, K) for n in (1, K, K + 1, P, P + 1, P + K + 1, 2 * P, 2 * P + K + 5)]
# with K = 1 the last segment can end inside a chunk, or have fewer tokens than the convolution
# remembers
LENGTHS += [(P + 8, 1), (P + 2, 1)]


def new_state(target, batch, length, pads_segments, tokens_per_forward=K):
    """A state that reads prompts in segments of P tokens, padded or not."""
    state = DecodeState(target, batch, length, tokens_per_forward)
    state.segment_length = P
    state.pads_segments = pads_segments
    return state


@pytest.mark.parametrize("pads_segments", (False, True), ids=("plain", "padded"))
@pytest.mark.parametrize("n, tokens_per_forward", LENGTHS)
@torch.no_grad()
def test_prefill_in_segments_is_the_whole_sequence(n, tokens_per_forward, pads_segments):
    """The end of a prompt, or the border of two segments, is wrong, or a segment of exactly K
    tokens is taken for a block. Two prompts of n tokens and a block that follows have the features
    and logits of whole sequences, in fp64. No place is left in the buffer."""
    target = small_target("untied", torch.float64)
    x = tokens_of(2, n + tokens_per_forward, seed=n)
    state = new_state(target, 2, n + tokens_per_forward, pads_segments, tokens_per_forward)
    features, logits = prefill(target, x[:, :n], state, LAYER_IDS)
    assert state.position.tolist() == [n, n]
    _, hidden = target(x[:, n:], state)
    all_logits = torch.cat((logits[:, None], target.logits(hidden)), 1)

    expected_features, expected_hidden = target(x, target_layer_ids=LAYER_IDS)
    expected_logits = target.logits(expected_hidden[:, n - 1:])
    assert apart(features[:, :n], expected_features[:, :n]) < 1e-9
    assert apart(all_logits, expected_logits) < 1e-9


@torch.no_grad()
def test_prefill_forgets_the_sequence_before():
    """A second prompt starts from the state of the first one."""
    target = small_target()
    x = tokens_of(1, P + 5)
    new = new_state(target, 1, 128, pads_segments=False)
    used = new_state(target, 1, 128, pads_segments=False)
    prefill(target, tokens_of(1, 2 * P, seed=1), used)
    target(tokens_of(1, K, seed=2), used)
    used.commit(K - 1)
    expected = prefill(target, x, new, LAYER_IDS)
    given = prefill(target, x, used, LAYER_IDS)
    assert torch.equal(given[0], expected[0]) and torch.equal(given[1], expected[1])
    assert torch.equal(used.position, new.position)
