"""
Speculative decoding with a DFlash drafter, its output identical to the target's own to the bit.

    python draft_decode.py --prompt "What is 7 * 34?"
    python draft_decode.py --target=Qwen/Qwen3.5-0.8B --drafter=DIR --prompt "..."   # folders or hub ids

A round is four steps: (1) draft K - 1 guesses in one forward of the drafter, (2) verify them in one forward of the
target, (3) accept the guesses up to the first one that differs from the target's own token, then that token, (4)
commit. The target alone is the same loop without (1): its forwards have the same K rows, only the first is used. A row
of a product depends on its own inputs alone, not on its index nor on the other rows; so both give the same bits.
"""
import sys
import time
from dataclasses import dataclass

import torch

from configurator import configure
from model import load_drafter
from target import chat_prompt, load_target, load_tokenizer, stop_ids

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
compare = True                              # also run the target alone: for the speedup, and to compare outputs
color = sys.stdout.isatty()                 # accepted guesses in green, the target's own tokens in blue

# ----------------------------------------------------------------------------------------------------------------------
# one rule for greedy and for sampling: the token at position t is argmax(logits_t / temperature + gumbel(seed, t)).
# Its distribution is the softmax (the Gumbel-max trick), and the noise depends on nothing but the seed and the absolute
# position; so verification compares tokens, and sampled output too is the target's own, whatever the drafter guesses.


@dataclass
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
        ordered, index = scores.sort(descending=True)
        p = ordered.softmax(-1)
        outside = p.cumsum(-1) - p >= top_p  # the tokens before it reach top_p without it
        scores = scores.masked_fill(torch.zeros_like(outside).scatter(-1, index, outside), -torch.inf)
    return scores


def choose(logits, s, temperature, noise):
    """Token ids (...) from logits (..., V) by the one rule; greedy is the case without noise."""
    if not temperature:
        return logits.argmax(-1)
    return (keep(logits.float() / temperature, s.top_k, s.top_p) + noise).argmax(-1)

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


@torch.inference_mode()
def generate(target, drafter, prompt_ids, max_new_tokens, stop_ids=(), rows=None, s=Sampling()):
    """Yields a Round for each forward of the target, the prompt's own first (one token, no guess).

    prompt_ids: list of token ids, at least one. drafter: a DFlashDraftModel, anything with its block_size, taps and
    `new_state`, `remember` and `propose`, or None for the target alone. rows: of a forward; None: the drafter's block
    size, or 16 without one. s: how tokens are chosen.
    rows=1 is the fastest target-only mode, whose products have another shape: equal up to rounding, not to the bit.
    Ends after a stop id, after max_new_tokens, or at the target's context limit; what lies past the end is dropped.
    """
    K = rows or (drafter.block_size if drafter else 16)
    n, device = len(prompt_ids), target.embed_tokens.weight.device
    limit = min(max_new_tokens, target.config.max_position_embeddings - n - max(K, 16))  # all modes end alike
    check_request(prompt_ids, max_new_tokens, limit, target.config)
    prompt = torch.tensor([prompt_ids], device=device)
    taps = drafter.taps if drafter else ()
    state, features, logits = target.prefill(prompt, n + limit + K, taps, K)
    if drafter:
        memory = drafter.new_state(1, n + limit + K, target.embed_tokens.weight)
        drafter.remember(features, memory, 0)
    ahead, V = torch.arange(1, K + 1, device=device), target.config.vocab_size
    noise = gumbel(s.seed, state.pos[None], V) if s.temperature else None
    anchor, sent, stop = choose(logits, s, s.temperature, noise), 0, set(stop_ids)           # (1,)
    block = anchor.new_zeros(1, K)

    def finish(tokens, accepted):
        """The round, cut at a stop id or the limit, and whether that was the end."""
        tokens = tokens[:limit - sent]
        end = next((i + 1 for i, t in enumerate(tokens) if t in stop), None)
        return Round(tokens[:end], min(accepted, end or len(tokens))), end is not None or sent + len(tokens) >= limit

    result, done = finish(anchor.tolist(), 0)
    while True:
        yield result
        if done:
            return
        sent += len(result.tokens)
        # 1. draft: the drafter's guesses for the K - 1 positions after the anchor
        block[:, 0] = anchor
        noise = gumbel(s.seed, state.pos + ahead, V) if s.temperature else None              # (K, V)
        if drafter:
            warm = s.draft_temperature if s.temperature else 0.0
            block[:, 1:] = drafter.propose(anchor, target, memory, state.pos,
                                           lambda logits: choose(logits, s, warm, noise[:-1] if warm else None))
        # 2. verify: one forward of the target over the anchor and the guesses; row k chooses the token after it
        features, logits = target(block, state, taps, rows=slice(None))
        choices = choose(logits, s, s.temperature, noise)                                    # (1, K)
        # 3. accept the guesses that are the target's own choice, then its choice after the last of them
        accepted = accept(block[:, 1:], choices) if drafter else torch.zeros_like(anchor)
        anchor = choices.gather(1, accepted[:, None])[:, 0]
        # 4. commit the anchor and the accepted guesses; the new anchor goes through the target in the next round
        if drafter:
            drafter.remember(features, memory, state.pos)
        state.commit(accepted[0] + 1)
        count, *tokens = torch.cat((accepted, choices[0])).tolist()  # the round's one wait for the device
        result, done = finish(tokens[:count + 1], count)


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


def run(target, drafter, prompt_ids, limit, stops, rows=None, s=Sampling(), on_round=None):
    """(tokens, rounds, seconds) of one generation, the drafter's first guess timed like all others, the prefill not.
    The rounds are those of draft and verify; the prompt's own token is the first of the tokens but in no round."""
    tokens, rounds, began, seconds = [], [], None, 0.0
    generation = generate(target, drafter, prompt_ids, limit, stops, rows, s)
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


def summary(ours, alone, step):
    """The line under the text, from run()'s results with the drafter, target-only at the same shape, and by steps."""
    tokens, rounds, _ = ours
    tau = sum(len(r.tokens) for r in rounds) / max(1, len(rounds))
    speed = [(len(t) - 1) / max(s, 1e-9) for t, _, s in (ours, step or ours)]
    line = f"{len(tokens)} tokens | {len(rounds)} rounds | tau {tau:.2f} | {speed[0]:,.0f} tokens/s"
    if alone is None:
        return line
    same = next((i for i, (a, b) in enumerate(zip(tokens, alone[0])) if a != b), min(len(tokens), len(alone[0])))
    verdict = "identical" if tokens == alone[0] else f"first difference at token {same}"
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
        ids = tokenizer.encode(prompt) if raw else chat_prompt(tokenizer, prompt, thinking)
        stops = stop_ids(tokenizer)
        if compare:
            for arm, rows in ((draft, None), (None, 1)):  # warm-up, so that neither pays for the first use of a kernel
                run(model, arm, ids, 8, stops, rows, s)
        ours = run(model, draft, ids, max_new_tokens, stops, s=s, on_round=printer(tokenizer, color))
        alone = run(model, None, ids, max_new_tokens, stops, draft.block_size, s) if compare else None
        step = run(model, None, ids, max_new_tokens, stops, 1, s) if compare else None
    except ValueError as error:
        sys.exit(f"error: {error}")
    print("\n\n" + summary(ours, alone, step))


if __name__ == "__main__":
    main()
