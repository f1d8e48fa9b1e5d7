"""
Speculative decoding with a DFlash drafter. The output is the target's own.

    python draft_decode.py --prompt "What is 7 * 34?"
    python draft_decode.py --target=Qwen/Qwen3.5-0.8B --drafter=DIR --prompt "..."

A round has four steps. (1) Draft: one forward of the drafter guesses the K - 1 tokens after the
last known one, the anchor. (2) Verify: one forward of the target over anchor and guesses yields its
own choice after each of them. (3) Accept: the guesses before the first one that is not the target's
choice, and then that choice, which is the next anchor. (4) Commit: the target adopts the old anchor
and the accepted guesses.

Every token returned is the target's choice, so the drafter decides how many tokens a round returns
and never which. Does the target alone choose the same? To the bit, if it runs forwards of the same
shape: K rows, of which it uses the first. Then the kernels are the same, and with those used here a
row's bits do not depend on its place nor on the other rows. The target alone is faster with
forwards of one row. Then the logits agree up to rounding, and a close choice may turn over.
docs/exactness.md has the whole argument.
"""
import contextlib
import itertools
import sys
import time
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import torch
from tqdm import tqdm

from tokenizer import chat_prompt, load_tokenizer, stop_ids
from checkpoint import load_drafter, load_target
from configurator import configure
from console import survive_closed_output
from fast.cpu import use_one_thread_if_small
from fast.cuda_graph import Graphs
from decode_state import DecodeState, prefill
from sampling import Sampling, choose, gumbel_noise

# keys of the command line, which main() reads
prompt = ""                                 # the question
target = "data/nano/target"                 # folder or hub id of the target
drafter = "data/nano/drafter-dflash"        # folder or hub id of the drafter
temperature = 0.0                           # of the target's choice; 0 is greedy
top_k = 0                                   # choose among this many likeliest tokens; 0: all
top_p = 1.0                                 # choose among the likeliest of this share; 1: all
seed = 0                                    # of the noise
draft_temperature = 0.0                     # above 0: guesses share the target's noise
raw = False                                 # continue the prompt as it is, no chat template
thinking = False                            # let a target that can think do so
max_new_tokens = 2048                       # at most; the target's context may end it before
device = "cuda" if torch.cuda.is_available() else "cpu"  # cpu or cuda
dtype = "float32" if device == "cpu" else "bfloat16"     # of weights and activations
compile = False                             # compile: a minute or two once, then faster
compare = True                              # also run the target alone, for speed and equality
color = sys.stdout.isatty()                 # accepted guesses green, the target's tokens blue

# --------------------------------------------------------------------------------------------------
# the round


class Decoder:
    """Decodes B sequences of at most `length` tokens, round by round.

    drafter         None: the target alone
    tokens_per_forward    K, the rows of a forward of the target. With a drafter it is its block size
    batch           B. Each of these *slots* holds a sequence at its own position, or is idle

    The bits of a sequence depend neither on its slot nor on the others: they share its forwards,
    and nothing else. A round has static shapes and keeps its positions in tensors. So on CUDA it is
    recorded as a graph (fast/cuda_graph.py), which all later rounds replay, also those of later prompts.
    So are the forwards that read a prompt, where they have one shape (prefill). A round waits
    for the device only once. A graph holds the addresses of its tensors, so what one round leaves
    to the next is written in place.
    """

    def __init__(self, target, drafter, length, tokens_per_forward, sampling, batch=1):
        self.target = target
        self.drafter = drafter
        self.sampling = sampling
        self.state = DecodeState(target, batch, length, tokens_per_forward)
        # Prompts are read one at a time into this state, and copied from there into a slot.
        self.reader = self.state
        if batch > 1:
            self.reader = DecodeState(target, 1, length, tokens_per_forward)
        self.layer_ids = ()                 # the target's layers that give the features
        if drafter is not None:
            assert tokens_per_forward == drafter.block_size, (tokens_per_forward, drafter.block_size)
            self.layer_ids = drafter.target_layer_ids
            self.cache = drafter.new_cache(batch, length)
        device = target.embed_tokens.weight.device
        self.block = torch.zeros(batch, tokens_per_forward, dtype=torch.long, device=device)
        self.anchor = torch.zeros(batch, dtype=torch.long, device=device)
        self.is_active = torch.zeros(batch, dtype=torch.long, device=device)  # 1, or 0 if idle
        self.offsets = torch.arange(tokens_per_forward, device=device)
        self.graphs = Graphs(device)        # of a round, and of the forwards that read prompts

    def round_kernels(self):
        """One round. Returns (B, 1 + K): the number of accepted guesses, and the target's choice
        after each of the K rows."""
        target, drafter, state = self.target, self.drafter, self.state
        sampling = self.sampling
        # What is at which position, p = state.position:
        #     position       p         p + 1     p + 2    ..   p + K - 1    p + K
        #     the block      anchor    guess 1   guess 2       guess K-1
        #     chosen by                row 0     row 1         row K-2      row K-1
        #     noise                    0         1             K-2          K-1
        noise = self.noise_at(state.position[:, None] + 1 + self.offsets)    # (B, K, V) or None

        # 1. draft: guesses for the K - 1 positions after the anchor. Without a drafter these rows
        #    stay token 0 for ever; they are there for the shape only.
        self.block[:, 0] = self.anchor
        if drafter is not None:
            self.block[:, 1:] = self.guesses(noise)

        # 2. verify: row k of the forward chooses the token after it
        features, hidden = target(self.block, state, self.layer_ids)
        logits = target.logits(hidden)                                       # (B, K, V)
        choices = choose(logits, sampling, sampling.temperature, noise)      # (B, K)

        # 3. accept: the guesses before the first wrong one, then the target's choice after them
        if drafter is None:
            accepted = torch.zeros_like(self.anchor)
        else:
            accepted = count_accepted(self.block[:, 1:], choices)
        self.anchor.copy_(choices.gather(1, accepted[:, None])[:, 0])

        # 4. commit the old anchor and the accepted guesses: accepted + 1 rows. (The new anchor goes
        #    through the target in the next round.) An idle slot runs along and commits nothing.
        #    The drafter's context grows by the same rows. But shapes must not vary, so it is given
        #    the features of all K rows. With two guesses accepted:
        #        p            p + 1        p + 2      p + 3       ..   p + K - 1
        #        anchor       guess 1      guess 2    new anchor
        #        features that stay                   features of rejected guesses
        #    The next round writes its block over the rejected ones before it reads anything, as it
        #    begins with the new anchor. commit comes last, since it moves p.
        if drafter is not None:
            drafter.write_context(features, self.cache, state.position)
        state.commit((accepted + 1) * self.is_active)
        return torch.cat((accepted[:, None], choices), 1)

    def guesses(self, noise):
        """The drafter's guesses (B, K-1): greedy, or chosen as the target chooses, and with the
        noise that it has at these positions."""
        logits = self.drafter.draft_logits(
            self.anchor, self.target, self.cache, self.state.position)
        if noise is None or self.sampling.draft_temperature == 0:
            return logits.argmax(-1)
        # the noise of the last position is for the target, which chooses one token more
        return choose(logits, self.sampling, self.sampling.draft_temperature, noise[:, :-1])

    def noise_at(self, positions):
        """Noise (..., V) for positions (...), or None where tokens are chosen greedily."""
        if self.sampling.temperature == 0:
            return None
        return gumbel_noise(self.sampling.seed, positions, self.target.config.vocab_size)

    def start_sequence(self, slot, prompt_ids):
        """Read a prompt into one of the slots, and leave the others as they are. Returns the
        target's token after it, which is the first anchor."""
        reader = self.reader
        prompt = torch.tensor([prompt_ids], device=self.anchor.device)
        features, logits = prefill(self.target, prompt, reader, self.layer_ids, self.graphs)
        if reader is not self.state:
            self.state.put(slot, reader)
        if self.drafter is not None:
            here = slice(slot, slot + 1)
            cache = [(keys[here], values[here]) for keys, values in self.cache]
            self.drafter.write_context(features, cache, torch.zeros_like(reader.position))
        noise = self.noise_at(reader.position)  # the token at this position is chosen now
        first = choose(logits, self.sampling, self.sampling.temperature, noise)
        self.anchor[slot] = first[0]
        self.is_active[slot] = 1
        return first.item()

    def release_slot(self, slot):
        """A sequence has ended: its slot is idle until the next prompt. It runs along at position
        0, as a block may no longer fit into the buffer where the sequence ended."""
        self.is_active[slot] = 0
        self.state.position[slot] = 0

    def run_round(self):
        """Run a round. Returns for each slot its tokens as a list, and how many were guesses."""
        outcome = self.graphs.run("round", self.round_kernels)
        outcomes = []
        for accepted, *choices in outcome.tolist():  # the one wait for the device
            # guesses that were accepted are the target's choices, so these hold all tokens
            outcomes.append((choices[:accepted + 1], accepted))
        return outcomes


def count_accepted(guesses, choices):
    """How many guesses (B, K-1) stand before the first that is not the target's choice, (B,).

    choices (B, K): the target's choice after each row. There is one more of them than guesses.
    """
    right = guesses == choices[:, :guesses.shape[1]]
    return right.long().cumprod(-1).sum(-1)

# --------------------------------------------------------------------------------------------------
# the loop


@dataclass
class RoundOutput:
    """What one forward of the target adds to the answer: tokens, how many of them were guesses, and
    whether the answer ends with them."""
    tokens: list
    accepted: int
    is_last: bool = False


def generate(target, drafter, prompt_ids, max_new_tokens, stops=(), tokens_per_forward=None,
             sampling=Sampling(), decoders=None):
    """Yields the answer in Pieces: first the one token that the prompt's forward chose, which has
    no guess in it, then a piece for each round. The arguments are those of generate_many.
    """
    prompts = [prompt_ids]
    for _, piece in generate_many(
            target, drafter, prompts, max_new_tokens, 1, stops, tokens_per_forward, sampling, decoders):
        yield piece


@torch.inference_mode()
def generate_many(target, drafter, prompts, max_new_tokens, slots, stops=(), tokens_per_forward=None,
                  sampling=Sampling(), decoders=None):
    """Decodes many prompts, up to `slots` at once. Yields (index of the prompt, RoundOutput).

    prompts         lists of token ids, each of at least one
    drafter         a DFlashDraftModel or whatever has its block_size, target_layer_ids, new_cache,
                    write_context and draft_logits; None: the target alone
    stops           token ids that end an answer
    tokens_per_forward    rows of a forward for each sequence; None: the drafter's block size, 16 without
                    a drafter. 1 is the fastest way for the target alone. Its products have another
                    shape and round differently, so it is equal up to rounding only, not to the bit.
    decoders        a dict that keeps Decoders, and with them their graphs, for later calls with the
                    same target; one generation at a time may use it

    An answer ends after a stop id, after max_new_tokens, or at the target's context limit. What a
    round returns past the end is dropped. For the same number of slots an answer has the same bits
    whatever the other prompts are. Raises ValueError for a prompt that cannot be continued, before
    any is read.
    """
    if tokens_per_forward is None:
        tokens_per_forward = drafter.block_size if drafter is not None else 16
    if decoders is None:
        decoders = {}

    # Prompts whose sequences need a buffer of the same length are decoded together. There are few
    # lengths, so buffers and graphs are shared.
    by_length = {}
    for index, prompt_ids in enumerate(prompts):
        try:
            answer = Request(index, prompt_ids, target.config, tokens_per_forward, max_new_tokens, stops)
        except ValueError as error:
            which = f"prompt {index}: " if len(prompts) > 1 else ""
            raise ValueError(f"{which}{error}") from None
        by_length.setdefault(answer.buffer_length, []).append(answer)
    for length, answers in by_length.items():
        key = (drafter, length, tokens_per_forward, sampling, slots)
        if key not in decoders:
            decoders[key] = Decoder(target, drafter, length, tokens_per_forward, sampling, slots)
        yield from decode_in_slots(decoders[key], answers, slots)


def decode_in_slots(decoder, waiting, slots):
    """Yields (index, RoundOutput) of the Requests that wait, in the order in which they become known."""
    for slot in range(slots):
        decoder.release_slot(slot)  # an earlier generation may have been left unfinished
    waiting = deque(waiting)
    running = {}  # the Request in each slot that is not idle
    while waiting or running:
        # a free slot reads the next prompt, or more of them where the first token ends an answer
        for slot in range(slots):
            while waiting and slot not in running:
                answer = waiting.popleft()
                token = decoder.start_sequence(slot, answer.prompt_ids)
                yield answer.index, answer.add([token], 0)
                if answer.has_ended:
                    decoder.release_slot(slot)
                else:
                    running[slot] = answer

        # one round for all; a slot whose answer has ended becomes free
        outcomes = decoder.run_round() if running else []
        for slot, (tokens, accepted) in enumerate(outcomes):
            if slot not in running:
                continue
            answer = running[slot]
            yield answer.index, answer.add(tokens, accepted)
            if answer.has_ended:
                decoder.release_slot(slot)
                del running[slot]


class Request:
    """An answer as it grows: how long it may become, and whether it has ended."""

    def __init__(self, index, prompt_ids, config, tokens_per_forward, max_new_tokens, stops):
        self.index = index
        self.prompt_ids = prompt_ids
        self.stops = stops
        self.has_ended = False
        # How many tokens may be returned: prompt, answer and one block have to fit into the
        # target's context. Forwards of one row leave room for 16 as well, so that answers end at
        # the same token as with blocks of 16.
        block_room = max(tokens_per_forward, 16)
        longest = config.max_position_embeddings
        self.tokens_left = min(max_new_tokens, longest - len(prompt_ids) - block_room)
        check_request(prompt_ids, max_new_tokens, self.tokens_left, config)
        length = round_up_to_power_of_two(len(prompt_ids) + self.tokens_left + block_room)
        self.buffer_length = min(max(256, length), longest)

    def add(self, tokens, accepted):
        """The RoundOutput of a round's tokens, without what lies past the limit or past a stop id."""
        tokens = tokens[:self.tokens_left]
        for i, token in enumerate(tokens):
            if token in self.stops:
                tokens = tokens[:i + 1]
                self.has_ended = True
                break
        self.tokens_left -= len(tokens)
        if self.tokens_left == 0:
            self.has_ended = True
        return RoundOutput(tokens, min(accepted, len(tokens)), self.has_ended)


def round_up_to_power_of_two(n):
    """The smallest power of two that is n or more."""
    return 1 << (n - 1).bit_length()


def check_request(prompt_ids, max_new_tokens, limit, config):
    """ValueError with one clear line for a prompt that cannot be continued."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens = {max_new_tokens}: ask for at least one token")
    if not prompt_ids:
        raise ValueError("the prompt is empty: give at least one token")
    if limit < 1:
        raise ValueError(f"the prompt has {len(prompt_ids)} tokens, too many for the target's "
                         f"context of {config.max_position_embeddings}, which also has to hold the "
                         "answer and one block")
    lowest, highest = min(prompt_ids), max(prompt_ids)
    if lowest < 0 or highest >= config.vocab_size:
        raise ValueError(f"token ids {lowest}..{highest} are outside the target's vocabulary of "
                         f"{config.vocab_size}: this tokenizer is not the target's")

# --------------------------------------------------------------------------------------------------
# the command line


class Generation(NamedTuple):
    """A whole answer: its tokens, the Pieces of its rounds, and the seconds of these rounds.

    The first token is in no round, as the prompt's forward chose it, and reading the prompt is not
    in the seconds. The drafter's first guess is timed like all others.
    """
    tokens: list
    rounds: list
    seconds: float


def timed_generate(target, drafter, prompt_ids, max_new_tokens, stops=(), tokens_per_forward=None,
                   sampling=Sampling(), decoders=None, on_piece=None):
    """generate() as a whole. on_piece(tokens so far, RoundOutput) is called after each piece."""
    tokens = []
    rounds = []
    seconds = 0.0
    generation = generate(
        target, drafter, prompt_ids, max_new_tokens, stops, tokens_per_forward, sampling, decoders)
    while True:
        began = time.perf_counter()
        piece = next(generation, None)
        elapsed = time.perf_counter() - began
        is_prompt = not tokens
        if not is_prompt:
            seconds += elapsed
        if piece is None:
            return Generation(tokens, rounds, seconds)
        if not is_prompt:
            rounds.append(piece)
        tokens.extend(piece.tokens)
        if on_piece is not None:
            on_piece(tokens, piece)


GREEN = "\033[32m"
BLUE = "\033[34m"
PLAIN = "\033[0m"


class Printer:
    """Streams the text of an answer: guesses in green, the target's own tokens in blue."""

    def __init__(self, tokenizer, color):
        self.tokenizer = tokenizer
        self.color = color
        self.printed = ""

    def __call__(self, tokens, piece):
        first = len(tokens) - len(piece.tokens)
        self.print_up_to(tokens[:first + piece.accepted], GREEN)
        self.print_up_to(tokens, BLUE)

    def print_up_to(self, tokens, paint):
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        if text.endswith("\ufffd"):  # half a character: wait for the rest of it
            return
        new = text[len(self.printed):]
        self.printed = text
        if self.color and new:
            new = f"{paint}{new}{PLAIN}"
        print(new, end="", flush=True)


def first_difference(a, b):
    """Index of the first token in which two lists differ; one may end early. None if equal."""
    for i, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return i
    if len(a) != len(b):
        return min(len(a), len(b))
    return None


def tokens_per_second(generation):
    return (len(generation.tokens) - 1) / max(generation.seconds, 1e-9)


def summary(ours, same_shape, one_row):
    """The line under the text, from one answer with the drafter and two of the target alone.

    same_shape: in forwards of as many rows, so it must be identical. one_row: one row a step, the
    speed to beat.
    """
    in_rounds = sum(len(piece.tokens) for piece in ours.rounds)
    tau = in_rounds / max(1, len(ours.rounds))
    speed = tokens_per_second(ours)
    line = (f"{len(ours.tokens)} tokens | {len(ours.rounds)} rounds | tau {tau:.2f} | "
            f"{speed:,.0f} tokens/s")
    if same_shape is None:
        return line
    alone = tokens_per_second(one_row)
    ratio = f"speedup {speed / alone:.2f}" if ours.rounds else "no round to time"
    place = first_difference(ours.tokens, same_shape.tokens)
    verdict = "identical" if place is None else f"first difference at token {place}"
    return (f"{line} | target alone, one row a step: {alone:,.0f} tokens/s, {ratio} | "
            f"target alone, same forwards: {verdict}")


def decode(config):
    """Load the pair, stream the answer, compare it; returns the summary."""
    if not config.prompt.strip():
        raise ValueError("the prompt is empty: give one, e.g. --prompt=\"What is 7 * 34?\"")
    if not is_unicode(config.prompt):
        raise ValueError("the prompt is no valid UTF-8: give text in that encoding")
    sampling = Sampling(config.temperature, config.top_k, config.top_p, config.seed,
                        config.draft_temperature)
    tokenizer = load_tokenizer(config.target)  # before the weights, as it fails sooner
    target = load_target(config.target, config.device, config.dtype)
    drafter = load_drafter(config.drafter, target.config, config.device, config.dtype)
    use_one_thread_if_small(target)
    if config.compile:
        target.compile_decoding()
        drafter.compile_decoding()
    if config.raw:
        prompt_ids = tokenizer.encode(config.prompt)
    else:
        prompt_ids = chat_prompt(tokenizer, config.prompt, config.thinking)
    request = (prompt_ids, config.max_new_tokens, stop_ids(tokenizer))
    decoders = {}

    if config.compare:
        # a few rounds of both that are timed, so that neither pays for the first use of a kernel
        for guesser, tokens_per_forward in ((drafter, None), (None, 1)):
            pieces = generate(target, guesser, *request, tokens_per_forward, sampling, decoders)
            list(itertools.islice(pieces, 4))

    printer = Printer(tokenizer, config.color)
    ours = timed_generate(
        target, drafter, *request, sampling=sampling, decoders=decoders, on_piece=printer)
    print("\n")
    if not config.compare:
        return summary(ours, None, None)
    # the target alone, which is slower
    print("now the target alone, for comparison; Ctrl-C leaves it out", flush=True)
    K = drafter.block_size
    try:
        with bar("same forwards", len(ours.tokens)) as show:
            # its time is not used, so it need not share the graphs of `decoders`
            same_shape = timed_generate(
                target, None, *request, tokens_per_forward=K, sampling=sampling, on_piece=show)
        with bar("one row a step", len(ours.tokens)) as show:
            one_row = timed_generate(
                target, None, *request, tokens_per_forward=1, sampling=sampling, decoders=decoders,
                on_piece=show)
    except KeyboardInterrupt:
        return summary(ours, None, None)
    return summary(ours, same_shape, one_row)


@contextlib.contextmanager
def bar(name, token_count):
    """Yields an on_piece that draws a progress bar, if somebody looks at a terminal."""
    with tqdm(total=token_count, desc=name, unit="token", disable=None) as progress:
        yield lambda tokens, piece: progress.update(len(piece.tokens))


def is_unicode(text):
    """Whether a command-line argument was valid UTF-8. Python marks bytes that were not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def main(argv=None):
    survive_closed_output()
    config = configure(globals(), argv)
    try:
        line = decode(config)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(line)


if __name__ == "__main__":
    main()
