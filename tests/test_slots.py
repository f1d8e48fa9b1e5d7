"""
Many sequences at once: the bits of a sequence depend on nothing but itself.

The shipped pair decodes all prompts. The tests compare prompts in any slot, with any neighbors, in
any order of arrival, next to idle slots, and next to slots whose answers end earlier. For more
prompts:

    SLOT_PROMPTS=64 python test_all.py test_slots
"""
import copy
import functools
import itertools
import os
import random
from types import SimpleNamespace

import pytest
import torch

import draft_decode
import fast.prefill as prefill_module
from benchmarks.drafters import Oracle
from tokenizer import chat_prompt, stop_ids
from checkpoint import load_drafter, load_target
from draft_decode import Decoder, generate, generate_many
from sampling import Sampling
from tests.common import (K, NANO_DRAFTER, NANO_TARGET, all_tokens, nano, questions, shipped,
                          untrained)

PROMPTS = int(os.environ.get("SLOT_PROMPTS", 8))
NEW_TOKENS = 16
GREEDY = Sampling()
SAMPLED = Sampling(1.0, top_k=20, top_p=0.95, seed=3)
UNDECIDED = Sampling(1.7, seed=3)  # so hot that the noise decides many tokens


@functools.cache
def pair(dtype):
    """The shipped target and drafter in float32 or bfloat16."""
    if dtype == "float32":
        target, _ = nano()
        return target, shipped()
    target = load_target(NANO_TARGET, "cpu", dtype)
    return target, load_drafter(NANO_DRAFTER, target.config, "cpu", dtype)


@functools.cache
def stops():
    """Stop ids, and two digits in the middle of many answers, so the answers end at different
    rounds."""
    _, tokenizer = nano()
    return stop_ids(tokenizer) | {*tokenizer.encode("07")}


@functools.cache
def prompts_of(count):
    _, tokenizer = nano()
    return [chat_prompt(tokenizer, question) for question in questions()[:count]]


def decode(dtype, drafter, slots, sampling, arriving, *, tokens_per_forward=K):
    """The rounds {prompt: [RoundOutput]} of prompts, in the order in which they arrive."""
    target, _ = pair(dtype)
    rounds = {}
    for index, output in generate_many(
            target, drafter, arriving, slots=slots, max_new_tokens=NEW_TOKENS,
            stop_token_ids=stops(), tokens_per_forward=tokens_per_forward, sampling=sampling,
            sequence_ids=[sum(prompt) for prompt in arriving]):
        rounds.setdefault(tuple(arriving[index]), []).append(output)
    return rounds


def shuffled(prompts):
    return random.Random(0).sample(prompts, len(prompts))


def tau_of(answers):
    """Mean tokens of a round. The first output of a prompt is in no round."""
    rounds = [output for answer in answers for output in answer[1:]]
    return len(all_tokens(rounds)) / len(rounds)

# ------------------------------------------------------------------------------------------------
# the same tokens


def drafters_of(dtype, answers):
    """{name: drafter}: trained, untrained, always wrong, half right, and always right about the
    answers {prompt: tokens}."""
    target, trained = pair(dtype)
    drafters = {"trained": trained, "random": copy.deepcopy(untrained()).to(getattr(torch, dtype))}
    for name, p in (("wrong", 0.0), ("half right", 0.7), ("oracle", 1.0)):
        oracle = Oracle(target, prompts=len(answers))
        for number, (prompt, answer) in enumerate(answers.items()):
            oracle.learn(list(prompt), answer, p, number)
        drafters[name] = oracle
    return drafters


@pytest.mark.parametrize("slots, dtype, sampling", (
    (3, "bfloat16", GREEDY),
    (3, "float32", SAMPLED),
    (8, "float32", GREEDY),
    (8, "bfloat16", SAMPLED)))
def test_slots_return_the_targets_own_tokens(slots, dtype, sampling):
    """Failure 5: an answer depends on its slot, its neighbors, the order of arrival, or the
    drafter. With a drafter the prompts arrive in a different order than for the target alone."""
    prompts = prompts_of(PROMPTS)
    alone = decode(dtype, None, slots, sampling, prompts)
    answers = {prompt: all_tokens(rounds) for prompt, rounds in alone.items()}
    tau = {}
    for name, drafter in drafters_of(dtype, answers).items():
        drafted = decode(dtype, drafter, slots, sampling, shuffled(prompts))
        for prompt in answers:
            assert all_tokens(drafted[prompt]) == answers[prompt], name
        tau[name] = tau_of(drafted.values())
    assert tau["wrong"] < 1.2
    assert tau["random"] < 1.2
    assert 1.5 < tau["half right"] < tau["oracle"]
    assert tau["trained"] > 3
    # The answers end at different times, so slots wait, are idle, and are used again.
    assert len(set(map(len, answers.values()))) > 3

# ------------------------------------------------------------------------------------------------
# the same logits


class RecordingDecoder(Decoder):
    """A Decoder that keeps the logits behind every token of a round, by prompt and position."""
    def __init__(self, recorded, target, drafter, **sizes):
        super().__init__(target, drafter, **sizes)
        self.recorded = recorded
        self.prompt_in = {}  # by slot
        plain_logits = target.logits

        def logits(hidden):
            self.last_logits = plain_logits(hidden)  # the last ones of a round are the target's
            return self.last_logits

        target.logits = logits

    def start_sequences(self, prompts, sequence_ids):
        for slot, prompt_ids in prompts.items():
            self.prompt_in[slot] = tuple(prompt_ids)
        return super().start_sequences(prompts, sequence_ids)

    def release_slot(self, slot):
        super().release_slot(slot)
        self.prompt_in.pop(slot, None)

    def run_round(self):
        starts = self.state.position.tolist()
        outputs = super().run_round()
        for slot, prompt in self.prompt_in.items():
            for i in range(len(outputs[slot][0])):
                self.recorded[prompt, starts[slot] + i] = self.last_logits[slot, i]
        return outputs


def record(dtype, drafter, slots, sampling, arriving, *, tokens_per_forward=K):
    """The rounds of decode(), and the logits {(prompt, position): (V,)} of prompts."""
    target, _ = pair(dtype)
    recorded = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draft_decode, "Decoder", functools.partial(RecordingDecoder, recorded))
        patch.setattr(target, "logits", target.logits)  # so that it is put back at the end
        rounds = decode(
            dtype, drafter, slots, sampling, arriving, tokens_per_forward=tokens_per_forward)
    return rounds, recorded


def check_logits(dtype, sampling, prompts, arrivals, *, slots=3, tokens_per_forward=K):
    """All logits of all prompts must be bitwise identical to those of the target alone, and all
    rounds to those of the first arrival with the same drafter. arrivals: (drafter, prompts)."""
    _, alone = record(
        dtype, None, slots, sampling, prompts, tokens_per_forward=tokens_per_forward)
    known = {}
    for drafter, arriving in arrivals:
        rounds, recorded = record(
            dtype, drafter, slots, sampling, arriving, tokens_per_forward=tokens_per_forward)
        for prompt in rounds:
            assert rounds[prompt] == known.setdefault((drafter, prompt), rounds[prompt])
        for (prompt, position), logits in alone.items():
            if prompt in rounds:
                assert torch.equal(recorded[prompt, position], logits)
    assert len(alone) > 5 * len(prompts)


@pytest.mark.parametrize("slots, dtype, sampling", (
    (3, "float32", UNDECIDED), (3, "bfloat16", GREEDY), (8, "float32", SAMPLED)))
def test_slots_have_the_same_logits(slots, dtype, sampling):
    """Failures 5 and 6: tokens agree but logits do not, so a near-tie can flip; or guesses depend
    on the slot. Prompts move to different slots and neighbors, and one is shorter than a block."""
    _, drafter = pair(dtype)
    prompts = [*prompts_of(max(10, PROMPTS)), prompts_of(1)[0][-5:]]
    check_logits(dtype, sampling, prompts, slots=slots, arrivals=(
        (drafter, prompts),
        (drafter, prompts[::-1]),
        (drafter, shuffled(prompts)),
        (None, prompts[::-1]),
        (None, prompts[2:5]),
        (drafter, prompts[4:5])))


def test_slots_of_one_token_forwards():
    """Failure 5: a 1-token forward changes S itself, in idle slots too, and the next prompt in that
    slot sees traces of it. Slots are used again, and two are idle."""
    prompts = prompts_of(5)
    arrivals = ((None, prompts[::-1]), (None, prompts[3:4]))
    check_logits("float32", UNDECIDED, prompts, arrivals, tokens_per_forward=1)

# ------------------------------------------------------------------------------------------------
# the scheduler


def test_slots_serve_each_prompt_in_turn():
    """A prompt starts before a slot is free, is left out, is answered twice, or gets the number of
    a different prompt; or decoders of a different length or number of slots are used."""
    target, drafter = pair("float32")
    prompts = prompts_of(5)
    long_prompt = prompts[0] * 6  # its sequence does not fit into the buffer of the others
    arriving = [*prompts[:2], long_prompt, *prompts[2:]]
    decoders = {}
    rounds = [[] for _ in arriving]
    running = set()
    for index, output in generate_many(
            target, drafter, arriving, slots=2, max_new_tokens=NEW_TOKENS,
            stop_token_ids=stops(), decoders=decoders):
        rounds[index].append(output)
        running.add(index)
        if output.is_last:
            running.discard(index)
        assert len(running) <= 2
    assert not running
    assert len(decoders) == 2
    for prompt, answer in zip(arriving, rounds):
        assert answer[0].accepted == 0 and len(answer[0].tokens) == 1  # the prompt's own token
        assert decode("float32", drafter, 2, GREEDY, [prompt]) == {tuple(prompt): answer}
    list(generate_many(target, drafter, prompts, slots=3, max_new_tokens=1, decoders=decoders))
    assert len(decoders) == 3


def test_slots_share_the_time_of_a_round(monkeypatch):
    """Failure 15: each sequence counts the whole time of a round. Here a round or a prefill takes a
    second."""
    target, _ = pair("float32")
    clock = SimpleNamespace(perf_counter=itertools.count().__next__)
    monkeypatch.setattr(draft_decode, "time", clock)
    outputs = generate_many(target, None, prompts_of(3), slots=3, max_new_tokens=3)
    seconds = [output.seconds for _, output in outputs]
    assert seconds == [1 / 3] * 9  # a prefill and two rounds, each of three sequences


def test_slots_with_answers_of_one_token_or_none(monkeypatch):
    """A slot is not free after an answer of one token; a round runs without a prompt; no prompts
    are an error; a mistake in the last prompt is found after hours."""
    target, drafter = pair("float32")
    results = list(generate_many(target, drafter, prompts_of(5), slots=3, max_new_tokens=1))
    assert [index for index, _ in results] == [0, 1, 2, 3, 4]
    assert all(len(output.tokens) == 1 for _, output in results)
    monkeypatch.setattr(draft_decode, "Decoder", None)  # none is needed
    assert list(generate_many(target, drafter, [], slots=3)) == []
    with pytest.raises(ValueError, match="prompt 2: the prompt is empty"):
        next(generate_many(target, drafter, [*prompts_of(2), []], slots=2))


@torch.inference_mode()
def test_slots_that_are_idle_stay_at_position_0():
    """Failure 6: an idle slot commits until it leaves its buffer: a slot that ended, that never had
    a prompt, or that an abandoned generation left running."""
    target, drafter = pair("float32")
    prompts = prompts_of(5)
    decoders = {}

    def answers(prompts):
        return generate_many(
            target, drafter, prompts, slots=4, max_new_tokens=NEW_TOKENS,
            stop_token_ids=stops(), decoders=decoders)

    abandoned = answers(prompts[:3])
    for _ in range(5):  # three first tokens, and two outputs of the first round
        next(abandoned)
    abandoned.close()
    decoder, = decoders.values()
    assert decoder.state.position[2] > len(prompts[2])
    for _ in answers(prompts[4:]):
        assert decoder.state.position.tolist()[1:] == [0, 0, 0]
    decoder.run_round()
    assert decoder.state.position.tolist() == [0, 0, 0, 0]


def test_slots_that_ended_at_the_end_of_the_buffer():
    """An idle slot writes its block past the end of its buffer. Here an answer ends at the last
    position of its buffer, while its neighbor continues. Then a generation is abandoned there."""
    target, _ = pair("float32")
    prompts = prompts_of(2)
    new_tokens = 20  # the prompt's own, a round of 16, and 3 of another round of 16
    full = (prompts[0] * 4)[:256 - K - new_tokens]
    # the answer, and what would follow it
    answer = all_tokens(generate(target, None, full, max_new_tokens=new_tokens + K))
    oracle = Oracle(target)
    oracle.learn(full, answer, 1.0)
    decoders = {}

    def answers(prompts):
        return generate_many(
            target, oracle, prompts, slots=2, max_new_tokens=new_tokens, decoders=decoders)

    counts = [0, 0]
    for index, output in answers([full, prompts[1]]):
        counts[index] += len(output.tokens)
    assert counts == [new_tokens, new_tokens]
    left = answers([prompts[1], full])
    for index, output in left:
        if index == 1 and output.is_last:
            break
    left.close()
    assert len(list(answers(prompts[1:]))) > 10
    assert len(decoders) == 1  # of buffers of 256 tokens

# ------------------------------------------------------------------------------------------------
# what a sequence must not depend on


@torch.inference_mode()
def test_prompts_that_wait_together_do_not_change_a_bit(monkeypatch):
    """Failure 5: a prompt's state depends on the prompts that are prefilled with it, or on its row
    among them; or two groups of prompts share a reader of a different shape."""
    monkeypatch.setattr(prefill_module, "SHORTEST_SEGMENT", 32)
    target, drafter = pair("float32")
    prompts = [*prompts_of(6), prompts_of(1)[0][:9], prompts_of(1)[0] * 2]
    sizes = [len(prompt) for prompt in prompts]
    assert min(sizes) < K and max(sizes) > 64

    def states(groups):
        """{prompt: its state and its part of the drafter's cache}, if groups start one by one."""
        decoder = Decoder(target, drafter, length=256, tokens_per_forward=K, sampling=GREEDY,
                          batch=4)
        decoder.state.pads_segments = True  # as on a GPU
        decoder.state.segment_length = 128
        found = {}
        for group in groups:
            slots = dict(enumerate(group))
            first = decoder.start_sequences({i: prompts[n] for i, n in slots.items()}, slots)
            for slot, n in slots.items():
                state = decoder.state
                tensors = [state.keys[:, slot, :, :sizes[n]], state.values[:, slot, :, :sizes[n]]]
                tensors += [state.S[:, :, slot], state.conv[:, slot], state.delta_inputs[:, slot]]
                tensors += [keys[slot, :, :sizes[n]] for keys, _ in decoder.cache]
                found[n] = (first[slot], [tensor.clone() for tensor in tensors])
        return found

    together = states(((0, 1, 2, 3), (4, 5, 6, 7)))
    for groups in (((7, 3, 6), (5, 2, 0, 1), (4,)), [(n,) for n in range(8)]):
        for n, (first, tensors) in states(groups).items():
            assert first == together[n][0]
            for i, (given, expected) in enumerate(zip(tensors, together[n][1], strict=True)):
                assert torch.equal(given, expected), (n, i)


def test_equal_prompts_get_different_samples_and_keep_them_alone():
    """The noise depends only on the position, so equal prompts get equal samples; or it depends on
    the slot, so a sequence gets a different sample when it is decoded alone."""
    target, drafter = pair("float32")
    prompt = prompts_of(1)[0]
    sampling = UNDECIDED
    together = [[] for _ in range(3)]
    for index, output in generate_many(
            target, drafter, [prompt] * 3, slots=3, max_new_tokens=30, sampling=sampling):
        together[index].append(output)
    answers = [all_tokens(rounds) for rounds in together]
    assert len(set(map(tuple, answers))) == 3
    for sequence_id, answer in enumerate(answers):
        alone = generate_many(
            target, drafter, [prompt] * 2, slots=3, max_new_tokens=30, sampling=sampling,
            sequence_ids=[sequence_id + 10, sequence_id])
        assert all_tokens(output for index, output in alone if index == 1) == answer


@pytest.mark.parametrize("slots", (1, 2))
@torch.inference_mode()
def test_nan_of_a_prompt_does_not_reach_the_next_one(slots):
    """Keys and values of an earlier prompt stay in a slot. They are masked, but 0 * NaN is NaN."""
    target, drafter = pair("float32")
    prompts = prompts_of(2)
    broken = copy.deepcopy(target)
    unused = next(token for token in range(100) if token not in prompts[1])
    broken.embed_tokens.weight.data[unused] = float("nan")
    bad_prompt = prompts[0] * 3 + [unused] + prompts[0]
    results = []
    for first_prompt in (bad_prompt, prompts[0]):
        decoder = Decoder(broken, drafter, length=512, tokens_per_forward=K, sampling=GREEDY,
                          batch=slots)
        for prompt in (first_prompt, prompts[1]):
            answer = list(decoder.start_sequences({slots - 1: prompt}, {slots - 1: 0}).values())
            for _ in range(2):
                tokens, rejected = decoder.run_round()[slots - 1]
                answer += tokens + rejected
        results.append(answer)
    assert results[0] == results[1]
