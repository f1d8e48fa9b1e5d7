"""
basic.py is the definition of the method. The fast code computes the same numbers.

Small random models run in float64, where only the order of sums differs: the largest relative
difference is about 1e-14. The shipped models run in float32, as they do for users.
"""
import functools
import json
import runpy
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import basic
from tokenizer import chat_prompt, stop_ids
from checkpoint import drafter_config
from fast.attention import grouped_attend
from data.nano.problems import problems
from decode_state import DecodeState, prefill
from draft_decode import generate
from loss import Targets, block_labels, block_loss
from model import DFlashDraftModel
from target import Target, TargetConfig
from tests.common import (FULL, NANO, NANO_DRAFTER, NANO_TARGET, ROOT, SLIDING, apart, edit_json,
                          nano, perturb, random_normal, shipped)

TOLERANCE = 1e-12
LINEAR = "linear_attention"

# Small models of several shapes: tied or untied heads, value heads that share a key head, query
# heads that share a key head, a rotary embedding of a part of the head, one or several layers for
# the features, blocks of 4, 8, and 16 tokens. With 24 tokens in the vocabulary, some of the random
# guesses are accepted.
SHAPES = {  # keys of the target, target_layer_ids, block size
    "tied": ({"tie_word_embeddings": True}, (0, 2), 16),
    "grouped": ({"linear_num_value_heads": 6, "num_key_value_heads": 1,
                 "partial_rotary_factor": 0.5}, (1, 2, 3), 8),
    "one layer": ({"num_key_value_heads": 4, "partial_rotary_factor": 1.0}, (3,), 4),
}
WIDTHS = {"vocab_size": 24, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5,
          "layer_types": (LINEAR, LINEAR, FULL, LINEAR, FULL), "num_attention_heads": 4,
          "num_key_value_heads": 2, "head_dim": 16, "linear_num_key_heads": 2,
          "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 12,
          "rope_theta": 1e4}
DRAFTER = {"mask_token_id": 23, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
           "intermediate_size": 40}


@pytest.fixture(autouse=True)
def float64():
    """Constants of the loss, which are float32 otherwise, do not hide differences."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@functools.cache
def small_pair(shape):
    """(Target, drafter) of one of the SHAPES, in float64, with random weights."""
    changes, target_layer_ids, block_size = SHAPES[shape]
    config = TargetConfig(**WIDTHS | changes)
    torch.manual_seed(0)
    target = perturb(Target(config), scale=8.0).double()
    config = drafter_config(
        config, num_hidden_layers=3, target_layer_ids=target_layer_ids, block_size=block_size,
        **DRAFTER)
    drafter = perturb(DFlashDraftModel(config), scale=5.0).double()
    return target, drafter


def as_basic(module, config, dtype=torch.float64):
    """The same weights as a basic.Model, through files of the public form."""
    weights = {}
    for name, weight in module.state_dict().items():
        prefix = "model." if isinstance(module, Target) and name != "lm_head.weight" else ""
        weights[prefix + name] = weight.clone()
    with tempfile.TemporaryDirectory() as folder:
        save_file(weights, f"{folder}/model.safetensors")
        Path(folder, "config.json").write_text(json.dumps(config))
        return basic.Model(Path(folder), dtype)


@functools.cache
def basic_pair(shape):
    target, drafter = small_pair(shape)
    config = dict(vars(target.config))
    config["rope_parameters"] = {
        "rope_type": "default", "rope_theta": config["rope_theta"],
        "partial_rotary_factor": config["partial_rotary_factor"]}
    return as_basic(target, config), as_basic(drafter, drafter.config.to_dict())


def random_tokens(n, seed=0):
    return torch.randint(0, 23, (n,), generator=torch.Generator().manual_seed(seed))


def read_by_basic(target, tokens):
    """(logits (n, V), outputs of all layers (n, layers, width)) of basic.py for n tokens."""
    state = {}
    logits = [basic.target_step(target, state, token) for token in tokens.tolist()]
    return torch.stack(logits), torch.stack(state["outputs"])


def pick_features(drafter, outputs):
    """Features (n, layers * width) from the outputs (n, layers, width) of all layers."""
    return outputs[:, list(drafter.target_layer_ids)].flatten(1)

# ------------------------------------------------------------------------------------------------
# the same numbers


@pytest.mark.parametrize("prompt_length", (1, 40))
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_blocks_with_rejected_guesses_equal_basic(shape, prompt_length):
    """Failure 8: a rejected guess changes the logits or features of the tokens after it, or S is
    right only if tokens come one at a time."""
    target, drafter = small_pair(shape)
    K = drafter.block_size
    tokens = random_tokens(75)
    expected_logits, outputs = read_by_basic(basic_pair(shape)[0], tokens)
    expected_features = pick_features(drafter, outputs)
    state = DecodeState(target, 1, 75 + K, K)
    prefill(target, tokens[None, :prompt_length], state, drafter.target_layer_ids)
    position = prompt_length
    for n in (1, K, K - 1, 2, 3, K, 1) * 3:
        n = min(n, 75 - position)
        block = random_tokens(K, seed=position)
        block[:n] = tokens[position:position + n]
        features, hidden = target(block[None], state, drafter.target_layer_ids)
        state.commit(n)
        committed = slice(position, position + n)
        assert apart(features[0, :n], expected_features[committed]) < TOLERANCE, position
        assert apart(target.logits(hidden)[0, :n], expected_logits[committed]) < TOLERANCE
        position += n
        if position == 75:
            break


def check_drafter(drafter, expected_hidden, tolerance=TOLERANCE):
    """Compare both forms of the drafter, for training and for decoding, with expected hidden
    states. expected_hidden(features, block) gets the features (n, ...) before the anchor."""
    draw = random_normal(0, torch.float64)
    anchors = torch.tensor([0, 1, 2, 15, 16, 29])
    features = draw(30, drafter.fc.in_features)
    blocks = draw(len(anchors), drafter.block_size, drafter.config.hidden_size)
    trained = drafter(features[None], blocks[None], anchors[None], grouped_attend)[0]
    for block, hidden, n in zip(blocks, trained, anchors.tolist()):
        assert apart(hidden, expected_hidden(features[:n], block)) < tolerance, n
        cache = drafter.new_cache(1, 30 + drafter.block_size)
        drafter.write_context(features[None, :n], cache, torch.tensor([0]))
        decoded = drafter.decode_block(block[None], cache, torch.tensor([n]))[0]
        assert apart(decoded, hidden) < TOLERANCE, n


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_drafter_equals_basic(shape):
    """Failures 2 and 3: a block is causal or sees other blocks, only a part of a key is rotated,
    positions are not absolute, or a layer's norm is applied to the context."""
    definition = basic_pair(shape)[1]
    check_drafter(small_pair(shape)[1], functools.partial(basic.drafter_hidden, definition))


@pytest.mark.parametrize("window", (1, 5, 12, 20, 100))
@torch.no_grad()
def test_sliding_layer_is_a_full_layer_that_gets_only_the_window(window):
    """A sliding-window layer sees a token too many or too few, or a token after its own.

    basic.py has no sliding windows. But position k of such a layer must equal the last position of
    a full layer that gets the visible part of the context and of the block, and nothing else.
    """
    config = drafter_config(
        small_pair("tied")[0].config, num_hidden_layers=1, target_layer_ids=(0, 2), block_size=8,
        **DRAFTER)
    config.layer_types = [SLIDING]
    config.sliding_window = window
    config.use_sliding_window = True
    drafter = perturb(DFlashDraftModel(config), scale=5.0).double()
    full = drafter.config.to_dict() | {"layer_types": [FULL]}
    definition = as_basic(drafter, full)

    def expected_hidden(features, block):
        n = len(features)
        rows = []
        for k in range(len(block)):
            oldest = max(0, n + k - window + 1)  # the oldest position that position n + k sees
            visible_block = block[max(0, oldest - n):k + 1]
            hidden = basic.drafter_hidden(definition, features[oldest:], visible_block)
            rows.append(hidden[-1])
        return torch.stack(rows)

    # the angles of the rotary embedding are float32, and their positions are shifted here
    check_drafter(drafter, expected_hidden, tolerance=1e-5)

# ------------------------------------------------------------------------------------------------
# the same tokens and rounds


@pytest.mark.parametrize("shape", SHAPES)
def test_small_models_decode_the_rounds_of_basic(shape):
    """Failure 5: tokens differ from the definition, or rounds have a different length."""
    target, drafter = small_pair(shape)
    accepted_lengths = set()
    for seed in range(2):
        prompt = random_tokens(9 + seed, seed).tolist()
        ours = generate(target, drafter, prompt, max_new_tokens=24)
        theirs = basic.decode(*basic_pair(shape), {}, prompt, end=-1)
        room = 24
        for output, (accepted, _, own) in zip(ours, theirs):
            expected = (accepted + own)[:room]  # generate() ends in the middle of a round
            assert output.tokens == expected
            room -= len(expected)
            accepted_lengths.add(len(expected))
        assert room == 0 and output.is_last
    assert len(accepted_lengths) > 1  # so rejected and accepted guesses occur


@functools.cache
def shipped_basic_pair():
    return basic.Model(Path(NANO_TARGET)), basic.Model(Path(NANO_DRAFTER))


@pytest.mark.parametrize("task", ("words", "plain"))
def test_shipped_models_decode_the_rounds_of_basic(task):
    """Failure 5: the shipped pair decodes tokens or rounds that differ from the definition, for
    word problems or short calculations."""
    torch.set_default_dtype(torch.float32)
    target, tokenizer = nano()
    for question, _, _ in problems("test", 2, task=task):
        prompt = chat_prompt(tokenizer, question)
        ours = list(generate(target, shipped(), prompt, stop_token_ids=stop_ids(tokenizer)))
        theirs = list(basic.decode(*shipped_basic_pair(), {}, prompt, tokenizer.eos_token_id))
        assert [piece.tokens for piece in ours] == [
            accepted + own for accepted, _, own in theirs], question
        assert [piece.rejected[:1] for piece in ours[:-1]] == [
            rejected for _, rejected, _ in theirs[:-1]], question

# ------------------------------------------------------------------------------------------------
# the same loss and gradient


def our_loss(target, drafter, tokens, supervised, anchors, outputs):
    """The weighted mean loss of one sample, from the parts that train.py uses."""
    labels, weights = block_labels(
        tokens[None], supervised[None], anchors[None], torch.ones(1, len(anchors)).bool(),
        K=drafter.block_size, gamma=7.0)
    features = pick_features(drafter, outputs)[None]
    blocks = drafter.embed_block(tokens[anchors][None], target.embed_tokens.weight)
    hidden = drafter(features, blocks, anchors[None], grouped_attend)
    loss, *_ = block_loss(
        hidden, target.head_weight, Targets(labels, weights), loss_chunk_size=20)
    return loss / weights.sum()


@pytest.mark.parametrize("anchors", ([20], [39], [18, 25, 26, 31, 38, 39]),
                         ids=("one", "last", "many"))
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradients_equal_basic(shape, anchors):
    """Failures 1, 2, and 7: a label is shifted, a weight is wrong, tokens after the response count,
    or a gradient is scaled or lost."""
    target, drafter = small_pair(shape)
    tokens = random_tokens(50)
    supervised = torch.zeros(50, dtype=torch.bool)
    supervised[18:41] = True
    supervised[45:] = True  # a second response; the loss of the first one must not see it
    definition, basic_drafter_ = basic_pair(shape)
    _, outputs = read_by_basic(definition, tokens)

    drafter.requires_grad_(True)
    loss = our_loss(target, drafter, tokens, supervised, torch.tensor(anchors), outputs)
    gradients = torch.autograd.grad(loss, list(drafter.parameters()))
    drafter.requires_grad_(False)

    weights = {name: basic_drafter_.weights[name] for name, _ in drafter.named_parameters()}
    for weight in weights.values():
        weight.requires_grad_(True)
    response = tokens[:41].tolist()
    expected = basic.sample_loss(basic_drafter_, definition, response, outputs, anchors)
    expected_gradients = torch.autograd.grad(expected, list(weights.values()))
    for weight in weights.values():
        weight.requires_grad_(False)

    assert apart(loss.detach(), expected.detach()) < TOLERANCE
    for name, gradient, expected_gradient in zip(weights, gradients, expected_gradients):
        assert apart(gradient, expected_gradient) < 1e-11, name

# ------------------------------------------------------------------------------------------------
# the file itself


def run_basic(monkeypatch, *words, file=f"{ROOT}/basic.py"):
    torch.set_default_dtype(torch.float32)
    monkeypatch.setattr(sys, "argv", ["basic.py", *words])
    runpy.run_path(str(file), run_name="__main__")


def test_basic_stays_small_and_alone():
    """basic.py grows past 250 lines, or imports another file of this project."""
    source = Path(ROOT, "basic.py").read_text()
    lines = source.splitlines()
    assert len(lines) <= 250
    imports = {line.split()[1].split(".")[0] for line in lines
               if line.startswith(("import ", "from "))}
    assert imports <= {"argparse", "json", "pathlib", "sys", "torch", "safetensors", "transformers"}


def test_basic_prints_the_rounds_of_an_answer(monkeypatch, capsys):
    """A round is printed without its accepted, rejected, or own tokens, or tau is wrong."""
    run_basic(monkeypatch, "What is 7 * 34?")
    assert capsys.readouterr().out.splitlines() == [
        "[+Step+]",
        "[ 1: 7 * 30 = ][-1-][+2+]",
        r"[10.\nStep 2: 7 * 4 = 2][+8+]",
        r"[.\nStep 3: 210 + 28 = ][+2+]",
        r"[38.\nThe answer is \boxed{2][-6-][+3+]",
        "[8}.]",
        "58 tokens in 5 rounds: tau 11.60"]


def test_basic_training_lowers_the_loss():
    """The gradient does not lower the loss, or the target is trained too."""
    torch.set_default_dtype(torch.float32)
    target, _ = shipped_basic_pair()
    drafter = basic.Model(Path(NANO_DRAFTER))
    torch.manual_seed(0)
    for name, weight in drafter.weights.items():
        new = torch.ones_like(weight) if weight.dim() == 1 else 0.06 * torch.randn_like(weight)
        drafter.weights[name] = new.requires_grad_()
    tokens = chat_prompt(nano()[1], "57 + 38")
    _, outputs = read_by_basic(target, torch.tensor(tokens))
    anchors = [5, 9, 14]
    before = basic.sample_loss(drafter, target, tokens, outputs, anchors).item()
    basic.train(target, drafter, [(tokens, outputs, 4)], steps=10)
    after = basic.sample_loss(drafter, target, tokens, outputs, anchors).item()
    assert after < 0.8 * before
    assert not any(weight.requires_grad for weight in target.weights.values())


def test_basic_refuses_what_it_does_not_compute(monkeypatch, tmp_path):
    """A drafter with sliding windows is computed as if it had none; a missing folder ends in a
    traceback."""
    file = shutil.copy(f"{ROOT}/basic.py", tmp_path)
    with pytest.raises(SystemExit, match="error: no folder .*nano: run basic.py in a complete"):
        run_basic(monkeypatch, "a", file=file)
    for part in ("target", "drafter-dflash"):
        shutil.copytree(f"{NANO}/{part}", tmp_path / "data" / "nano" / part)
    config = tmp_path / "data" / "nano" / "drafter-dflash" / "config.json"
    for name, setting in (
            ("sliding_attention", {"layer_types": ["sliding_attention"] * 4}),
            ("is_causal", {"is_causal": True}),
            ("attention_bias", {"attention_bias": True}),
            ("rms_norm_eps", {"rms_norm_eps": 1e-5}),
            ("rope_type", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}})):
        edit_json(config, **{"layer_types": ["full_attention"] * 4, **setting})
        with pytest.raises(SystemExit, match=f"error: .*{name}.*use draft_decode.py"):
            run_basic(monkeypatch, "a", file=file)
