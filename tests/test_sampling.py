"""
The rule that chooses tokens: its noise, its filters, its distribution, and guesses that share its
noise.
"""
import math

import pytest
import torch

from benchmarks.drafters import Oracle
from draft_decode import generate, generate_many
from sampling import Sampling, choose, gumbel_noise, mask_unlikely, perturbed_scores
from tests.common import K, all_tokens, nano, questions, shipped, tiny_target
from tokenizer import chat_prompt


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


SCORES = [1.0, 5.0, 2.0, 4.0, 3.0]
EQUAL = [0.0, 0.0, 0.0, 0.0]  # exactly a quarter each


@pytest.mark.parametrize("scores, top_k, top_p, kept", (
    (SCORES, 1, 1.0, [1]),
    (SCORES, 2, 1.0, [1, 3]),
    (SCORES, 4, 1.0, [1, 2, 3, 4]),
    (SCORES, 0, 1.0, [0, 1, 2, 3, 4]),
    (SCORES, 5, 1.0, [0, 1, 2, 3, 4]),
    (SCORES, 6, 1.0, [0, 1, 2, 3, 4]),
    (EQUAL, 0, 0.01, [0]),
    (EQUAL, 0, 0.25, [0]),
    (EQUAL, 0, 0.26, [0, 1]),
    (EQUAL, 0, 0.75, [0, 1, 2]),
    (EQUAL, 0, 0.76, [0, 1, 2, 3]),
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
    scores = torch.zeros(1, 32_768)
    scores[:, 30_000:] = -torch.inf
    assert mask_unlikely(scores, 0, top_p).isfinite().sum() == kept


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


PROMPT = [1, 2, 3]
SAMPLINGS = (Sampling(1.0, seed=1), Sampling(3.0, top_k=5, top_p=0.9, seed=2))


def slow_distribution(logits, sampling):
    """Probabilities {token: p} of the next token given its logits (V,), by sorting and adding."""
    p = (logits.double() / sampling.temperature).softmax(-1).tolist()
    likeliest = sorted(range(len(p)), key=p.__getitem__, reverse=True)
    if sampling.top_k > 0:
        likeliest = likeliest[:sampling.top_k]
    total = sum(p[token] for token in likeliest)
    kept = {}
    for token in likeliest:
        if sum(kept.values()) < sampling.top_p:
            kept[token] = p[token] / total
    return {token: probability / sum(kept.values()) for token, probability in kept.items()}


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=("all", "filtered"))
@torch.no_grad()
def test_sampled_tokens_are_those_of_the_rule(sampling):
    """Failure 11: the temperature or a filter is ignored, or a token gets the noise of a different
    seed, sequence, or position."""
    outputs = generate_many(
        tiny_target(), None, [PROMPT] * 8, slots=3, max_new_tokens=20, sampling=sampling)
    answer = all_tokens(output for index, output in outputs if index == 7)
    _, hidden = tiny_target()(torch.tensor([PROMPT + answer]))
    logits = tiny_target().logits(hidden)[0]
    for position, chosen in enumerate(answer, len(PROMPT)):
        scores = {}
        for token, p in slow_distribution(logits[position - 1], sampling).items():
            scores[token] = math.log(p) + slow_noise(sampling.seed, 7, position, token)
        assert max(scores, key=scores.get) == chosen, position


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=("all", "filtered"))
@pytest.mark.parametrize("varied", ("seed", "sequence", "position"))
def test_sampled_distribution_is_the_softmax(sampling, varied):
    """Failure 11: tokens are not drawn from the softmax; or tokens of neighboring seeds, sequences,
    or positions depend on each other. Counts pairs of neighbors, and compares by chi-square."""
    logits = torch.tensor([0.3, -1.0, 2.0, 1.1, 0.0, 1.5, -0.5, 0.8])
    n = torch.arange(4000)
    seeds = n.tolist() if varied == "seed" else [5]
    sequences = n if varied == "sequence" else torch.tensor([0])
    positions = n if varied == "position" else torch.tensor([9])
    noise = torch.cat([gumbel_noise(seed, sequences, positions, 8) for seed in seeds])
    assert noise.shape == (4000, 8)
    tokens = choose(logits.expand(4000, 8), sampling, sampling.temperature, noise)
    seen = torch.zeros(8, 8)
    seen.index_put_((tokens[::2], tokens[1::2]), torch.tensor(1.0), accumulate=True)
    probability = torch.zeros(8)
    for token, p in slow_distribution(logits, sampling).items():
        probability[token] = p
    expected = 2000 * probability[:, None] * probability
    common = expected >= 5  # all others count as one
    counts = torch.cat((seen[common], seen[~common].sum()[None]))
    expected = torch.cat((expected[common], expected[~common].sum().clamp(min=1)[None]))
    assert not seen[:, probability == 0].any()
    chi_square = ((counts - expected).square() / expected).sum()
    freedom = len(counts) - 1
    assert freedom > 8
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


class KnowsLogits(Oracle):
    """A drafter that was told the logits (1, T, V) of a text, position by position."""
    def __init__(self, logits):
        self.block_size = K
        self.logits = logits

    def draft_logits(self, anchor, target, cache, position):
        return self.logits[:, position:position + K - 1]


@pytest.mark.parametrize("draft_temperature", (0.0, 1.0, 4.0))
def test_sampled_guesses_coupled_to_the_noise_are_accepted(draft_temperature):
    """Failure 11: guesses do not share the target's noise, have that of the next position, or are
    chosen at the target's temperature or without its filters. The drafter has the target's own
    logits times draft_temperature: coupled guesses are always right, greedy ones cannot be."""
    target = tiny_target()
    lengths = []
    for seed in range(4):
        sampling = Sampling(1.0, top_k=5, seed=seed, draft_temperature=draft_temperature)
        answer = all_tokens(generate(target, None, PROMPT, max_new_tokens=50, sampling=sampling))
        with torch.no_grad():
            _, hidden = target(torch.tensor([PROMPT + answer]))
            logits = target.logits(hidden) * (draft_temperature or 1.0)
        drafter = KnowsLogits(logits)
        rounds = list(generate(target, drafter, PROMPT, max_new_tokens=33, sampling=sampling))
        assert all_tokens(rounds) == answer[:33]
        lengths += [len(r.tokens) for r in rounds[1:]]
    tau = sum(lengths) / len(lengths)
    if draft_temperature == 0.0:
        assert tau < 4
    else:
        assert tau == 16


def test_guesses_are_greedy_where_the_target_is():
    """draft_temperature has an effect at temperature 0, where there is no noise to share, so fewer
    guesses are right."""
    target, tokenizer = nano()
    prompt = chat_prompt(tokenizer, questions()[0])
    greedy = list(generate(target, shipped(), prompt, max_new_tokens=64))
    warm = Sampling(draft_temperature=5.0)
    assert list(generate(target, shipped(), prompt, max_new_tokens=64, sampling=warm)) == greedy
