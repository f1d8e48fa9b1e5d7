"""
The drafter, against the contract in words: what a block sees, in training and in decoding.
"""
import copy
import dataclasses
import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from fast import cpu
import model
from checkpoint import drafter_config, prepare_decoding
from fast.cpu import attention_by_anchor_groups
from model import (DFlashDraftModel, block_mask, block_visibility, masked_attention, project,
                   rotary_table)
from fast.projections import groups_of, join_projections
from tests.common import (DRAFTERS, HIDDEN, K, LAYER_IDS, MASK, V, apart, perturb, random_normal,
                          shipped, small_config, small_drafter, small_target,
                          tokens_of)


def drafting(T, A=5, seed=0):
    """Random features (2, T, ...), blocks (2, A, K, hidden) and ascending anchors (2, A)."""
    draw = random_normal(seed)
    features = draw(2, T, len(LAYER_IDS) * HIDDEN)
    blocks = draw(2, A, K, HIDDEN)
    anchors = []
    for _ in range(2):
        _, positions = draw(T - 1).topk(A)
        anchors.append(positions + 1)
    anchors, _ = torch.stack(anchors).sort()
    return features, blocks, anchors


@pytest.mark.parametrize("layer_types, window", DRAFTERS)
def test_drafter_decodes_as_it_was_trained(layer_types, window):
    """Failure 2: 98 % in training, 10 % served. Context arrives in blocks of 16 whose rejected rows
    are stale; row k of the logits is that of slot k, not shifted."""
    target = small_target()
    drafter = small_drafter(layer_types, window)
    features, _, _ = drafting(70)
    stale, _, _ = drafting(K, seed=1)
    anchors = [1, 2, 15, 16, 17, 30, 33, 49, 50]
    tokens = tokens_of(2, len(anchors))
    blocks = drafter.embed_block(tokens, target.embed_tokens.weight)
    trained = drafter(features, blocks, torch.tensor([anchors] * 2))

    r = random.Random(0)
    cache = drafter.new_cache(2, 100)
    position = 0
    for i, n in enumerate(anchors):
        while position < n:
            new = r.randint(1, min(K, n - position))
            accepted = features[:, position:position + new]
            rows = torch.cat((accepted, stale[:, new:]), 1)
            drafter.write_context(rows, cache, torch.tensor([position, position]))
            position += new
        anchor_position = torch.tensor([n, n])
        hidden = drafter.decode_block(blocks[:, i], cache, anchor_position)
        expected = trained[:, i]
        assert apart(hidden, expected) < 1e-5, n
        logits = drafter.draft_logits(tokens[:, i], target, cache, anchor_position)
        expected = target.logits(expected[:, 1:])
        assert apart(logits, expected) < 1e-5, n
        assert torch.equal(logits.argmax(-1), expected.argmax(-1)), n


def drafter_named(name):
    if name == "nano":
        return copy.deepcopy(shipped())  # as other tests use it as it is
    config = small_drafter().config
    config.attention_bias = name == "with biases"
    return perturb(DFlashDraftModel(config), scale=5.0)


def written_and_decoded(drafter):
    """The cache with a context of K positions and a block after it, and the block's hidden states.
    """
    draw = random_normal()
    feature_width = drafter.fc.in_features
    features = draw(2, K, feature_width)
    block = draw(2, K, drafter.config.hidden_size)
    cache = drafter.new_cache(2, 2 * K)
    drafter.write_context(features, cache, torch.tensor([0, 0]))
    hidden = drafter.decode_block(block, cache, torch.tensor([K, K]))
    results = [hidden]
    for keys, values in cache:
        results += [keys, values]
    return results


@pytest.mark.parametrize("name", ("small", "nano", "with biases"))
@torch.no_grad()
def test_joined_projections_give_the_same_drafter(name):
    """On GPUs: a joined projection takes the rows of another one's weight or loses its bias; a
    checkpoint saved from such a drafter has other names or weights."""
    drafter = drafter_named(name)
    results = written_and_decoded(drafter)
    weights = {key: weight.clone() for key, weight in drafter.state_dict().items()}

    join_projections(drafter)
    for joined, plain in zip(written_and_decoded(drafter), results, strict=True):
        assert apart(joined, plain) < 1e-5
    weights_after = drafter.state_dict()
    assert list(weights_after) == list(weights)
    assert list(dict(drafter.named_parameters())) == list(weights)
    for key in weights:
        assert torch.equal(weights_after[key], weights[key]), key

    # and into a drafter that is not joined
    other = DFlashDraftModel(drafter.config).eval()
    other.load_state_dict(weights_after)
    assert apart(written_and_decoded(other)[0], results[0]) < 1e-5


@torch.no_grad()
def test_joined_projections_are_fewer_products(monkeypatch):
    """A projection that is left out of the joined product: a launch more in every layer."""
    products = []
    linear = F.linear

    def counted_linear(x, weight, bias=None):
        products.append(weight.shape)
        return linear(x, weight, bias)

    monkeypatch.setattr(F, "linear", counted_linear)
    drafter = small_drafter()
    written_and_decoded(drafter)
    context = 1 + 2 * 2  # fc; k and v in each of two layers
    block = 2 * 7        # q, k, v, o, gate, up and down
    assert len(products) == context + block

    products.clear()
    join_projections(drafter)
    written_and_decoded(drafter)
    context = 1 + 2      # fc; in each layer k and v as one
    block = 2 * 4        # q, k, v as one; o; gate and up as one; down
    assert len(products) == context + block


def test_joined_projections_take_no_memory():
    """A drafter's weights are in memory twice, joined and apart."""
    drafter = join_projections(small_drafter())
    for layers in groups_of(drafter):
        joined = layers[0].joined_weight.untyped_storage().data_ptr()
        for layer in layers:
            assert layer.weight.untyped_storage().data_ptr() == joined
            assert layer.joined_weight.untyped_storage().data_ptr() == joined


@torch.no_grad()
def test_context_has_keys_and_values_of_its_own():
    """The queries of the context are taken for its keys. With as many key heads as query heads all
    shapes are right, and in training, where nothing is joined, all is well."""
    config = small_drafter().config
    config.num_key_value_heads = config.num_attention_heads
    attention = perturb(DFlashDraftModel(config), scale=5.0).layers[1].self_attn
    x = random_normal()(2, K, HIDDEN)
    layers = [attention.q_proj, attention.k_proj, attention.v_proj]
    expected = [layer(x) for layer in layers]

    for is_joined in (False, True):
        if is_joined:
            join_projections(attention)
        for first in range(3):
            projected = project(x, layers[first:])
            for ours, its_own in zip(projected, expected[first:], strict=True):
                assert apart(ours, its_own) < 1e-6, (is_joined, first)

    rotary = rotary_table(torch.arange(K), config.head_dim, 1e4)
    k, v = attention.keys_values(x, rotary)
    _, block_k, block_v = attention.queries_keys_values(x, rotary)
    assert apart(k, block_k) < 1e-6
    assert apart(v, block_v) < 1e-6


def test_drafter_on_a_cpu_is_packed_not_joined(monkeypatch):
    """Large weights joined on a CPU, where packing each by itself is faster: a round takes a fifth
    longer."""
    monkeypatch.setattr(cpu, "MIN_PACKED", 0)
    drafter = prepare_decoding(small_drafter())
    for name, module in drafter.named_modules():
        assert not hasattr(module, "joined_weight"), name
        if isinstance(module, torch.nn.Linear):
            assert "forward" in vars(module), name  # pack_linears puts its own there


def test_block_is_the_anchor_and_masks():
    """The mask is another token, such as the tokenizer's last one; or the anchor is masked too.
    Training and decoding would agree on it, and no published drafter would be read right."""
    embedding = random_normal()(V, HIDDEN)
    tokens = tokens_of(2, 3)
    blocks = small_drafter().embed_block(tokens, embedding)
    assert blocks.shape == (2, 3, K, HIDDEN)
    assert torch.equal(blocks[:, :, 0], embedding[tokens])
    assert torch.equal(blocks[:, :, 1:], embedding[MASK].expand(2, 3, K - 1, HIDDEN))


@pytest.mark.parametrize("layer_types, window", DRAFTERS)
def test_leak_from_future_features_or_other_blocks(layer_types, window):
    """Failures 1 and 2: a block sees features at or after its anchor, or another block; or it does
    not see the feature before its anchor, or its own anchor."""
    drafter = small_drafter(layer_types, window)
    features, blocks, anchors = drafting(40)
    hidden = drafter(features, blocks, anchors, attention_by_anchor_groups)
    positions = torch.arange(40)
    for a in range(5):
        n = anchors[:, a, None]
        own_hidden = hidden[:, a]

        in_the_future = (positions >= n).float()
        other_features = features + in_the_future[..., None]
        other_blocks = blocks + 1
        other_blocks[:, a] = blocks[:, a]
        changed = drafter(other_features, other_blocks, anchors, attention_by_anchor_groups)[:, a]
        assert torch.equal(changed, own_hidden)

        just_before = (positions == n - 1).float()
        other_features = features + just_before[..., None]
        changed = drafter(other_features, blocks, anchors, attention_by_anchor_groups)[:, a]
        assert not torch.allclose(changed, own_hidden, rtol=1e-2)

        other_anchor = blocks.clone()
        other_anchor[:, a, 0] += 1
        changed = drafter(features, other_anchor, anchors, attention_by_anchor_groups)[:, a]
        assert not torch.allclose(changed[:, 1], own_hidden[:, 1], rtol=1e-2)


@pytest.mark.parametrize("layer_types, window", DRAFTERS)
@torch.no_grad()
def test_leak_in_flex_attention(layer_types, window, monkeypatch):
    """Failures 1 and 2 on GPUs: flex_attention's mask is not that of the form for CPUs. Here it
    runs uncompiled."""
    monkeypatch.setattr(model, "compiled_flex_attention", flex_attention)
    monkeypatch.setattr(model, "compiled_create_block_mask", create_block_mask)
    drafter = small_drafter(layer_types, window)
    features, blocks, anchors = drafting(200, A=20)
    anchors[0, 0] = 0    # a block without context
    anchors[1, -3:] = 0  # unreal ones after the last
    with_flex = drafter(features, blocks, anchors)
    in_groups = drafter(features, blocks, anchors, attention_by_anchor_groups)
    assert apart(with_flex, in_groups) < 1e-5


@pytest.mark.parametrize("window", (None, 24))
def test_block_mask_is_compiled_once_for_all_anchors(window, monkeypatch):
    """A mask that is compiled anew in every micro-batch, or that keeps the anchors of the first.
    Here it is traced and not turned into kernels."""
    compiled = torch.compile(create_block_mask, dynamic=False, backend="eager")
    monkeypatch.setattr(model, "compiled_create_block_mask", compiled)
    graphs = counters["stats"]["unique_graphs"]
    T = 200
    for seed in range(3):
        _, _, anchors = drafting(T, A=20, seed=seed)
        visible = block_visibility(anchors, T, K, window)
        shape = (20 * K, T + 20 * K, anchors.device)
        mask = block_mask(visible, 2, *shape)
        expected = create_block_mask(visible, 2, None, *shape)
        assert torch.equal(mask.to_dense(), expected.to_dense())
        assert torch.equal(mask.full_kv_num_blocks, expected.full_kv_num_blocks)
        assert mask.mask_mod is visible
    assert counters["stats"]["unique_graphs"] == graphs + 1


def test_only_wide_heads_have_options_of_their_own(monkeypatch):
    """An option that is meant for the backward of heads of 256 channels and slows others down."""
    given = []

    def keep_options(q, k, v, block_mask, enable_gqa, kernel_options):
        given.append(kernel_options)
        return q

    monkeypatch.setattr(model, "compiled_flex_attention", keep_options)
    monkeypatch.setattr(model, "compiled_create_block_mask", create_block_mask)
    features, blocks, anchors = drafting(200)
    config = small_drafter().config
    for head_dim in (128, 256):
        config = Qwen3Config(**config.to_dict() | {"head_dim": head_dim})  # of two layers
        DFlashDraftModel(config)(features, blocks, anchors)
    assert given == [None] * 2 + [{"bwd_num_warps": 8}] * 2


@pytest.mark.parametrize("gain_dtype", (torch.float32, torch.bfloat16))
def test_norm_in_bf16_is_computed_in_fp32(gain_dtype):
    """Statistics or the gain of a norm rounded to bf16 before they are used. The gain is fp32 in
    training and bf16 in decoding."""
    norm = model.RMSNorm(64, 1e-6)
    gain = (1 + 0.3 * random_normal(1)((64,))).to(gain_dtype)
    norm.weight.data = gain
    x = random_normal()((400, 64)).bfloat16()
    normed = norm(x)
    assert normed.dtype == torch.bfloat16

    mean_square = x.double().square().mean(-1, keepdim=True)
    exact = x.double() / (mean_square + 1e-6).sqrt() * gain.double()
    # rounded once, to eight bits
    error = (normed.double() - exact).abs()
    assert (error <= 1.01 * 2 ** -8 * exact.abs()).all()


def test_attention_in_bf16_has_its_softmax_in_fp32():
    """Scores divided or a softmax summed in bf16, which has three digits. Of a buffer of 400 keys
    300 are seen."""
    draw = random_normal()
    q = 8 * draw(1, 4, 3, 32).bfloat16()
    k = draw(1, 2, 400, 32).bfloat16()
    v = draw(1, 2, 400, 32).bfloat16()
    mask = (torch.arange(400) < 300).expand(1, 3, -1)
    o = masked_attention(q, k, v, mask)
    assert o.dtype == torch.bfloat16

    # two query heads share a key head. Rounded to bf16 are the products, and the weights, which are
    # part of the second product
    seen_k = k[:, :, :300].double().repeat_interleave(2, 1)
    seen_v = v[:, :, :300].double().repeat_interleave(2, 1)
    scores = (q.double() @ seen_k.mT).bfloat16().double()
    weights = (scores / 32 ** 0.5).softmax(-1).bfloat16().double()
    exact = weights @ seen_v
    assert apart(o, exact) < 2.5e-3


@pytest.mark.parametrize("ids", ((1, 7), (3, 1), (1, 1), (-1, 2), ()))
def test_taps_are_refused(ids):
    """Failure 4: the last layer as a feature, which transformers returns normed; layers in another
    order than fc's columns."""
    with pytest.raises(ValueError, match=r"0 \.\. 6"):
        drafter_config(small_config(), 1, ids, MASK, heads=4, kv_heads=2, head_dim=16, mlp=96)


def test_failure_3_partial_rotary_stays_with_the_target():
    """Failure 3: the drafter inherits the target's partial rotary, so that its slots 2 and up are
    never accepted."""
    target = dataclasses.replace(small_config(), partial_rotary_factor=0.25, rope_theta=5e5)
    config = drafter_config(target, 1, LAYER_IDS, MASK, heads=4, kv_heads=2, head_dim=16, mlp=96)
    cos, sin = DFlashDraftModel(config).rotary(torch.arange(3))
    assert cos.shape == (3, 16)
    assert (sin[1] != 0).all()  # all 16 channels turn
    assert sin[1, 1].item() == pytest.approx(math.sin(5e5 ** (-2 / 16)), rel=1e-5)


@pytest.mark.parametrize("theta", (1e4, 1e6, 1e7))
@pytest.mark.parametrize("dim", (64, 128, 256))
def test_rotary_table_equals_that_of_transformers(theta, dim):
    """Frequencies as theta^(-2i/dim), which are right in theory: their rounding moves cos by 0.01
    at position 200,000 from what published weights were trained with."""
    config = Qwen3Config(head_dim=dim, rope_parameters={"rope_type": "default",
                                                        "rope_theta": theta})
    positions = torch.arange(262_144)
    positions = torch.cat((positions[:3000], positions[3000::97], positions[-3000:]))
    theirs = Qwen3RotaryEmbedding(config)(torch.zeros(1), positions[None])
    ours = rotary_table(positions, dim, theta)
    assert torch.equal(ours[0], theirs[0][0])
    assert torch.equal(ours[1], theirs[1][0])
