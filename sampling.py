"""
One rule chooses every token, greedy or sampled:

    token at position t = argmax over the vocabulary of  logits / temperature + noise

The logits are those that predict position t. top_k and top_p can remove unlikely tokens first. At
temperature 0 there is no noise, so the rule is greedy. Above 0 the noise has a Gumbel distribution.
Then the argmax is a sample of softmax(logits / temperature). This is the Gumbel-max trick.

The noise depends only on the seed, the sequence, the position, and the token id. So even with
sampling, the logits determine the target's choice. The noise is the same whether the position is
computed alone or in a block of 16. Therefore verification only compares tokens. The output is the
target's own sample, and no guess can change it.

Other projects use rejection sampling: they accept a guess with probability min(1, p / q), and
otherwise sample from the remaining distribution. That preserves the target's distribution. The rule
here preserves the target's sample, so an equality check can prove that decoding is correct.
"""
import numbers
from dataclasses import dataclass

import torch

# the lowest and the highest value of each field of Sampling
SAMPLING_RANGES = {
    "temperature": (0.0, 1e6),
    "top_k": (0, 10**9),
    "top_p": (1e-9, 1.0),
    "seed": (1 - 2**63, 2**63 - 1),
    "draft_temperature": (0.0, 1e6),
}


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    temperature        of the target's choice; 0 is greedy
    top_k, top_p       choose among the likeliest tokens only; 0 and 1.0 mean among all
    seed               of the noise
    draft_temperature  of the drafter's guesses. At 0 they are greedy. Above 0 they use the
                       target's own noise. Similar logits with the same noise usually have the same
                       argmax (Gumbel coupling: Daliri, Musco, Suresh, arXiv 2408.07978). Greedy
                       guesses are right more often if the target is sure, coupled guesses if the
                       target is undecided. Ignored if temperature is 0.

    Raises ValueError for values out of range.
    """
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    draft_temperature: float = 0.0

    def __post_init__(self):
        for name, (lowest, highest) in SAMPLING_RANGES.items():
            value = getattr(self, name)
            kind = numbers.Real
            if isinstance(lowest, int):
                kind = numbers.Integral
            in_range = isinstance(value, kind) and lowest <= value <= highest  # false for NaN
            if not in_range:
                raise ValueError(f"{name} = {value!r:.60}: use {lowest} to {highest}")


def choose(logits, sampling, temperature, noise):
    """Token ids (...) from logits (..., V).

    temperature    the target's or the drafter's, one of the two in `sampling`
    noise (..., V) not used at temperature 0
    """
    scores = perturbed_scores(logits, sampling, temperature, noise)
    return scores.argmax(-1)


def perturbed_scores(logits, sampling, temperature, noise):
    """The scores (..., V) whose argmax is the chosen token."""
    if temperature == 0:
        return logits
    scores = logits.float() / temperature
    return mask_unlikely(scores, sampling.top_k, sampling.top_p) + noise


def mask_unlikely(scores, top_k, top_p):
    """scores (..., V), with -inf for the tokens that top_k and top_p leave out.

    top_p keeps the smallest set of likeliest tokens whose probabilities sum to at least top_p.
    """
    if 0 < top_k < scores.shape[-1]:
        smallest_kept = scores.topk(top_k)[0][..., -1:]
        scores = scores.masked_fill(scores < smallest_kept, -torch.inf)
    if top_p < 1:
        ordered, token_ids = scores.sort(descending=True, stable=True)
        # Probabilities are summed as integers, in units of 2^-52. The order of a cumsum may
        # depend on the number of rows. That changes a sum of floats, but not a sum of integers.
        probabilities = ordered.double().softmax(-1)
        units = (probabilities * 2.0 ** 52).long()
        units_before = units.cumsum(-1) - units
        # a token is left out if those before it already reach top_p
        left_out = units_before >= max(1, int(top_p * 2.0 ** 52))  # the first always stays
        # from the order of likelihood back to the order of token ids
        in_id_order = torch.zeros_like(left_out)
        left_out = in_id_order.scatter(-1, token_ids, left_out)
        scores = scores.masked_fill(left_out, -torch.inf)
    return scores


def gumbel_noise(seed, sequence_ids, positions, vocab_size):
    """Standard Gumbel noise (..., vocab_size) in fp32 for absolute positions (...) of sequences.

    A pure function of (seed, sequence, position, token id), like a hash. There is no generator with
    a state, so the order of calls does not matter. Equal prompts with different sequence ids get
    different samples, and a sequence gets the same sample when it is decoded alone.
    """
    keys = mix_bits(torch.full_like(positions, seed))
    keys = mix_bits(keys + sequence_ids)
    position_keys = mix_bits(keys + positions)
    # token id i adds i times 0x9e3779b97f4a7c15 (2^64 / golden ratio), here as a signed number
    token_ids = torch.arange(vocab_size, device=positions.device)
    token_offsets = token_ids * -0x61c8864680b583eb
    bits = mix_bits(position_keys[..., None] + token_offsets)
    # the upper 52 bits as a number strictly between 0 and 1: at 0 and 1 the noise is infinite
    upper_bits = (bits >> 12) & ((1 << 52) - 1)
    uniform = (upper_bits.double() + 0.5) * 2.0 ** -52
    # The logarithms are computed in fp64 and rounded to fp32 at the end. On a CPU, scalar and
    # vector code can round a fp32 logarithm differently, and an element's place in its tensor
    # decides which of them runs. After rounding from fp64 the two agree.
    noise = -(-uniform.log()).log()
    return noise.float()


def mix_bits(x):
    """Mixes the 64 bits of each integer: the finalizer of SplitMix64 (Steele, Lea, Flood, 2014).

    torch has only signed integers. So the published constants appear here minus 2^64, and products
    overflow on purpose. A >> copies the sign bit, so a mask clears the copies.
    """
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * -0x40a7b892e31b1a47
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * -0x6b2fb644ecceee15
    return x ^ ((x >> 31) & ((1 << 33) - 1))
