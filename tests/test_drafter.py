"""
The drafter: what a block sees, in training and in decoding.
"""
import dataclasses
import math
import random

import pytest
import torch
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

import model
from checkpoint import drafter_config
from fast.attention import grouped_attend
from model import DFlashDraftModel, masked_attention, rotary_table
from tests.common import (DRAFTERS, HIDDEN, K, LAYER_IDS, MASK, V, apart, drafting, random_normal,
                          small_config, small_drafter, small_target, tokens_of)

SMALLEST = {"num_hidden_layers": 1, "mask_token_id": MASK, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 96}


@pytest.mark.parametrize("layer_types, window", DRAFTERS)
def test_drafter_decodes_as_it_was_trained(layer_types, window):
    """Failure 2: 98 % in training, 10 % served. The context arrives in blocks of 16, whose rejected
    features are garbage. Logit k belongs to position k, not to a neighbor."""
    target = small_target()
    drafter = small_drafter(layer_types, window)
    features, _, _ = drafting(70, 1)
    stale, _, _ = drafting(K, 1, seed=1)
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


def test_block_is_the_anchor_and_masks():
    """The mask is a different token, or the anchor is masked too. Training and decoding would
    agree, but published drafters would fail."""
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
    features, blocks, anchors = drafting(40, 5)
    hidden = drafter(features, blocks, anchors, grouped_attend)
    positions = torch.arange(40)
    for a in range(5):
        n = anchors[:, a, None]
        own_hidden = hidden[:, a]

        in_the_future = (positions >= n).float()
        other_features = features + in_the_future[..., None]
        other_blocks = blocks + 1
        other_blocks[:, a] = blocks[:, a]
        changed = drafter(other_features, other_blocks, anchors, grouped_attend)[:, a]
        assert torch.equal(changed, own_hidden)

        just_before = (positions == n - 1).float()
        other_features = features + just_before[..., None]
        changed = drafter(other_features, blocks, anchors, grouped_attend)[:, a]
        assert not torch.allclose(changed, own_hidden, rtol=1e-2)

        other_anchor = blocks.clone()
        other_anchor[:, a, 0] += 1
        changed = drafter(features, other_anchor, anchors, grouped_attend)[:, a]
        assert not torch.allclose(changed[:, 1], own_hidden[:, 1], rtol=1e-2)


@pytest.mark.parametrize("gain_dtype", (torch.float32, torch.bfloat16))
def test_norm_in_bf16_is_computed_in_fp32(gain_dtype):
    """Statistics or the gain of a norm are rounded to bf16 before they are used. The gain is fp32
    in training and bf16 in decoding."""
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
    """Scores or a softmax are in bf16, which has three digits. 300 of 400 keys are visible."""
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
    """Failure 4: the last layer is a feature, which transformers returns normed, or the order of
    layers is not that of fc's columns."""
    with pytest.raises(ValueError, match=r"0 \.\. 6"):
        drafter_config(small_config(), target_layer_ids=ids, **SMALLEST)


def test_failure_3_partial_rotary_stays_with_the_target():
    """Failure 3: the drafter inherits the target's partial rotary, so its guesses from position 2
    on are never accepted. Or a norm ignores the target's rms_norm_eps."""
    target = dataclasses.replace(
        small_config(), partial_rotary_factor=0.25, rope_theta=5e5, rms_norm_eps=0.5)
    drafter = DFlashDraftModel(drafter_config(target, target_layer_ids=LAYER_IDS, **SMALLEST))
    cos, sin = drafter.rotary(torch.arange(3))
    assert cos.shape == (3, 16)
    assert (sin[1] != 0).all()  # all 16 channels turn
    assert sin[1, 1].item() == pytest.approx(math.sin(5e5 ** (-2 / 16)), rel=1e-5)
    for name, module in drafter.named_modules():
        if isinstance(module, model.RMSNorm):
            assert module.eps == 0.5, name


@pytest.mark.parametrize("dim, theta", ((64, 1e7), (128, 1e6), (256, 1e4)))
def test_rotary_table_equals_that_of_transformers(dim, theta):
    """Frequencies are theta^(-2i/dim). They round differently, which changes cos by 0.01 at
    position 200,000."""
    rope = {"rope_type": "default", "rope_theta": theta}
    config = Qwen3Config(head_dim=dim, rope_parameters=rope)
    positions = torch.arange(262_144)
    positions = torch.cat((positions[:3000], positions[3000::97], positions[-3000:]))
    theirs = Qwen3RotaryEmbedding(config)(torch.zeros(1), positions[None])
    ours = rotary_table(positions, dim, theta)
    assert torch.equal(ours[0], theirs[0][0])
    assert torch.equal(ours[1], theirs[1][0])
