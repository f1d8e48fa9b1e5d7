"""
Speculative decoding with a DFlash drafter. The output is the target's own.

    python draft_decode.py --prompt "What is 7 * 34?"
    python draft_decode.py --target=Qwen/Qwen3.5-0.8B --drafter=DIR --prompt "..."

A round has four steps:

    draft     One drafter forward guesses the K - 1 tokens after the newest one, the anchor.
    verify    One target forward over anchor and guesses gives the target's choice after each.
    accept    Keep all guesses before the first mismatch, then add the target's own choice. That
              choice is the next anchor.
    commit    The target keeps the old anchor and the accepted guesses, and forgets the others.

Every token is the target's choice. So the drafter changes only how many tokens a round returns.
Does the target alone choose the same tokens? Yes, bit for bit, if it also runs K-token forwards and
uses only the first output of each. Then all kernels are the same, and with these kernels a token's
bits depend neither on its place in the block nor on the tokens after it. The target alone is faster
with 1-token forwards, but then logits match only up to rounding, and a near-tie can flip.
docs/exactness.md has the full argument.
"""
import contextlib
import itertools
import numbers
import operator
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from tqdm import tqdm

import fast
from checkpoint import load_drafter, load_target
from configurator import check_ranges, configure, survive_closed_output
from decode_state import DecodeState
from fast.cuda_graph import Graphs
from fast.prefill import Prefill
from formats.files import LINE, one_line, printable
from sampling import SAMPLING_RANGES, Sampling, choose, gumbel_noise
from tokenizer import chat_prompt, load_tokenizer, stop_ids

# keys of the command line, which main() reads
prompt = ""                                 # the question
target = "data/nano/target"                 # folder or hub id of the target
drafter = "data/nano/drafter-dflash"        # folder or hub id of the drafter
temperature = 0.0                           # for the target's choice; 0 is greedy
top_k = 0                                   # choose among this many most likely tokens; 0: all
top_p = 1.0                                 # nucleus sampling: smallest set with this probability
seed = 0                                    # for the sampling noise
draft_temperature = 0.0                     # above 0: guesses share the target's noise
raw = False                                 # continue the prompt as it is, no chat template
thinking = False                            # let a target that can think do so
max_new_tokens = 2048                       # upper limit; the context length may end it sooner
device = "cuda" if torch.cuda.is_available() else "cpu"  # cpu or cuda
dtype = "float32" if device == "cpu" else "bfloat16"     # of weights and activations
compile = False                             # compile: a minute or two once, then faster
compare = True                              # also run the target alone, for speed and equality
color = sys.stdout.isatty()                 # accepted guesses green, the target's tokens blue

RANGES = SAMPLING_RANGES | {"max_new_tokens": (1, 10**9)}

# --------------------------------------------------------------------------------------------------
# the round


class Decoder:
    """Decodes B sequences of at most `length` tokens, round by round.

    drafter               None: the target alone
    tokens_per_forward    K, the tokens per target forward; with a drafter, its block size
    batch                 B. Each of the B *slots* holds a sequence at its own position, or is idle

    A sequence's output bits do not depend on its slot or on the other sequences. Sequences
    only share forwards.

    A round has static shapes and keeps its positions in tensors. So on a GPU it is recorded once as
    a CUDA graph (fast/cuda_graph.py), which all later rounds replay. Graphs hold the addresses of
    tensors, so tensors that carry state from round to round are updated in place. Each round syncs
    with the GPU once.
    """

    def __init__(self, target, drafter, *, length, tokens_per_forward, sampling, batch=1):
        self.target = target
        self.drafter = drafter
        self.sampling = sampling
        self.state = DecodeState(target, batch, length, tokens_per_forward)
        self.layer_ids = ()                 # the target's layers that give the features
        self.cache = None                   # the drafter's
        if drafter is not None:
            assert tokens_per_forward == drafter.block_size
            self.layer_ids = drafter.target_layer_ids
            self.cache = drafter.new_cache(batch, length)
        device = target.embed_tokens.weight.device
        self.block = torch.zeros(batch, tokens_per_forward, dtype=torch.long, device=device)
        self.anchor = torch.zeros(batch, dtype=torch.long, device=device)
        self.is_active = torch.zeros(batch, dtype=torch.long, device=device)  # 1, or 0 if idle
        self.sequence_ids = torch.zeros(batch, dtype=torch.long, device=device)  # for the noise
        self.offsets = torch.arange(tokens_per_forward, device=device)
        self.is_finite = [True] * batch     # per slot: were the logits of its last token finite?
        self.graphs = Graphs(device)
        self.prefill = Prefill(self)

    def round_kernels(self):
        """One round on the device. Returns (B, 2 K + 1): the number of accepted guesses, the choice
        of the target after each of the K tokens, the K - 1 guesses, and whether logits are finite.

        Positions, with p = state.position:

            position       p         p + 1     p + 2    ..   p + K - 1    p + K
            the block      anchor    guess 1   guess 2       guess K-1
            target's choice          token 0   token 1       token K-2    token K-1
            noise                    0         1             K-2          K-1
        """
        positions = self.state.position[:, None] + 1 + self.offsets          # (B, K)
        noise = self.noise_at(self.sequence_ids[:, None], positions)         # (B, K, V) or None
        self.draft(noise)
        features, choices, are_finite = self.verify(noise)
        accepted = self.accept(choices)
        self.commit(accepted, features)
        is_finite = are_finite.gather(1, accepted[:, None])
        return torch.cat((accepted[:, None], choices, self.block[:, 1:], is_finite), 1)

    def draft(self, noise):
        """Fill the block: the anchor and K - 1 guesses. Without a drafter, these stay 0."""
        self.block[:, 0] = self.anchor
        if self.drafter is None:
            return
        logits = self.drafter.draft_logits(
            self.anchor, self.target, self.cache, self.state.position)       # (B, K-1, V)
        if noise is None or self.sampling.draft_temperature == 0:
            self.block[:, 1:] = logits.argmax(-1)
        else:
            # the target's own noise, without the last position, where only the target chooses
            self.block[:, 1:] = choose(
                logits, self.sampling, self.sampling.draft_temperature, noise[:, :-1])

    def verify(self, noise):
        """The target's forward over the block: features, its choice after each token (B, K), and
        whether the logits of these choices are finite."""
        features, hidden = self.target(self.block, self.state, self.layer_ids)
        logits = self.target.logits(hidden)                                  # (B, K, V)
        choices = choose(logits, self.sampling, self.sampling.temperature, noise)
        return features, choices, chosen_are_finite(logits, choices)

    def accept(self, choices):
        """How many guesses are accepted (B,). The choice after them is the next anchor."""
        if self.drafter is None:
            accepted = torch.zeros_like(self.anchor)
        else:
            accepted = count_accepted(self.block[:, 1:], choices)
        self.anchor.copy_(choices.gather(1, accepted[:, None])[:, 0])
        return accepted

    def commit(self, accepted, features):
        """Add the old anchor and the accepted guesses to the sequence: accepted + 1 tokens.

        The target processes the new anchor in the next round. The drafter's context grows by these
        tokens too, but shapes are static, so the drafter gets the features of all K tokens. Idle
        slots commit nothing. With two accepted guesses:

            p            p + 1        p + 2      p + 3       ..   p + K - 1
            anchor       guess 1      guess 2    new anchor
            features that stay                   features of rejected guesses

        The next block starts at the new anchor, so it overwrites rejected features before anything
        reads them. state.commit() is last because it changes p.
        """
        if self.drafter is not None:
            self.drafter.write_context(features, self.cache, self.state.position)
        self.state.commit((accepted + 1) * self.is_active)

    def noise_at(self, sequence_ids, positions):
        """Noise (..., V) for positions (...) of sequences, or None if choices are greedy."""
        if self.sampling.temperature == 0:
            return None
        vocab_size = self.target.config.vocab_size
        return gumbel_noise(self.sampling.seed, sequence_ids, positions, vocab_size)

    def start_sequences(self, prompts, sequence_ids):
        """Prefill prompts {slot: token ids} into free slots. sequence_ids: {slot: int}.

        Returns {slot: the target's choice after the prompt}, which is also the first anchor.
        """
        first_tokens = {}
        for slots, logits in self.prefill.run(prompts):
            ids = [sequence_ids[slot] for slot in slots]
            self.sequence_ids[slots] = torch.tensor(ids, device=self.anchor.device)
            # state.position is the index of the token that is chosen now
            noise = self.noise_at(self.sequence_ids[slots], self.state.position[slots])
            choices = choose(logits, self.sampling, self.sampling.temperature, noise)
            self.anchor[slots] = choices
            self.is_active[slots] = 1
            are_finite = chosen_are_finite(logits, choices)
            results = torch.stack((choices, are_finite), 1).tolist()
            for slot, (token, is_finite) in zip(slots, results):
                first_tokens[slot] = token
                self.is_finite[slot] = is_finite
        return first_tokens

    def release_slot(self, slot):
        """Free a slot. It keeps running at position 0, because a block at its old position might
        not fit into the buffer."""
        self.is_active[slot] = 0
        self.state.position[slot] = 0

    def run_round(self):
        """Run a round. Returns (tokens, rejected guesses) for each slot, both lists. All tokens but
        the last are accepted guesses."""
        result = self.graphs.run("round", self.round_kernels)
        K = self.block.shape[1]
        outputs = []
        for slot, (accepted, *rest) in enumerate(result.tolist()):  # the one sync with the device
            choices = rest[:K]
            guesses = rest[K:-1]
            self.is_finite[slot] = rest[-1]
            # accepted guesses equal the target's choices, so the choices contain all tokens
            rejected = guesses[accepted:] if self.drafter is not None else []
            outputs.append((choices[:accepted + 1], rejected))
        return outputs


def count_accepted(guesses, choices):
    """Number of leading guesses (B, K-1) that equal the target's choices (B, K), as (B,).

    choices has one entry more, the choice after the last guess.
    """
    right = guesses == choices[:, :guesses.shape[1]]
    return right.long().cumprod(-1).sum(-1)


def chosen_are_finite(logits, choices):
    """Whether the logits of the chosen tokens are finite, (...) from logits (..., V).

    An argmax always chooses NaN or +infinity if there is one, so other logits need no check. The
    host gets this flag together with the tokens, without another sync.
    """
    return logits.gather(-1, choices[..., None])[..., 0].isfinite()

# --------------------------------------------------------------------------------------------------
# the loop


@dataclass
class RoundOutput:
    """The result of a round for one answer. The first output of an answer comes from the prefill.

    tokens      new tokens; those after a stop id or past the limit are dropped
    accepted    how many of the tokens were guesses
    rejected    the guesses that were not accepted, the first mismatch first
    seconds     wall-clock time of the round, divided by the number of sequences in it
    is_last     whether the answer ends here
    is_finite   false if the target's logits were NaN or infinite, so the tokens mean nothing
    """
    tokens: list
    accepted: int = 0
    rejected: list = field(default_factory=list)
    seconds: float = field(default=0.0, compare=False)
    is_last: bool = False
    is_finite: bool = True


def generate(target, drafter, prompt_ids, *, max_new_tokens=2048, stop_token_ids=(),
             tokens_per_forward=None, sampling=Sampling(), sequence_id=0, decoders=None):
    """Yields the answer to one prompt as RoundOutputs. For the arguments see generate_many()."""
    outputs = generate_many(
        target, drafter, [prompt_ids], slots=1, max_new_tokens=max_new_tokens,
        stop_token_ids=stop_token_ids, tokens_per_forward=tokens_per_forward, sampling=sampling,
        sequence_ids=[sequence_id], decoders=decoders)
    for _, output in outputs:
        yield output


@torch.inference_mode()
def generate_many(target, drafter, prompts, *, slots, max_new_tokens=2048, stop_token_ids=(),
                  tokens_per_forward=None, sampling=Sampling(), sequence_ids=None, decoders=None):
    """Decodes many prompts, up to `slots` at once. Yields (index of the prompt, RoundOutput).

    drafter               a DFlashDraftModel, or an object with block_size, target_layer_ids,
                          new_cache(), write_context(), and draft_logits(); None: the target alone
    prompts               token ids of each prompt: lists, tensors, or arrays
    stop_token_ids        an id or a collection of ids that end an answer
    tokens_per_forward    None: the drafter's block size, or 16 without a drafter. 1 is the fastest
                          mode of the target alone. Its matmuls have a different shape, so its
                          logits match only up to rounding.
    sequence_ids          an int for each prompt, part of the seed of its noise. None: its index
    decoders              a dict that keeps Decoders, and with them their CUDA graphs, for later
                          calls with the same target; only one generation at a time can use it

    An answer ends after a stop id, after max_new_tokens, or at the target's context limit. For a
    fixed number of slots, an answer is bitwise independent of the other prompts. Raises ValueError
    for a prompt that cannot be continued, before any prompt is prefilled.
    """
    if tokens_per_forward is None:
        tokens_per_forward = drafter.block_size if drafter is not None else 16
    if decoders is None:
        decoders = {}
    for name, count in (("max_new_tokens", max_new_tokens), ("slots", slots),
                        ("tokens_per_forward", tokens_per_forward)):
        if not isinstance(count, numbers.Integral) or count < 1:
            raise ValueError(f"{name} = {count!r:.60}: use an integer of at least 1")
    if sequence_ids is None:
        sequence_ids = range(len(prompts))
    if isinstance(stop_token_ids, int) or getattr(stop_token_ids, "ndim", 1) == 0:
        stop_token_ids = [stop_token_ids]
    stops = set(token_list(stop_token_ids, "stop_token_ids"))
    unknown = [token for token in stops if not 0 <= token < target.config.vocab_size]
    if unknown:
        raise ValueError(f"stop token id {unknown[0]} is outside the target's vocabulary of "
                         f"{target.config.vocab_size}: use the target's own tokenizer")

    # Prompts with the same buffer length are decoded together. There are few lengths, so buffers
    # and graphs are shared.
    by_length = {}
    for index, prompt_ids in enumerate(prompts):
        try:
            request = Request(
                index, prompt_ids, sequence_id=sequence_ids[index], stops=stops,
                max_new_tokens=max_new_tokens, config=target.config,
                tokens_per_forward=tokens_per_forward)
        except ValueError as error:
            which = f"prompt {index}: " if len(prompts) > 1 else ""
            raise ValueError(f"{which}{error}") from None
        by_length.setdefault(request.buffer_length, []).append(request)
    for length, requests in by_length.items():
        key = (drafter, length, tokens_per_forward, sampling, slots)
        if key not in decoders:
            decoders[key] = Decoder(
                target, drafter, length=length, tokens_per_forward=tokens_per_forward,
                sampling=sampling, batch=slots)
        yield from decode_in_slots(decoders[key], requests, slots)


def decode_in_slots(decoder, waiting, slots):
    """Yields (index, RoundOutput) of waiting Requests, each as soon as it is ready."""
    for slot in range(slots):
        decoder.release_slot(slot)  # an earlier generation may have been left unfinished
    waiting = deque(waiting)
    running = {}  # the Request in each busy slot
    while waiting or running:
        # fill free slots; a prompt whose first token ends its answer leaves the slot free
        while waiting and len(running) < slots:
            free = [slot for slot in range(slots) if slot not in running]
            starting = {slot: waiting.popleft() for slot in free[:len(waiting)]}
            began = time.perf_counter()
            prompts = {slot: request.prompt_ids for slot, request in starting.items()}
            sequence_ids = {slot: request.sequence_id for slot, request in starting.items()}
            first_tokens = decoder.start_sequences(prompts, sequence_ids)
            seconds = (time.perf_counter() - began) / len(starting)
            for slot, token in first_tokens.items():
                request = starting[slot]
                yield request.index, request.add([token], [], seconds, decoder.is_finite[slot])
                if request.has_ended:
                    decoder.release_slot(slot)
                else:
                    running[slot] = request
        if not running:
            continue

        # one round for all sequences; a sequence that ends frees its slot
        began = time.perf_counter()
        outputs = decoder.run_round()
        seconds = (time.perf_counter() - began) / len(running)
        for slot, (tokens, rejected) in enumerate(outputs):
            if slot not in running:
                continue
            request = running[slot]
            yield request.index, request.add(tokens, rejected, seconds, decoder.is_finite[slot])
            if request.has_ended:
                decoder.release_slot(slot)
                del running[slot]


class Request:
    """A prompt, how many more tokens its answer may get, and whether the answer has ended."""

    def __init__(self, index, prompt_ids, *, sequence_id, stops, max_new_tokens, config,
                 tokens_per_forward):
        self.index = index
        self.sequence_id = sequence_id
        self.prompt_ids = token_list(prompt_ids)
        self.stops = stops
        self.has_ended = False
        # Prompt, answer, and one block must fit into the target's context. 1-token forwards reserve
        # a block of 16 too, so that answers end at the same token as with blocks of 16.
        block_room = max(tokens_per_forward, 16)
        longest = config.max_position_embeddings
        self.tokens_left = min(max_new_tokens, longest - len(self.prompt_ids) - block_room)
        check_request(self.prompt_ids, self.tokens_left, config)
        needed = len(self.prompt_ids) + self.tokens_left + block_room
        self.buffer_length = min(max(256, round_up_to_power_of_two(needed)), longest)

    def add(self, tokens, rejected, seconds, is_finite):
        """The RoundOutput for a round's tokens. Tokens past the end are dropped."""
        accepted = len(tokens) - 1
        tokens = tokens[:self.tokens_left]
        for i, token in enumerate(tokens):
            if token in self.stops:
                tokens = tokens[:i + 1]
                self.has_ended = True
                break
        self.tokens_left -= len(tokens)
        if self.tokens_left == 0:
            self.has_ended = True
        accepted = min(accepted, len(tokens))
        return RoundOutput(tokens, accepted, rejected, seconds, self.has_ended, bool(is_finite))


def token_list(token_ids, name="a prompt"):
    """Token ids as a flat list of ints, from a list, a tensor, or an array."""
    if hasattr(token_ids, "tolist"):
        token_ids = token_ids.tolist()
    try:
        return [operator.index(token) for token in token_ids]  # refuses 1.5 and text
    except TypeError:
        raise ValueError(f"{name} must be one flat sequence of token ids") from None


def round_up_to_power_of_two(n):
    """The smallest power of two that is n or more."""
    return 1 << (n - 1).bit_length()


def check_request(prompt_ids, limit, config):
    """ValueError with one clear line for a prompt that cannot be continued."""
    if not prompt_ids:
        raise ValueError("the prompt is empty: give at least one token")
    if limit < 1:
        raise ValueError(f"prompt too long: {len(prompt_ids)} tokens, but the context of "
                         f"{config.max_position_embeddings} must also hold the answer and one "
                         "block")
    lowest, highest = min(prompt_ids), max(prompt_ids)
    if lowest < 0 or highest >= config.vocab_size:
        raise ValueError(f"token ids {lowest}..{highest} are not all in the target's vocabulary of "
                         f"{config.vocab_size}: use the target's own tokenizer")


class Generation(NamedTuple):
    """A whole answer: its tokens, the RoundOutputs of its rounds, and the seconds of these rounds.

    The prefill produces the first token. So that token is in no round, and the time of the prefill
    is not in the seconds.
    """
    tokens: list
    rounds: list
    seconds: float


def collect(outputs, on_output=None):
    """The Generation of all outputs of generate(). on_output(tokens so far, output) sees each."""
    tokens = []
    rounds = []
    for output in outputs:
        if tokens:
            rounds.append(output)
        tokens.extend(output.tokens)
        if on_output is not None:
            on_output(tokens, output)
    seconds = sum(output.seconds for output in rounds)
    return Generation(tokens, rounds, seconds)

# --------------------------------------------------------------------------------------------------
# the command line

GREEN = "\033[32m"
BLUE = "\033[34m"
PLAIN = "\033[0m"


class Printer:
    """Streams the text of an answer: guesses in green, the target's own tokens in blue."""

    def __init__(self, tokenizer, color):
        self.tokenizer = tokenizer
        self.color = color
        self.printed = 0    # tokens

    def __call__(self, tokens, output):
        first = len(tokens) - len(output.tokens)
        self.print_up_to(tokens[:first + output.accepted], GREEN)
        self.print_up_to(tokens, BLUE)

    def print_up_to(self, tokens, paint):
        # only new tokens, so that the work per round does not grow with the answer
        new = self.tokenizer.decode(tokens[self.printed:], skip_special_tokens=True)
        if new.endswith("\ufffd"):  # half a character: wait for the rest of it
            return
        new = printable(new)
        self.printed = len(tokens)
        if self.color and new:
            new = f"{paint}{new}{PLAIN}"
        print(new, end="", flush=True)


def first_difference(a, b):
    """Index of the first token in which two lists differ; None if they are equal."""
    for i, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return i
    if len(a) != len(b):
        return min(len(a), len(b))
    return None


def tokens_per_second(generation):
    return (len(generation.tokens) - 1) / max(generation.seconds, 1e-9)


def summary(ours, same_shape, one_token):
    """The line under the text, for one answer with the drafter and two of the target alone.

    same_shape: the target alone in K-token forwards, which must equal `ours`. one_token: the target
    alone in 1-token forwards, the speed to beat.
    """
    in_rounds = sum(len(output.tokens) for output in ours.rounds)
    tau = in_rounds / max(1, len(ours.rounds))
    speed = tokens_per_second(ours)
    line = (f"{len(ours.tokens)} tokens | {len(ours.rounds)} rounds | tau {tau:.2f} | "
            f"{speed:,.0f} tokens/s")
    if same_shape is None:
        return line
    alone = tokens_per_second(one_token)
    ratio = f"speedup {speed / alone:.2f}x" if ours.rounds else "no round to time"
    place = first_difference(ours.tokens, same_shape.tokens)
    verdict = "identical" if place is None else f"first difference at token {place}"
    return (f"{line} | without drafter (1-token forwards): {alone:,.0f} tokens/s | {ratio} | "
            f"output vs. target alone (same forwards): {verdict}")


def decode(config):
    """Load the pair, stream the answer, compare it; returns the summary."""
    if not config.prompt.strip():
        raise ValueError("the prompt is empty: give one, e.g. --prompt=\"What is 7 * 34?\"")
    try:
        config.prompt.encode()
    except UnicodeEncodeError:  # Python marks the bytes that were not UTF-8
        raise ValueError("the prompt is not valid UTF-8: give text in that encoding") from None
    check_ranges(config, RANGES)
    sampling = Sampling(config.temperature, config.top_k, config.top_p, config.seed,
                        config.draft_temperature)
    tokenizer = load_tokenizer(config.target)  # before the weights, to fail sooner
    target = load_target(config.target, config.device, config.dtype)
    drafter = load_drafter(config.drafter, target.config, config.device, config.dtype)
    fast.prepare_for_decoding(target, drafter, compile=config.compile)
    if config.raw:
        prompt_ids = tokenizer.encode(config.prompt)
    else:
        prompt_ids = chat_prompt(tokenizer, config.prompt, config.thinking)
    decoders = {}

    def run(drafter, tokens_per_forward=None):
        outputs = generate(
            target, drafter, prompt_ids, max_new_tokens=config.max_new_tokens,
            stop_token_ids=stop_ids(tokenizer), tokens_per_forward=tokens_per_forward,
            sampling=sampling, decoders=decoders)
        return check_finite(outputs, config.target)

    if config.compare:
        # warm up both timed modes with a few rounds
        for outputs in (run(drafter), run(None, 1)):
            list(itertools.islice(outputs, 4))

    ours = collect(run(drafter), Printer(tokenizer, config.color))
    print("\n")
    if not config.compare:
        return summary(ours, None, None)
    print("running the target alone for comparison (Ctrl-C to skip)", flush=True)
    try:
        with bar("same forwards", len(ours.tokens)) as show:
            same_shape = collect(run(None, drafter.block_size), show)
        with bar("1-token forwards", len(ours.tokens)) as show:
            one_token = collect(run(None, 1), show)
    except KeyboardInterrupt:
        return summary(ours, None, None)
    return summary(ours, same_shape, one_token)


def check_finite(outputs, name):
    """Yields outputs of generate(). ValueError if logits of the target `name` are not finite."""
    for output in outputs:
        if not output.is_finite:
            raise ValueError(f"the target in {name!r:.100} gives logits that are NaN or infinite: "
                             "its weights or its config.json are broken")
        yield output


@contextlib.contextmanager
def bar(name, token_count):
    """Yields an on_output that draws a progress bar, if stderr is a terminal."""
    with tqdm(total=token_count, desc=name, unit="token", disable=None) as progress:
        yield lambda tokens, output: progress.update(len(output.tokens))


def main(argv=None):
    survive_closed_output()
    config = configure(globals(), argv)
    try:
        line = decode(config)
    except ValueError as error:
        sys.exit(one_line(f"error: {error}", LINE))
    print(line)


if __name__ == "__main__":
    main()
