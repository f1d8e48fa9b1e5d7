"""
Speculative decoding with a DFlash drafter, its output identical to the target's own to the bit.

    python draft_decode.py --prompt "What is 7 * 34?"
    python draft_decode.py --target=DIR --drafter=DIR --prompt "..."      # other checkpoints

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
target = "data/nano/target"                 # folder of the target
drafter = "data/nano/drafter-dflash"        # folder of the drafter
raw = False                                 # continue the prompt as it is, without the chat template
thinking = False                            # let a target that can think do so
max_new_tokens = 2048                       # tokens at most; the target's context may end it before
device = "cuda" if torch.cuda.is_available() else "cpu"  # cpu or cuda
dtype = "float32" if device == "cpu" else "bfloat16"     # of weights and activations
compare = True                              # also run the target alone: for the speedup, and to compare outputs
color = sys.stdout.isatty()                 # accepted guesses in green, the target's own tokens in blue

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
def generate(target, drafter, prompt_ids, max_new_tokens, stop_ids=(), rows=None):
    """Yields a Round for each forward of the target, the prompt's own first (one token, no guess).

    prompt_ids: list of token ids, at least one. drafter: a DFlashDraftModel, anything with its block_size, taps and
    `new_state`, `remember` and `propose`, or None for the target alone. rows: of a forward; None: the drafter's block
    size, or 16 without one.
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
    anchor, sent, stop = logits.argmax(-1), 0, set(stop_ids)                                 # (1,)
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
        if drafter:
            block[:, 1:] = drafter.propose(anchor, target, memory, state.pos)
        # 2. verify: one forward of the target over the anchor and the guesses; row k chooses the token after it
        features, logits = target(block, state, taps, rows=slice(None))
        choices = logits.argmax(-1)                                                          # (1, K)
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


def run(target, drafter, prompt_ids, limit, stops, rows=None, on_round=None):
    """(tokens, rounds, seconds) of one generation, the drafter's first guess timed like all others, the prefill not.
    The rounds are those of draft and verify; the prompt's own token is the first of the tokens but in no round."""
    tokens, rounds, began, seconds = [], [], None, 0.0
    generation = generate(target, drafter, prompt_ids, limit, stops, rows)
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
    return f"{line} | target alone {speed[1]:,.0f} tokens/s | speedup {speed[0] / speed[1]:.2f} | {verdict}"


def main():
    configure(globals())
    try:
        if not prompt.strip():
            raise ValueError("the prompt is empty: give one, e.g. --prompt=\"What is 7 * 34?\"")
        model = load_target(target, device, dtype)
        tokenizer = load_tokenizer(target)
        draft = load_drafter(drafter, model.config, device, dtype)
        ids = tokenizer.encode(prompt) if raw else chat_prompt(tokenizer, prompt, thinking)
        stops = () if raw else stop_ids(tokenizer)
        if compare:
            run(model, draft, ids, 8, stops)  # warm-up, so that neither arm pays for the first use of a kernel
        ours = run(model, draft, ids, max_new_tokens, stops, on_round=printer(tokenizer, color))
        alone = run(model, None, ids, max_new_tokens, stops, draft.block_size) if compare else None
        step = run(model, None, ids, max_new_tokens, stops, 1) if compare else None
    except ValueError as error:
        sys.exit(f"error: {error}")
    print("\n\n" + summary(ours, alone, step))


if __name__ == "__main__":
    main()
