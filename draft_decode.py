"""
Speculative decoding with a DFlash drafter, its output identical to the target's own to the bit.

    python draft_decode.py --prompt "What is 7 * 34?"
    python draft_decode.py --target=Qwen/Qwen3.5-0.8B --drafter=DIR --prompt "..."   # folders or hub ids

A round is four steps: (1) draft K - 1 guesses in one forward of the drafter, (2) verify them in one forward of the
target, (3) accept the guesses up to the first one that differs from the target's own token, then that token, (4)
commit. The target alone is the same loop without (1): its forwards have the same K rows, only the first is used. A row
of a product depends on its own inputs alone, not on its index nor on the other rows; so both give the same bits.
"""
import itertools
import sys
import time
from dataclasses import dataclass

import torch

from configurator import configure
from model import load_drafter
from target import DecodeState, chat_prompt, load_target, load_tokenizer, stop_ids

prompt = ""                                 # the question
target = "data/nano/target"                 # folder or hub id of the target
drafter = "data/nano/drafter-dflash"        # folder or hub id of the drafter
temperature = 0.0                           # of the target's choice; 0 is greedy
top_k = 0                                   # choose among so many likeliest tokens; 0: all
top_p = 1.0                                 # choose among the likeliest tokens that hold this share; 1: all
seed = 0                                    # of the noise
draft_temperature = 0.0                     # above 0: guesses share the target's noise, at this temperature
raw = False                                 # continue the prompt as it is, without the chat template
thinking = False                            # let a target that can think do so
max_new_tokens = 2048                       # tokens at most; the target's context may end it before
device = "cuda" if torch.cuda.is_available() else "cpu"  # cpu or cuda
dtype = "float32" if device == "cpu" else "bfloat16"     # of weights and activations
compile = False                             # compile the target's layers: a minute or two once, then faster
compare = True                              # also run the target alone: for the speedup, and to compare outputs
color = sys.stdout.isatty()                 # accepted guesses in green, the target's own tokens in blue

# ----------------------------------------------------------------------------------------------------------------------
# one rule for greedy and for sampling: the token at position t is argmax(logits_t / temperature + gumbel(seed, t)).
# Its distribution is the softmax (the Gumbel-max trick), and the noise depends on nothing but the seed and the absolute
# position; so verification compares tokens, and sampled output too is the target's own, whatever the drafter guesses.


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Guesses of the drafter take no noise at draft_temperature 0, else the target's own
    (Gumbel coupling: Daliri, Musco, Suresh, arXiv 2408.07978). ValueError for values out of range."""
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    draft_temperature: float = 0.0

    def __post_init__(self):
        fits = min(self.temperature, self.draft_temperature, self.top_k) >= 0 and 0 < self.top_p <= 1
        if not fits or abs(self.seed) >= 1 << 63:
            raise ValueError(f"{self}: temperatures and top_k are 0 or more, top_p is above 0 and at most 1, "
                             "seed fits in 64 bits")


def scramble(x):
    """A 64-bit mix of int64 x (SplitMix64: Steele, Lea, Flood, OOPSLA 2014); shifts made logical by a mask."""
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * -0x40a7b892e31b1a47
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * -0x6b2fb644ecceee15
    return x ^ (x >> 31 & (1 << 33) - 1)


def gumbel(seed, positions, count):
    """Standard Gumbel noise (R, count), fp32, of the positions (R,): a pure function of (seed, position, token id).

    The logarithms are taken in fp64, so that the last bit of the fp32 result does not depend on where in the tensor
    an element stands, as vectorised and scalar fp32 code on a CPU differ there.
    """
    key = scramble(scramble(torch.full_like(positions, seed)) + positions)
    bits = scramble(key[:, None] + torch.arange(count, device=positions.device) * -0x61c8864680b583eb)
    u = ((bits >> 12 & (1 << 52) - 1).double() + 0.5) * 2.0 ** -52  # never 0 nor 1, whose noise is infinite
    return (-(-u.log()).log()).float()


def keep(scores, top_k, top_p):
    """scores (..., V) with -inf for tokens outside the top_k likeliest and outside the smallest set, likeliest first,
    whose probability reaches top_p."""
    if 0 < top_k < scores.shape[-1]:
        scores = scores.masked_fill(scores < scores.topk(top_k)[0][..., -1:], -torch.inf)
    if top_p < 1:
        ordered, index = scores.sort(descending=True, stable=True)
        p = (ordered.double().softmax(-1) * 2.0 ** 52).long()  # integers, as sums of floats depend on their order
        outside = p.cumsum(-1) - p >= int(top_p * 2.0 ** 52)  # the tokens before it reach top_p without it
        scores = scores.masked_fill(torch.zeros_like(outside).scatter(-1, index, outside), -torch.inf)
    return scores


def score(logits, s, temperature, noise):
    """What the one rule takes the argmax of, (..., V): logits, or filtered logits / temperature + noise (..., V)."""
    return keep(logits.float() / temperature, s.top_k, s.top_p) + noise if temperature else logits


def choose(logits, s, temperature, noise):
    """Token ids (...) from logits (..., V) by the one rule; greedy is the case without noise."""
    return score(logits, s, temperature, noise).argmax(-1)

# ----------------------------------------------------------------------------------------------------------------------
# the loop


@dataclass
class Round:
    """What one round returned: its tokens, and how many of them were guesses of the drafter."""
    tokens: list
    accepted: int


def accept(guesses, choices):
    """How many guesses (B, K-1) stand before the first one that differs from the target's choice there, (B,)."""
    return (guesses == choices[:, :guesses.shape[1]]).long().cumprod(-1).sum(-1)


class Decoder:
    """One sequence of at most `length` tokens: states of target and drafter (None: the target alone), and the round.

    A round has static shapes and keeps every position in a tensor. So on CUDA the second one is captured as a graph,
    and all that follow, of later prompts too, are replays of it, with one wait for the device each.
    """
    def __init__(self, target, drafter, length, rows, s):
        self.target, self.drafter, self.s, like = target, drafter, s, target.embed_tokens.weight
        self.state, self.taps = DecodeState(target, 1, length, rows), drafter.taps if drafter else ()
        self.memory = drafter.new_state(1, length, like) if drafter else None
        self.block = torch.zeros(1, rows, dtype=torch.long, device=like.device)
        self.anchor, self.ahead = self.block[:, 0].clone(), torch.arange(1, rows + 1, device=like.device)
        self.graph, self.rounds = None, 0

    def noise(self, positions):
        return gumbel(self.s.seed, positions, self.target.config.vocab_size) if self.s.temperature else None

    def prefill(self, prompt_ids):
        """Read a prompt; returns the target's token after it, which is the first anchor."""
        self.state.reset()
        prompt = torch.tensor([prompt_ids], device=self.anchor.device)
        features, logits = self.target.prefill(prompt, self.state, self.taps)
        if self.drafter:
            self.drafter.remember(features, self.memory, 0)
        self.anchor.copy_(choose(logits, self.s, self.s.temperature, self.noise(self.state.pos[None])))
        return self.anchor.item()

    def round(self):
        """[accepted, the target's choice after each of the K rows], (1 + K,) on the device."""
        target, drafter, state, block, s = self.target, self.drafter, self.state, self.block, self.s
        # 1. draft: the drafter's guesses for the K - 1 positions after the anchor
        block[:, 0] = self.anchor
        noise = self.noise(state.pos + self.ahead)                                           # (K, V)
        if drafter:
            warm = s.draft_temperature if s.temperature else 0.0
            block[:, 1:] = drafter.propose(self.anchor, target, self.memory, state.pos,
                                           lambda logits: choose(logits, s, warm, noise[:-1] if warm else None))
        # 2. verify: one forward of the target over the anchor and the guesses; row k chooses the token after it
        features, logits = target(block, state, self.taps, rows=slice(None))
        choices = choose(logits, s, s.temperature, noise)                                    # (1, K)
        # 3. accept the guesses that are the target's own choice, then its choice after the last of them
        accepted = accept(block[:, 1:], choices) if drafter else torch.zeros_like(self.anchor)
        self.anchor.copy_(choices.gather(1, accepted[:, None])[:, 0])
        # 4. commit the anchor and the accepted guesses; the new anchor goes through the target in the next round
        if drafter:
            drafter.remember(features, self.memory, state.pos)
        state.commit(accepted[0] + 1)
        return torch.cat((accepted, choices[0]))

    def run(self):
        """A round's tokens as a list, and how many of them were guesses: the one wait for the device."""
        if self.graph is None and self.rounds and self.anchor.is_cuda:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.result = self.round()
        self.rounds += 1
        if self.graph is None:
            self.result = self.round()
        else:
            self.graph.replay()
        accepted, *tokens = self.result.tolist()
        return tokens[:accepted + 1], accepted


@torch.inference_mode()
def generate(target, drafter, prompt_ids, max_new_tokens, stop_ids=(), rows=None, s=Sampling(), decoders=None):
    """Yields a Round for each forward of the target, the prompt's own first (one token, no guess).

    prompt_ids: list of token ids, at least one. drafter: a DFlashDraftModel, anything with its block_size, taps and
    `new_state`, `remember` and `propose`, or None for the target alone. rows: of a forward; None: the drafter's block
    size, or 16 without one. s: how tokens are chosen. decoders: a dict that keeps Decoders, and with them their graphs,
    for later calls with the same models; one generation at a time may use it.
    rows=1 is the fastest target-only mode, whose products have another shape: equal up to rounding, not to the bit.
    Ends after a stop id, after max_new_tokens, or at the target's context limit; what lies past the end is dropped.
    """
    K, n = rows or (drafter.block_size if drafter else 16), len(prompt_ids)
    context = target.config.max_position_embeddings
    limit = min(max_new_tokens, context - n - max(K, 16))  # all modes end alike
    check_request(prompt_ids, max_new_tokens, limit, target.config)
    length = min(max(256, 1 << (n + limit + max(K, 16) - 1).bit_length()), context)  # few lengths: shared by prompts
    decoders, key = {} if decoders is None else decoders, (drafter, length, K, s)
    if key not in decoders:
        decoders[key] = Decoder(target, *key)
    decoder, sent, stop, done = decoders[key], 0, set(stop_ids), False
    tokens, accepted = [decoder.prefill(prompt_ids)], 0
    while not done:
        tokens = tokens[:limit - sent]
        end = next((i + 1 for i, t in enumerate(tokens) if t in stop), None)
        sent, done = sent + len(tokens), end is not None or sent + len(tokens) >= limit
        yield Round(tokens[:end], min(accepted, end or len(tokens)))
        tokens, accepted = decoder.run() if not done else ([], 0)


def check_request(prompt_ids, max_new_tokens, limit, config):
    """ValueError with one clear line for a prompt that cannot be continued."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens = {max_new_tokens}: ask for at least one token")
    if not prompt_ids:
        raise ValueError("the prompt is empty: give at least one token")
    if limit < 1:
        raise ValueError(f"the prompt has {len(prompt_ids)} tokens, too many for the target's context of "
                         f"{config.max_position_embeddings}, which also has to hold the answer and one block")
    if not 0 <= min(prompt_ids) <= max(prompt_ids) < config.vocab_size:
        raise ValueError(f"token ids {min(prompt_ids)}..{max(prompt_ids)} are outside the target's vocabulary of "
                         f"{config.vocab_size}: this tokenizer is not the target's")

# ----------------------------------------------------------------------------------------------------------------------
# command line

GREEN, BLUE, PLAIN = "\033[32m", "\033[34m", "\033[0m"


def run(target, drafter, prompt_ids, limit, stops, rows=None, s=Sampling(), on_round=None, decoders=None):
    """(tokens, rounds, seconds) of one generation, the drafter's first guess timed like all others, the prefill not.
    The rounds are those of draft and verify; the prompt's own token is the first of the tokens but in no round."""
    tokens, rounds, began, seconds = [], [], None, 0.0
    generation = generate(target, drafter, prompt_ids, limit, stops, rows, s, decoders)
    while True:
        began = time.perf_counter()
        result = next(generation, None)
        if tokens:
            seconds += time.perf_counter() - began
        if result is None:
            return tokens, rounds, seconds
        rounds += [result] if tokens else []
        tokens += result.tokens
        if on_round:
            on_round(tokens, result)


def printer(tokenizer, color):
    """A function for run()'s on_round that streams the text, guesses and the target's own tokens in two colours."""
    shown = ""

    def show(tokens, result):
        nonlocal shown
        first = len(tokens) - len(result.tokens)
        for end, paint in ((first + result.accepted, GREEN), (len(tokens), BLUE)):
            text = tokenizer.decode(tokens[:end], skip_special_tokens=True)
            if text.endswith("\ufffd"):  # half a character: wait for the rest of it
                continue
            new, shown = text[len(shown):], text
            print(f"{paint}{new}{PLAIN}" if color and new else new, end="", flush=True)
    return show


def first_difference(a, b):
    """Index of the first token that differs in two lists, one of which may end early; None if they are equal."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b))) if a != b else None


def summary(ours, alone, step):
    """The line under the text, from run()'s results with the drafter, target-only at the same shape, and by steps."""
    tokens, rounds, _ = ours
    tau = sum(len(r.tokens) for r in rounds) / max(1, len(rounds))
    speed = [(len(t) - 1) / max(s, 1e-9) for t, _, s in (ours, step or ours)]
    line = f"{len(tokens)} tokens | {len(rounds)} rounds | tau {tau:.2f} | {speed[0]:,.0f} tokens/s"
    if alone is None:
        return line
    i = first_difference(tokens, alone[0])
    verdict = "identical" if i is None else f"first difference at token {i}"
    ratio = f"speedup {speed[0] / speed[1]:.2f}" if rounds else "no round to time"
    return f"{line} | target alone {speed[1]:,.0f} tokens/s | {ratio} | {verdict}"


def main():
    configure(globals())
    try:
        if not prompt.strip():
            raise ValueError("the prompt is empty: give one, e.g. --prompt=\"What is 7 * 34?\"")
        s = Sampling(temperature, top_k, top_p, seed, draft_temperature)
        tokenizer = load_tokenizer(target)  # before the weights, as it fails sooner
        model = load_target(target, device, dtype)
        draft = load_drafter(drafter, model.config, device, dtype)
        if compile:
            model.compile()
            draft.compile_decoding()
        decoders = {}
        ids = tokenizer.encode(prompt) if raw else chat_prompt(tokenizer, prompt, thinking)
        stops = stop_ids(tokenizer)
        if compare:
            for arm, rows in ((draft, None), (None, 1)):  # warm-up, so that neither pays for the first use of a kernel
                list(itertools.islice(generate(model, arm, ids, max_new_tokens, stops, rows, s, decoders), 4))
        ours = run(model, draft, ids, max_new_tokens, stops, None, s, printer(tokenizer, color), decoders)
        alone = run(model, None, ids, max_new_tokens, stops, draft.block_size, s) if compare else None
        step = run(model, None, ids, max_new_tokens, stops, 1, s, decoders=decoders) if compare else None
    except ValueError as error:
        sys.exit(f"error: {error}")
    print("\n\n" + summary(ours, alone, step))


if __name__ == "__main__":
    main()
