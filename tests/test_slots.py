"""
Many sequences at once: the bits of a sequence depend on nothing but itself, for every drafter.

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
from checkpoint import load_drafter, load_target
from draft_decode import Decoder, generate, generate_many
from model import DFlashDraftModel
from sampling import Sampling
from tests.common import K, NANO_DRAFTER, NANO_TARGET, all_tokens, nano, questions, shipped
from tokenizer import chat_prompt, stop_ids

PROMPTS = int(os.environ.get("SLOT_PROMPTS", 5))
NEW_TOKENS = 14
GREEDY = Sampling()
SAMPLED = Sampling(1.0, top_k=20, top_p=0.95, seed=3, draft_temperature=1.0)
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


def shuffled(prompts):
    return random.Random(0).sample(prompts, len(prompts))


def decode(dtype, drafter, slots, sampling, arriving, *, tokens_per_forward=K):
    """The rounds {prompt: [RoundOutput]} of prompts, in the order in which they arrive, and the
    logits {(prompt, position): (V,)} behind all tokens of rounds."""
    target, _ = pair(dtype)
    plain_logits = target.logits
    prompt_of = {sum(prompt): tuple(prompt) for prompt in arriving}  # by the id of the sequence
    assert len(prompt_of) == len(arriving)
    last = []
    rounds = {}
    recorded = {}

    def kept_logits(hidden):
        last[:] = [plain_logits(hidden)]  # the last ones of a round are the target's
        return last[0]

    class RecordingDecoder(Decoder):
        def run_round(self):
            starts = self.state.position.tolist()
            outputs = super().run_round()
            for slot in self.is_active.nonzero().flatten().tolist():
                prompt = prompt_of[self.sequence_ids[slot].item()]
                for i in range(len(outputs[slot][0])):
                    recorded[prompt, starts[slot] + i] = last[0][slot, i]
            return outputs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draft_decode, "Decoder", RecordingDecoder)
        patch.setattr(target, "logits", kept_logits)
        for index, output in generate_many(
                target, drafter, arriving, slots=slots, max_new_tokens=NEW_TOKENS,
                stop_token_ids=stops(), tokens_per_forward=tokens_per_forward, sampling=sampling,
                sequence_ids=list(prompt_of)):
            rounds.setdefault(tuple(arriving[index]), []).append(output)
    return rounds, recorded


def check_same(alone, drafted):
    """Tokens and logits of prompts must be bitwise those of the target alone. Returns tau."""
    (rounds, logits), (drafted_rounds, drafted_logits) = alone, drafted
    in_rounds = []
    for prompt, answer in drafted_rounds.items():
        assert all_tokens(answer) == all_tokens(rounds[prompt])
        in_rounds += answer[1:]  # the first output of a prompt is in no round
    for (prompt, position), expected in logits.items():
        if prompt in drafted_rounds:
            assert torch.equal(drafted_logits[prompt, position], expected), position
    return len(all_tokens(in_rounds)) / len(in_rounds)


def oracle_of(dtype, answers, p):
    """A drafter that knows the answers {prompt: rounds}, with guesses that are right with
    probability p."""
    oracle = Oracle(pair(dtype)[0], prompts=len(answers))
    for number, (prompt, rounds) in enumerate(answers.items()):
        oracle.learn(list(prompt), all_tokens(rounds), p, number)
    return oracle


@pytest.mark.parametrize("slots, dtype, sampling", (
    (1, "float32", SAMPLED),
    (3, "float32", UNDECIDED),
    (2, "bfloat16", SAMPLED),
    (6, "float32", GREEDY)))
def test_slots_are_identical_for_every_drafter(slots, dtype, sampling):
    """Failures 5, 6, and 11: an answer depends on its slot, its neighbors, the order of arrival, or
    the drafter; or tokens agree but logits do not, so a near-tie can flip; or guesses depend on the
    slot. One prompt is shorter than a block."""
    _, trained = pair(dtype)
    prompts = [*prompts_of(min(PROMPTS, slots + 2)), prompts_of(1)[0][-5:]]
    alone = decode(dtype, None, slots, sampling, prompts)
    # The answers end at different times, so slots wait, are idle, and are used again.
    assert len({len(all_tokens(rounds)) for rounds in alone[0].values()}) > 1
    some = prompts[2:0:-1]
    check_same(alone, decode(dtype, None, slots, sampling, some))

    torch.manual_seed(0)
    untrained = DFlashDraftModel(trained.config).requires_grad_(False).to(trained.dtype)
    assert check_same(alone, decode(dtype, untrained, slots, sampling, some)) < 1.2
    tau = []
    for p in (0.7, 1.0):
        oracle = oracle_of(dtype, alone[0], p)
        tau.append(check_same(alone, decode(dtype, oracle, slots, sampling, shuffled(prompts))))
    assert 1.5 < tau[0] < tau[1]

    drafted = decode(dtype, trained, slots, sampling, shuffled(prompts))
    tau_of_trained = check_same(alone, drafted)
    assert tau_of_trained > (3 if sampling is not UNDECIDED else 1)
    again = decode(dtype, trained, slots, sampling, some)
    check_same(alone, again)
    for prompt, rounds in again[0].items():
        assert rounds == drafted[0][prompt]


def test_slots_of_one_token_forwards():
    """Failure 5: a 1-token forward changes S itself, in idle slots too, and the next prompt in that
    slot sees traces of it. Slots are used again, and two are idle."""
    prompts = prompts_of(5)
    alone = decode("float32", None, 3, UNDECIDED, prompts, tokens_per_forward=1)
    for arriving in (prompts[::-1], prompts[3:4]):
        check_same(alone, decode("float32", None, 3, UNDECIDED, arriving, tokens_per_forward=1))


def test_slots_serve_each_prompt_in_turn():
    """A prompt starts before a slot is free, is left out, is answered twice, or gets the number of
    a different prompt; or a Decoder of a different length, drafter, or way of sampling is used."""
    target, drafter = pair("float32")
    prompts = prompts_of(4)
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
        assert decode("float32", drafter, 2, GREEDY, [prompt])[0] == {tuple(prompt): answer}
    for change in ({"slots": 3}, {"sampling": SAMPLED}, {"drafter": None}, {"prompts": prompts}):
        request = {"drafter": drafter, "prompts": prompts, "slots": 2} | change
        list(generate_many(target, **request, max_new_tokens=1, decoders=decoders))
    assert len(decoders) == 5  # the last request needs no new one


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
    """Failure 6: an idle slot commits until it leaves its buffer: a slot that ended at the end of
    its buffer, that never had a prompt, or that an abandoned generation left running there."""
    target, _ = pair("float32")
    prompts = prompts_of(2)
    new_tokens = 18  # the prompt's own, a round of 16, and 1 of another round of 16
    full = (prompts[0] * 4)[:256 - K - new_tokens]  # its answer ends where the buffer ends
    # the answer, and what would follow it
    answer = all_tokens(generate(target, None, full, max_new_tokens=new_tokens + K))
    oracle = Oracle(target)
    oracle.learn(full, answer, 1.0)
    decoders = {}

    def answers(prompts):
        return generate_many(
            target, oracle, prompts, slots=3, max_new_tokens=new_tokens, decoders=decoders)

    counts = [0, 0]
    for index, output in answers([full, prompts[1]]):  # the second answer takes longer
        counts[index] += len(output.tokens)
        decoder, = decoders.values()  # of a buffer of 256 tokens
        assert decoder.state.position[2] == 0
    assert counts == [new_tokens, new_tokens]
    abandoned = answers([*prompts, full])
    for index, output in abandoned:
        if index == 2 and output.is_last:
            break
    abandoned.close()
    assert all(decoder.state.position > len(prompts[1]))
    for _ in answers(prompts[1:]):
        assert decoder.state.position.tolist()[1:] == [0, 0]
    decoder.run_round()
    assert decoder.state.position.tolist() == [0, 0, 0]


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
        readers = decoder.prefill.readers.items()
        assert {n: len(reader.state.position) for n, reader in readers} == {32: 4, 64: 2, 128: 1}
        return found

    together = states(((0, 1, 2, 3), (4, 5, 6, 7)))
    for groups in (((7, 3, 6), (5, 2, 0, 1), (4,)), [(n,) for n in range(8)]):
        for n, (first, tensors) in states(groups).items():
            assert first == together[n][0]
            for i, (given, expected) in enumerate(zip(tensors, together[n][1], strict=True)):
                assert torch.equal(given, expected), (n, i)


@pytest.mark.parametrize("slots, on_gpu", ((1, False), (2, False), (2, True)))
@torch.inference_mode()
def test_nan_of_a_prompt_does_not_reach_the_next_one(slots, on_gpu, monkeypatch):
    """Keys and values of an earlier prompt stay in a slot. They are masked, but 0 * NaN is NaN."""
    monkeypatch.setattr(prefill_module, "SHORTEST_SEGMENT", 64)
    target, drafter = pair("float32")
    prompts = prompts_of(2)
    broken = copy.deepcopy(target)
    # 0 pads blocks; and with a tied head the token's logit would always be NaN
    unused = next(token for token in range(1, 100) if token not in prompts[0] + prompts[1])
    broken.config.tie_word_embeddings = False
    broken.lm_head = copy.deepcopy(broken.embed_tokens)
    broken.embed_tokens.weight.data[unused] = float("nan")
    bad_prompt = prompts[0] * 3 + [unused] + prompts[0]
    results = []
    for first_prompt in (bad_prompt, prompts[0]):
        decoder = Decoder(broken, drafter, length=512, tokens_per_forward=K, sampling=GREEDY,
                          batch=slots)
        if on_gpu:  # where a short prompt is prefilled in a shorter buffer
            decoder.state.pads_segments = True
            decoder.state.segment_length = 256
        for prompt in (first_prompt, prompts[1]):
            answer = list(decoder.start_sequences({slots - 1: prompt}, {slots - 1: 0}).values())
            for _ in range(2):
                tokens, rejected = decoder.run_round()[slots - 1]
                answer += tokens + rejected
        results.append(answer)
    assert results[0] == results[1]
    assert len(set(results[1])) > 3
