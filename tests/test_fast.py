"""
fast/ computes the same numbers as the plain modules, faster. Without it everything still runs.
"""
import copy

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import fast
from checkpoint import load_drafter, load_target
from draft_decode import generate
from fast import attention, cpu
from fast.decoding import Joined, join_projections, product
from model import DFlashDraftModel, block_visibility
from target import Target
from tests.common import (DRAFTERS, HIDDEN, K, LAYER_IDS, NANO_DRAFTER, NANO_TARGET, apart,
                          drafting, perturb, questions, random_normal, small_drafter, small_target,
                          tokens_of)
from tokenizer import chat_prompt, load_tokenizer


def test_plain_and_prepared_pairs_decode_the_same_tokens():
    """Decoding needs fast/, or returns different tokens or rounds with it. A second call of
    prepare_for_decoding() changes something."""
    plain = load_target(NANO_TARGET)
    plain_drafter = load_drafter(NANO_DRAFTER, plain.config)
    target = load_target(NANO_TARGET)
    drafter = load_drafter(NANO_DRAFTER, target.config)
    fast.prepare_for_decoding(target, drafter)
    assert type(plain) is Target and type(target) is not Target
    fast.prepare_for_decoding(target, drafter)
    tokenizer = load_tokenizer(NANO_TARGET)
    modes = ((None, None, 1), (None, None, K), (plain_drafter, drafter, K))
    for question in questions()[:2]:
        prompt = chat_prompt(tokenizer, question)
        for plain_guesser, guesser, tokens_per_forward in modes:
            options = {"max_new_tokens": 12, "tokens_per_forward": tokens_per_forward}
            expected = list(generate(plain, plain_guesser, prompt, **options))
            assert list(generate(target, guesser, prompt, **options)) == expected, question


def results_of(target, drafter):
    """Features, logits, and guesses of a few tokens, by whole sequences and by a block."""
    x = tokens_of(2, 20)
    features, hidden = target(x, target_layer_ids=LAYER_IDS)
    cache = drafter.new_cache(2, 20 + K)
    drafter.write_context(features, cache, torch.tensor([0, 0]))
    guesses = drafter.draft_logits(x[:, 0], target, cache, torch.tensor([20, 20]))
    return features, target.logits(hidden), guesses


@pytest.mark.parametrize("with_bias", (False, True))
@pytest.mark.parametrize("shape", ("tied", "untied"))
@torch.no_grad()
def test_prepared_modules_compute_the_same(shape, with_bias, monkeypatch):
    """A projection is left out when weights are joined or packed, gets the weight of a different
    one, or loses its bias; weights have other names or values."""
    target = copy.deepcopy(small_target(shape))
    drafter = small_drafter()
    if with_bias:
        drafter.config.attention_bias = True
        drafter = perturb(DFlashDraftModel(drafter.config), scale=5.0)
        assert drafter.layers[0].self_attn.k_proj.bias.any()
    expected = results_of(target, drafter)
    models = (target, drafter)
    weights = [copy.deepcopy(model.state_dict()) for model in models]

    monkeypatch.setattr(cpu, "MIN_PACKED", 0)
    fast.prepare_for_decoding(target, drafter)
    packed = results_of(target, drafter)
    join_projections(drafter)  # as on a GPU
    joined = results_of(target, drafter)
    for i in range(3):
        assert apart(packed[i], expected[i]) < 1e-5, i
        assert apart(joined[i], expected[i]) < 1e-5, i
    for model, before in zip(models, weights):
        after = model.state_dict()
        assert list(after) == list(before)
        for name in before:
            assert torch.equal(after[name], before[name]), name


@torch.no_grad()
def test_matmuls_are_joined_and_packed(monkeypatch):
    """A projection is left out of a joined matmul, which is one more launch in every layer; a
    linear layer is not packed; a joined weight is in memory twice."""
    plain = []
    packed = []
    linear = F.linear
    packed_product = cpu.PackedWeight.product

    def counted_linear(*args):
        plain.append(args)
        return linear(*args)

    def counted_packed(*args):
        packed.append(args)
        return packed_product(*args)

    monkeypatch.setattr(cpu, "MIN_PACKED", 0)
    monkeypatch.setattr(F, "linear", counted_linear)
    monkeypatch.setattr(cpu.PackedWeight, "product", counted_packed)
    target = copy.deepcopy(small_target("untied"))
    drafter = small_drafter()
    fast.prepare_for_decoding(target, drafter)
    _, hidden = target(tokens_of(1, K))
    target.logits(hidden)
    assert (len(plain), len(packed)) == (0, 8 * 4 + 1)  # two of a mixer, two of an MLP; the head
    for module in target.layers.modules():
        if isinstance(module, Joined):
            joined = module.joined_weight.untyped_storage().data_ptr()
            for name in module.joined_names:
                own = getattr(module, name).weight.untyped_storage().data_ptr()
                assert own == joined

    features = random_normal()(2, K, drafter.fc.in_features)
    block = random_normal()(2, K, HIDDEN)
    for counted, expected in ((packed, (1 + 2 * 2, 2 * 7)), (plain, (2, 2 * 2))):
        cache = drafter.new_cache(2, 2 * K)
        counted.clear()
        drafter.write_context(features, cache, torch.tensor([0, 0]))
        of_context = len(counted)  # fc, and keys and values of two layers
        drafter.decode_block(block, cache, torch.tensor([K, K]))
        assert (of_context, len(counted) - of_context) == expected
        monkeypatch.setattr(cpu, "MIN_PACKED", 10**9)
        join_projections(drafter)  # as on a GPU; what is not joined stays packed


@pytest.mark.parametrize("B, K, width", ((1, 16, 9728), (5, 16, 9728), (1, 20, 40_000)))
def test_activations_do_not_depend_on_threads(B, K, width):
    """Failure 5: threads split an elementwise operation inside a token, where it rounds
    differently. So a token's bits depend on its slot or its position in the block. A token can
    also be wider than what one thread gets."""
    torch.set_num_threads(3)
    blocks = random_normal()(B, K, width)
    results = cpu.on_few_tokens(F.silu, blocks)
    assert torch.allclose(results, F.silu(blocks), rtol=1e-6, atol=1e-7)
    for slot, position in ((0, 1), (B - 1, 7), (B // 2, K - 1)):
        moved = blocks.roll((slot, position), (0, 1))
        expected = results.roll((slot, position), (0, 1))
        assert torch.equal(cpu.on_few_tokens(F.silu, moved), expected), (slot, position)


@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 2e-4), (torch.bfloat16, 0.5)))
def test_rows_of_packed_products_depend_on_nothing_else(dtype, tolerance):
    """Failure 5: in oneDNN's order of large weights, a row's bits depend on other rows or on its
    place among them."""
    draw = random_normal()
    weight = draw(1031, 517).to(dtype)
    x = draw(K, 517).to(dtype)
    others = draw(K, 517).to(dtype)
    packed = cpu.pack_weight(weight)  # None on a CPU without bf16
    assert packed is not None or dtype == torch.bfloat16
    y = product(x[None], weight, packed)[0]
    expected = F.linear(x, weight)
    assert torch.allclose(y.float(), expected.float(), rtol=0, atol=tolerance)
    for place in range(K):
        moved = others.clone()
        moved[place] = x[3]
        assert torch.equal(product(moved[None], weight, packed)[0, place], y[3]), place


@pytest.mark.parametrize("variable, largest, threads_used", (
    (None, cpu.SMALL, 1), (None, 1000, 2), ("2", cpu.SMALL, 2)))
def test_small_target_decodes_with_one_thread(monkeypatch, variable, largest, threads_used):
    """Next to other busy processes two threads wait for each other: 22 tokens/s instead of 280. A
    large target, or a user who chose the number, is left alone."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    monkeypatch.setattr(cpu, "SMALL", largest)
    torch.set_num_threads(2)
    fast.prepare_for_decoding(copy.deepcopy(small_target()))
    assert torch.get_num_threads() == threads_used


def test_small_weights_are_not_packed(monkeypatch):
    """Packing costs more than it gains, or copies every weight."""
    weight = torch.zeros(16, 16)
    monkeypatch.setattr(cpu, "MIN_PACKED", 257)
    assert cpu.pack_weight(weight) is None
    monkeypatch.setattr(cpu, "MIN_PACKED", 256)
    assert cpu.pack_weight(weight) is not None


def test_matmul_of_one_token_is_summed_in_fp32(monkeypatch):
    """Compiled code sums numbers that were rounded to bf16, or its output has a different shape or
    dtype. Here the code takes this form on a CPU."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    draw = random_normal()
    weight = draw(300, 500)
    for shape in ((500,), (1, 500), (1, 1, 500), (1, 2, 500), (2, 1, 500)):
        x = draw(shape)
        assert apart(product(x, weight), F.linear(x, weight)) < 1e-6
        x_bf16 = x.bfloat16()
        weight_bf16 = weight.bfloat16()
        ours = product(x_bf16, weight_bf16)
        expected = F.linear(x_bf16.double(), weight_bf16.double())
        assert ours.dtype == torch.bfloat16
        assert ours.shape == expected.shape
        assert apart(ours, expected) < 2e-3  # the output's own rounding


@pytest.mark.parametrize("layer_types, window", DRAFTERS)
@torch.no_grad()
def test_leak_in_a_faster_attention(layer_types, window, monkeypatch):
    """Failures 1 and 2: flex_attention, or groups of anchors, see what masked_attend() hides."""
    monkeypatch.setattr(attention, "compiled_flex_attention", flex_attention)
    monkeypatch.setattr(attention, "compiled_create_block_mask", create_block_mask)
    drafter = small_drafter(layer_types, window)
    features, blocks, anchors = drafting(200, 20)
    anchors[0, 0] = 0    # a block without context
    anchors[:, -3:] = 0  # padding after the last anchor
    expected = drafter(features, blocks, anchors)
    for new_attend in (attention.flex_attend, attention.grouped_attend):
        assert apart(drafter(features, blocks, anchors, new_attend), expected) < 1e-5


def test_block_mask_is_compiled_once_for_all_anchors(monkeypatch):
    """A mask is compiled again in every micro-batch, or keeps the first anchors; or an option for
    the backward of heads of 256 channels slows others down. Here the mask is traced, but no kernels
    are generated."""
    given = []

    def keep(q, k, v, block_mask, enable_gqa, kernel_options):
        given.append((block_mask, kernel_options))

    compiled = torch.compile(create_block_mask, dynamic=False, backend="eager")
    monkeypatch.setattr(attention, "compiled_create_block_mask", compiled)
    monkeypatch.setattr(attention, "compiled_flex_attention", keep)
    graphs = counters["stats"]["unique_graphs"]
    T = 200
    for seed, D, options in ((0, 8, None), (1, 128, None), (2, 256, {"bwd_num_warps": 8})):
        inputs = [torch.zeros(2, 1, count, D) for count in (20 * K, T, T, 20 * K, 20 * K)]
        _, _, anchors = drafting(T, 20, seed)
        visible = block_visibility(anchors, T, K, sliding_window=24)
        attention.flex_attend(visible, anchors, T, K)(*inputs)
        expected = create_block_mask(visible, 2, None, 20 * K, T + 20 * K, anchors.device)
        mask, kernel_options = given[-1]
        assert torch.equal(mask.to_dense(), expected.to_dense())
        assert torch.equal(mask.full_kv_num_blocks, expected.full_kv_num_blocks)
        assert kernel_options == options
    assert counters["stats"]["unique_graphs"] == graphs + 1
