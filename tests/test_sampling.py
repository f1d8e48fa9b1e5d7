"""
The rule that chooses tokens: its noise, its filters, its distribution, and guesses that share its
noise.
"""
import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch

from tokenizer import chat_prompt
from draft_decode import Decoder, generate
from sampling import Sampling, choose, gumbel_noise, mask_unlikely, perturbed_scores
from tests.common import K, all_tokens, nano, questions, random_normal, shipped, tiny_target

# ------------------------------------------------------------------------------------------------
# noise


def mixed(x):
    """SplitMix64's finaliser, on an integer of 64 bits."""
    x ^= x >> 30
    x = x * 0xbf58476d1ce4e5b9 % 2 ** 64
    x ^= x >> 27
    x = x * 0x94d049bb133111eb % 2 ** 64
    return x ^ x >> 31


def slow_noise(seed, sequence_id, position, token):
    """The noise of one token at one position, by Python's integers and doubles."""
    key = mixed((mixed(seed % 2 ** 64) + sequence_id) % 2 ** 64)
    key = mixed((key + position) % 2 ** 64)
    bits = mixed((key + token * 0x9e3779b97f4a7c15) % 2 ** 64)
    uniform = ((bits >> 12) + 0.5) / 2 ** 52
    return -math.log(-math.log(uniform))


@pytest.mark.parametrize("seed", (0, 1, -5, 2 ** 63 - 1))
def test_noise_equals_its_definition(seed):
    """Failures 5 and 11: a shift of signed numbers or an overflow changes the noise, so samples of
    a seed differ between versions; or noise depends on the cut into blocks."""
    positions = torch.tensor([0, 1, 262143, 5])
    sequence_ids = torch.tensor([0, 3, 3, 7])
    noise = gumbel_noise(seed, sequence_ids, positions, 1000)
    for row, sequence_id, position in zip(noise, sequence_ids, positions):
        expected = [
            slow_noise(seed, int(sequence_id), int(position), token) for token in range(50)]
        assert row[:50].tolist() == pytest.approx(expected, rel=1e-6)
        alone = gumbel_noise(seed, sequence_id[None], position[None], 1000)
        assert torch.equal(alone[0], row)

# ------------------------------------------------------------------------------------------------
# filters


@pytest.mark.parametrize("scores, top_k, top_p, kept", (
    ([1.0, 5.0, 2.0, 4.0, 3.0], 1, 1.0, [1]),
    ([1.0, 5.0, 2.0, 4.0, 3.0], 2, 1.0, [1, 3]),
    ([1.0, 5.0, 2.0, 4.0, 3.0], 4, 1.0, [1, 2, 3, 4]),
    ([1.0, 5.0, 2.0, 4.0, 3.0], 0, 1.0, [0, 1, 2, 3, 4]),
    ([1.0, 5.0, 2.0, 4.0, 3.0], 5, 1.0, [0, 1, 2, 3, 4]),
    ([1.0, 5.0, 2.0, 4.0, 3.0], 6, 1.0, [0, 1, 2, 3, 4]),
    # four equal scores are exactly a quarter each
    ([0.0, 0.0, 0.0, 0.0], 0, 0.01, [0]),
    ([0.0, 0.0, 0.0, 0.0], 0, 0.25, [0]),
    ([0.0, 0.0, 0.0, 0.0], 0, 0.26, [0, 1]),
    ([0.0, 0.0, 0.0, 0.0], 0, 0.5, [0, 1]),
    ([0.0, 0.0, 0.0, 0.0], 0, 0.75, [0, 1, 2]),
    ([0.0, 0.0, 0.0, 0.0], 0, 0.76, [0, 1, 2, 3]),
    # top_p counts the probabilities among the top_k
    ([0.0, 0.0, -1.0, -1.0], 2, 0.5, [0]),
    ([0.0, 0.0, -1.0, -1.0], 2, 0.51, [0, 1]),
))
def test_filters_keep_the_likeliest(scores, top_k, top_p, kept):
    """top_k or top_p keeps one token too few or too many, or changes a score."""
    scores = torch.tensor(scores)
    masked = mask_unlikely(scores[None], top_k, top_p)[0]
    assert masked.isfinite().nonzero().flatten().tolist() == kept
    assert torch.equal(masked[kept], scores[kept])


@pytest.mark.parametrize("top_p, kept", ((0.5 * (1 - 1e-9), 15000), (0.5 * (1 + 1e-9), 15001)))
def test_top_p_sums_probabilities_in_fp64(top_p, kept):
    """In fp32 the sum of 15,000 probabilities is wrong in its eighth digit."""
    masked = mask_unlikely(torch.zeros(1, 30_000), 0, top_p)
    assert masked.isfinite().sum() == kept


@pytest.mark.parametrize("values", (
    {"temperature": -0.1}, {"draft_temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0},
    {"top_p": 1.1}, {"seed": 1 << 63}, {"draft_temperature": float("nan")}, {"top_k": 1.5},
    {"temperature": "1"}))
def test_sampling_refuses_values_out_of_range(values):
    """A temperature or a probability that no distribution has generates tokens all the same, or a
    value at the edge of the range, such as the default top_p = 1, is refused."""
    name, = values
    with pytest.raises(ValueError, match=f"^{name} = .*: use .* to "):
        Sampling(**values)
    Sampling(temperature=0.0, top_k=0, top_p=1.0, seed=(1 << 63) - 1)
    Sampling(top_p=1e-9, seed=1 - (1 << 63))


def test_scores_of_bf16_logits_are_in_fp32():
    """Logits are divided by the temperature in bf16, which has three digits, so different tokens
    get the same score."""
    logits = torch.tensor([[10.0, 10.0625, -3.0]]).bfloat16()
    noise = torch.tensor([[0.5, 0.25, 0.125]])
    scores = perturbed_scores(logits, Sampling(0.7), 0.7, noise)
    assert scores.dtype == torch.float32
    expected = [10.0 / 0.7 + 0.5, 10.0625 / 0.7 + 0.25, -3.0 / 0.7 + 0.125]
    assert scores[0].tolist() == pytest.approx(expected, rel=1e-6)
    # greedy: the logits as they are, without noise or filters
    assert perturbed_scores(logits, Sampling(0.0, top_k=1), 0, noise) is logits

# ------------------------------------------------------------------------------------------------
# the distribution of two tokens in a row

PROMPT = [1, 2, 3]
SAMPLINGS = (Sampling(1.0), Sampling(3.0, top_k=5, top_p=0.9))


def count_pairs(sampling, count):
    """How often (8, 8) the pairs of the first two tokens were sampled with so many seeds."""
    seen = torch.zeros(8, 8)
    for seed in range(count):
        seeded = dataclasses.replace(sampling, seed=seed)
        answer = generate(tiny_target(), None, PROMPT, max_new_tokens=2, sampling=seeded)
        first, second = all_tokens(answer)
        seen[first, second] += 1
    return seen


def slow_distribution(logits, sampling):
    """Probabilities (V,) of the next token given its logits (V,), by sorting and adding."""
    p = (logits.double() / sampling.temperature).softmax(-1)
    order = p.argsort(descending=True)
    if sampling.top_k > 0:
        order = order[:sampling.top_k]
    p = p / p[order].sum()
    kept = torch.zeros_like(p)
    for token in order:
        if kept.sum() >= sampling.top_p:
            break
        kept[token] = p[token]
    return kept / kept.sum()


@torch.no_grad()
def expected_pairs(sampling, count):
    """How often (8, 8) each pair is to be expected: the target's own softmax, twice."""
    target = tiny_target()
    expected = torch.zeros(8, 8, dtype=torch.float64)
    for first in range(8):
        _, hidden = target(torch.tensor([PROMPT + [first]]))
        first_logits, second_logits = target.logits(hidden)[0, -2:]
        p_first = slow_distribution(first_logits, sampling)[first]
        expected[first] = count * p_first * slow_distribution(second_logits, sampling)
    return expected


def chi_square(seen, expected):
    """(chi-square, its degrees of freedom); pairs expected less than 5 times count as one."""
    assert not seen[expected == 0].any(), "a token outside the filters was chosen"
    common = expected >= 5
    chi = ((seen - expected)[common].square() / expected[common]).sum()
    rest_seen = seen[~common].sum()
    rest_expected = expected[~common].sum()
    chi += (rest_seen - rest_expected).square() / rest_expected.clamp(min=1)
    return chi.item(), int(common.sum())


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=("all", "filtered"))
def test_sampled_distribution_is_the_targets(sampling):
    """Failure 11: tokens are not drawn from the target's softmax, alone and jointly."""
    seen = count_pairs(sampling, 600)
    chi, freedom = chi_square(seen, expected_pairs(sampling, 600))
    assert freedom > 3
    assert chi < freedom + 4 * math.sqrt(2 * freedom)

# ------------------------------------------------------------------------------------------------
# guesses that share the noise


class Itself:
    """A drafter that is the target itself: it continues the text with the target's own logits and
    with guesses that are chosen by the same rule as in a Decoder."""
    block_size = K
    target_layer_ids = ()

    def __init__(self, answer, sampling):
        self.answer = answer
        self.sampling = sampling

    def new_cache(self, batch, length):
        return []  # of no layer

    def write_context(self, features, cache, position):
        pass

    def draft_logits(self, anchor, target, cache, position):
        position = int(position)
        known = PROMPT + self.answer[:position - len(PROMPT)] + [int(anchor)]
        tokens = torch.tensor([known])
        temperature = self.sampling.draft_temperature
        logits = []
        for t in range(position + 1, position + K):
            _, hidden = target(tokens)
            logits.append(target.logits(hidden[:, -1:]))
            noise = gumbel_noise(
                self.sampling.seed, torch.tensor([0]), torch.tensor([t]), target.config.vocab_size)
            guess = choose(logits[-1], self.sampling, temperature, noise)
            tokens = torch.cat((tokens, guess), 1)
        return torch.cat(logits, 1)


@pytest.mark.parametrize("draft_temperature", (0.0, 1.0))
def test_sampled_guesses_coupled_to_the_noise_are_accepted(draft_temperature):
    """Failure 11: guesses do not share the target's noise, so few are accepted. With shared noise a
    drafter that is the target itself is always right, and with greedy guesses it cannot be."""
    target = tiny_target()
    lengths = []
    for seed in range(4):
        sampling = Sampling(1.0, seed=seed, draft_temperature=draft_temperature)
        answer = all_tokens(generate(target, None, PROMPT, max_new_tokens=33, sampling=sampling))
        drafter = Itself(answer, sampling)
        rounds = list(generate(target, drafter, PROMPT, max_new_tokens=33, sampling=sampling))
        assert all_tokens(rounds) == answer
        lengths += [len(r.tokens) for r in rounds[1:]]
    tau = sum(lengths) / len(lengths)
    if draft_temperature == 1.0:
        assert tau == 16
    else:
        assert tau < 4


@torch.inference_mode()
def test_guesses_have_their_own_temperature():
    """Guesses are chosen at the target's temperature, without its filters, or with the noise of the
    next position."""
    sampling = Sampling(0.5, top_k=4, seed=3, draft_temperature=4.0)
    logits = 3 * random_normal()(1, K - 1, 8)
    drafter = SimpleNamespace(
        block_size=K, target_layer_ids=(), new_cache=lambda batch, length: [],
        draft_logits=lambda anchor, target, cache, position: logits)
    decoder = Decoder(tiny_target(), drafter, length=64, tokens_per_forward=K, sampling=sampling)
    positions = torch.arange(5, 5 + K)[None]
    noise = decoder.noise_at(torch.zeros_like(positions), positions)
    decoder.draft(noise)
    expected = choose(logits, sampling, 4.0, noise[:, :-1])
    assert decoder.block[:, 1:].tolist() == expected.tolist()
    assert expected.tolist() != choose(logits, sampling, 0.5, noise[:, :-1]).tolist()


def test_guesses_are_greedy_where_the_target_is():
    """draft_temperature has an effect at temperature 0, where there is no noise to share, so fewer
    guesses are right."""
    target, tokenizer = nano()
    prompt = chat_prompt(tokenizer, questions()[0])
    greedy = list(generate(target, shipped(), prompt, max_new_tokens=64))
    warm = Sampling(draft_temperature=5.0)
    assert list(generate(target, shipped(), prompt, max_new_tokens=64, sampling=warm)) == greedy
