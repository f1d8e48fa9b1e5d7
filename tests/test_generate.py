"""
The loop: output identical to the target's own for every drafter, and where a generation ends.
"""
import copy

import pytest
import torch
import torch.nn.functional as F

import fast
from tokenizer import chat_prompt, stop_ids
from draft_decode import Decoder, collect, count_accepted, first_difference, generate
from fast.decoding import join_projections
from sampling import Sampling
from tests.common import (K, Oracle, V, all_tokens, apart, nano, questions, reference, shipped,
                          small_drafter, small_target, tokens_of, untrained)


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


def test_first_difference_sees_an_end():
    """A comparison stops at the end of the shorter output and calls them identical."""
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 4, 3]) == 1
    assert first_difference([1, 2, 3], [1, 2]) == 2
    assert first_difference([], [1]) == 0

# ------------------------------------------------------------------------------------------------
# output identical to the target's own


NEW_TOKENS = 40  # one from the prompt, then two and a half blocks


def decode_by_all(question_number):
    """{drafter: the tokens of each round}, of the target alone and of drafters. The untrained one
    takes as many rounds as the target alone, so it is there for one prompt of four."""
    target, tokenizer = nano()
    prompt = chat_prompt(tokenizer, questions()[question_number])
    rounds = {"alone": list(generate(
        target, None, prompt, max_new_tokens=NEW_TOKENS, tokens_per_forward=K))}
    answer = all_tokens(rounds["alone"])
    drafters = {
        "shipped": shipped(),
        "half-right": Oracle(len(prompt), answer, seed=question_number),
        "perfect": Oracle(len(prompt), answer, right=K - 1),
    }
    if question_number % 4 == 0:
        drafters["random"] = untrained()
    for name, drafter in drafters.items():
        rounds[name] = list(generate(target, drafter, prompt, max_new_tokens=NEW_TOKENS))
    return rounds


@pytest.mark.parametrize("first", range(0, 64, 16))
def test_generate_is_identical_for_every_drafter(first):
    """Failure 5: speculative output is not the target's, for 32 prompts and four drafters."""
    lengths = {"alone": [], "random": [], "shipped": [], "half-right": [], "perfect": []}
    for i in range(first, first + 8):
        rounds = decode_by_all(i)
        answer = all_tokens(rounds["alone"])
        for name in rounds:
            assert all_tokens(rounds[name]) == answer, (name, questions()[i])
            lengths[name] += [len(r.tokens) for r in rounds[name][1:]]
        # nothing but the end keeps a perfect drafter from a whole block
        for r in rounds["perfect"][1:-1]:
            assert len(r.tokens) == K

    tau = {name: sum(x) / len(x) for name, x in lengths.items()}
    assert tau["alone"] == 1
    assert tau["random"] < 1.2
    assert tau["shipped"] > 1.2
    assert 1.2 < tau["half-right"] < tau["perfect"]
    assert tau["perfect"] == 39 / 3


def sampled(drafter, prompt, sampling):
    target, _ = nano()
    return all_tokens(generate(
        target, drafter, prompt, max_new_tokens=24, tokens_per_forward=K, sampling=sampling))


@pytest.mark.parametrize("temperature", (0.7, 1.0, 3.0))
def test_sampled_output_is_identical_for_every_drafter(temperature):
    """Failure 11: the temperature is ignored, or sampled output depends on the drafter."""
    _, tokenizer = nano()
    prompts = [chat_prompt(tokenizer, question) for question in questions()[:2]]
    greedy = sampled(None, prompts[0], Sampling())
    outputs = [greedy]
    for prompt, seed in ((prompts[0], 0), (prompts[0], 1), (prompts[1], 0)):
        sampling = Sampling(temperature, seed=seed)
        alone = sampled(None, prompt, sampling)
        oracle = Oracle(len(prompt), alone)
        assert sampled(oracle, prompt, sampling) == alone
        for draft_temperature in (0.0, 0.5, 1.0):
            coupled = Sampling(temperature, seed=seed, draft_temperature=draft_temperature)
            assert sampled(shipped(), prompt, coupled) == alone
        outputs.append(alone)
    if temperature == 3.0:  # below, this target is nearly always sure of itself
        different = {tuple(tokens) for tokens in outputs}
        assert len(different) == 4


@torch.no_grad()
def test_training_form_predicts_decoded_rounds():
    """Failure 1: accuracy in training, no acceptance in decoding. The training form over a finished
    answer must accept exactly as many guesses as decoding did."""
    target, tokenizer = nano()
    drafter = shipped()
    for question in questions()[:4]:
        prompt = chat_prompt(tokenizer, question)
        rounds = list(generate(
            target, drafter, prompt, max_new_tokens=64, stop_token_ids=stop_ids(tokenizer)))
        tokens = torch.tensor([prompt + all_tokens(rounds)])
        T = tokens.shape[1]
        features, _ = target(tokens, target_layer_ids=drafter.target_layer_ids)
        anchor = len(prompt)
        predicted = []
        while anchor < T - 1:
            block = drafter.embed_block(tokens[:, anchor:anchor + 1], target.embed_tokens.weight)
            hidden = drafter(features, block, torch.tensor([[anchor]]))
            guesses = target.logits(hidden[:, 0, 1:]).argmax(-1)
            truth = tokens[:, anchor + 1:anchor + K]
            missing = K - 1 - truth.shape[1]
            truth = F.pad(truth, (0, missing), value=-1)  # past the end: no token
            accepted = count_accepted(guesses, truth).item()
            length = min(accepted + 1, T - 1 - anchor)
            predicted.append(length)
            anchor += length
        assert predicted == [len(r.tokens) for r in rounds[1:]]


def test_generate_begins_anew_with_each_prompt():
    """Failure 6: a Decoder keeps something of the previous prompt, or serves a prompt that is too
    long for it or is sampled differently."""
    prompts = [tokens_of(length, seed=length).tolist() for length in (40, 3, 21, 300)]
    decoders = {}
    for drafter in (None, small_drafter()):
        for sampling in (Sampling(), Sampling(1.0)):
            for prompt in prompts:
                request = (small_target(), drafter, prompt)
                kept = generate(
                    *request, max_new_tokens=12, sampling=sampling, decoders=decoders)
                fresh = generate(*request, max_new_tokens=12, sampling=sampling)
                assert list(kept) == list(fresh)
    # for each drafter and way of sampling one for prompts up to 200 tokens, one for longer ones
    assert len(decoders) == 2 * 2 * 2

# ------------------------------------------------------------------------------------------------
# where a generation ends


def decode_reference(limit, stops=()):
    """The rounds of the target alone and of drafters right in 15, 3 and 0 guesses."""
    prompt, answer = reference()
    drafters = [None]
    for right in (15, 3, 0):
        drafters.append(Oracle(len(prompt), answer, right))
    results = []
    for drafter in drafters:
        rounds = generate(
            small_target(), drafter, prompt, max_new_tokens=limit, stop_token_ids=stops)
        results.append(list(rounds))
    return results


@pytest.mark.parametrize("limit", (1, 2, 5, 16, 17, 18, 30))
def test_generate_ends_at_the_limit(limit):
    """Failure 15: a round's tokens past max_new_tokens are returned, or counted as accepted."""
    _, answer = reference()
    for rounds in decode_reference(limit):
        assert all_tokens(rounds) == answer[:limit]
        assert rounds[0].accepted == 0
        for r in rounds:
            assert 0 <= r.accepted <= len(r.tokens) <= K


@pytest.mark.parametrize("place", (0, 1, 2, 7, 16, 20))
def test_generate_ends_at_a_stop(place):
    """Failure 15: tokens after a stop id are returned, an answer ends a round later with a drafter
    than without, or the rounds of an answer lack one or its time."""
    prompt, answer = reference()
    stop = answer[place]
    expected = answer[:answer.index(stop) + 1]
    for rounds in decode_reference(40, {stop}):
        assert all_tokens(rounds) == expected
        for r in rounds:
            assert len(r.tokens) > 0
    # tau counts what is returned, and the token of the prefill is in no round
    oracle = Oracle(len(prompt), answer, right=15)
    result = collect(generate(
        small_target(), oracle, prompt, max_new_tokens=40, stop_token_ids=stop))
    assert result.tokens == expected
    assert 1 + len(all_tokens(result.rounds)) == len(expected)
    assert result.seconds == sum(r.seconds for r in result.rounds)


def test_generate_ends_at_the_context(monkeypatch):
    """A block continues past the target's last position; a prompt that is too long, empty, or of a
    different tokenizer is accepted."""
    target = small_target()
    prompt, answer = reference()
    monkeypatch.setattr(target.config, "max_position_embeddings", 50)
    room = 50 - len(prompt) - K
    for rounds in decode_reference(40):
        assert all_tokens(rounds) == answer[:room]
    # 1-token forwards end at the same token
    one_token = all_tokens(generate(
        target, None, prompt, max_new_tokens=40, tokens_per_forward=1))
    assert len(one_token) == room

    with pytest.raises(ValueError, match="empty"):
        next(generate(target, None, []))
    with pytest.raises(ValueError, match="prompt too long: 40 tokens.*context of 50"):
        next(generate(target, None, [1] * 40))
    with pytest.raises(ValueError, match="vocabulary of 300"):
        next(generate(target, None, [V]))
    with pytest.raises(ValueError, match="max_new_tokens = 0: use an integer of at least 1"):
        next(generate(target, None, [1], max_new_tokens=0))
    with pytest.raises(ValueError, match=f"stop token id {V} is outside"):
        next(generate(target, None, [1], stop_token_ids=V))


@pytest.mark.parametrize("rows", (1, K))
@torch.inference_mode()
def test_compiled_rounds_equal_plain_ones(rows, traced_only):
    """Compiled code silently mistakes one tensor for another that shares its memory; or a different
    function is compiled; or compiling stops after 8 shapes, so later ones run plain."""
    torch._dynamo.config.recompile_limit = 8  # torch's default
    prompt = tokens_of(20).tolist()
    results = []
    for is_compiled in (False, True):
        target = copy.deepcopy(small_target())
        drafter = None
        if rows == K:
            drafter = small_drafter()
            join_projections(drafter)  # as on a GPU
        fast.prepare_for_decoding(target, drafter, compile=is_compiled)
        decoder = Decoder(
            target, drafter, length=64, tokens_per_forward=rows, sampling=Sampling(), batch=2)
        decoder.state.pads_segments = True  # so that segments are compiled too
        decoder.state.segment_length = 32
        answer = [decoder.start_sequences({1: prompt}, {1: 0})[1]]
        for _ in range(6):
            _, (tokens, _) = decoder.run_round()
            answer += tokens
        remembered = [decoder.state.S[:, :, 1], decoder.state.conv[:, 1]]
        if drafter is not None:
            for keys, values in decoder.cache:
                remembered += [keys[1], values[1]]
        results.append((answer, remembered))
    kinds, shapes, buffer_lengths = 2, 2, 4  # linear and full layers, blocks and segments
    assert torch._dynamo.config.recompile_limit >= kinds * shapes * buffer_lengths
    (plain_answer, plain), (answer, remembered) = results
    assert answer == plain_answer
    for given, expected in zip(remembered, plain, strict=True):
        assert apart(given, expected) < 1e-5
