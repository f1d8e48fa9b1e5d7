"""
The prefill of a prompt in segments of one shape computes the same as the whole sequence at once.

A segment has 32 tokens here, two chunks of the small target's delta rule.
"""
import copy

import pytest
import torch

import fast
from decode_state import DecodeState, Segment, prefill
from tests.common import K, LAYER_IDS, apart, small_target, tiny_target, tokens_of

P = 32                   # tokens of a segment
LENGTHS = (1, K, K + 1, P - 1, P, P + 1, P + K, P + K + 1, 2 * P, 2 * P + 1, 2 * P + K + 5)


def new_state(target, batch, length, pads_segments, tokens_per_forward=K):
    """A state that reads prompts in segments of P tokens, padded or not."""
    state = DecodeState(target, batch, length, tokens_per_forward)
    state.segment_length = P
    state.pads_segments = pads_segments
    return state


@torch.no_grad()
def check_prompt(n, pads_segments, tokens_per_forward=K):
    """Features of two prompts of n tokens, the logits after them, and the logits of a block that
    follows: in fp64 as those of whole sequences. No place is left in the buffer."""
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


@pytest.mark.parametrize("pads_segments", (False, True), ids=("plain", "padded"))
@pytest.mark.parametrize("n", LENGTHS)
def test_prefill_in_segments_is_the_whole_sequence(n, pads_segments):
    """The end of a prompt, or the border of two segments, is wrong, or a segment of exactly K
    tokens is taken for a block."""
    check_prompt(n, pads_segments)


@pytest.mark.parametrize("pads_segments", (False, True), ids=("plain", "padded"))
def test_prefill_in_segments_for_forwards_of_one_row(pads_segments):
    """With K = 1 the last segment can end inside a chunk, or have fewer tokens than the convolution
    remembers."""
    check_prompt(P + 8, pads_segments, tokens_per_forward=1)
    check_prompt(P + 2, pads_segments, tokens_per_forward=1)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@torch.no_grad()
def test_prefill_padding_changes_no_bit(dtype):
    """Failure 5: padding changes the state or the features of other tokens. Without padding,
    results are equal up to rounding, because the matmuls have a different shape."""
    target = small_target("untied", dtype)
    x = tokens_of(2, P + 2 * K)
    last_segment = x[:, P:P + K]
    block = x[:, P + K:]
    paddings = (torch.zeros(2, K, dtype=torch.long), tokens_of(2, K, seed=1), x[:, :0])
    results = []
    for padding in paddings:
        state = new_state(target, 2, 128, pads_segments=True)
        target(x[:, :P], state, segment=Segment(0, torch.tensor([P])))
        state.commit(P)
        segment = torch.cat((last_segment, padding), 1)
        features, _ = target(segment, state, LAYER_IDS, segment=Segment(P, torch.tensor([K])))
        state.commit(K)
        S = state.S.clone()
        conv = state.conv.clone()
        _, hidden = target(block, state)
        results.append((features[:, :K], S, conv, target.logits(hidden)))
    zeros, garbage, without = results
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for i in range(len(zeros)):
        assert torch.equal(zeros[i], garbage[i]), i
        assert apart(zeros[i], without[i]) < tolerance, i


def test_prefill_on_a_cpu_is_not_padded():
    """A question of 50 tokens takes the time of a thousand."""
    assert not DecodeState(tiny_target(), 1, 256).pads_segments


@torch.no_grad()
def test_prefill_of_all_lengths_is_one_graph(traced_only):
    """Failure 14: compiled code reads a length or the place of a segment, so it compiles for
    minutes for each new prompt."""
    target = copy.deepcopy(tiny_target())
    fast.prepare_for_decoding(target, compile=True)
    compiles = torch._dynamo.utils.counters["stats"]

    def read(n):
        state = new_state(target, 1, 128, pads_segments=True)
        prefill(target, tokens_of(1, n, seed=n) % 8, state, (0,))

    torch._dynamo.reset()
    compiles.clear()
    read(K)
    graphs_of_a_block = compiles["unique_graphs"]
    read(P + 1)
    assert compiles["unique_graphs"] > graphs_of_a_block > 0  # segments are compiled too
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (K + 1, P, 2 * P, 2 * P + K + 5, 3 * P + 3):
            read(n)
    torch._dynamo.reset()


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
    for expected, given in zip(prefill(target, x, new, LAYER_IDS),
                               prefill(target, x, used, LAYER_IDS)):
        assert torch.equal(given, expected)
    assert torch.equal(used.position, new.position)
