"""
The loop for one sequence: what a round accepts, and where a generation ends. test_slots compares
the output with the target's own.
"""
import copy
import functools

import pytest
import torch
import torch.nn.functional as F

import fast
from benchmarks.drafters import Oracle
from draft_decode import Decoder, check_finite, collect, count_accepted, generate
from fast.decoding import join_projections
from sampling import Sampling
from tests.common import (K, V, all_tokens, apart, nano, questions, shipped, small_drafter,
                          small_target, tokens_of)
from tokenizer import chat_prompt, stop_ids


def test_accept_counts_up_to_the_first_difference():
    """A right guess after a wrong one counts, or a guess is compared with a different position."""
    choices = torch.tensor([[5, 6, 7, 8, 9]] * 5)
    guesses = torch.tensor([
        [5, 6, 7, 8],
        [5, 0, 7, 8],
        [0, 6, 7, 8],
        [6, 7, 8, 9],
        [5, 6, 7, 0]])
    assert count_accepted(guesses, choices).tolist() == [4, 1, 0, 0, 3]


@torch.no_grad()
def test_training_form_predicts_decoded_rounds():
    """Failure 1: accuracy in training, no acceptance in decoding. The training form over a finished
    answer must accept exactly as many guesses as decoding did."""
    target, tokenizer = nano()
    drafter = shipped()
    for question in questions()[:3]:
        prompt = chat_prompt(tokenizer, question)
        rounds = list(generate(
            target, drafter, prompt, max_new_tokens=64, stop_token_ids=stop_ids(tokenizer)))
        tokens = torch.tensor([prompt + all_tokens(rounds)])
        T = tokens.shape[1]
        features, _ = target(tokens, target_layer_ids=drafter.target_layer_ids)
        padded = F.pad(tokens, (0, K), value=-1)  # past the end: no token
        anchor = len(prompt)
        predicted = []
        while anchor < T - 1:
            block = drafter.embed_block(tokens[:, anchor:anchor + 1], target.embed_tokens.weight)
            hidden = drafter(features, block, torch.tensor([[anchor]]))
            guesses = target.logits(hidden[:, 0, 1:]).argmax(-1)
            accepted = count_accepted(guesses, padded[:, anchor + 1:anchor + K]).item()
            predicted.append(min(accepted + 1, T - 1 - anchor))
            anchor += predicted[-1]
        assert predicted == [len(r.tokens) for r in rounds[1:]]


@functools.cache
def reference():
    """(prompt, answer): 40 tokens of small_target() after a prompt of 21 tokens. 21 is not a
    multiple of K, so rounds cross the borders of the delta rule's chunks."""
    prompt = tokens_of(21, seed=5).tolist()
    answer = all_tokens(generate(small_target(), None, prompt, max_new_tokens=40))
    return prompt, answer


def decode_reference(limit, stops=()):
    """The rounds of the target alone and of drafters that are right never, often, and always."""
    prompt, answer = reference()
    drafters = [None]
    for p in (0.0, 0.7, 1.0):
        drafters.append(Oracle(small_target()))
        drafters[-1].learn(prompt, answer, p)
    results = []
    for drafter in drafters:
        rounds = generate(
            small_target(), drafter, prompt, max_new_tokens=limit, stop_token_ids=stops)
        results.append(list(rounds))
    return results


@pytest.mark.parametrize("limit", (1, 2, 16, 17, 18, 30))
def test_generate_ends_at_the_limit(limit):
    """Failure 15: a round's tokens past max_new_tokens are returned, or counted as accepted."""
    _, answer = reference()
    for rounds in decode_reference(limit):
        assert all_tokens(rounds) == answer[:limit]
        assert rounds[0].accepted == 0
        for r in rounds:
            assert 0 <= r.accepted <= len(r.tokens) <= K
    # of the drafter that is always right, all are guesses but the last one of a whole block
    assert [len(r.tokens) for r in rounds[1:-1]] == [K] * ((limit - 2) // K)
    assert [r.accepted for r in rounds[1:]] == [min(K - 1, len(r.tokens)) for r in rounds[1:]]


@pytest.mark.parametrize("tokens_per_forward", (1, K))
def test_logits_that_are_not_finite_are_marked(tokens_per_forward):
    """Without a mark, the tokens of a broken target look like an answer, and both modes seem
    identical. The prefill's token and the tokens of rounds have marks of their own."""
    target = copy.deepcopy(small_target())
    target.norm.weight.data.fill_(float("inf"))
    outputs = list(generate(
        target, None, [1, 2, 3], max_new_tokens=3, tokens_per_forward=tokens_per_forward))
    assert [output.is_finite for output in outputs] == [False] * 3
    with pytest.raises(ValueError, match="'broken' gives logits that are NaN or infinite"):
        next(check_finite(outputs, "broken"))


@pytest.mark.parametrize("place", (0, 1, 7, 16, 20))
def test_generate_ends_at_a_stop(place):
    """Failure 15: tokens after a stop id are returned, an answer ends a round later with a drafter
    than without, or the rounds of an answer lack one or its time."""
    _, answer = reference()
    stop = answer[place]
    expected = answer[:answer.index(stop) + 1]
    for rounds in decode_reference(40, stop):
        assert all_tokens(rounds) == expected
        for r in rounds:
            assert len(r.tokens) > 0
        # tau counts what is returned, and the token of the prefill is in no round
        result = collect(rounds)
        assert result.tokens == expected
        assert result.rounds == rounds[1:]
        assert result.seconds == sum(r.seconds for r in rounds[1:])


def test_generate_ends_at_the_context(monkeypatch):
    """A block continues past the target's last position; a prompt that is too long, empty, or of a
    different tokenizer is accepted."""
    target = small_target()
    prompt, answer = reference()
    monkeypatch.setattr(target.config, "max_position_embeddings", 50)
    room = 50 - len(prompt) - K
    one_token = generate(target, None, prompt, max_new_tokens=40, tokens_per_forward=1)
    assert len(all_tokens(one_token)) == room
    assert all_tokens(generate(target, None, prompt, max_new_tokens=40)) == answer[:room]
    assert all_tokens(generate(target, small_drafter(), prompt)) == answer[:room]

    for wrong_prompt, options, hint in (
            ([], {}, "empty"),
            ([1] * 40, {}, "prompt too long: 40 tokens.*context of 50"),
            ([V], {}, "vocabulary of 300"),
            ([1.5], {}, "flat sequence of token ids"),
            ([1], {"max_new_tokens": 0}, "max_new_tokens = 0: use an integer of at least 1"),
            ([1], {"stop_token_ids": V}, f"stop token id {V} is outside")):
        with pytest.raises(ValueError, match=hint):
            next(generate(target, None, wrong_prompt, **options))


@pytest.mark.parametrize("rows", (1, K))
@torch.inference_mode()
def test_compiled_rounds_equal_plain_ones(rows, traced_only):
    """Compiled code silently mistakes one tensor for another that shares its memory; or a different
    function is compiled; or compiling stops after 8 shapes, so later ones run plain. Failure 14: it
    compiles for minutes for each new prompt, because it reads a length or a segment's place."""
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 8  # torch's default
    results = []
    for is_compiled in (False, True):
        target = copy.deepcopy(small_target())
        drafter = None
        if rows == K:
            drafter = small_drafter()
            join_projections(drafter)  # as on a GPU
        fast.prepare_for_decoding(target, drafter, compile=is_compiled)
        decoder = Decoder(
            target, drafter, length=128, tokens_per_forward=rows, sampling=Sampling(), batch=2)
        decoder.state.pads_segments = True  # so that segments are compiled too
        decoder.state.segment_length = 32
        answer = []
        for number, length in enumerate((20, 64 + K + 5, K + 1, 33)):
            prompt = tokens_of(length, seed=length).tolist()
            is_new = number < 2  # the drafter's context is compiled for one length, then for all
            with torch._dynamo.config.patch(error_on_recompile=is_compiled and not is_new):
                answer.append(decoder.start_sequences({1: prompt}, {1: 0})[1])
                for _ in range(2):
                    _, (tokens, _) = decoder.run_round()
                    answer += tokens
        if drafter is None:
            # as on a CPU, where the lengths of segments vary, so they are not compiled
            decoder.state.pads_segments = False
            decoder.prefill.readers.clear()
            with torch._dynamo.config.patch(error_on_recompile=is_compiled):
                decoder.start_sequences({1: tokens_of(50).tolist()}, {1: 0})
        remembered = [decoder.state.S[:, :, 1], decoder.state.conv[:, 1]]
        if drafter is not None:
            for keys, values in decoder.cache:
                remembered += [keys[1], values[1]]
        results.append((answer, remembered))
    kinds, shapes, buffer_lengths = 2, 2, 4  # linear and full layers, blocks and segments
    assert torch._dynamo.config.recompile_limit >= kinds * shapes * buffer_lengths
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= kinds * shapes
    (plain_answer, plain), (answer, remembered) = results
    assert answer == plain_answer
    for given, expected in zip(remembered, plain, strict=True):
        assert apart(given, expected) < 1e-5
