"""
Many sequences at once: the bits of a sequence depend on nothing but itself.

A slot is here a place for a sequence in a batch. All is decoded by the shipped pair. Prompts are
compared in any slot, with any neighbours, in any order of arrival, beside idle slots and beside
slots whose answers end earlier. For more prompts:

    SLOT_PROMPTS=64 python test_all.py test_slots
"""
import copy
import functools
import os
import random

import pytest
import torch

from fast import cpu
import decode_state
import draft_decode
import model
from benchmarks.drafters import Oracle
from benchmarks.slips import slip
from tokenizer import chat_prompt, stop_ids
from checkpoint import load_drafter, load_target
from decode_state import DecodeState, prefill
from draft_decode import Decoder, generate, generate_many
from model import DFlashDraftModel
from sampling import Sampling
from tests.common import (K, NANO_DRAFTER, NANO_TARGET, all_tokens, nano, questions, shipped,
                          untrained)

PROMPTS = int(os.environ.get("SLOT_PROMPTS", 8))
NEW_TOKENS = 16
GREEDY = Sampling()
SAMPLED = Sampling(1.0, seed=3)
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
    """Stop ids, and two digits that stand in the middle of many answers: so these end at different
    rounds."""
    _, tokenizer = nano()
    return stop_ids(tokenizer) | {*tokenizer.encode("07")}


@functools.cache
def prompts_of(count):
    _, tokenizer = nano()
    return [chat_prompt(tokenizer, question) for question in questions()[:count]]


def pieces_of(dtype, drafter, slots, sampling, prompts, order=None):
    """The Pieces of each prompt. order: the numbers of the prompts in the order in which they
    arrive."""
    target, _ = pair(dtype)
    order = order or range(len(prompts))
    arriving = [prompts[number] for number in order]
    pieces = [[] for _ in prompts]
    for index, piece in generate_many(
            target, drafter, arriving, NEW_TOKENS, slots, stops(), K, sampling):
        pieces[order[index]].append(piece)
    return pieces


def shuffled(count):
    numbers = list(range(count))
    random.Random(0).shuffle(numbers)
    return numbers


def tau_of(pieces):
    """Mean tokens of a round; the first piece of a prompt is in no round."""
    rounds = [piece for answer in pieces for piece in answer[1:]]
    return len(all_tokens(rounds)) / len(rounds)

# ------------------------------------------------------------------------------------------------
# the same tokens


def drafters_of(dtype, answers):
    """Trained, untrained, always wrong, half right and always right."""
    target, trained = pair(dtype)
    prompts = prompts_of(len(answers))
    drafters = {"trained": trained, "random": copy.deepcopy(untrained()).to(getattr(torch, dtype))}
    for name, p in (("wrong", 0.0), ("half right", 0.7), ("oracle", 1.0)):
        oracle = Oracle(target, prompts=len(prompts))
        for number, prompt in enumerate(prompts):
            oracle.learn(prompt, all_tokens(answers[number]), p, number)
        drafters[name] = oracle
    return drafters


@pytest.mark.parametrize("slots, dtype, sampling", (
    (1, "float32", GREEDY),
    (3, "bfloat16", GREEDY),
    (3, "float32", SAMPLED),
    (8, "float32", GREEDY),
    (8, "bfloat16", SAMPLED)))
def test_slots_return_the_targets_own_tokens(slots, dtype, sampling):
    """Failure 5: an answer depends on its slot, its neighbours or the order of arrival, or on the
    drafter. With a drafter the prompts arrive in another order than for the target alone."""
    prompts = prompts_of(PROMPTS)
    answers = pieces_of(dtype, None, slots, sampling, prompts)
    tau = {}
    for name, drafter in drafters_of(dtype, answers).items():
        pieces = pieces_of(dtype, drafter, slots, sampling, prompts, shuffled(PROMPTS))
        for number in range(PROMPTS):
            assert all_tokens(pieces[number]) == all_tokens(answers[number]), (name, number)
        tau[name] = tau_of(pieces)
    assert tau["wrong"] < 1.2
    assert tau["random"] < 1.2
    assert 1.5 < tau["half right"] < tau["oracle"]
    assert tau["trained"] > 3
    # the answers end at different times, so that slots wait, are idle and are used again
    lengths = {len(all_tokens(answer)) for answer in answers}
    assert len(lengths) > 3


@pytest.mark.parametrize("dtype, sampling", (("float32", SAMPLED), ("bfloat16", GREEDY)))
def test_slots_have_the_same_rounds(dtype, sampling):
    """Failures 5 and 6: more prompts in eight slots. What the drafter guesses depends on the slot
    or on the neighbours."""
    prompts = prompts_of(max(14, PROMPTS))
    _, drafter = pair(dtype)
    count = len(prompts)
    alone = pieces_of(dtype, None, 8, sampling, prompts)
    pieces = pieces_of(dtype, drafter, 8, sampling, prompts)
    for order in (list(range(count))[::-1], shuffled(count)):
        assert pieces_of(dtype, drafter, 8, sampling, prompts, order) == pieces
    for number in range(count):
        assert all_tokens(pieces[number]) == all_tokens(alone[number]), number


def test_slots_of_one_are_generate():
    """One sequence at a time takes the rounds of another prompt."""
    target, drafter = pair("float32")
    prompts = prompts_of(4)
    pieces = pieces_of("float32", drafter, 1, GREEDY, prompts)
    for prompt, expected in zip(prompts, pieces):
        assert list(generate(target, drafter, prompt, NEW_TOKENS, stops())) == expected

# ------------------------------------------------------------------------------------------------
# the same logits


class RecordingDecoder(Decoder):
    """A Decoder that keeps the logits behind every token of a round, by prompt and position."""

    def __init__(self, recorded, target, *rest):
        super().__init__(target, *rest)
        self.recorded = recorded
        self.prompt_in = {}  # by place
        plain_logits = target.logits

        def logits(hidden):
            self.last_logits = plain_logits(hidden)  # the last ones of a round are the target's
            return self.last_logits

        target.logits = logits

    def start_sequence(self, place, prompt_ids):
        self.prompt_in[place] = tuple(prompt_ids)
        return super().start_sequence(place, prompt_ids)

    def release_slot(self, place):
        super().release_slot(place)
        self.prompt_in.pop(place, None)

    def run_round(self):
        starts = self.state.position.tolist()
        outcomes = super().run_round()
        for place, prompt in self.prompt_in.items():
            tokens, _ = outcomes[place]
            for row in range(len(tokens)):
                self.recorded[prompt, starts[place] + row] = self.last_logits[place, row]
        return outcomes


def record(dtype, drafter, slots, sampling, arriving, tokens_per_forward=K):
    """The Pieces {prompt: [RoundOutput]} and the logits {(prompt, position): (V,)} of prompts."""
    target, _ = pair(dtype)
    recorded = {}
    pieces = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draft_decode, "Decoder", functools.partial(RecordingDecoder, recorded))
        patch.setattr(target, "logits", target.logits)  # so that it is put back at the end
        for index, piece in generate_many(
                target, drafter, arriving, NEW_TOKENS, slots, stops(), tokens_per_forward, sampling):
            pieces.setdefault(tuple(arriving[index]), []).append(piece)
    return pieces, recorded


def check_logits(dtype, sampling, prompts, arrivals, tokens_per_forward=K):
    """In three slots all logits of all prompts must be those of the target alone, to the bit, and
    all rounds those of the first arrival with the same drafter. arrivals: (drafter, prompts)."""
    _, alone = record(dtype, None, 3, sampling, prompts, tokens_per_forward)
    rounds = {}
    for drafter, arriving in arrivals:
        pieces, recorded = record(dtype, drafter, 3, sampling, arriving, tokens_per_forward)
        for prompt in pieces:
            known = rounds.setdefault((drafter, prompt), pieces[prompt])
            assert pieces[prompt] == known
        for (prompt, position), logits in alone.items():
            if prompt in pieces:
                assert (prompt, position) in recorded
                assert torch.equal(recorded[prompt, position], logits)
    return alone


@pytest.mark.parametrize("dtype, sampling", (("float32", GREEDY), ("bfloat16", UNDECIDED)))
def test_slots_have_the_same_logits(dtype, sampling):
    """Failure 5: tokens agree and logits do not, so that a close choice turns over some day. All
    bits of all logits, with a drafter and without, in other slots, with other neighbours, beside
    idle slots and alone among them."""
    _, drafter = pair(dtype)
    prompts = prompts_of(PROMPTS)
    alone = check_logits(dtype, sampling, prompts, (
        (drafter, prompts),
        (drafter, prompts[::-1]),
        (None, prompts[2:5]),
        (None, prompts[::-1]),
        (drafter, prompts[4:5])))
    assert len(alone) > 5 * PROMPTS


@torch.inference_mode()
def test_slots_of_one_have_the_logits_of_a_plain_loop():
    """The Decoder adds something to what the target computes: one slot has the logits of forwards
    and commits that are written out."""
    target, _ = pair("float32")
    prompt = prompts_of(4)[3]
    _, recorded = record("float32", None, 1, GREEDY, [prompt])
    state = DecodeState(target, 1, 256, K)
    _, logits = prefill(target, torch.tensor([prompt]), state)
    token = logits.argmax(-1)
    for position in range(len(prompt), len(prompt) + len(recorded)):
        block = torch.zeros(1, K, dtype=torch.long)
        block[:, 0] = token
        _, hidden = target(block, state)
        state.commit(1)
        logits = target.logits(hidden)[0]
        assert torch.equal(logits[0], recorded[tuple(prompt), position])
        token = logits[:1].argmax(-1)


def test_slots_at_a_width_that_threads_split():
    """Failure 5: with many slots an elementwise operation has so many rows that threads split them
    at any element, and a row's bits depend on its slot."""
    torch.set_num_threads(3)
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randn(5, K, 9728, generator=generator)
    together = cpu.rowwise(torch.nn.functional.silu, blocks)
    for slot in range(5):
        moved = blocks.roll(slot, 0)
        assert torch.equal(cpu.rowwise(torch.nn.functional.silu, moved)[slot], together[0])

# ------------------------------------------------------------------------------------------------
# the scheduler


def test_slots_serve_each_prompt_in_turn():
    """A prompt that is read before a slot is free, one that is left out or answered twice, a piece
    under another prompt's number; buffers of two lengths."""
    target, drafter = pair("float32")
    prompts = prompts_of(5)
    long_prompt = prompts[0] * 6  # its sequence does not fit into the buffer of the others
    arriving = [*prompts[:2], long_prompt, *prompts[2:]]
    decoders = {}
    pieces = [[] for _ in arriving]
    running = set()
    for index, piece in generate_many(
            target, drafter, arriving, NEW_TOKENS, 2, stops(), decoders=decoders):
        if not pieces[index]:
            assert piece.accepted == 0 and len(piece.tokens) == 1  # the prompt's own token
        pieces[index].append(piece)
        running.add(index)
        if piece.tokens[-1] in stops() or len(all_tokens(pieces[index])) == NEW_TOKENS:
            running.discard(index)
        assert len(running) <= 2
    assert not running
    assert len(decoders) == 2
    for prompt, answer in zip(arriving, pieces, strict=True):
        assert pieces_of("float32", drafter, 2, GREEDY, [prompt]) == [answer]


def test_slots_with_answers_of_one_token():
    """A slot is not free again after an answer that ends with its first token; a round is run
    though nobody waits for it; no prompts are an error."""
    target, drafter = pair("float32")
    results = list(generate_many(target, drafter, prompts_of(5), 1, 3))
    assert [index for index, _ in results] == [0, 1, 2, 3, 4]
    for _, piece in results:
        assert len(piece.tokens) == 1
    assert list(generate_many(target, drafter, [], 5, 3)) == []


def test_slots_refuse_a_bad_prompt_before_any_is_read(monkeypatch):
    """A run of hours that ends at its last prompt."""
    target, drafter = pair("float32")
    monkeypatch.setattr(draft_decode, "Decoder", None)  # none must be made
    with pytest.raises(ValueError, match="prompt 2: the prompt is empty"):
        next(generate_many(target, drafter, [*prompts_of(2), []], 5, 2))


@torch.inference_mode()
def check_idle():
    """Idle places must stand still: those that ended, that never had a prompt, and those that an
    abandoned generation left running."""
    target, drafter = pair("float32")
    prompts = prompts_of(5)
    decoders = {}

    def answers(prompts):
        return generate_many(target, drafter, prompts, NEW_TOKENS, 4, stops(), decoders=decoders)

    abandoned = answers(prompts[:3])
    for _ in range(5):  # three first tokens, and two pieces of the first round
        next(abandoned)
    abandoned.close()
    decoder, = decoders.values()
    assert decoder.state.position[2] > len(prompts[2])
    for _ in answers(prompts[4:]):
        assert decoder.state.position.tolist()[1:] == [0, 0, 0]
    decoder.run_round()
    assert decoder.state.position.tolist() == [0, 0, 0, 0]


def test_slots_that_are_idle_stand_still():
    """Failure 6: an idle slot commits what it ran along with, and leaves its buffer some day."""
    check_idle()


def check_buffer_end():
    """An answer ends at the last place of its buffer, in a round that commits more rows than it may
    return. No block fits after them, and the slot beside it goes on for many rounds. Then the first
    generation is left at this very piece, and another one begins."""
    target, _ = pair("float32")
    prompts = prompts_of(2)
    new_tokens = 20  # the prompt's own, a round of 16, and 3 of another round of 16
    full = (prompts[0] * 4)[:256 - K - new_tokens]
    answer = all_tokens(generate(target, None, full, new_tokens + K))  # and what would follow it
    oracle = Oracle(target)
    oracle.learn(full, answer, 1.0)
    decoders = {}

    def answers(prompts):
        return generate_many(target, oracle, prompts, new_tokens, 2, decoders=decoders)

    counts = [0, 0]
    for index, piece in answers([full, prompts[1]]):
        counts[index] += len(piece.tokens)
    assert counts == [new_tokens, new_tokens]
    left = answers([prompts[1], full])
    for index, piece in left:
        if index == 1 and piece.is_last:
            break
    left.close()
    assert len(list(answers(prompts[1:]))) > 10
    assert len(decoders) == 1  # of buffers of 256 tokens


def test_slots_that_ended_at_the_end_of_the_buffer():
    """An idle slot writes its block past the end of its buffer."""
    check_buffer_end()


def check_one_row():
    """check_logits with forwards of one row: slots that are used again, and two idle ones."""
    prompts = prompts_of(5)
    arrivals = ((None, prompts[::-1]), (None, prompts[3:4]))
    check_logits("float32", UNDECIDED, prompts, arrivals, tokens_per_forward=1)


def test_slots_of_one_row():
    """Failure 5: a forward of one row changes S itself, in idle slots too, and the next prompt in
    that slot has traces of it."""
    check_one_row()

# ------------------------------------------------------------------------------------------------
# wrong lines, each of which a check above must catch


def check_small():
    """check_logits with six questions and a prompt shorter than a block: one slot is used again,
    and noise decides many tokens."""
    prompts = [*prompts_of(6), prompts_of(1)[0][-5:]]
    arrivals = ((shipped(), prompts[::-1]), (shipped(), prompts), (None, prompts[::-1]))
    check_logits("float32", UNDECIDED, prompts, arrivals)


def test_slots_small_check():
    """The check that wrong lines must fail fails without one."""
    check_small()


FORWARD = DecodeState.begin_forward
COMMIT = DecodeState.commit
PUT = DecodeState.put
ROUND = Decoder.round_kernels
PREFILL = Decoder.start_sequence
WRONG_LINES = (  # what is wrong, the function, the right line, the wrong one, the check
    ("position of a neighbour", FORWARD,
     "self.position[:, None] + offsets", "self.position.roll(1)[:, None] + offsets", check_small),
    ("window place of a neighbour", FORWARD,
     "tail[:, None]", "tail.roll(1)[:, None]", check_small),
    ("rotary of a neighbour", FORWARD,
     "self.cos[self.row_positions]", "self.cos[self.row_positions.roll(1, 0)]", check_small),
    ("mask of a neighbour", FORWARD,
     "self.row_positions[..., None]", "self.row_positions.roll(1, 0)[..., None]", check_small),
    ("chunk of a neighbour", COMMIT,
     "self.position % K + n >= K", "self.position.roll(1) % K + n >= K", check_small),
    ("state of a neighbour", COMMIT,
     "self.S_chunk_end, self.S,", "self.S_chunk_end.roll(1, 1), self.S,", check_small),
    ("window of a neighbour", COMMIT,
     "is_complete, second_chunk", "is_complete, second_chunk.roll(1, 1)",
     check_small),
    ("convolution place of a neighbour", COMMIT, "n[:, None]", "n.roll(1)[:, None]", check_small),
    ("rows of a neighbour committed", COMMIT,
     "last_places])\n    self.position += n", "last_places])\n    self.position += n.roll(1)",
     check_small),
    ("prompt's state in the first slot", PUT, "self.S[:, slot]", "self.S[:, 0]", check_small),
    ("what an idle slot did to its state", PUT,
     "self.S[:, slot] = other.S[:, 0]", "pass", check_one_row),
    ("prompt's window in the first slot", PUT,
     "self.window[:, slot]", "self.window[:, 0]", check_small),
    ("prompt's convolution in the first slot", PUT,
     "self.conv[:, slot]", "self.conv[:, 0]", check_small),
    ("prompt's keys in the first slot", PUT, "self.keys[:, slot]", "self.keys[:, 0]", check_small),
    ("prompt's values in the first slot", PUT,
     "self.values[:, slot]", "self.values[:, 0]", check_small),
    ("prompt's position in the first slot", PUT,
     "self.position[slot]", "self.position[0]", check_small),
    ("prompt left where it was read", PREFILL,
     "self.state.put(slot, reader)", "pass", check_small),
    ("noise of a neighbour", ROUND,
     "state.position[:, None] + 1", "state.position.roll(1)[:, None] + 1", check_small),
    ("slot taken for row", ROUND,
     "choices.gather(1, accepted[:, None])[:, 0]", "choices[0].gather(0, accepted)", check_small),
    ("anchor of a neighbour", ROUND,
     "self.block[:, 0] = self.anchor", "self.block[:, 0] = self.anchor.roll(1)", check_small),
    ("accepted count of a neighbour", ROUND,
     "state.commit((accepted + 1)", "state.commit((accepted.roll(1) + 1)", check_small),
    ("drafter's context at a neighbour's position", ROUND,
     "self.cache, state.position)", "self.cache, state.position.roll(1))", check_small),
    ("draft at a neighbour's position", Decoder.guesses,
     "self.cache, self.state.position)", "self.cache, self.state.position.roll(1))", check_small),
    ("drafter's prompt in the first slot", PREFILL,
     "slice(slot, slot + 1)", "slice(0, 1)", check_small),
    ("first anchor in the first slot", PREFILL,
     "self.anchor[slot]", "self.anchor[0]", check_small),
    ("traces of the sequence before", prefill,
     "state.reset()", "state.position.zero_()", check_small),
    ("drafter's mask of a neighbour", model.Attention.decode,
     "positions[:, -1:, None]", "positions[:, -1:, None].roll(1, 0)", check_small),
    ("drafter's block at a neighbour's position", model.Attention.decode,
     "write_at(keys, positions, k)", "write_at(keys, positions.roll(1, 0), k)", check_small),
    ("drafter's rotary of a neighbour", DFlashDraftModel.decode_block,
     "self.rotary(positions)", "self.rotary(positions.roll(1, 0))", check_small),
    ("keys written into a neighbour's row", decode_state.FullLayerState.attention,
     "self.keys, state.row_positions", "self.keys, state.row_positions.roll(1, 0)",
     check_small),
    ("outputs of a neighbour's place", decode_state.LinearLayerState.delta_rule,
     "o[state.sequences, state.window_positions]",
     "o[state.sequences, state.window_positions.roll(1, 0)]", check_small),
    ("an idle slot commits", ROUND,
     "state.commit((accepted + 1) * self.is_active)", "state.commit(accepted + 1)", check_idle),
    ("an ended slot stays active", Decoder.release_slot,
     "self.is_active[slot] = 0", "pass", check_idle),
    ("a slot left active", draft_decode.decode_in_slots,
     "decoder.release_slot(slot)  # an earlier", "pass  # an earlier", check_idle),
    ("an idle slot at the end of its buffer", Decoder.release_slot,
     "self.state.position[slot] = 0", "pass", check_buffer_end),
)


@pytest.mark.parametrize(
    "function, right, wrong, check", [line[1:] for line in WRONG_LINES],
    ids=[line[0] for line in WRONG_LINES])
def test_slots_wrong_line(function, right, wrong, check):
    """The checks of this file could not fail: a slot, a position or a mask is another's."""
    with slip(function, right, wrong):
        with pytest.raises((AssertionError, IndexError)):
            check()
