r"""
Every test of the project. None needs the network, a GPU or files that are not in the repository.

    python test_all.py                    # all, four minutes on two cores
    python test_all.py cuts               # those with "cuts" in the name; also -k EXPR, or plain pytest

Each test's docstring names the failure it catches. The numbers are those of the table of failures people reported with
this method (training 0.99, acceptance 0.12; greedy output that differs; ...):

    1  training leaks, or is off by one    test_leak_*, test_training_form_predicts_decoded_rounds
    2  labels, mask or blocks not as served  test_drafter_*, test_labels_*, test_leak_*
    3  rotary of the drafter               test_failure_3_*, test_drafter_equals_dense_restatement
    4  taps off by one                     test_failure_4_*, test_target_equals_transformers, test_taps_are_refused
    5  output differs from target-only     test_cuts_*, test_generate_is_identical_for_every_drafter
    6  a rejected block leaves traces      test_cuts_rejected_block, test_cuts_propose_twice
    7  logits of all anchors at once       test_loss_never_holds_all_logits
    8  wrong state after a block of 16     test_kernel_*, test_state_after_blocks_equals_recurrence
    9  another chat template when served   test_failure_9_*, test_chat_*, test_prepare*
    10 rope_theta dropped, wrong target    test_failure_10_*, test_checkpoint_*, test_drafter*_refused
    11 temperature ignored                 test_sampled_*, test_noise_*
    12 resume is another run               test_resume_*, test_ranks_are_the_same_run
    13 loss depends on the split           test_step_does_not_depend_on_the_split, test_ranks_are_the_same_run
    14 shapes that vary                    test_anchors_*, test_batches_*
    15 a flattering benchmark              test_generate_ends_*, test_bench_*
"""
import argparse
import contextlib
import dataclasses
import errno
import functools
import http.server
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

MODULES = tempfile.TemporaryDirectory()  # where transformers copies the code of checkpoints it loads; goes at exit
if "PYTEST_XDIST_WORKER" in os.environ:  # before torch reads it; threads of two workers would fight for the cores
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ.update(HF_HUB_OFFLINE="1", HF_MODULES_CACHE=MODULES.name, TOKENIZERS_PARALLELISM="false")

import huggingface_hub
import numpy as np
import pyarrow.parquet
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn.attention.flex_attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, Qwen3_5ForCausalLM, Qwen3_5TextConfig

ROOT = os.path.dirname(os.path.abspath(__file__))
NANO = os.path.join(ROOT, "data", "nano")
sys.path[:0] = [path for path in (ROOT, NANO) if path not in sys.path]

import bench
import draft_decode
import model
import prepare
import pretrain
import speed
import train
from configurator import configure, script_keys
from data import regenerate
from data.math240k import prepare as math240k
from data.math500 import prepare as math500
from data.rows import Rows, write_rows
from draft_decode import Sampling, accept, generate, gumbel, run
from model import (DFlashDraftModel, block_labels, block_loss, dpace, drafter_config, load_drafter, newest,
                   sample_anchors, save_drafter)
from problems import boxed, problem, problems, split_of
from target import (FP32, SIZES, DecodeState, Joined, Target, TargetConfig, chat_prompt, delta_step, fingerprint,
                    gated_delta_rule, load_target, load_tokenizer, random_weights, rowwise, stop_ids, target_config)

V, K, MASK = 300, 16, 299   # of the small models
TAPS = (0, 3, 6)

# ----------------------------------------------------------------------------------------------------------------------
# small models; random gains and biases, as freshly made ones hide a gain that is read as w where 1 + w is meant


def small_config(shape):
    """Two layer patterns of the 0.8B: its own, and that of larger sizes with more value heads and an untied head."""
    own = {"tied": {"linear_num_value_heads": 4, "tie_word_embeddings": True},
           "untied": {"linear_num_value_heads": 8, "tie_word_embeddings": False}}[shape]
    return TargetConfig(vocab_size=V, hidden_size=64, intermediate_size=96, num_hidden_layers=8, num_attention_heads=4,
                        num_key_value_heads=2, head_dim=32, linear_num_key_heads=4, linear_key_head_dim=16,
                        linear_value_head_dim=16, max_position_embeddings=512, **own)


def perturb(model, seed=0, scale=1.0):
    """Random gains, biases and, for scale > 1, larger matrices, so that no part of the model is next to nothing."""
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.dim() == 1 and "A_log" not in name:
            p.data += 0.2 * torch.randn(p.shape, generator=g)
        elif p.dim() == 2:
            p.data *= scale
    return model.eval().requires_grad_(False)


@functools.cache
def small_target(shape="tied", dtype=torch.float32):
    torch.manual_seed(0)
    return perturb(Target(small_config(shape)), scale=5.0).to(dtype)


def small_drafter(kinds=("full_attention",) * 2, window=None, seed=0, target="tied"):
    torch.manual_seed(seed)
    config = drafter_config(small_config(target), len(kinds), TAPS, MASK, 4, 2, 16, 96, K)
    config.layer_types, config.sliding_window, config.use_sliding_window = list(kinds), window, window is not None
    return perturb(DFlashDraftModel(config), seed, 5.0)


SLIDING, FULL = "sliding_attention", "full_attention"
DRAFTERS = [((FULL, FULL), None), ((SLIDING, SLIDING), 5), ((SLIDING, FULL), 20)]  # windows below and above a block


@functools.cache
def nano():
    return load_target(os.path.join(NANO, "target")), load_tokenizer(os.path.join(NANO, "target"))


@functools.cache
def shipped():
    return load_drafter(os.path.join(NANO, "drafter-dflash"), nano()[0].config)


@functools.cache
def questions():
    return [question for question, _, _ in problems("val", 64)]


def tokens_of(*shape, seed=0):
    return torch.randint(0, V - 1, shape, generator=torch.Generator().manual_seed(seed))


def apart(a, b):
    """Relative error |a - b| / |b|."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()

# ----------------------------------------------------------------------------------------------------------------------
# the kernel, against its definition


def recurrence(q, k, v, g, beta, S):
    """The gated delta rule, one token after another: what gated_delta_rule computes in chunks."""
    R, out = v.shape[2] // q.shape[2], []
    for t in range(v.shape[1]):
        q_t, k_t = (x[:, t].double().repeat_interleave(R, 1) for x in (q, k))
        S = S * g[:, t].double().exp()[..., None, None]
        u = beta[:, t, :, None].double() * (v[:, t].double() - torch.einsum("bhdv,bhd->bhv", S, k_t))
        S = S + torch.einsum("bhd,bhv->bhdv", k_t, u)
        out.append(torch.einsum("bhdv,bhd->bhv", S, q_t) / q.shape[-1] ** 0.5)
    return torch.stack(out, 1), S


def kernel_inputs(T, B=2, H=2, Hv=4, D=8, Dv=6, seed=0):
    """q k v g beta, and S; a tenth of the decays is -50, which forgets all, and a tenth 0, which forgets nothing."""
    r = functools.partial(torch.randn, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    q, k = (F.normalize(r(B, T, H, D), dim=-1) for _ in range(2))
    kind, g = r(B, T, Hv), -F.softplus(r(B, T, Hv))
    g = g.masked_fill(kind > 1.3, -50.0).masked_fill(kind < -1.3, 0.0)
    return (q, k, r(B, T, Hv, Dv), g, r(B, T, Hv).sigmoid()), r(B, Hv, D, Dv)


@pytest.mark.parametrize("chunk", (4, 16, 64))
@pytest.mark.parametrize("T", (1, 15, 16, 17, 63, 64, 65, 130))
def test_kernel_equals_recurrence(T, chunk):
    """Failure 8: the chunked form sums, decays or pads other than the recurrence does, or overflows on strong decay."""
    inputs, S = kernel_inputs(T)
    o, state = gated_delta_rule(*inputs, S, chunk=chunk)
    o_true, S_true = recurrence(*inputs, S)
    assert apart(o, o_true) < 1e-9 and apart(state, S_true) < 1e-9
    assert apart(gated_delta_rule(*inputs, chunk=chunk)[0], recurrence(*inputs, 0 * S)[0]) < 1e-9


@pytest.mark.parametrize("T", (33, 64))
def test_kernel_any_split_in_two_calls(T):
    """Failure 8: a state handed from one call to the next lacks the last, unfinished chunk."""
    inputs, S = kernel_inputs(T)
    whole, last = recurrence(*inputs, S)
    for cut in range(1, T):
        head, middle = gated_delta_rule(*(x[:, :cut] for x in inputs), S, chunk=16)
        tail, end = gated_delta_rule(*(x[:, cut:] for x in inputs), middle, chunk=16)
        assert apart(torch.cat((head, tail), 1), whole) < 1e-9 and apart(end, last) < 1e-9, cut


def test_kernel_keeps_the_state_of_an_earlier_chunk():
    """Failure 8: keep=1 returns the state after the window, not after its first chunk; or padding changes the state."""
    inputs, S = kernel_inputs(48)
    for keep in (0, 1, 2, 3):
        _, kept = gated_delta_rule(*inputs, S, chunk=16, keep=keep)
        assert apart(kept, recurrence(*(x[:, :16 * keep] for x in inputs), S)[1] if keep else S) < 1e-9
    padded = [F.pad(x, (0, 0) * (x.dim() - 2) + (0, 16)) for x in inputs]
    assert torch.equal(gated_delta_rule(*padded, S, chunk=16)[1], gated_delta_rule(*inputs, S, chunk=16)[1])


def test_kernel_step_equals_recurrence():
    """Failure 8: the one-token form drifts from the definition, with value heads a multiple of key heads."""
    inputs, S = kernel_inputs(20)
    o_true, S_true = recurrence(*inputs, S)
    out = []
    for t in range(20):
        o, S = delta_step(*(x[:, t:t + 1] for x in inputs), S)
        out.append(o)
    assert apart(torch.cat(out, 1), o_true) < 1e-9 and apart(S, S_true) < 1e-9


def test_kernel_is_finite_in_fp32():
    """A decay of exp(50) above the diagonal: inf times a zero of the mask is nan."""
    inputs, S = kernel_inputs(130)
    g = torch.where(torch.arange(130)[None, :, None] % 3 > 0, -50.0, 0.0).expand(2, 130, 4)
    inputs = [x.float() for x in (*inputs[:3], g, inputs[4])]
    o, state = gated_delta_rule(*inputs, S.float())
    o_true, S_true = recurrence(*inputs, S)
    assert o.isfinite().all() and state.isfinite().all()
    assert apart(o, o_true) < 1e-5 and apart(state, S_true) < 1e-5


@pytest.mark.parametrize("cuts", ((16, 16, 16, 16), (1,) * 40, (7, 16, 12, 0, 3, 16, 15, 1), (15, 1, 16, 9, 7)))
def test_state_after_blocks_equals_recurrence(cuts):
    """Failure 8: the state kept is right after one token at a time only, not after a block of 16 or a part of it."""
    target = small_target("untied", torch.float64)
    inputs, S = kernel_inputs(sum(cuts), 1, 4, 8, 16, 16)
    state, S, pos = DecodeState(target, 1, 128, K), 0 * S, 0
    o_true, _ = recurrence(*inputs, S)
    for n in cuts:
        garbage, _ = kernel_inputs(K, 1, 4, 8, 16, 16, seed=pos + 1)
        block = [torch.cat((x[:, pos:pos + n], y[:, n:]), 1) for x, y in zip(inputs, garbage)]
        state.begin(K)
        o = state.layers[0].delta_rule(*block)
        state.commit(n)
        assert n == 0 or apart(o[:, :n], o_true[:, pos:pos + n]) < 1e-9, pos
        pos += n
        whole = pos // K * K
        assert apart(state.S[0], recurrence(*(x[:, :whole] for x in inputs), S)[1]) < 1e-9 if whole else pos < K

# ----------------------------------------------------------------------------------------------------------------------
# the target, against transformers


@functools.cache
def peer(shape):
    """A random Qwen3_5ForCausalLM of transformers, and our Target with its weights under their public names."""
    c, names = small_config(shape), set(small_config(shape).__dict__) - {"rope_theta", "partial_rotary_factor"}
    torch.manual_seed(1)
    theirs = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**{k: getattr(c, k) for k in names} | {
        "layer_types": list(c.layer_types), "rope_parameters": {
            "rope_type": "default", "rope_theta": c.rope_theta, "partial_rotary_factor": 0.25,
            "mrope_section": [2, 1, 1]}}))
    perturb(theirs, scale=5.0)
    weights = {name.removeprefix("model."): w for name, w in theirs.state_dict().items()}
    if c.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    ours = Target(c).eval()
    ours.load_state_dict(weights)  # strict: the names are those of the public checkpoint
    return theirs, ours


@pytest.mark.parametrize("T", (1, 15, 16, 17, 63, 64, 65, 130))
@pytest.mark.parametrize("shape", ("tied", "untied"))
@torch.no_grad()
def test_target_equals_transformers(shape, T):
    """Failure 4: a feature is not the residual stream after its layer; and any departure of the target's own math."""
    theirs, ours = peer(shape)
    x = tokens_of(2, T, seed=T)
    reference = theirs(x, output_hidden_states=True)
    features, logits = ours(x, taps=TAPS, rows=slice(None))
    assert apart(logits, reference.logits) < 1e-4
    for j, i in enumerate(TAPS):
        assert apart(features[..., 64 * j:64 * j + 64], reference.hidden_states[i + 1]) < 1e-4, i
    assert torch.equal(ours(x, taps=TAPS)[0], features)  # features alone stop at the last tap


@torch.no_grad()
def test_nano_target_is_a_public_checkpoint():
    """Failure 10: the shipped target has another form than the public one, so that only this project can read it."""
    theirs = Qwen3_5ForCausalLM.from_pretrained(os.path.join(NANO, "target"), dtype=torch.float32).eval()
    x = torch.tensor([chat_prompt(nano()[1], questions()[0])])
    assert apart(nano()[0](x, rows=slice(None))[1], theirs(x).logits) < 1e-4
    assert sum(p.numel() for p in nano()[0].parameters()) < 5e6


def test_load_target_refuses_what_it_cannot_read(tmp_path):
    """A missing shard, experts, or a config without a width end in something else than a line that names them."""
    text = publish(tmp_path, small_target("untied"))
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="model-00002-of-00002.safetensors"):
        load_target(str(tmp_path))
    with pytest.raises(ValueError, match="mixture-of-experts"):
        TargetConfig.from_dict({"text_config": text | {"num_experts": 4}})
    with pytest.raises(ValueError, match="hidden_size"):
        TargetConfig.from_dict({k: v for k, v in text.items() if k != "hidden_size"})


def phase_1_2():
    """TargetConfig and drafter at the published widths, spelled out, as the project's own table is under test too."""
    target = TargetConfig(vocab_size=248320, hidden_size=1024, intermediate_size=3584, num_hidden_layers=24,
                          num_attention_heads=8, num_key_value_heads=2, head_dim=256, linear_num_key_heads=16,
                          linear_num_value_heads=16, linear_key_head_dim=128, linear_value_head_dim=128,
                          tie_word_embeddings=True)
    return target, DFlashDraftModel(drafter_config(target, 5, (3, 7, 11, 15, 19), 248077, 8, 2, 256, 3584))


def test_sizes_of_phase_1_2():
    """A layer, gain or bias too many or too few at the published widths."""
    with torch.device("meta"):
        target, drafter = phase_1_2()
        sizes = [sum(p.numel() for p in m.parameters()) for m in (Target(target), drafter)]
    assert sizes == [752_393_024, 86_522_368]


def publish(folder, target, prefix="model.language_model.", shards=2, **change):
    """Write a target as its publishers do: config.json with text_config and vision_config, shards and their index (or
    one file), a vision tower and mtp layers. change: keys of text_config. Returns the text_config."""
    c = target.config
    text = {k: v for k, v in vars(c).items() if k not in ("rope_theta", "partial_rotary_factor")} | {
        "model_type": "qwen3_5_text", "attn_output_gate": True, "full_attention_interval": 4, "hidden_act": "silu",
        "mamba_ssm_dtype": "float32", "mlp_only_layers": [], "mtp_num_hidden_layers": 1, "dtype": "bfloat16",
        "rope_parameters": {"mrope_interleaved": True, "mrope_section": [2, 1, 1], "rope_type": "default",
                            "rope_theta": c.rope_theta, "partial_rotary_factor": c.partial_rotary_factor}} | change
    config = {"architectures": ["Qwen3_5ForConditionalGeneration"], "model_type": "qwen3_5", "image_token_id": 7,
              "text_config": text, "tie_word_embeddings": c.tie_word_embeddings,
              "vision_config": {"depth": 2, "hidden_size": 8, "model_type": "qwen3_5"}}
    weights = {k if k == "lm_head.weight" else prefix + k: v.clone() for k, v in target.state_dict().items()}
    weights |= {"model.visual.blocks.0.attn.qkv.weight": torch.ones(3, 2), "mtp.fc.weight": torch.ones(2, 3)}
    files = {k: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, k in enumerate(weights)}
    folder.mkdir(exist_ok=True)
    if shards == 1:
        files = dict.fromkeys(weights, "model.safetensors")
    else:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    for name in set(files.values()):
        save_file({k: v for k, v in weights.items() if files[k] == name}, folder / name, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return text


@pytest.mark.parametrize("prefix, shards", (("model.language_model.", 3), ("model.language_model.", 1), ("model.", 1)))
@pytest.mark.parametrize("shape", ("tied", "untied"))
def test_load_target_is_bit_equal_in_every_layout(shape, prefix, shards, tmp_path):
    """Failure 10: a head, a shard or a prefix of which another loader would make something else."""
    target = small_target(shape)
    publish(tmp_path, target, prefix, shards)
    loaded = load_target(str(tmp_path))
    assert loaded.config == target.config and not any(p.requires_grad for p in loaded.parameters())
    for name, w in target.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], w), name
    half = load_target(str(tmp_path), dtype="bfloat16").state_dict()
    assert {k: v.dtype == torch.float32 for k, v in half.items()} == {k: k.endswith(FP32) for k in half}
    assert all(torch.equal(half[k].float(), w if k.endswith(FP32) else w.bfloat16().float())
               for k, w in target.state_dict().items())


@torch.no_grad()
def test_failure_4_features_of_a_loaded_target_are_hidden_states_one_later(tmp_path):
    """Failure 4: id i read as hidden_states[i], or the last one, which is normed. A public folder, read by both."""
    publish(tmp_path, small_target("untied"))
    theirs = Qwen3_5ForCausalLM.from_pretrained(str(tmp_path), dtype=torch.float32, key_mapping={
        "^model.language_model": "model"}).eval()
    x, taps = tokens_of(2, 40), tuple(range(7))
    states = theirs(x, output_hidden_states=True).hidden_states
    features, _ = load_target(str(tmp_path))(x, taps=taps)
    for i in taps:
        own = features[..., 64 * i:64 * i + 64]
        assert apart(own, states[i + 1]) < 1e-4 and apart(own, states[i]) > 1e-2


def test_load_target_names_all_that_is_wrong_at_once(tmp_path):
    """Failure 10: one wrong tensor named at a time, or none: a file of another size trains without a word."""
    target = small_target("untied")
    publish(tmp_path, target, shards=1)
    weights = {"model.language_model." * (k != "lm_head.weight") + k: v.clone() for k, v in target.state_dict().items()}
    broken = weights | {"model.language_model.layers.9.extra": torch.ones(1),
                        "model.language_model.norm.weight": torch.ones(3), "lm_head.scale": torch.ones(1)}
    for name in ("layers.0.linear_attn.A_log", "layers.3.self_attn.q_proj.weight"):
        del broken["model.language_model." + name]
    save_file(broken, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as error:
        load_target(str(tmp_path))
    for part in ("layers.9.extra is left over", "lm_head.scale is left over", "norm.weight is [3], not [64]",
                 "layers.0.linear_attn.A_log is missing", "layers.3.self_attn.q_proj.weight is missing"):
        assert part in str(error.value), error.value
    for i, value in enumerate((math.nan, math.inf, -math.inf)):
        weights[f"model.language_model.layers.{i}.mlp.up_proj.weight"][3, i] = value
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="layers.0.mlp.up_proj.weight is not finite.*layers.1.*layers.2"):
        load_target(str(tmp_path))


MEASURE = """
import resource, sys
import model
from target import load_target
model.LARGE = float(sys.argv[2])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
target = load_target(sys.argv[1])
size = sum(p.numel() * p.element_size() for p in target.parameters())
print(peak() - before, size)
"""


@pytest.mark.parametrize("large, copies", ((math.inf, 1), (model.LARGE, 2)), ids=("plain", "packed"))
def test_load_target_peak_memory(tmp_path, capsys, large, copies):
    """The file held beside the model, and so once more the memory that a machine has for it, where large weights on a
    CPU, packed there, already need twice their size. One file is the harder case."""
    config = dataclasses.replace(small_config("untied"), vocab_size=20_000, hidden_size=512, intermediate_size=4096)
    publish(tmp_path, random_weights(config, "cpu", torch.bfloat16), shards=1)
    # started by a shell, as a process inherits the peak of the one that starts it
    out = subprocess.run(["sh", "-c", '"$@"; exit $?', "sh", sys.executable, "-c", MEASURE, str(tmp_path),
                          str(large)], cwd=ROOT, capture_output=True, text=True, check=True)
    peak, size = map(int, out.stdout.split())
    with capsys.disabled():
        print(f" [host memory {peak / 1e6:.0f} MB for a model of {size / 1e6:.0f} MB] ", end="")
    assert (copies - 0.2) * size < peak < (copies + 0.2) * size  # the embedding of an untied head is not packed


def test_random_targets_have_the_published_sizes(monkeypatch):
    """A width of a published size mistyped; random weights that differ from run to run, or in fp32 by mistake."""
    counts = {}
    for size in SIZES:
        with torch.device("meta"):
            counts[size] = sum(p.numel() for p in Target(target_config(f"random:{size}")[0]).parameters())
    assert counts == {"0.8b": 752_393_024, "2b": 1_881_825_088, "4b": 4_205_751_296, "9b": 8_953_803_264,
                      "27b": 26_895_998_464}
    monkeypatch.setitem(SIZES, "tiny", small_config("untied"))
    one, two = load_target("random:tiny"), load_target("random:tiny:4", dtype="bfloat16")
    assert len(one.layers) == 8 and two.config.layer_types == ("linear_attention",) * 3 + ("full_attention",)
    assert {w.dtype for k, w in two.state_dict().items() if not k.endswith(FP32)} == {torch.bfloat16}
    assert torch.equal(one.head, load_target("random:tiny").head)
    assert one(tokens_of(1, 9), rows=slice(None))[1].std() > 0
    for name in ("random:", "random:5b", "random:tiny:9", "random:tiny:0", "random:tiny:x"):
        with pytest.raises(ValueError, match="random:SIZE:LAYERS with a size of 0.8b, 2b"):
            load_target(name)
    with pytest.raises(ValueError, match="random weights and no tokenizer"):
        load_tokenizer("random:0.8b")


def hub_copy(cache, name, source):
    """A checkpoint in the hub's cache, as a download leaves it."""
    home = cache / f"models--{name.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("abc")
    shutil.copytree(source, home / "snapshots" / "abc")


def test_hub_ids_load_from_the_cache(monkeypatch, tmp_path):
    """An id that works online only; or one not in the cache, offline, that ends in a page of traceback."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for name in ("target", "drafter-dflash"):
        hub_copy(tmp_path, f"some/{name}", os.path.join(NANO, name))
    target, tokenizer = load_target("some/target"), load_tokenizer("some/target")
    drafter = load_drafter("some/drafter-dflash", target.config)
    assert fingerprint("some/target") == fingerprint(os.path.join(NANO, "target"))
    rounds = list(generate(target, drafter, chat_prompt(tokenizer, questions()[0]), 20))
    assert [r.tokens for r in rounds] == [r.tokens for r in generate(
        nano()[0], shipped(), chat_prompt(tokenizer, questions()[0]), 20)]
    for load in (load_target, load_tokenizer, lambda name: load_drafter(name, target.config)):
        with pytest.raises(ValueError, match="no folder 'some/thing', and the hub does not give it.*its folder"):
            load("some/thing")


def test_target_configs_that_are_refused():
    """Failure 10: a target of another kind is computed as if it were ours."""
    text = vars(small_config("untied"))
    for change, hint in ((dict(num_experts=4), "mixture-of-experts"), (dict(model_type="qwen3_5_moe_text"), "mixture"),
                         (dict(rope_parameters={"rope_type": "yarn"}), "rope_type = 'yarn'"),
                         (dict(quantization_config={"bits": 4}), "quantization_config"),
                         (dict(hidden_act="gelu"), "hidden_act"), (dict(layer_types=["full"] * 8), "unknown kinds"),
                         (dict(layer_types=["full_attention"]), "1 entries for 8"),
                         (dict(linear_num_value_heads=6), "no multiple of linear_num_key_heads = 4")):
        with pytest.raises(ValueError, match=hint):
            TargetConfig.from_dict({"model_type": "qwen3_5", "text_config": text | change})
    assert TargetConfig.from_dict(text | {"num_experts": 0}) == small_config("untied")

# ----------------------------------------------------------------------------------------------------------------------
# decoding: a token's logits do not depend on how the sequence was cut


@torch.no_grad()
def decode(target, x, prompt, cuts, rows=K):
    """Logits and features of tokens prompt - 1 .. of x, committed in the given cuts, with garbage in rejected rows."""
    g, pos, cuts = torch.Generator().manual_seed(len(cuts)), prompt, list(cuts)
    state = DecodeState(target, len(x), x.shape[1] + rows, rows)
    features, logits = target.prefill(x[:, :prompt], state, TAPS)
    parts, taps = [logits[:, None]], [features]
    while pos < x.shape[1]:
        n = min(cuts.pop(), x.shape[1] - pos)
        block = torch.randint(0, V, (len(x), rows), generator=g)
        block[:, :n] = x[:, pos:pos + n]
        features, logits = target(block, state, TAPS, rows=slice(None))
        state.commit(n)
        parts, taps, pos = parts + [logits[:, :n]], taps + [features[:, :n]], pos + n
    assert state.pos.item() == x.shape[1]
    return torch.cat(parts, 1), torch.cat(taps, 1)


def targets():
    return {"tied": lambda: small_target(), "untied": lambda: small_target("untied"),
            "bf16": lambda: small_target("untied", torch.bfloat16), "nano": lambda: nano()[0]}


@pytest.mark.parametrize("name", targets())
def test_cuts_do_not_change_a_bit(name):
    """Failure 5: verifying sixteen rows sums in another order than one row a step. Over 100 commits, all bits equal."""
    target, r, commits = targets()[name](), random.Random(0), 0
    for prompt, T in ((1, 70), (16, 90), (33, 110)):
        x = tokens_of(1 if name == "nano" else 2, T, seed=prompt)
        one, one_features = decode(target, x, prompt, [1] * T)
        for trial in range(8):
            cuts = [r.choice((1, 2, 15, 16) if trial < 2 else range(1, 17)) for _ in range(T)]
            logits, features = decode(target, x, prompt, cuts)
            assert torch.equal(logits, one) and torch.equal(features, one_features), (prompt, cuts)
            commits += math.ceil((T - prompt) / 16)
        if name != "bf16":  # and they are right: those of the whole sequence at once, and of one-row forwards
            whole = target(x, None, TAPS, slice(None))
            assert apart(one, whole[1][:, prompt - 1:]) < 1e-4 and apart(one_features, whole[0]) < 1e-4
            assert apart(decode(target, x, prompt, [1] * T, rows=1)[0], one) < 1e-4
    assert commits > 100


@torch.no_grad()
def test_cuts_propose_twice():
    """Failure 6: a forward changes the committed sequence, or commit(0) does."""
    target, x = small_target("untied"), tokens_of(1, 60)
    states = [DecodeState(target, 1, 100) for _ in range(2)]
    for state in states:
        target.prefill(x[:, :20], state, TAPS)
    for pos in range(20, 60, 10):
        states[0].commit(0) if pos > 20 else None
        for seed in range(2):
            target(tokens_of(1, K, seed=pos + seed), states[0], TAPS)
            states[0].commit(0) if seed else None
        block = F.pad(x[:, pos:pos + 10], (0, 6))
        ours, clean = (target(block, state, TAPS, slice(None)) for state in states)
        assert torch.equal(ours[0], clean[0]) and torch.equal(ours[1], clean[1]), pos
        for n, state in zip((torch.tensor(10), 10), states):  # a number on the device, or here
            state.commit(n)


@pytest.mark.parametrize("accepted", (1, 5, 12, 15))
@torch.no_grad()
def test_cuts_rejected_block(accepted):
    """Failure 6: the KV is cropped after a rejection, the recurrent state or the convolution's memory is not."""
    target, x = small_target(), tokens_of(1, 60)
    n = 20 + accepted
    state = DecodeState(target, 1, n + 1 + K)  # of one length in all three: it decides the order of sums
    target.prefill(x[:, :20], state)
    block = tokens_of(1, K, seed=9)
    block[:, :accepted] = x[:, 20:20 + accepted]
    target(block, state)
    state.commit(accepted)
    _, logits = target(F.pad(x[:, n:n + 1], (0, K - 1)), state, rows=slice(None))
    state.reset()  # as for the next prompt
    fresh = target.prefill(x[:, :n + 1], state)[1]
    stepped, _ = decode(target, x[:, :n + 1], 20, [1] * 60)
    assert apart(logits[:, 0], fresh) < 1e-4 and torch.equal(logits[:, 0], stepped[:, -1]), n

# ----------------------------------------------------------------------------------------------------------------------
# the loop: output identical to the target's own


class Oracle:
    """Knows the continuation of a prompt of n tokens. right() says how many of a round's guesses are right."""
    block_size, taps = K, ()

    def __init__(self, n, answer, right):
        self.n, self.right = n, right
        self.answer = torch.tensor(answer + [0] * 2 * K)

    def new_state(self, batch, length, like):
        return None

    def remember(self, features, state, pos):
        pass

    def propose(self, anchor, target, state, pos, pick):
        i, right = int(pos) - self.n, self.right()
        assert self.answer[i] == anchor, "the loop hands the drafter another anchor or position"
        guesses = self.answer[i + 1:i + K].clone()
        guesses[right:] = (guesses[right:] + 1) % 8  # wrong, and in every vocabulary
        return guesses[None]


@functools.cache
def untrained():
    torch.manual_seed(0)
    return DFlashDraftModel(shipped().config).requires_grad_(False).eval()


def decode_all(i):
    """{drafter: rounds} for question i and target-only."""
    target, tokenizer = nano()
    prompt, r = chat_prompt(tokenizer, questions()[i]), random.Random(i)
    alone = [round.tokens for round in generate(target, None, prompt, 64, rows=K)]
    answer = sum(alone, [])
    drafters = {"random": untrained(), "shipped": shipped(),
                "half-right": Oracle(len(prompt), answer, lambda: r.randrange(K)),
                "perfect": Oracle(len(prompt), answer, lambda: K - 1)}
    return {"alone": alone} | {name: [round.tokens for round in generate(target, drafter, prompt, 64)]
                               for name, drafter in drafters.items()}


@pytest.mark.parametrize("first", range(0, 64, 16))
def test_generate_is_identical_for_every_drafter(first):
    """Failure 5: speculative output is not the target's. 64 prompts of 64 new tokens, four drafters, no difference."""
    results, tau = [decode_all(i) for i in range(first, first + 16)], {}
    for name in results[0]:
        for i, result in enumerate(results):
            assert sum(result[name], []) == sum(result["alone"], []), (name, questions()[first + i])
        rounds = [tokens for result in results for tokens in result[name][1:]]
        tau[name] = sum(map(len, rounds)) / len(rounds)
    for result in results:  # nothing but the end keeps a perfect drafter from a whole block
        assert all(len(tokens) == K for tokens in result["perfect"][1:-1])
    assert tau["alone"] == 1 and tau["random"] < 1.2 and tau["perfect"] == 63 / 4, tau
    assert 1.2 < tau["half-right"] < tau["perfect"] and tau["shipped"] > 1.2, tau


@pytest.mark.parametrize("temperature", (0.7, 1.0, 3.0))
def test_sampled_output_is_identical_for_every_drafter(temperature):
    """Failure 11: temperature ignored, or sampled output that depends on the drafter. One seed, one output."""
    target, tokenizer = nano()
    heard = {}
    for question, seed in ((questions()[0], 0), (questions()[0], 1), (questions()[1], 0)):
        prompt, r = chat_prompt(tokenizer, question), random.Random(0)
        s = Sampling(temperature, seed=seed)
        alone = sum((r.tokens for r in generate(target, None, prompt, 40, rows=K, s=s)), [])
        for drafter, warm in ((Oracle(len(prompt), alone, lambda: r.randrange(K)), 0.0), (shipped(), 0.0),
                              (shipped(), 0.5), (shipped(), 1.0)):
            coupled = Sampling(temperature, seed=seed, draft_temperature=warm)
            assert sum((r.tokens for r in generate(target, drafter, prompt, 40, s=coupled)), []) == alone
        heard[question, seed] = alone
    greedy = sum((r.tokens for r in generate(target, None, chat_prompt(tokenizer, questions()[0]), 40, rows=K)), [])
    if temperature == 3.0:  # below, this target is nearly always sure of itself
        assert len({tuple(x) for x in [greedy, *heard.values()]}) == 4


def test_noise_is_a_function_of_seed_and_position():
    """Failures 5 and 11: noise that a cut changes, that two positions or seeds share, or that is not Gumbel's."""
    positions = torch.tensor([0, 5, 1000, 4, 262143])
    whole = gumbel(7, positions, 1000)
    for i, t in enumerate(positions):
        assert torch.equal(gumbel(7, t[None], 1000)[0], whole[i])
    rows = torch.cat((gumbel(0, torch.arange(100), 1000), gumbel(1, torch.arange(100), 1000)))
    assert abs(rows.mean() - 0.5772) < 0.01 and abs(rows.var() - math.pi ** 2 / 6) < 0.03
    assert torch.corrcoef(rows).fill_diagonal_(0).abs().max() < 0.2 and rows.isfinite().all()


@functools.cache
def tiny_target():
    """A vocabulary of 8, so that the joint frequencies of two tokens can be counted."""
    torch.manual_seed(0)
    return perturb(Target(TargetConfig(8, 32, 32, 4, 2, 1, 16, 2, 2, 16, 16, tie_word_embeddings=True)), scale=20.0)


@torch.no_grad()
def joint_chi_square(s, count):
    """(chi-square, its degrees of freedom, share of identical outputs): the first two sampled tokens against the
    target's own distribution, and against those of a drafter that is right by halves."""
    target, prompt, seen, same = tiny_target(), [1, 2, 3], torch.zeros(8, 8), 0
    for seed in range(count):
        keyed = dataclasses.replace(s, seed=seed)
        a, b = alone = sum((r.tokens for r in generate(target, None, prompt, 2, s=keyed)), [])
        drafter = bench.Oracle(target).know(prompt, alone, 0.5)
        same += sum((r.tokens for r in generate(target, drafter, prompt, 2, s=keyed)), []) == alone
        seen[a, b] += 1
    x = torch.tensor([prompt + [a] for a in range(8)])
    scores = target(x, rows=slice(2, 4))[1] / s.temperature                                  # (8, 2, V)
    p = draft_decode.keep(scores, s.top_k, s.top_p).softmax(-1)
    expected = count * p[0, 0][:, None] * p[:, 1]
    assert not seen[expected == 0].any(), "a token outside the filters was chosen"
    common = expected >= 5
    rest, got = expected[~common].sum(), seen[~common].sum()
    chi = ((seen - expected)[common].square() / expected[common]).sum() + (got - rest).square() / rest.clamp(min=1)
    return chi.item(), int(common.sum()), same / count


def test_cuts_at_a_width_that_threads_split():
    """Failure 5: an elementwise operation split over threads inside a row rounds differently there."""
    x, threads = torch.randn(40, 9728, generator=torch.Generator().manual_seed(0)), torch.get_num_threads()
    torch.set_num_threads(3)
    blocks = [rowwise(F.silu, x[None, i:i + K])[0] for i in range(24)]
    plain = [F.silu(x[i:i + K].contiguous()) for i in range(24)]
    torch.set_num_threads(threads)
    assert all(torch.equal(blocks[i][t - i], blocks[0][t]) for i in range(24) for t in range(i, K))
    assert torch.allclose(torch.stack(blocks), torch.stack(plain), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_rows_of_packed_products_depend_on_nothing_else(dtype):
    """Failure 5: in oneDNN's blocked order, that of large weights on a CPU, a row's bits depend on others."""
    g = torch.Generator().manual_seed(0)
    w, x, other = (torch.randn(n, 517, generator=g).to(dtype) for n in (1031, K, K))
    times = model.pack(w)
    y, expected = times(x[None])[0], F.linear(x, w)
    assert torch.allclose(y.float(), expected.float(), rtol=0, atol=2e-4 if dtype == torch.float32 else 0.5)
    for place in range(K):
        moved = torch.where(torch.arange(K)[:, None] == place, x[3], other)
        assert torch.equal(times(moved[None])[0, place], y[3]), place


def test_packed_and_plain_models_agree(monkeypatch):
    """A projection left out of packing, or packed from another's weights: with every product packed the logits of
    target and drafter are the plain ones up to rounding."""
    target, drafter = tiny_target(), bench.random_drafter(tiny_target())
    tokens = torch.randint(0, target.config.vocab_size, (1, 40), generator=torch.Generator().manual_seed(0))
    found = []
    for least in (1 << 40, 0):
        monkeypatch.setattr(model, "LARGE", least)
        model.pack_linears(drafter)
        joined = [m for m in target.join().modules() if isinstance(m, Joined)]
        inside = [id(getattr(m, name)) for m in joined for name in m.names] + [id(getattr(target, "lm_head", None))]
        own = [m for m in (*target.modules(), *drafter.modules()) if isinstance(m, torch.nn.Linear)
               and id(m) not in inside]
        found_forms = [m.packed for m in joined] + [target.packed_head] + [vars(m).get("forward") for m in own]
        assert all(found_forms) if least == 0 else not any(found_forms), found_forms
        with torch.no_grad():
            features, logits = target(tokens, taps=drafter.taps, rows=slice(None))
            guesses = drafter(features, drafter.block(tokens[:, 20:22], target.embed_tokens.weight),
                              torch.tensor([[20, 21]]))
        found.append((features, logits, guesses))
    for plain, packed in zip(*found):
        assert torch.allclose(plain, packed, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("s", (Sampling(1.0), Sampling(3.0, top_k=5, top_p=0.9)), ids=("all", "filtered"))
def test_sampled_distribution_is_the_targets(s):
    """Failure 11: tokens not drawn from the target's softmax, alone and jointly; or not from the seed alone."""
    chi, freedom, same = joint_chi_square(s, 600)
    assert freedom > 3 and chi < freedom + 4 * math.sqrt(2 * freedom) and same == 1, (chi, freedom, same)


def test_sampled_distribution_test_sees_bad_noise(monkeypatch):
    """The test above can fail: noise that two positions share makes the second token depend on the first; noise drawn
    anew whenever a position is met again makes the output depend on the cuts."""
    monkeypatch.setattr(draft_decode, "gumbel", lambda seed, positions, count: gumbel(seed, positions * 0, count))
    chi, freedom, _ = joint_chi_square(Sampling(1.0), 600)
    assert chi > freedom + 8 * math.sqrt(2 * freedom), (chi, freedom)
    anew = itertools.count(1000)
    monkeypatch.setattr(draft_decode, "gumbel", lambda seed, positions, count: gumbel(next(anew), positions, count))
    assert joint_chi_square(Sampling(1.0), 20)[2] < 0.5


def test_sampled_guesses_coupled_to_the_noise_are_accepted():
    """Failure 11: sampling collapses acceptance, as where the guesses' noise is not the target's. On a target that is
    undecided, a drafter that is the target itself must be right if coupled, and cannot be if it samples by itself."""
    target, prompt = tiny_target(), [1, 2, 3]

    class Itself:
        block_size, taps = K, ()

        def new_state(self, *_):
            self.seen = prompt

        def remember(self, *_):
            pass

        def propose(self, anchor, target, state, pos, pick):
            scores, x = [], prompt + heard[:int(pos) - 3]
            assert x[3:] == heard[:len(x) - 3]
            x = torch.tensor([x + [int(anchor)]])
            while x.shape[1] < int(pos) + K:  # the target's own continuation, at the noise that pick adds
                scores.append(target(x, rows=slice(-1, None))[1])
                filled = torch.cat(scores + [scores[-1]] * (K - 1 - len(scores)), 1)
                x = torch.cat((x, pick(filled)[:, len(scores) - 1:len(scores)]), 1)
            return x[:, -(K - 1):]

    lengths = {}
    for warm in (0.0, 1.0):
        lengths[warm] = []
        for seed in range(8):
            s = Sampling(1.0, seed=seed, draft_temperature=warm)
            heard = sum((r.tokens for r in generate(target, None, prompt, 33, s=s)), [])
            rounds = list(generate(target, Itself(), prompt, 33, s=s))
            assert sum((r.tokens for r in rounds), []) == heard
            lengths[warm] += [len(r.tokens) for r in rounds[1:]]
    tau = {warm: sum(x) / len(x) for warm, x in lengths.items()}
    assert tau[1.0] == 16 and tau[0.0] < 4, tau


@torch.no_grad()
def test_training_form_predicts_decoded_rounds():
    """Failure 1: accuracy in training, no acceptance in decoding. The training form over a finished answer, block after
    block, must accept exactly what decoding accepted."""
    (target, tokenizer), drafter = nano(), shipped()
    for question in questions()[:4]:
        prompt = chat_prompt(tokenizer, question)
        rounds = [round.tokens for round in generate(target, drafter, prompt, 64, stop_ids(tokenizer))]
        x, at, predicted = torch.tensor([prompt + sum(rounds, [])]), len(prompt), []
        features, _ = target(x, taps=drafter.taps)
        while at < x.shape[1] - 1:
            block = drafter.block(x[:, at:at + 1], target.embed_tokens.weight)
            hidden = drafter(features, block, torch.tensor([[at]]))
            guesses = F.linear(hidden[:, 0, 1:], target.head).argmax(-1)
            truth = F.pad(x[:, at + 1:at + K], (0, max(0, at + K - x.shape[1])), value=-1)
            predicted.append(min(int(accept(guesses, truth)[0]) + 1, x.shape[1] - 1 - at))
            at += predicted[-1]
        assert predicted == [len(tokens) for tokens in rounds[1:]]


def test_accept_counts_up_to_the_first_difference():
    """A guess that is right after a wrong one is counted; or row k is compared with another slot's choice."""
    choices = torch.tensor([[5, 6, 7, 8, 9]] * 5)
    guesses = torch.tensor([[5, 6, 7, 8], [5, 0, 7, 8], [0, 6, 7, 8], [6, 7, 8, 9], [5, 6, 7, 0]])
    assert accept(guesses, choices).tolist() == [4, 1, 0, 0, 3]


@functools.cache
def reference():
    """(prompt, 40 tokens) of the small target; a prompt of 21, so that rounds straddle chunks."""
    prompt = tokens_of(21, seed=5).tolist()
    return prompt, sum((r.tokens for r in generate(small_target(), None, prompt, 40)), [])


def arms(limit, stops=()):
    """Rounds of target-only and of drafters right in 15, 3 and 0 guesses."""
    prompt, answer = reference()
    drafters = [None] + [Oracle(len(prompt), answer, lambda right=right: right) for right in (15, 3, 0)]
    return [list(generate(small_target(), drafter, prompt, limit, stops)) for drafter in drafters]


def test_generate_begins_anew_with_each_prompt():
    """Failure 6: a Decoder that serves many prompts keeps something of the one before."""
    prompts, decoders = [tokens_of(n, seed=n).tolist() for n in (40, 3, 21)], {}
    for drafter in (None, small_drafter()):
        kept, fresh = ([[r.tokens for r in generate(small_target(), drafter, x, 40, decoders=d)] for x in prompts]
                       for d in (decoders, None))
        assert kept == fresh
    assert len(decoders) == 2


@pytest.mark.parametrize("limit", (1, 2, 5, 16, 17, 18, 30))
def test_generate_ends_at_the_limit(limit):
    """Failure 15: a round's tokens past max_new_tokens are returned, or counted as accepted."""
    for rounds in arms(limit):
        assert sum((r.tokens for r in rounds), []) == reference()[1][:limit]
        assert all(0 <= r.accepted <= len(r.tokens) <= K for r in rounds) and rounds[0].accepted == 0


@pytest.mark.parametrize("at", (0, 1, 2, 7, 16, 20))
def test_generate_ends_at_a_stop(at):
    """Failure 15: tokens after a stop id in mid-round are returned; or it ends a round later with a drafter."""
    stop = reference()[1][at]
    expected = reference()[1][:reference()[1].index(stop) + 1]
    for rounds in arms(40, {stop}):
        assert sum((r.tokens for r in rounds), []) == expected and all(r.tokens for r in rounds)
    prompt, answer = reference()
    tokens, rounds, _ = run(small_target(), Oracle(len(prompt), answer, lambda: 15), prompt, 40, {stop})
    assert len(tokens) == len(expected) == 1 + sum(len(r.tokens) for r in rounds)  # tau counts what is returned


def test_generate_ends_at_the_context(monkeypatch):
    """A block that runs past the target's last position; a prompt that leaves no room, or is empty or foreign."""
    monkeypatch.setattr(small_target().config, "max_position_embeddings", 50)
    for rounds in arms(40):
        assert sum((r.tokens for r in rounds), []) == reference()[1][:50 - 21 - K]
    for prompt, hint in (([], "empty"), ([1] * 40, "40 tokens.*context of 50"), ([V], "vocabulary of 300")):
        with pytest.raises(ValueError, match=hint):
            next(generate(small_target(), None, prompt, 5))

# ----------------------------------------------------------------------------------------------------------------------
# the drafter, against the contract in words


def slow_block(drafter, features, block, n):
    """Hidden states (K, hidden) of one block at position n: dense and in fp64, as the contract says it.
    features (T, ...) of a row, block (K, hidden)."""
    c, w = drafter.config, {k: v.double() for k, v in drafter.state_dict().items()}
    D, H, R = c.head_dim, c.num_attention_heads, c.num_attention_heads // c.num_key_value_heads

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + c.rms_norm_eps).sqrt() * w[name + ".weight"]

    def turn(x, positions):  # (T, heads, D), channel i paired with i + D/2, at the angle p * theta^(-2i/D)
        angle = positions[:, None].double() * c.rope_parameters["rope_theta"] ** (-torch.arange(0, D, 2).double() / D)
        z = torch.complex(x[..., :D // 2], x[..., D // 2:]) * torch.polar(torch.ones_like(angle), angle)[:, None]
        return torch.cat((z.real, z.imag), -1)

    context = norm(features[:n].double() @ w["fc.weight"].T, "hidden_norm")
    position, x = torch.arange(n + len(block)), block.double()
    for i, kind in enumerate(c.layer_types):
        def project(y, name):
            return (y @ w[f"layers.{i}.self_attn.{name}_proj.weight"].T).unflatten(-1, (-1, D))
        y = norm(x, f"layers.{i}.input_layernorm")
        seen = torch.cat((context, y))  # the context goes without the layer's norm
        q = turn(norm(project(y, "q"), f"layers.{i}.self_attn.q_norm"), position[n:])
        k, v = turn(norm(project(seen, "k"), f"layers.{i}.self_attn.k_norm"), position), project(seen, "v")
        o = []
        for row in range(len(block)):
            see = torch.ones(len(seen), dtype=torch.bool)
            if kind == SLIDING:
                see = (position <= n + row) & (position > n + row - c.sliding_window)
            o.append(torch.cat([(q[row, h] @ k[see, h // R].T / D ** 0.5).softmax(-1) @ v[see, h // R]
                                for h in range(H)]))
        x = x + torch.stack(o) @ w[f"layers.{i}.self_attn.o_proj.weight"].T
        y, mlp = norm(x, f"layers.{i}.post_attention_layernorm"), f"layers.{i}.mlp."
        x = x + (F.silu(y @ w[mlp + "gate_proj.weight"].T) * (y @ w[mlp + "up_proj.weight"].T)) \
            @ w[mlp + "down_proj.weight"].T
    return norm(x, "norm")


def drafting(T, A=5, seed=0):
    """Random features (2, T, ...), blocks (2, A, K, hidden) and ascending anchors (2, A)."""
    r = functools.partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    return r(2, T, 3 * 64), r(2, A, K, 64), torch.stack([r(T - 1).topk(A)[1].sort()[0] + 1 for _ in range(2)])


@pytest.mark.parametrize("kinds, window", DRAFTERS)
def test_drafter_equals_dense_restatement(kinds, window):
    """Failures 2 and 3: causal inside a full block; part of the head rotated; positions not absolute."""
    drafter, (features, blocks, anchors) = small_drafter(kinds, window), drafting(40)
    anchors[0, 0] = 0  # a block without any context
    hidden = drafter(features, blocks, anchors)
    for b in range(2):
        for a, n in enumerate(anchors[b].tolist()):
            assert apart(hidden[b, a], slow_block(drafter, features[b], blocks[b, a], n)) < 1e-5, n


@pytest.mark.parametrize("kinds, window", DRAFTERS)
def test_drafter_decodes_as_it_was_trained(kinds, window):
    """Failure 2: 98 % in training, 10 % served. Context arrives in blocks of 16 whose rejected rows are stale."""
    drafter, (features, _, _) = small_drafter(kinds, window), drafting(70)
    target, stale, r = small_target(), drafting(K, seed=1)[0], random.Random(0)
    anchors = [1, 2, 15, 16, 17, 30, 33, 49, 50]
    tokens = tokens_of(2, len(anchors))
    blocks = drafter.block(tokens, target.embed_tokens.weight)
    trained = drafter(features, blocks, torch.tensor([anchors] * 2))
    state, pos = drafter.new_state(2, 100, target.embed_tokens.weight), 0
    for i, n in enumerate(anchors):
        while pos < n:
            new = r.randint(1, min(K, n - pos))
            rows = torch.cat((features[:, pos:pos + new], stale[:, new:]), 1)
            drafter.remember(rows, state, torch.tensor(pos))
            pos += new
        assert apart(drafter.guess(blocks[:, i], state, torch.tensor(n)), trained[:, i]) < 1e-5, n
        guesses = drafter.propose(tokens[:, i], target, state, torch.tensor(n), lambda x: x.argmax(-1))
        assert torch.equal(guesses, (trained[:, i, 1:] @ target.head.T).argmax(-1)), n  # row k is slot k's: no shift


@pytest.mark.parametrize("kinds, window", DRAFTERS)
def test_leak_from_future_features_or_other_blocks(kinds, window):
    """Failures 1 and 2: a block sees features at or after its anchor, or another block."""
    drafter, (features, blocks, anchors) = small_drafter(kinds, window), drafting(40)
    hidden = drafter(features, blocks, anchors)
    for a in range(anchors.shape[1]):
        later, other = features.clone(), blocks + 1
        for b in range(2):
            later[b, anchors[b, a]:] += 1
        other[:, a] = blocks[:, a]
        assert torch.equal(drafter(later, other, anchors)[:, a], hidden[:, a])
        nearest, own = features.clone(), blocks.clone()
        for b in range(2):
            nearest[b, anchors[b, a] - 1] += 1
        own[:, a, 0] += 1
        assert not torch.allclose(drafter(nearest, blocks, anchors)[:, a], hidden[:, a], rtol=1e-2)
        assert not torch.allclose(drafter(features, own, anchors)[:, a, 1], hidden[:, a, 1], rtol=1e-2)


@pytest.mark.parametrize("kinds, window", DRAFTERS)
@torch.no_grad()
def test_leak_in_flex_attention(kinds, window, monkeypatch):
    """Failures 1 and 2 on GPUs: flex_attention's mask is not that of the form for CPUs. Here it runs uncompiled."""
    monkeypatch.setattr(model, "flex", flex_attention)
    drafter, (features, blocks, anchors) = small_drafter(kinds, window), drafting(200, A=20)
    anchors[0, 0], anchors[1, -3:] = 0, 0  # a block without context; unreal ones after the last
    assert apart(drafter(features, blocks, anchors, flex=True), drafter(features, blocks, anchors)) < 1e-5


def test_leak_from_future_tokens_through_the_whole(monkeypatch):
    """Failure 1: tokens after the anchor reach its guesses, through the target's features or the block's ids."""
    for name, value in {"anchors": 6, "device": "cpu", "dtype": "float32"}.items():
        monkeypatch.setattr(train, name, value)
    seen, real = [], train.sample_anchors
    monkeypatch.setattr(train, "sample_anchors", lambda *args: seen.append(real(*args)) or seen[-1])
    monkeypatch.setattr(train, "block_loss", lambda hidden, *args: seen.append(hidden) or block_loss(hidden, *args))
    target, drafter, x, supervised = small_target(), small_drafter(), tokens_of(1, 130), torch.zeros(1, 130) > 0
    supervised[:, 20:] = True

    def hidden(tokens):
        seen.clear()
        train.block_forward(target, drafter, tokens, supervised, torch.Generator().manual_seed(0))
        return seen[0][0][0].tolist(), seen[1]

    anchors, clean = hidden(x)
    for i, n in enumerate(anchors):
        later, before, own = x.clone(), x.clone(), x.clone()
        later[:, n + 1:] = tokens_of(1, 129 - n, seed=1)
        before[:, n - 1], own[:, n] = (x[:, n - 1] + 1) % V, (x[:, n] + 1) % V
        assert torch.equal(hidden(later)[1][:, i], clean[:, i])
        assert apart(hidden(before)[1][:, i], clean[:, i]) > 1e-3 and apart(hidden(own)[1][:, i], clean[:, i]) > 1e-3


def test_taps_are_refused():
    """Failure 4: the last layer as a tap, which transformers returns normed; taps in another order than fc's."""
    for taps in ((1, 7), (3, 1), (1, 1), (-1, 2), ()):
        with pytest.raises(ValueError, match=r"0 \.\. 6"):
            drafter_config(small_config("tied"), 1, taps, MASK, 4, 2, 16, 96)

# ----------------------------------------------------------------------------------------------------------------------
# anchors, labels and loss


def masks():
    """Supervised masks (., 40): no response, one token, two tokens, two responses, everything."""
    m = torch.zeros(5, 40, dtype=torch.bool)
    m[1, 5], m[2, 38:], m[3, 4:12], m[3, 20:30], m[4, :] = True, True, True, True, True
    return m


@pytest.mark.parametrize("count", (1, 8, 39, 64))
def test_anchors_are_supervised_distinct_and_static(count):
    """Failure 14: shapes that follow a row's length; and anchors outside the response, or twice."""
    anchors, real = sample_anchors(masks(), count, torch.Generator().manual_seed(3))
    again, _ = sample_anchors(masks(), count, torch.Generator().manual_seed(3))
    assert anchors.shape == real.shape == (5, count) and torch.equal(anchors, again)
    for row, at, ok, candidates in zip(masks(), anchors, real, (0, 0, 1, 16, 39)):
        chosen = at[ok]
        assert len(chosen) == len(set(chosen.tolist())) == min(count, candidates)
        assert (row[chosen] & row[chosen + 1]).all() and chosen.tolist() == sorted(chosen.tolist())
        assert not at[~ok].any()


def test_anchors_follow_the_generator_alone():
    """Failures 12 and 14: anchors from the global generator, or always the same."""
    torch.manual_seed(0)
    first = sample_anchors(masks(), 8, torch.Generator().manual_seed(0))[0]
    torch.manual_seed(1)
    assert torch.equal(sample_anchors(masks(), 8, torch.Generator().manual_seed(0))[0], first)
    seen = [sample_anchors(masks()[4:], 8, torch.Generator().manual_seed(s))[0] for s in range(200)]
    assert set(torch.cat(seen).flatten().tolist()) == set(range(39))


def test_labels_are_not_shifted_and_end_with_the_response():
    """Failure 2: row k learns the token after its own; or a later response of the row, or padding, is learned."""
    tokens, anchors = tokens_of(5, 40), torch.tensor([[0, 0], [5, 0], [38, 0], [10, 20], [0, 30]])
    real = torch.tensor([[0, 0], [0, 0], [1, 0], [1, 1], [1, 1]]) > 0
    labels, weights = block_labels(tokens, masks(), anchors, real, K, gamma=7.0)
    assert labels.shape == weights.shape == (5, 2, K - 1)
    for b in range(5):
        for a in range(2):
            n, alive = anchors[b, a].item(), real[b, a].item()
            for k in range(1, K):
                alive = alive and n + k < 40 and masks()[b, n + k].item()
                assert weights[b, a, k - 1].item() == pytest.approx(math.exp(-(k - 1) / 7) if alive else 0)
                assert not alive or labels[b, a, k - 1] == tokens[b, n + k]


@pytest.mark.parametrize("smooth", (0.0, 0.5, 1.0))
def test_dpace_weights_equal_their_definition(smooth):
    """w_j = sum over m >= j of s_1 .. s_m, slot by slot, and nothing past the end of the response."""
    r = torch.rand(9, K - 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inside = (torch.arange(K - 1) < torch.tensor([0, 1, 2, 5, 9, 15, 15, 15, 15])[:, None]).double()
    weights = dpace(r, inside, smooth)
    for q, ok, w in zip(r.tolist(), inside.tolist(), weights.tolist()):
        products = [math.prod((1 - smooth) * x + smooth for x in q[:m + 1]) * ok[m] for m in range(K - 1)]
        assert w == pytest.approx([sum(products[j:]) for j in range(K - 1)])
    # it is the gradient of the expected accepted length by log q, where nothing is smoothed
    q = r[5:].clone().requires_grad_()
    q.cumprod(-1).sum().backward()
    assert apart(dpace(r[5:], inside[5:], 0.0), q.grad * r[5:]) < 1e-9


def loss_inputs(dtype=torch.float64):
    r = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = r(2, 6, K - 1).abs() * (r(2, 6, K - 1) > 0)
    return r(2, 6, K, 12).to(dtype).requires_grad_(), r(V, 12).to(dtype), tokens_of(2, 6, K - 1), weights


@pytest.mark.parametrize("smooth", (None, 0.5))
@pytest.mark.parametrize("chunk", (1, 40, 1000))
def test_loss_and_gradient_equal_slow_loop(chunk, smooth):
    """The one-pass loss weighs, scales or chunks other than cross entropy over full logits; row 0 has a loss; D-PACE's
    weights come from slots of another block, or are differentiated."""
    hidden, head, labels, weights = loss_inputs()
    if smooth is not None:
        weights = (weights > 0).double().cumprod(-1)
    loss, nll, correct, used = block_loss(hidden, head, labels, weights, chunk, smooth)
    (loss * 3).backward()
    grad, hidden.grad, total = hidden.grad, None, 0
    for b in range(2):
        for a in range(6):
            logits = hidden[b, a, 1:] @ head.T
            each = F.cross_entropy(logits, labels[b, a], reduction="none")
            w = weights[b, a] if smooth is None else dpace((-each.detach()).exp(), weights[b, a], smooth)
            total = total + (each * w).sum()
            assert apart(nll[b, a], each.detach()) < 1e-12 and torch.allclose(used[b, a], w)
            assert torch.equal(correct[b, a], logits.argmax(-1) == labels[b, a])
    (total * 3).backward()
    assert apart(loss.detach(), total.detach()) < 1e-12 and apart(grad, hidden.grad) < 1e-12
    assert not grad[:, :, 0].any()
    with torch.no_grad():
        assert torch.equal(block_loss(hidden, head, labels, weights, chunk, smooth)[0], loss)


def test_loss_in_bf16_is_summed_in_fp32():
    """A softmax or a sum of thousands of losses in bf16, which has three digits."""
    hidden, head, labels, weights = loss_inputs(torch.bfloat16)
    loss, *_ = block_loss(hidden, head, labels, weights.float(), 7)
    loss.backward()
    true, *_ = block_loss(hidden.detach().double(), head.double(), labels, weights, 7)
    assert loss.dtype == torch.float32 and apart(loss.detach(), true) < 5e-3 and hidden.grad.dtype == torch.bfloat16


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation made."""
    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for x in out if isinstance(out, (tuple, list)) else (out,):
            self.size = max(self.size, x.numel() if isinstance(x, torch.Tensor) else 0)
        return out


def test_loss_never_holds_all_logits():
    """Failure 7: out of memory, as logits of anchors x slots x vocabulary exist at once, forward or backward."""
    hidden, head, labels, weights = loss_inputs()
    for smooth in (None, 0.5):
        with Largest() as largest:
            block_loss(hidden, head, labels, weights, 40, smooth)[0].backward()  # two blocks of 15 rows
        assert 30 * V <= largest.size <= max(30 * V, head.numel(), hidden.numel()) < labels.numel() * V / 4

# ----------------------------------------------------------------------------------------------------------------------
# training


@pytest.fixture
def small_run(monkeypatch, tmp_path):
    """train.py's variables for a run of seconds on the nano target; rows (tokens, mask) of unequal lengths."""
    r = np.random.default_rng(0)
    rows = [(r.integers(0, 500, n), (np.arange(n) >= n // 2).astype(np.int64)) for n in r.integers(10, 60, 20)]
    folder = str(tmp_path / "data")
    write_rows(folder, {"train": rows, "val": rows[:3]},
               {"vocab_size": 512, "tokenizer": fingerprint(os.path.join(NANO, "target"))})
    for name, value in dict(target=os.path.join(NANO, "target"), data=folder, out_dir=str(tmp_path / "run-dflash"),
                            resume=False, layers=1, heads=4, kv_heads=2, head_dim=32, mlp=64, taps=(1, 6),
                            anchors=64, batch_size=2, accumulation=2, max_length=128, length_step=64, lr=1e-2,
                            warmup=0.2, clip=1.0, epochs=1.2, log_every=1, eval_every=3, eval_rows=3, save_every=3,
                            device="cpu", dtype="float32", attention="grouped").items():
        monkeypatch.setattr(train, name, value)
    return rows


def config():
    """What configure() would return: train.py's variables as they are now."""
    return {name: getattr(train, name) for name in script_keys(vars(train))}


def go(folder=None, resume=False):
    """(weights, moments, log without speed) after a run's loop into a folder; its checkpoints stay there."""
    train.resume, train.out_dir = resume, str(folder or train.out_dir)
    run, held_out, _ = train.setup(config())
    train.loop(run, held_out, config())
    return outcome(run, train.out_dir)


def outcome(run, folder):
    with open(os.path.join(folder, "log.jsonl")) as f:
        log = [json.loads(line) for line in f]
    return run.drafter.state_dict(), run.optimizer.state_dict()["state"], \
        [{k: v for k, v in entry.items() if k not in ("tokens_per_s", "minutes_left")} for entry in log]


def same(a, b):
    """Whether two outcomes are equal to the bit."""
    assert a[2] == b[2] and a[0].keys() == b[0].keys() and len(a[1]) == len(a[0])
    assert all(torch.equal(a[0][k], b[0][k]) for k in a[0])
    return all(torch.equal(a[1][i][k], b[1][i][k]) for i in a[1] for k in a[1][i])


def test_batches_are_a_function_of_seed_and_number(small_run, monkeypatch):
    """Failures 12 and 14: batches that depend on the order of calls, repeat or miss rows, or have any length."""
    batches = train.Batches(small_run)
    first = [batches[n] for n in range(20)]
    for n in (13, 2, 19, 2):
        assert all(torch.equal(a, b) for a, b in zip(train.Batches(small_run)[n], first[n]))
    epochs = [np.concatenate([batches.chosen(n) for n in range(e, e + 10)]).tolist() for e in (0, 10)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(20)) and epochs[0] != epochs[1]
    assert all(t.shape == m.shape == (2, 64) for t, m in first)
    for n in range(10):
        for row, i in zip(batches[n][0], batches.chosen(n)):
            assert row[:len(small_run[i][0])].tolist() == small_run[i][0].tolist()
    monkeypatch.setattr(train, "max_length", 20)
    tokens, mask = train.pad(small_run)
    assert tokens.shape == (20, 64) and not tokens[:, 20:].any() and not mask[:, 20:].any()
    for row, (t, m) in zip(zip(tokens, mask), small_run):
        n = min(20, len(t))
        assert row[0][:n].tolist() == t[:n].tolist() and row[1][:n].tolist() == (m[:n] > 0).tolist()


def test_batches_hold_rows_alike_in_length(monkeypatch):
    """Half of a batch is padding; or rows come short ones first, in an order that is the same in every epoch."""
    monkeypatch.setattr(train, "batch_size", 4), monkeypatch.setattr(train, "length_step", 64)
    monkeypatch.setattr(train, "max_length", 3072)
    lengths = (np.random.default_rng(0).gamma(2.0, 600, 2003) + 50).astype(int).clip(max=3072)
    batches = train.Batches([(np.zeros(n), np.ones(n)) for n in lengths])
    longest = [lengths[batches.chosen(n)].max() for n in range(1000)]
    padded = sum(-(-n // 64) * 64 * 4 for n in longest[:500])
    assert len(batches) == 500 and padded < 1.1 * lengths.sum()
    assert abs(np.corrcoef(longest[:500], range(500))[0, 1]) < 0.15 and longest[:500] != longest[500:]


def test_step_does_not_depend_on_the_split(small_run, monkeypatch):
    """Failure 13: a mean of means. The same rows as 1 x 8 and 4 x 2 give one loss and one gradient, for both losses."""
    monkeypatch.setattr(train, "clip", 1e9)
    grads, logged = [], []

    class Keep(torch.optim.SGD):
        def step(self):
            grads.append(torch.cat([p.grad.flatten() for group in self.param_groups for p in group["params"]]))

    data = [(t % V, m) for t, m in small_run[:8]]
    for kind in ("decay", "dpace"):
        for rows, micro in ((8, 1), (2, 4)):
            for name, value in (("loss", kind), ("batch_size", rows), ("accumulation", micro)):
                monkeypatch.setattr(train, name, value)
            drafter = small_drafter().requires_grad_()  # 64 anchors hold every candidate, so both splits have the same
            run = train.Run(small_target(), drafter, drafter, Keep(drafter.parameters(), 1.0), train.Batches(data), 10)
            logged.append(train.train_step(run)[0])
        assert apart(grads[-1], grads[-2]) < 1e-4 and grads[-1].norm() > 0
        assert logged[-1]["loss"] == pytest.approx(logged[-2]["loss"], rel=1e-5)
        assert logged[-1]["tau"] == logged[-2]["tau"]
    assert logged[0]["loss"] != logged[2]["loss"]
    assert len({int(run.batches[n][1].sum()) for n in range(4)}) > 1  # else a mean of means would pass


RANKS = """
import os, shutil, signal, sys
import torch.distributed as dist
import train
train.join()
def go(name, *flags):
    flags = [sys.argv[1], f"--out_dir={sys.argv[2]}/{name}-dflash", "--accumulation=1", *flags]
    config = train.configure(vars(train), flags)
    run, held_out, _ = train.setup(config)
    train.loop(run, held_out, config)
go("ddp")
go("fsdp", "--parallel=fsdp")
if dist.get_rank() == 0:
    shutil.copytree(f"{sys.argv[2]}/ddp-dflash/step-000010", f"{sys.argv[2]}/again-dflash/step-000010")
dist.barrier()
go("again", "--parallel=ddp", "--resume")
if dist.get_rank() == 1:
    os.kill(os.getpid(), signal.SIGKILL)
dist.barrier()
print("not reached")
"""


def test_ranks_are_the_same_run(small_run, monkeypatch, tmp_path):
    """Failures 12 and 13: two gloo processes, DDP and FSDP, with unequal supervised counts, follow one process with
    twice the accumulation; their checkpoints resume on one process, and on two to the bit; a dead rank ends all."""
    for name, value in dict(epochs=4.0, save_every=10, keep=9, eval_every=5, clip=0.5).items():
        monkeypatch.setattr(train, name, value)
    lines = [f"{k} = {v!r}" for k, v in config().items() if v is not None and k not in ("out_dir", "accumulation")]
    (tmp_path / "small.py").write_text("\n".join(lines)), (tmp_path / "ranks.py").write_text(RANKS)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                           str(tmp_path / "ranks.py"), str(tmp_path / "small.py"), str(tmp_path)], cwd=ROOT, text=True,
                          env={**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"}, capture_output=True)
    assert done.returncode == 1 and "not reached" not in done.stdout and "SIGKILL" in done.stderr, done.stderr[-3000:]
    one, logs = go(tmp_path / "one-dflash"), {}
    for name in ("one", "ddp", "fsdp", "again"):
        with open(tmp_path / f"{name}-dflash" / "log.jsonl") as f:
            logs[name] = [e for e in map(json.loads, f) if e["kind"] == "train"]
    for name in ("ddp", "fsdp"):
        for a, b in zip(logs[name], logs["one"], strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-6) and a["slots"] == b["slots"], (name, a["step"])
    folders = [tmp_path / f"{name}-dflash" / "step-000020" for name in ("one", "ddp", "fsdp", "again")]
    states = [torch.load(folder / "training_state.pt", weights_only=False) for folder in folders]
    for a, b in zip(*(torch.utils._pytree.tree_leaves((state["master_weights"], state["optimizer_state_dict"]))
                      for state in (states[1], states[3])), strict=True):  # two processes, resumed
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert sorted(os.listdir(folders[2])) == sorted(os.listdir(folders[0]))
    assert load_drafter(str(folders[2]), nano()[0].config)
    (tmp_path / "back-dflash").mkdir()
    shutil.copytree(tmp_path / "fsdp-dflash" / "step-000010", tmp_path / "back-dflash" / "step-000010")
    back = go(tmp_path / "back-dflash", resume=True)  # two sharded processes, then one
    assert all(apart(back[0][k], one[0][k]) < 1e-4 for k in one[0])
    monkeypatch.setattr(train, "accumulation", 1)
    with pytest.raises(ValueError, match="accumulation x ranks was 2, is 1"):
        go(tmp_path / "back-dflash", resume=True)


def test_rate_warms_up_and_ends_at_zero(monkeypatch):
    """A schedule that starts at zero (a lost step), never reaches its peak or ends above zero."""
    monkeypatch.setattr(train, "lr", 2.0), monkeypatch.setattr(train, "warmup", 0.1)
    rates = [train.rate(step, 100) for step in range(101)]
    assert rates[0] == 0.2 and rates[9] == rates[10] == 2.0 and rates[55] == pytest.approx(1.0) and rates[100] < 1e-9
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)


def test_resume_equals_uninterrupted_run(small_run, monkeypatch, tmp_path, capsys):
    """Failure 12: repeated data, moments or master weights lost to bf16. All is equal bit for bit, the log too; after
    a crash, and after SIGTERM and Ctrl-C, which save between two intervals."""
    whole, broken = tmp_path / "whole-dflash", tmp_path / "broken-dflash"
    expected = go(whole)
    assert [(e["kind"], e["step"]) for e in expected[2] if e["step"] in (3, 6)] == [
        ("train", 3), ("val", 3), ("train", 6), ("val", 6)]
    assert newest(str(whole)) == str(whole / "step-000006")
    assert (whole / "training.png").read_bytes()[:4] == b"\x89PNG"
    # as a crash leaves it: the log runs ahead of the checkpoint, its last line is torn
    shutil.copytree(whole / "step-000003", broken / "step-000003")
    lines = (whole / "log.jsonl").read_text().splitlines(True)
    (broken / "log.jsonl").write_text("".join(lines[:6]) + lines[6][:20])
    assert same(go(broken, resume=True), expected)
    real = train.train_step
    for number in (signal.SIGTERM, signal.SIGINT):
        folder = tmp_path / f"{number.name}-dflash"
        monkeypatch.setattr(sys, "argv", ["train.py", "config/nano.py"])
        monkeypatch.setattr(train, "train_step", lambda run: (
            os.kill(os.getpid(), number) if run.step == 3 else None, real(run))[1])
        with pytest.raises(SystemExit, match=r"stopped at step 4, saved .*step-000004; to go on: .*nano.py --resume$"):
            go(folder)
        monkeypatch.setattr(train, "train_step", real)
        assert same(go(folder, resume=True), expected)
    with pytest.raises(ValueError, match="holds a run.*--resume"):
        go(folder)
    monkeypatch.setattr(train, "lr", 1.0)
    with pytest.raises(ValueError, match="another run.*lr was 0.01, is 1.0"):
        go(folder, resume=True)


class Killed(BaseException):
    """What nothing catches, as kill -9."""


@pytest.mark.parametrize("owner, name", ((torch, "save"), (os, "replace"), (shutil, "rmtree")))
def test_resume_after_a_kill_in_the_middle_of_a_save(small_run, monkeypatch, tmp_path, owner, name):
    """A half-written folder that loads, or an old one deleted before the new one stood. Killed at every single call of
    what writes, renames and deletes."""
    for key, value in dict(epochs=0.4, save_every=1, eval_every=9, keep=1).items():
        monkeypatch.setattr(train, key, value)
    expected, real, n, finished = go(tmp_path / "whole-dflash"), getattr(owner, name), 0, False
    assert sorted(os.listdir(tmp_path / "whole-dflash")) == ["log.jsonl", "step-000002", "training.png"]
    while not finished:
        n += 1
        left, folder = [n], tmp_path / f"{n}-dflash"

        def dying(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            return real(*args, **kwargs)

        steps = []
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, dying)
            patch.setattr(train, "train_step", lambda run, step=train.train_step: (steps.append(1), step(run))[1])
            try:
                go(folder)
                finished = True
            except Killed:
                pass
        found = newest(str(folder))
        assert len(steps) < 2 or int(found[-6:]) >= len(steps) - 1, (n, found)
        if len(steps) > 1:
            assert load_drafter(found, nano()[0].config)
        assert same(go(folder, resume=found != str(folder)), expected)
    assert n > 2


def test_resume_after_kill_9(small_run, monkeypatch, tmp_path):
    """The same with a real kill -9 at any moment of a real process; KILLS=20 python test_all.py kill_9 for more."""
    for key, value in dict(epochs=4.0, save_every=1, eval_every=9, keep=2, decode_rows=1).items():
        monkeypatch.setattr(train, key, value)
    expected, r = go(tmp_path / "whole-dflash"), random.Random(0)
    lines = [f"{k} = {v!r}" for k, v in config().items() if v is not None and k not in ("out_dir", "resume")]
    (tmp_path / "small.py").write_text("\n".join(lines))
    for kill in range(int(os.environ.get("KILLS", 1))):
        folder = tmp_path / f"{kill}-dflash"
        process = subprocess.Popen([sys.executable, "train.py", str(tmp_path / "small.py"), f"--out_dir={folder}"],
                                   cwd=ROOT, stdout=subprocess.DEVNULL)
        while process.poll() is None and not folder.exists():
            time.sleep(0.01)
        time.sleep(3 * r.random())
        process.kill()
        process.wait()
        found = newest(str(folder))
        print(f"killed after {os.path.basename(found)}, left {sorted(os.listdir(folder))}")
        assert found == str(folder) or load_drafter(found, nano()[0].config)
        assert same(go(folder, resume=found != str(folder)), expected)


def test_disk_full_keeps_the_old_checkpoint(small_run, monkeypatch, tmp_path):
    """A full disk that costs the last good checkpoint, or leaves half of one; an error that does not say so."""
    folder = tmp_path / "full-dflash"
    with monkeypatch.context() as patch:
        def full(*args, **kwargs):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        patch.setattr(train, "keep", 1)
        save = train.save
        patch.setattr(train, "save", lambda run, c: (patch.setattr(torch, "save", full) if run.step > 3 else 0,
                                                     save(run, c))[1])
        with pytest.raises(ValueError, match="cannot write .*step-000006, its disk has .* No space left.*make room"):
            go(folder)
    assert sorted(os.listdir(folder)) == ["log.jsonl", "step-000003", "training.png"]
    assert same(go(folder, resume=True), go(tmp_path / "whole-dflash"))


def test_strange_gradients_are_skipped_counted_and_end_the_run(small_run, monkeypatch, tmp_path):
    """One NaN in a run of days that ruins weights and moments; a run that goes on for hours with nothing but NaN."""
    real = train.block_forward

    def faulty(model, net, tokens, supervised, generator):  # 4 micro-batches of a step forward, in order
        loss, sums = real(model, net, tokens, supervised, generator)
        seen.append(tokens)
        factor = {2: math.nan, 4: 1e4}.get((len(seen) - 1) // 2 if torch.is_grad_enabled() else None, 1)
        return loss * factor, sums

    monkeypatch.setattr(train, "block_forward", faulty)
    monkeypatch.setattr(train, "eval_every", 99)
    seen, values = [], []
    monkeypatch.setattr(train, "train_step", lambda run, step=train.train_step: (
        step(run), values.append(next(run.drafter.parameters()).detach().clone()))[0])
    _, _, log = go(tmp_path / "a-dflash")
    skipped = [e["skipped"] for e in log if e["kind"] == "train"]
    assert skipped == [0, 0, 1, 1, 2, 2]
    moved = [not torch.equal(a, b) for a, b in zip(values, values[1:])]
    assert moved == [True, False, True, False, True] and values[-1].isfinite().all()
    state = torch.load(tmp_path / "a-dflash" / "step-000006" / "training_state.pt", weights_only=False)
    assert state["watch"]["skipped"] == 2 and state["optimizer_state_dict"]["state"][0]["step"] == 4
    monkeypatch.setattr(train, "patience", 2)
    monkeypatch.setattr(train, "block_forward", lambda *args: (real(*args)[0] * math.nan, real(*args)[1]))
    rows = sum((train.Batches(small_run).chosen(n).tolist() for n in (2, 3)), [])
    with pytest.raises(ValueError, match=f"step 2 has norm nan.* 2th? in a row.*{re.escape(str(rows))}"):
        go(tmp_path / "b-dflash")


def test_specforge_checkpoints_are_gone_on_from(small_run, monkeypatch, tmp_path):
    """Moments given to other parameters, micro-batches counted as steps, or code run from a file someone published."""
    monkeypatch.setattr(train, "keep", 9)
    weights, moments, _ = go(tmp_path / "ours-dflash")
    theirs = tmp_path / "theirs-dflash"
    shutil.copytree(tmp_path / "ours-dflash" / "step-000003", theirs)
    ours = torch.load(theirs / "training_state.pt", weights_only=False)
    state = {"epoch": 0, "global_step": 6, "args": argparse.Namespace(learning_rate=1e-2, output_dir="x"),
             "optimizer_state_dict": ours["optimizer_state_dict"], "scheduler_state_dict": {"last_epoch": 2}}
    torch.save(state, theirs / "training_state.pt")
    monkeypatch.setattr(train, "start", str(theirs)), monkeypatch.setattr(train, "out_dir", str(tmp_path / "x-dflash"))
    run, held_out, _ = train.setup(config())
    assert run.step == 3
    for (name, p), m in zip(run.drafter.named_parameters(), run.optimizer.state_dict()["state"].values()):
        assert torch.equal(p, ours["master_weights"][name].bfloat16().float()) and m["exp_avg"].shape == p.shape
    train.loop(run, held_out, config())
    drift = [apart(p, weights[name]) for name, p in run.drafter.state_dict().items()]
    assert 0 < max(drift) < 0.02, drift  # the same run, but for weights that were rounded to bf16
    monkeypatch.setattr(train, "out_dir", str(tmp_path / "y-dflash"))
    bad = {**state, "optimizer_state_dict": {"state": {i: moments[len(moments) - 1 - i] for i in moments}}}
    for broken, hint in ((bad, "does not fit this drafter: moment 0"), ({**state, "args": Evil()}, "cannot read")):
        torch.save(broken, theirs / "training_state.pt")
        with pytest.raises(ValueError, match=hint):
            train.setup(config())
    assert not Evil.ran


class Evil:
    """A pickle that runs code when it is loaded."""
    ran = []

    def __reduce__(self):
        return Evil.ran.append, (1,)


def test_operations_are_those_of_phase_1_2():
    """An MFU that counts other operations than are made: per sample 4.2 TFLOP for the drafter, 1.5 for its attention,
    7.8 for the head, 2.6 for the target's layers up to the last tap."""
    with torch.device("meta"):
        target, drafter = phase_1_2()
        alone, both = (train.operations(drafter, 1, 3072, 512, m) for m in (None, Target(target)))
    assert alone == pytest.approx(13.5e12, rel=0.01) and both - alone == pytest.approx(2.55e12, rel=0.02)

# ----------------------------------------------------------------------------------------------------------------------
# checkpoints


def saved(folder, drafter):
    save_drafter(drafter, str(folder), "# card\n", {"training_state.pt": {"step": 1}})
    return json.loads((folder / "config.json").read_text())


def test_checkpoint_is_what_engines_read(tmp_path):
    """Failure 10: rope_theta at one place only, the target's partial rotary inherited, tensors renamed or not bf16."""
    drafter = small_drafter()
    config = saved(tmp_path / "a-dflash", drafter)
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 1e7
    assert "partial_rotary" not in json.dumps(config) and "mrope" not in json.dumps(config)
    expected = {
        "architectures": ["DFlashDraftModel"], "model_type": "qwen3",
        "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
        "block_size": 16, "dflash_config": {"block_size": 16, "mask_token_id": MASK, "target_layer_ids": list(TAPS)},
        "num_target_layers": 8, "num_hidden_layers": 2, "layer_types": [FULL] * 2, "hidden_size": 64,
        "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "hidden_act": "silu", "rms_norm_eps": 1e-6, "attention_bias": False, "max_position_embeddings": 512,
        "vocab_size": V, "tie_word_embeddings": False, "rope_scaling": None, "use_sliding_window": False,
        "sliding_window": None, "max_window_layers": 2, "dtype": "bfloat16", "torch_dtype": "bfloat16"}
    assert {k: config.get(k, "missing") for k in expected} == expected
    own = ("input_layernorm", "post_attention_layernorm", *(f"self_attn.{x}_proj" for x in "qkvo"), "self_attn.q_norm",
           "self_attn.k_norm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    names = {f"{x}.weight" for x in ("fc", "hidden_norm", "norm", *(f"layers.{i}.{x}" for i in (0, 1) for x in own))}
    with safe_open(tmp_path / "a-dflash" / "model.safetensors", "pt") as f:
        assert set(f.keys()) == names and len(names) == 3 + 11 * 2 and f.metadata() == {"format": "pt"}
        assert all(f.get_tensor(name).dtype == torch.bfloat16 for name in names)
        assert f.get_tensor("fc.weight").shape == (64, 3 * 64)
    files = {"config.json", "model.safetensors", "dflash.py", "README.md", "training_state.pt"}
    assert set(os.listdir(tmp_path / "a-dflash")) == files and os.listdir(tmp_path) == ["a-dflash"]
    with open(os.path.join(ROOT, "model.py")) as f:
        assert (tmp_path / "a-dflash" / "dflash.py").read_text() == f.read()


@pytest.mark.parametrize("kinds, window", DRAFTERS)
@torch.no_grad()
def test_checkpoint_loads_by_auto_model(kinds, window, tmp_path):
    """Failure 10: the shipped dflash.py needs the project around it, or a window, theta or mask is lost on the way."""
    drafter, (features, blocks, anchors) = small_drafter(kinds, window), drafting(40)
    saved(tmp_path / "b-dflash", drafter)
    ours = load_drafter(str(tmp_path / "b-dflash"), small_config("tied"))
    theirs = AutoModel.from_pretrained(str(tmp_path / "b-dflash"), trust_remote_code=True, dtype=torch.float32).eval()
    assert type(theirs) is not DFlashDraftModel and type(theirs).__name__ == "DFlashDraftModel"
    hidden = ours(features, blocks, anchors)
    assert torch.equal(theirs(features, blocks, anchors), hidden)
    # and they are the drafter's own, but for its weights in bf16
    assert torch.equal(hidden, drafter.bfloat16().float()(features, blocks, anchors))
    for loaded in (ours, theirs):
        assert (loaded.taps, loaded.block_size, loaded.mask_token_id) == (TAPS, K, MASK)


def test_checkpoint_of_a_step_is_the_newest_whole_one(tmp_path):
    """A half-written folder, or step 9 before step 10, is taken for the newest."""
    for name in ("step-000009", "step-000010", "step-000011.part", "notes"):
        (tmp_path / name).mkdir()
    assert newest(str(tmp_path)) == str(tmp_path / "step-000010")
    (tmp_path / "config.json").write_text("{}")
    assert newest(str(tmp_path)) == str(tmp_path) and newest("nowhere") == "nowhere"


def test_drafter_of_another_target_is_refused(tmp_path):
    """Failure 10: acceptance collapses without a word, as the drafter reads another target's features or head."""
    folder, target = tmp_path / "c-dflash", small_config("tied")
    config = saved(folder, small_drafter())

    def refused(hint, **change):
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=hint):
            load_drafter(str(folder), target)

    refused("hidden_size is 128, the target's 64", hidden_size=128)
    refused("vocab_size is 512, the target's 300", vocab_size=512)
    refused("num_target_layers is 24, the target's 8", num_target_layers=24)
    refused("mask id 300 of 300", dflash_config=config["dflash_config"] | {"mask_token_id": 300})
    refused("last tap 7 of 8", dflash_config=config["dflash_config"] | {"target_layer_ids": [0, 3, 7]})
    refused("layers.2", num_hidden_layers=3, layer_types=[FULL] * 3)
    refused("layers.1", num_hidden_layers=1, layer_types=[FULL])
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "dflash_config"}))
    with pytest.raises(ValueError, match="has no dflash_config"):
        load_drafter(str(folder), target)


RULES = {  # the contract's seven, each a claim about (config.json, {name: tensor}) of five layers and three taps
    "1 block_size in both places, taps and mask inside": lambda c, w: c["block_size"] == K == c["dflash_config"][
        "block_size"] and c["dflash_config"].keys() == {"block_size", "mask_token_id", "target_layer_ids"},
    "2 rope_theta in both places": lambda c, w: c["rope_theta"] == 1e7 == c["rope_parameters"]["rope_theta"]
        and c["rope_parameters"]["rope_type"] == "default" and c["rope_scaling"] is None,
    "3 nothing of the target's rotary": lambda c, w: not re.search("partial|mrope", json.dumps(c)),
    "4 taps ascend, differ, end before the last layer": lambda c, w: (taps := c["dflash_config"]["target_layer_ids"])
        == sorted(set(taps)) and max(taps) <= c["num_target_layers"] - 2 and c["num_target_layers"] == 8,
    "5 exactly 3 + 11 L tensors, fc by taps": lambda c, w: len(w) == 58 == 3 + 11 * c["num_hidden_layers"]
        and w["fc.weight"].shape == (64, 3 * 64) and not any(name.startswith("model.") for name in w),
    "6 plain norms, gains near one": lambda c, w: all(abs(x.float().mean() - 1) < 0.5 for name, x in w.items()
                                                      if "norm" in name),
    "7 bf16": lambda c, w: {x.dtype for x in w.values()} == {torch.bfloat16} and c["dtype"] == c["torch_dtype"]}


@pytest.mark.parametrize("rule", RULES)
def test_failure_10_checkpoint_keeps_the_contract(rule, tmp_path):
    """Failure 10: an engine reads another theta, tap or tensor than was trained, without a word."""
    config = saved(tmp_path / "d-dflash", small_drafter((FULL,) * 5))
    with safe_open(tmp_path / "d-dflash" / "model.safetensors", "pt") as f:
        assert RULES[rule](config, {name: f.get_tensor(name) for name in f.keys()})


def test_checkpoint_order_is_that_of_optimizer_states():
    """Failure 12: moments saved by SpecForge go by index; in another order each lands on another parameter."""
    layer = [f"self_attn.{x}" for x in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")] + [
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm"]
    names = [f"layers.{i}.{x}.weight" for i in range(5) for x in layer] + [
        "norm.weight", "fc.weight", "hidden_norm.weight"]
    assert [name for name, _ in small_drafter((FULL,) * 5).named_parameters()] == names and len(names) == 58


@pytest.mark.parametrize("kinds, window", DRAFTERS)
def test_checkpoint_round_trip_is_bit_equal(kinds, window, tmp_path):
    """Failure 10: a checkpoint that changes by being loaded and written again."""
    saved(tmp_path / "one-dflash", small_drafter(kinds, window))
    loaded = load_drafter(str(tmp_path / "one-dflash"), small_config("tied"))
    saved(tmp_path / "two-dflash", loaded)
    for name in os.listdir(tmp_path / "one-dflash"):
        assert (tmp_path / "one-dflash" / name).read_bytes() == (tmp_path / "two-dflash" / name).read_bytes(), name


def drop(config, *names):
    return {k: v for k, v in config.items() if k not in names}


PUBLISHED = {  # what published config.json files have otherwise than ours: (heads, kv heads, width), change
    "4B: theta and block inside only": ((4, 2, 32), (SLIDING,) * 5 + (FULL,), lambda c: drop(
        c, "rope_theta", "block_size", "torch_dtype", "max_window_layers") | {"tie_word_embeddings": True,
                                                                              "pad_token_id": None}),
    "27B: theta and block outside only": ((8, 4, 16), (FULL,) * 5, lambda c: drop(c, "rope_parameters") | {
        "dflash_config": drop(c["dflash_config"], "block_size")}),
    "window without its flag": ((2, 1, 64), (SLIDING, FULL), lambda c: c | {"use_sliding_window": False}),
    "no count of target layers": ((4, 2, 16), (FULL,), lambda c: drop(c, "num_target_layers", "layer_types"))}


@pytest.mark.parametrize("name", PUBLISHED)
@torch.no_grad()
def test_published_drafters_load_by_their_config(name, tmp_path):
    """Failure 10: layers as many as taps, one head layout, one mask, or one place of a key are taken for granted."""
    (heads, kv_heads, width), kinds, change = PUBLISHED[name]
    config = drafter_config(small_config("tied"), len(kinds), (0, 2, 3, 6), 270, heads, kv_heads, width, 48, 8)
    config.layer_types, config.sliding_window = list(kinds), 12 if SLIDING in kinds else None
    config.use_sliding_window = SLIDING in kinds
    drafter = perturb(DFlashDraftModel(config), scale=5.0).bfloat16().float()
    public, folder = saved(tmp_path / "e-dflash", drafter), tmp_path / "e-dflash"
    (folder / "config.json").write_text(json.dumps(change(public)))
    (folder / "dflash.py").unlink()  # not every imported checkpoint has one
    loaded = load_drafter(str(folder), small_config("tied"))
    assert (loaded.taps, loaded.block_size, loaded.mask_token_id) == ((0, 2, 3, 6), 8, 270)
    assert len(loaded.layers) == len(kinds)
    r = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    features, blocks = r(1, 30, 4 * 64), r(1, 2, 8, 64)
    hidden, state = loaded(features, blocks, torch.tensor([[9, 25]])), loaded.new_state(1, 40, features)
    loaded.remember(features[:, :25], state, 0)
    truth = [slow_block(drafter, features[0], blocks[0, a], n) for a, n in enumerate((9, 25))]
    assert apart(hidden[0, 0], truth[0]) < 1e-5 and apart(hidden[0, 1], truth[1]) < 1e-5
    assert apart(loaded.guess(blocks[:, 1], state, torch.tensor(25))[0], truth[1]) < 1e-5
    again = saved(tmp_path / "f-dflash", loaded)
    assert drop(again, "layer_types") == drop(public, "layer_types") | {
        "num_target_layers": 8, "pad_token_id": loaded.config.pad_token_id}
    theirs = AutoModel.from_pretrained(str(tmp_path / "f-dflash"), trust_remote_code=True, dtype=torch.float32).eval()
    assert torch.equal(theirs(features, blocks, torch.tensor([[9, 25]])), hidden)


def test_drafters_that_compute_otherwise_are_refused(tmp_path):
    """Failures 3 and 10: a config.json that asks for what is not computed loads all the same, and guesses badly."""
    folder, target = tmp_path / "g-dflash", small_config("tied")
    config = saved(folder, small_drafter())
    own, rope = config["dflash_config"], config["rope_parameters"]
    for hint, changed in (
            ("block_size is 8 at the top and 16 inside", config | {"block_size": 8}),
            ("has no block_size", drop(config, "block_size") | {"dflash_config": drop(own, "block_size")}),
            ("rope_theta is 10000 at the top and 1", config | {"rope_theta": 10000}),
            ("has no rope_theta", drop(config, "rope_theta", "rope_parameters")),
            ("partial_rotary_factor", config | {"partial_rotary_factor": 0.25}),
            ("partial_rotary_factor", config | {"rope_parameters": rope | {"partial_rotary_factor": 0.25}}),
            ("yarn", config | {"rope_parameters": rope | {"rope_type": "yarn"}}),
            ("conv_kernel_size", config | {"dflash_config": own | {"conv_kernel_size": 2}}),
            ("has no hidden_size", drop(config, "hidden_size")),
            ("mask_token_id", config | {"dflash_config": drop(own, "mask_token_id")}),
            ("no sliding_window", config | {"layer_types": [SLIDING, FULL]}),
            ("must ascend", config | {"dflash_config": own | {"target_layer_ids": [3, 0, 6]}})):
        (folder / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=hint):
            load_drafter(str(folder), target)
    (folder / "config.json").write_text(json.dumps(config))
    weights = {k: v.bfloat16() for k, v in small_drafter().state_dict().items()}
    weights["fc.weight"][0, 0] = math.nan
    save_file(drop(weights, "norm.weight") | {"lm_head.weight": torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="lm_head.weight is left over, norm.weight is missing"):
        load_drafter(str(folder), target)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match="fc.weight is not finite"):
        load_drafter(str(folder), target)


def test_failure_3_partial_rotary_stays_with_the_target():
    """Failure 3: the drafter inherits the target's partial rotary, so that its slots 2 and up are never accepted."""
    target = dataclasses.replace(small_config("tied"), partial_rotary_factor=0.25, rope_theta=5e5)
    drafter = DFlashDraftModel(drafter_config(target, 1, TAPS, MASK, 4, 2, 16, 96))
    cos, sin = drafter.rotary(torch.arange(3))
    assert cos.shape == (3, 16) and (sin[1] != 0).all()  # all 16 channels turn
    assert sin[1, 1].item() == pytest.approx(math.sin(5e5 ** (-2 / 16)), rel=1e-5)

# ----------------------------------------------------------------------------------------------------------------------
# data, tokenizer, template


def test_rows_round_trip(tmp_path):
    """Ids above 65,535 wrap in uint16; rows without a supervised token train on nothing."""
    rows = [([1, 70_000, 248_319], [0, 1, 1]), ([5], [0]), ([65_536], [1])]
    meta = write_rows(str(tmp_path), {"train": rows, "val": []}, {"vocab_size": 248_320})
    read = Rows(str(tmp_path), "train", 248_320)
    assert [(t.tolist(), m.tolist()) for t, m in (read[i] for i in range(len(read)))] == [rows[0], rows[2]]
    assert meta["splits"]["train"] == {"rows": 2, "dropped": 1, "tokens": 4, "supervised": 3}
    for split, vocab, hint in (("train", 512, "248320.*512"), ("val", 248_320, "no rows"), ("x", 248_320, "no rows")):
        with pytest.raises(ValueError, match=hint + ".*run python.*prepare.py"):
            Rows(str(tmp_path), split, vocab)
    with open(tmp_path / "train.tokens.bin", "ab") as f:
        f.write(b"1234")
    with pytest.raises(ValueError, match="5 tokens, meta.json says 4"):
        Rows(str(tmp_path), "train", 248_320)
    (tmp_path / "meta.json").unlink()  # written last, so the folder counts as unfinished
    with pytest.raises(ValueError, match="no meta.json.*prepare.py"):
        Rows(str(tmp_path), "train", 248_320)


def test_rows_outside_the_vocabulary_are_refused(tmp_path):
    """Ids of another tokenizer reach the embedding: a crash of the device that names nothing."""
    with pytest.raises(ValueError, match=r"row 1 has token ids 3..600, outside the vocabulary of 512"):
        write_rows(str(tmp_path), {"train": [([1, 2], [0, 1]), ([3, 600], [0, 1])]}, {"vocab_size": 512})
    assert not (tmp_path / "meta.json").exists()


def test_problems_are_disjoint_and_right():
    """A question in two splits, another stream at every run, a solution whose box is not the answer."""
    splits = {name: list(problems(name, 60)) for name in ("train", "val", "test")}
    asked = [q for rows in splits.values() for q, _, _ in rows]
    assert len(set(asked)) == 180 and all(split_of(q) == name for name, rows in splits.items() for q, _, _ in rows)
    assert list(problems("train", 10, start=50)) == splits["train"][50:] and problem(7) == problem(7)
    for rows in splits.values():
        for _, solution, answer in rows:
            assert boxed(solution) == answer
            sums = re.findall(r"(?<![-+*/] )\b(\d+ [-+*/] \d+) = (\d+)\b(?! [-+*/=])", solution)
            assert sums and all(eval(left) == int(right) for left, right in sums), solution
    assert boxed(r"\boxed{1} \boxed{\frac{1}{2}}") == r"\frac{1}{2}" and boxed(r"\boxed{1") is boxed("1") is None


def test_tokenizer_ids():
    """Digits merged to numbers, special tokens elsewhere, a mask id that is a token, text that does not survive."""
    _, tokenizer = nano()
    assert len(tokenizer) == 507 and nano()[0].config.vocab_size == 512
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]) \
        == [502, 503, 504, 505, 506]
    assert [tokenizer.decode([i]) for i in tokenizer.encode("1234567890")] == list("1234567890")
    for text in ("What is 12 * 34 ?\n\nSo 5.", "héé → 漢字 \t end", questions()[0]):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_chat_prompt_has_the_empty_thought():
    """Failure 9: a drafter trained with one template and served with another; stop ids of another tokenizer."""
    _, tokenizer = nano()
    opening = "<|im_start|>user\nHi 12<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert tokenizer.decode(chat_prompt(tokenizer, "Hi 12")) == opening + "\n</think>\n\n"
    assert tokenizer.decode(chat_prompt(tokenizer, "Hi 12", thinking=True)) == opening
    assert stop_ids(tokenizer) == {502, 504}
    conversation = [{"role": "user", "content": "Hi 12"}, {"role": "assistant", "content": "34"}]
    whole = tokenizer.apply_chat_template(conversation, return_dict=False)
    assert whole == chat_prompt(tokenizer, "Hi 12") + tokenizer.encode("34<|im_end|>\n")


def test_prepared_rows_begin_with_chat_prompt():
    """Failure 9: rows of another template than decoding's; answers that are not the target's own."""
    target, tokenizer = nano()
    rows = prepare.answer(target, tokenizer, questions()[:3], 160, batch_size=2)
    shipped = [row for row in prepare.read_answers() if row["split"] == "val"]
    for question, (prompt, answer), row in zip(questions(), rows, shipped):
        assert prompt == chat_prompt(tokenizer, question)
        assert row["question"] == question and tokenizer.encode(row["answer"] + "<|im_end|>") == answer
        alone = generate(target, None, prompt, 160, stop_ids(tokenizer), rows=1)
        assert answer == sum((r.tokens for r in alone), [])
        (ids, n), = pretrain.encode(tokenizer, [(question, "34.")])
        assert ids == prompt + tokenizer.encode("34.<|im_end|>") and n == len(prompt)


# ----------------------------------------------------------------------------------------------------------------------
# data sets in the public form


def turns(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


@functools.cache
def answered():
    """(question, answer) pairs that the nano target gave."""
    return [(row["question"], row["answer"]) for row in prepare.read_answers()[:40]]


def public_rows():
    """Rows of the public form: good ones in both keys, with ids and extras of changing types; and of each bad kind."""
    rows = [{"id": i if i % 3 else str(i), "extra": [None, 1, "x"][i % 3],
             ("conversations", "messages")[i % 2]: turns(*pair)} for i, pair in enumerate(answered())]
    return rows[:20] + [
        {"text": "no conversation"}, {"messages": turns("only a question")}, {"messages": turns("q", " ")},
        {"messages": [{"from": "human", "value": "q"}]}, {"messages": turns("q", "a<|im_end|>b")},
        {"messages": turns("p", "<think>\nhm\n</think>\n\na")}, {"messages": turns("why " * 200, "late")},
        {"messages": turns("q", "<think>\n\n</think>\n\nempty thought, written out")},
        {"conversations": turns("What is 1 + 1?", "2", "And 2 + 2?", "It is 4.", "thanks")}] + rows[20:]


@pytest.fixture
def math_rows(main, tmp_path):
    """data/math240k/prepare.py over rows written as JSON lines: what it said, and its folder."""
    def call(rows, *args, folder="rows"):
        source = tmp_path / "source.jsonl"
        source.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return main(math240k, f"--source={source}", f"--target={NANO}/target", f"--out_dir={tmp_path / folder}",
                    "--num_proc=1", "--max_length=160", *args), tmp_path / folder
    return call


def read_rows(folder, split):
    rows = Rows(str(folder), split, 512, fingerprint(os.path.join(NANO, "target")))
    return [(t.tolist(), m.tolist()) for t, m in (rows[i] for i in range(len(rows)))]


def test_failure_9_prepared_rows_begin_with_chat_prompt(math_rows):
    """Failure 9: acceptance falls from 60 to 25 %, as rows have another template than decoding; the header or the empty
    thought is supervised, or the closing <|im_end|> is not; an earlier answer is not supervised."""
    said, folder = math_rows(public_rows())
    tokenizer, rows = nano()[1], read_rows(folder, "train") + read_rows(folder, "val")
    known = {tuple(t): m for t, m in rows}
    for question, answer in answered():
        prompt, reply = chat_prompt(tokenizer, question), tokenizer.encode(answer + "<|im_end|>")
        assert known.pop(tuple(prompt + reply)) == [0] * len(prompt) + [1] * len(reply)
    conversation = turns("What is 1 + 1?", "2", "And 2 + 2?")
    prompt = chat_prompt(tokenizer, conversation)
    (long, long_mask), = [(t, m) for t, m in known.items() if list(t[:len(prompt)]) == prompt]
    assert list(long) == prompt + tokenizer.encode("It is 4.<|im_end|>")
    spoken = [tokenizer.decode([t]) for t, m in zip(long, long_mask) if m]
    assert "".join(spoken) == "2<|im_end|>It is 4.<|im_end|>"
    (short, short_mask), = [(t, m) for t, m in known.items() if t != long]
    assert list(short) == chat_prompt(tokenizer, "q") + tokenizer.encode("empty thought, written out<|im_end|>")
    assert sum(short_mask) == len(short) - len(chat_prompt(tokenizer, "q"))


def test_prepare_counts_what_it_keeps_cuts_and_drops(math_rows, monkeypatch):
    """Rows lost without a word; or a run that differs from the last one, or with the number of processes."""
    said, folder = math_rows(public_rows())
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["dropped"] == {"<|im_start|> or <|im_end|> in the text": 1, "a message without role and content": 1,
                               "a thought, with thinking off": 1, "an empty answer": 1, "no conversation": 1,
                               "no answer within 160 tokens": 1, "no assistant's answer": 1}
    assert meta["read"] == 49 and meta["splits"]["val"]["rows"] == 4 and meta["splits"]["train"]["rows"] == 38
    assert "49 rows read, 42 kept" in said and "7 dropped" in said
    assert meta["cut"] == sum(len(t) == 160 for split in ("train", "val") for t, _ in read_rows(folder, split))
    math_rows(public_rows(), folder="again")
    math_rows(public_rows(), "--num_proc=2", folder="processes")
    for name in os.listdir(folder):
        for other in ("again", "processes"):
            assert (folder / name).read_bytes() == (folder.parent / other / name).read_bytes(), (name, other)
    math_rows(public_rows()[::-1], folder="reversed")
    assert sorted(read_rows(folder.parent / "reversed", "val")) == sorted(read_rows(folder, "val"))
    _, thoughts = math_rows(public_rows(), "--thinking", folder="thinking")
    said = {nano()[1].decode(t).partition("assistant\n")[2] for split in ("train", "val")
            for t, _ in read_rows(thoughts, split)}
    assert "<think>\nhm\n</think>\n\na<|im_end|>" in said and len(said) == 2
    # interrupted: what was done before no longer counts, and nothing looks done
    monkeypatch.setattr(math240k, "encode", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        math_rows(public_rows(), folder="again")
    with pytest.raises(ValueError, match="no finished data"):
        read_rows(folder.parent / "again", "train")


def test_prepare_reads_parquet_and_folders(math_rows, main, tmp_path):
    """Rows that depend on the file they came in."""
    _, folder = math_rows(public_rows())
    (tmp_path / "many").mkdir()
    plain = [{"messages": row.get("messages") or row.get("conversations")} for row in public_rows()]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(plain[:30]), tmp_path / "many" / "a.parquet")
    (tmp_path / "many" / "b.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in plain[30:]))
    (tmp_path / "many" / "dataset_infos.json").write_text("{}")
    main(math240k, f"--source={tmp_path}/many", f"--target={NANO}/target", f"--out_dir={tmp_path}/mixed",
         "--max_length=160", "--num_proc=1")
    for split in ("train", "val"):
        assert read_rows(tmp_path / "mixed", split) == read_rows(folder, split)


def test_prepare_with_a_template_like_the_real_one(math_rows, main, tmp_path):
    """Failure 9: the public template trims text, writes thoughts into the last turn only and refuses some talk; rows of
    its rendering of whole conversations begin otherwise than decoding."""
    template = """{%- if messages[0].role == 'assistant' %}{{ raise_exception('no user') }}{% endif %}
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and loop.last %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{{- m.content | trim + '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}
{%- if not enable_thinking | default(true) %}{{- '\\n</think>\\n\\n' }}{% endif %}{% endif %}"""
    target = nano_copy(tmp_path / "t", "target", chat_template__jinja=template.encode())
    rows = [turns(" 1 ", " 2 ", "3", " 4"), turns("a", "b"), turns("c", "d"), turns("e", "f")[::-1] * 2]
    said, folder = math_rows([{"messages": row} for row in rows], target)
    assert "dropped 1: refused by the chat template" in said
    tokenizer = load_tokenizer(str(tmp_path / "t"))
    splits = [Rows(str(folder), split, 512) for split in ("train", "val")]
    (tokens, mask), = [rows[i] for rows in splits for i in range(len(rows)) if "4" in tokenizer.decode(rows[i][0])]
    assert tokenizer.decode(tokens) == (
        "<|im_start|>user\n1<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n<|im_start|>user\n3<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n 4<|im_end|>")
    assert tokenizer.decode(tokens[mask > 0]) == "2<|im_end|> 4<|im_end|>"


def test_phase_1_2_end_to_end_on_small_stand_ins(math_rows, main, tmp_path):
    """The recipe of the real run, on a target of 24 layers in the public layout and rows in the public form, small in
    width only: a key, a shape or a file name that first fails on the real machine. Loss falls, the result decodes."""
    config = dataclasses.replace(small_config("tied"), vocab_size=512, num_hidden_layers=24, layer_types=(),
                                 eos_token_id=504)
    publish(tmp_path / "Qwen3.5-0.8B", perturb(random_weights(config, "cpu", torch.float32), scale=5.0))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(os.path.join(NANO, "target", name), tmp_path / "Qwen3.5-0.8B")
    _, data = math_rows(public_rows())
    said = main(train, "config/phase1_2.py", f"--target={tmp_path}/Qwen3.5-0.8B", f"--data={data}", "--device=cpu",
                f"--out_dir={tmp_path}/run-dflash", "--dtype=float32", "--anchors=16", "--heads=2", "--head_dim=32",
                "--mlp=96", "--lr=5e-3", "--epochs=1.5", "--log_every=1", "--decode_rows=1", "--decode_tokens=8")
    losses = [float(x) for x in re.findall(r"\| loss ([\d.]+)", said)]
    assert sum(losses[-6:-1]) / 5 < losses[0] - 0.5 and "held-out tau from real decoding" in said, said
    folder, = (tmp_path / "run-dflash").glob("step-*")
    with safe_open(folder / "model.safetensors", "pt") as f:
        assert len(f.keys()) == 58 and f.get_tensor("fc.weight").shape == (64, 5 * 64)
    written = json.loads((folder / "config.json").read_text())
    assert written["dflash_config"] == {"block_size": 16, "mask_token_id": 507, "target_layer_ids": [3, 7, 11, 15, 19]}
    assert written["num_target_layers"] == 24 and written["rope_theta"] == 1e7
    said = main(draft_decode, f"--target={tmp_path}/Qwen3.5-0.8B", f"--drafter={tmp_path}/run-dflash", "--prompt=What",
                "--max_new_tokens=20", "--device=cpu", "--dtype=float32")
    assert said.rstrip().endswith("identical")


def test_math500_prompts(main, tmp_path):
    """Another suffix than the published figures were measured with."""
    source, out = tmp_path / "test.jsonl", tmp_path / "new" / "prompts.jsonl"
    source.write_text(json.dumps({"problem": "What is $1+1$?", "answer": "2", "level": 1}) + "\n")
    assert "1 prompts" in main(math500, f"--source={source}", f"--out={out}")
    (question, answer), = bench.load_questions(str(out), 5)
    assert answer == "2" and question == \
        "What is $1+1$?\nPlease reason step by step, and put your final answer within \\boxed{}."


@pytest.fixture(scope="module")
def served():
    """Address of `transformers serve` with the nano target, in a process of its own."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = "import sys; from transformers.cli.transformers import main; sys.exit(main())"
    with subprocess.Popen([sys.executable, "-c", command, "serve", os.path.join(NANO, "target"), "--device=cpu",
                           "--dtype=float32", "--host=127.0.0.1", f"--port={port}"], stdout=subprocess.DEVNULL,
                          stderr=subprocess.DEVNULL) as process:
        try:
            for _ in range(300):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                assert process.poll() is None, "the server did not start"
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()


class Flaky(http.server.BaseHTTPRequestHandler):
    """Passes a request on to self.upstream, but first fails each prompt once: busy, or the connection breaks."""
    upstream, seen, log = "", set(), []

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        first = body not in self.seen
        self.seen.add(body), self.log.append(json.loads(body))
        if first and len(self.seen) % 2:
            self.close_connection = True
        elif first:
            self.send_error(503)
        else:
            request = urllib.request.Request(self.upstream + self.path.removeprefix("/v1"), body,
                                             {"Content-Type": "application/json"})
            with urllib.request.urlopen(request) as answer:
                content = answer.read()
            self.send_response(200), self.send_header("Content-Length", str(len(content))), self.end_headers()
            self.wfile.write(content)

    def log_message(self, *args):
        pass


def test_regenerate_against_a_server(main, monkeypatch, served, tmp_path):
    """Answers of another template, out of order, lost with a broken connection, or asked for again after a stop; one
    that ran into the limit trained as if it had ended. A real server, behind one that fails every prompt once."""
    source, pairs = tmp_path / "prompts.jsonl", answered()[:3]
    rows = [{"question": q} for q, _ in pairs[:1]]
    rows += [{"id": "x", "conversations": turns(q, "other")} for q, _ in pairs[1:]]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(Flaky, "upstream", served), monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Flaky) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        args = [f"--prompts={source}", f"--server=http://127.0.0.1:{proxy.server_port}/v1", "--in_flight=4",
                f"--model={os.path.join(NANO, 'target')}", "--max_new_tokens=160"]
        said = main(regenerate, *args, f"--out={tmp_path}/all.jsonl")
        assert "3 answered" in said and len(Flaky.log) == 6
        assert all(body["chat_template_kwargs"] == {"enable_thinking": False} for body in Flaky.log)
        got = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
        assert [row["messages"] for row in got] == [turns(q, a) for q, a in pairs]  # the target's own, as shipped
        assert [row["id"] for row in got] == ["0", "x", "x"]
        # an interrupted run: two answers and half of a third; only one prompt is asked for again
        header = {"prompts": str(source), "model": os.path.join(NANO, "target"), "temperature": 0.0, "thinking": False,
                  "max_new_tokens": 160}
        lines = [json.dumps(header)] + [json.dumps({"prompt": turns(q), "answer": a, "why": None}) for q, a in pairs]
        (tmp_path / "some.jsonl.part").write_text("\n".join(lines[:4])[:-9])
        main(regenerate, *args, f"--out={tmp_path}/some.jsonl")
        assert len(Flaky.log) == 7 and not (tmp_path / "some.jsonl.part").exists()
        assert (tmp_path / "some.jsonl").read_bytes() == (tmp_path / "all.jsonl").read_bytes()
        (tmp_path / "more.jsonl.part").write_text(lines[0].replace("0.0", "1.0") + "\n")
        assert "in another way" in main(regenerate, *args, f"--out={tmp_path}/more.jsonl")
        assert "is there already" in main(regenerate, *args, f"--out={tmp_path}/all.jsonl")
        args[-1] = "--max_new_tokens=9"
        assert "did not end" in main(regenerate, *args, f"--out={tmp_path}/short.jsonl")
        proxy.shutdown()
    args[1] = f"--server={served}"
    assert "refused: 400" in main(regenerate, *args, "--model=other", f"--out={tmp_path}/other.jsonl")
    args[1] = "--server=http://127.0.0.1:9/v1"
    assert "gave no answer in 3 tries" in main(regenerate, *args, "--retries=2", f"--out={tmp_path}/none.jsonl")


def test_regenerate_here_and_prepare(main, tmp_path):
    """The whole way to target-matched rows without a server; its rows are those that a server's answers give."""
    source, pairs = tmp_path / "prompts.jsonl", answered()[:3]
    rows = [{"problem": q} for q, _ in pairs] + [{"prompt": "9 " * 1100}]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = main(regenerate, f"--prompts={source}", f"--out={tmp_path}/rows.jsonl", f"--target={NANO}/target",
                f"--drafter={NANO}/drafter-dflash", "--device=cpu", "--dtype=float32", "--max_new_tokens=160")
    assert "3 answered, 1 refused" in said
    main(math240k, f"--source={tmp_path}/rows.jsonl", f"--target={NANO}/target", f"--out_dir={tmp_path}/rows")
    rows = read_rows(tmp_path / "rows", "train") + read_rows(tmp_path / "rows", "val")
    said = {nano()[1].decode([x for x, supervised in zip(*row) if supervised]) for row in rows}
    assert said == {a + "<|im_end|>" for _, a in pairs}

# ----------------------------------------------------------------------------------------------------------------------
# the shipped pair and the bench


def test_shipped_drafter_carries_model_py():
    """The file you read is the file you ship: after an edit, cp model.py data/nano/drafter-dflash/dflash.py."""
    with open(os.path.join(ROOT, "model.py")) as a, open(os.path.join(NANO, "drafter-dflash", "dflash.py")) as b:
        assert a.read() == b.read()


@pytest.fixture
def benchmark(monkeypatch, tmp_path, capsys):
    """A function that runs `python bench.py ARGS` in this process and returns its last line, parsed."""
    monkeypatch.chdir(ROOT)
    before = {k: v for k, v in vars(bench).items() if isinstance(v, (str, int, float, tuple))}

    def call(*args, broken=False):
        monkeypatch.setattr(sys, "argv", ["bench.py", *args, f"--out_dir={tmp_path}"])
        with pytest.raises(SystemExit, match="differs") if broken else contextlib.nullcontext():
            bench.main()
        return json.loads(capsys.readouterr().out.splitlines()[-1])
    yield call
    vars(bench).update(before)


def test_bench_acceptance(benchmark, tmp_path):
    """Failure 15: a report whose figures do not follow from its rounds, or a pair that lost its acceptance."""
    report = benchmark("acceptance", "--limit=4")
    with open(tmp_path / "acceptance.jsonl") as f:
        rounds = [json.loads(line) for line in f]
    assert report["command"] == "acceptance" and report["prompts"] == 4 and report["identical"] == 1
    assert report["tau_micro"] == sum(len(r["tokens"]) for r in rounds) / len(rounds) > 4
    means = [[len(r["tokens"]) for r in rounds if r["prompt"] == i] for i in range(4)]
    assert report["tau_macro"] == pytest.approx(sum(sum(m) / len(m) for m in means) / 4)
    assert report["slots"] == [sum(r["accepted"] >= k for r in rounds) / len(rounds) for k in range(1, K)]
    assert report["accuracy"]["target"] == report["accuracy"]["speculative"] >= 0.5
    assert report["speedup"] == report["tokens_per_s"]["speculative"] / report["tokens_per_s"]["target"]
    assert (tmp_path / "acceptance.png").stat().st_size > 1000


def test_bench_figures(tmp_path):
    """A picture of a run that never was: what its rounds returned is not the target's answer to that prompt."""
    with open(os.path.join(ROOT, "logs", "acceptance_nano.json")) as f:
        shown = json.load(f)["transcript"]
    target, tokenizer = nano()
    prompt = bench.load_prompts("nano", 200, target, tokenizer)[shown["prompt"]]
    answer = run(target, None, prompt.ids, 512, stop_ids(tokenizer))[0]
    pieces = [shown["rounds"][0]["anchor"]]
    for made, following in zip(shown["rounds"], shown["rounds"][1:] + [None]):
        pieces += made["guesses"][:made["accepted"]] + [made["own"]] * (made["own"] is not None)
        assert following is None or following["anchor"] == made["own"]
    assert "".join(pieces) == tokenizer.decode(answer)
    assert bench.transcript(target, shipped(), tokenizer, prompt.ids, stop_ids(tokenizer))[-1]["own"] == made["own"]
    bench.figures(tmp_path)
    assert (tmp_path / "acceptance.png").stat().st_size > 1000 < (tmp_path / "curve.png").stat().st_size


def test_bench_tau_by_hand():
    """Failure 15: tokens past a stop or past the limit counted. A stop in mid-round, a limit in mid-round, full blocks.

    The prompt's own token is in no round. Limit 20, 3 guesses right: 19 tokens, rounds of 4 4 4 4 3. Stop at the 11th
    token: 10 tokens, rounds of 4 4 2. Limit 33, 15 right: 32 tokens, rounds of 16 16."""
    prompt, answer = reference()
    stop = answer[10]
    assert answer.index(stop) == 10
    drafters = [Oracle(len(prompt), answer, lambda right=right: right) for right in (3, 3, 15)]
    ends = [(20, ()), (40, {stop}), (33, ())]

    def arm(drafter_of):
        calls = iter([0, 0, 1, 2])  # the first is the warm-up
        return lambda ids: (lambda i: run(small_target(), drafter_of(i), ids, *ends[i]))(next(calls))

    journal = type("Kept", (), {"row": lambda self, i, make: json.loads(json.dumps(make(i)))})()
    results = bench.measure({name: (arm(of), 1) for name, of in (
        ("speculative", drafters.__getitem__), ("alone", lambda i: None), ("target", lambda i: None))},
        [bench.Prompt(prompt, None)] * 3, journal)
    assert [[len(tokens) for _, tokens in row["speculative"]["rounds"]] for row in results] == [
        [4, 4, 4, 4, 3], [4, 4, 2], [16, 16]]
    report = bench.statistics(results, None, K)
    assert report["tau_micro"] == (19 + 10 + 32) / (5 + 3 + 2) == 6.1 and report["identical"] == 1
    assert report["tau_macro"] == pytest.approx((19 / 5 + 10 / 3 + 16) / 3)
    assert report["slots"] == [1.0, 1.0, 0.9] + [0.2] * 12  # the stop's round returned two guesses: a third was cut off


@pytest.fixture
def copies(monkeypatch):
    """bench's card without its second of copying."""
    monkeypatch.setattr(speed, "bandwidth", lambda device: 1e9)


def test_bench_speedup(benchmark, copies, tmp_path):
    """Failure 15: figures that contradict each other. tau of acceptance, of speedup and of the loop is one number."""
    args = ("--limit=2", "--max_new_tokens=16", "--repeats=2", "--hf")
    report, other = benchmark("speedup", *args), benchmark("acceptance", *args)
    assert {"faster", "prompts", "geomean", "min", "median", "max"} < set(report) and report["prompts"] == 2
    target, tokenizer = nano()
    lengths = [[len(r.tokens) for r in list(generate(target, shipped(), q.ids, 16, stop_ids(tokenizer)))[1:]]
               for q in bench.load_prompts("nano", 2, target, tokenizer)]
    assert report["tau_micro"] == other["tau_micro"] == sum(map(sum, lengths)) / sum(map(len, lengths))
    assert report["tau_macro"] == other["tau_macro"]
    rows = [json.loads(line) for line in (tmp_path / "speedup.jsonl").read_text().splitlines()]
    gains = [row["speedup"] for row in rows]
    assert report["min"] == min(gains) <= report["geomean"] <= max(gains) == report["max"]
    assert report["geomean"] == pytest.approx(math.prod(gains) ** 0.5) and report["median"] == sum(gains) / 2
    assert report["faster"] == sum(x > 1 for x in gains) and [len(row["target"]["repeats"]) for row in rows] == [2, 2]
    assert report["identical"] == report["identical_to_transformers"] == 1 < report["tokens_per_s"]["transformers"]
    card = report["card"]
    assert card["bytes"]["step"] == 4 * card["parameters"]["target"] and card["floor_seconds"]["step"] == \
        card["bytes"]["step"] / 1e9
    assert card["ceiling"] == pytest.approx(report["tau_micro"] * card["bytes"]["step"] / card["bytes"]["round"])
    assert card["share_of_ceiling"] == report["speedup"] / card["ceiling"]
    assert (tmp_path / "speedup.png").stat().st_size > 1000


def without_clock(report):
    return {k: v for k, v in report.items() if k not in ("tokens_per_s", "speedup", "card", "geomean", "min", "median",
                                                         "max", "faster")}


@pytest.mark.parametrize("command", ("acceptance", "exactness"))
def test_bench_resume_after_an_interruption(benchmark, monkeypatch, tmp_path, command):
    """A torn line, prompts measured twice or not at all, or rows of another run taken for this one's."""
    args = (command, "--limit=3", "--max_new_tokens=8", "--dtypes=float32", "--temperatures=1,")
    whole = benchmark(*args)
    assert not list(tmp_path.glob("*.part.jsonl"))
    calls, made = [], bench.run

    def stops_in_the_second(*rest, **more):
        calls.append(rest[2])
        if len(calls) > (7 if command == "acceptance" else 9):  # runs of a prompt, and of acceptance a warm-up
            raise KeyboardInterrupt
        return made(*rest, **more)

    monkeypatch.setattr(bench, "run", stops_in_the_second)
    with pytest.raises(SystemExit, match="interrupted: .*--resume"):
        benchmark(*args)
    part = tmp_path / f"{command}.part.jsonl"
    before = part.read_text()
    assert before.endswith("\n") and len([json.loads(line) for line in before.splitlines()]) == 2
    part.write_text(before + before[:40])  # as a power cut leaves it
    monkeypatch.setattr(bench, "run", made)
    with pytest.raises(SystemExit, match="made with count = 3, now it is 2"):
        benchmark(command, "--limit=2", *args[2:], "--resume")
    measured = []
    monkeypatch.setattr(bench, "run", lambda *rest, **more: measured.append(rest[2]) or made(*rest, **more))
    report = benchmark(*args, "--resume")
    assert without_clock(report) == without_clock(whole) and not part.exists()
    assert len({tuple(ids) for ids in measured}) == (3 if command == "acceptance" else 2)  # acceptance warms up
    with pytest.raises(SystemExit, match="coupling cannot be resumed"):
        benchmark("coupling", "--resume")


class Broken(http.server.BaseHTTPRequestHandler):
    """Passes a request on to self.upstream, but a prompt that names a fault meets that fault. Its /metrics are vLLM's,
    with a round of 4 tokens for each request and another engine's rounds of 2."""
    upstream, asked = "", 0
    streams = {"cut": b'data: {"choices": [{"delta": {"content": "4"}}]}\n\n', "garbage": b"data: {nonsense\n\n",
               "number": b"data: 7\n\n", "html": b"<html>It works</html>", "error": b'data: {"error": "full"}\n\n',
               "countless": b'data: {"choices": [{"delta": {"content": "4"}, "finish_reason": "stop"}]}\n\n'}

    def do_GET(self):
        counts = (("drafts", 0, 1), ("drafts", 1, 1), ("accepted_tokens", 0, 3), ("accepted_tokens", 1, 1))
        text = "".join(f'vllm:spec_decode_num_{name}_total{{engine="{engine}"}} {n * Broken.asked}.0\n'
                       for name, engine, n in counts)
        self.reply(text.encode() if self.path == "/metrics" else b"[]")

    def reply(self, content):
        self.send_response(200), self.send_header("Content-Length", str(len(content))), self.end_headers()
        self.wfile.write(content)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        fault = json.loads(body)["messages"][0]["content"]
        Broken.asked += 1
        if fault in self.streams:
            self.reply(self.streams[fault])
        elif fault == "busy":
            self.send_error(503)
        elif fault == "dead":
            self.close_connection = True
        elif fault == "slow":
            self.send_response(200), self.end_headers()
            with contextlib.suppress(OSError):
                for _ in range(20):
                    self.wfile.write(self.streams["cut"]), time.sleep(0.4)
        else:
            request = urllib.request.Request(self.upstream + self.path.removeprefix("/v1"), body,
                                             {"Content-Type": "application/json"})
            with urllib.request.urlopen(request) as answer:
                self.reply(answer.read())

    def log_message(self, *args):
        pass


def test_bench_serve(benchmark, monkeypatch, served, tmp_path):
    """A server's failures averaged into its speed or accuracy, or counted for the other; an answer that is not the
    target's. Both arms are one real server, behind one that fails in every way there is."""
    faults = ["busy", "dead", "slow", *Broken.streams]
    good = sorted(problems("test", 30), key=lambda p: len(p[1]))[:2]
    rows = [{"question": q, "answer": a} for q, _, a in good] + [{"question": f, "answer": "1"} for f in faults]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(Broken, "upstream", served)
    args = ["serve", f"--prompts={tmp_path}/prompts.jsonl", f"--served_model={NANO}/target", "--limit=99",
            "--max_new_tokens=72", f"--baseline_url={served}", "--concurrency=2", "--timeout=5"]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Broken) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        report = benchmark(*args, f"--base_url=http://127.0.0.1:{proxy.server_port}/v1/")
        proxy.shutdown()
    ours, theirs = report["speculative"], report["baseline"]
    assert ours["answered"] == report["pairs"] == 2 and ours["failed"] == len(faults) == sum(ours["errors"].values())
    assert theirs["failed"] == 0 and theirs["answered"] == len(rows)
    assert {"status 503", "no end within 5 s"} < set(ours["errors"]) and len(ours["errors"]) == len(faults)
    assert report["agreement"]["value"] == 1 and ours["tokens_per_s_of_all"]["value"] > 0
    assert report["tau"] == 3 and "counters" in ours["tau_source"] and theirs["tau"] is None
    lines = [json.loads(line) for line in (tmp_path / "serve.jsonl").read_text().splitlines()]
    counted = [line for line in lines if "error" not in line["speculative"]]
    assert [line["prompt"] for line in counted] == [0, 1]
    a, b = ([line[arm] for line in counted] for arm in ("speculative", "baseline"))
    speed_of = [sum(x["tokens"] for x in arm) / sum(x["seconds"] for x in arm) for arm in (a, b)]
    assert report["speedup"]["value"] == pytest.approx(speed_of[0] / speed_of[1])
    assert report["speedup"]["low"] <= report["speedup"]["value"] <= report["speedup"]["high"]
    assert ours["first_token_s"]["value"] == pytest.approx(sum(x["first"] for x in a) / 2)
    assert all(0 < x["first"] <= x["seconds"] for x in a + b)
    target, tokenizer = nano()
    said = [run(target, shipped(), chat_prompt(tokenizer, q), 72, stop_ids(tokenizer))[0] for q, _, _ in good]
    assert [x["text"].lstrip() for x in b] == [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in said]
    assert ours["accuracy"]["value"] == sum(boxed(x["text"]) == y for x, (_, _, y) in zip(a, good)) / 2 >= 0.5
    for url, hint in (("http://127.0.0.1:9/v1", "the speculative server .* does not answer"), ("", "give --base_url")):
        with pytest.raises(SystemExit, match=hint):
            benchmark(*args, f"--base_url={url}")


def test_bench_serve_resumes(benchmark, monkeypatch, served, tmp_path):
    """Groups asked twice, or lost, after an interruption."""
    import serve
    args = ["serve", f"--served_model={NANO}/target", "--limit=3", "--max_new_tokens=8", f"--base_url={served}",
            f"--baseline_url={served}"]
    asked, ask = [], serve.ask

    def until(count):
        def count_and_ask(url, body, timeout):
            asked.append(body["messages"][0]["content"])
            if len(asked) > count:
                raise KeyboardInterrupt
            return ask(url, body, timeout)
        return count_and_ask

    monkeypatch.setattr(serve, "ask", until(2 + 3))  # two of warm-up, the first prompt, and half of the second
    with pytest.raises(SystemExit, match="interrupted"):
        benchmark(*args)
    assert len((tmp_path / "serve.part.jsonl").read_text().splitlines()) == 2
    asked.clear(), monkeypatch.setattr(serve, "ask", until(99))
    report = benchmark(*args, "--resume")
    assert len(asked) == 2 + 4 and report["pairs"] == report["prompts"] == 3 and report["agreement"]["value"] == 1


def test_bench_serve_figures(monkeypatch):
    """A tau without the target's own token, or of other requests; an interval that is none."""
    import serve
    answer = {"text": "x", "tokens": 5, "first": 1.0, "seconds": 3.0}
    engine = {"/metrics": "vllm:spec_decode_num_drafts_created 1.7e9\n", "/get_server_info": json.dumps(
        {"internal_states": [{"avg_spec_accept_length": 5.25}]})}
    monkeypatch.setattr(serve, "get", lambda url, timeout: engine.get(url.removeprefix("http://x"), ""))
    assert serve.acceptance("http://x/v1", 1) == {"mean": 5.25}  # sglang
    rows = [{"answers": [answer, answer], "wall": 4.0, "before": {}, "after": {"mean": 5.25}},
            {"answers": [answer, {"error": "dead"}], "wall": 600.0, "before": {}, "after": {"mean": 5.25}}]
    figures = serve.arm_figures(rows, ["x"] * 4, lambda text, answer: text == answer)
    assert figures["tau"] == 5.25 and figures["tau_source"] == "the server's mean since its start"
    assert figures["tokens_per_s_of_all"]["value"] == 10 / 4 and figures["token_s"]["value"] == 2 / 4
    assert figures["tokens_per_s"] == {"value": pytest.approx(5 / 3), "low": pytest.approx(5 / 3),
                                       "high": pytest.approx(5 / 3)} and figures["answered"] == 3
    engine["/metrics"] = "".join(f'vllm:spec_decode_num_{name}_total{{model_name="a b",engine="0"}} {count}\n'
                                  for name, count in (("drafts", "1.2e+02"), ("accepted_tokens", "480.0")))
    assert serve.acceptance("http://x/v1", 1) == {"drafts": 120, "accepted": 480}
    rows = [{"before": {"drafts": 20, "accepted": 80}, "after": serve.acceptance("http://x/v1", 1)}]
    assert serve.tau(rows) == (5.0, "the server's counters over these requests")
    x = np.random.default_rng(1).normal(10, 2, 400)
    found = serve.estimate(serve.mean, x)  # by the normal distribution: mean +- 1.96 * 2 / 20
    assert found["low"] == pytest.approx(x.mean() - 0.196, abs=0.03) and \
        found["high"] == pytest.approx(x.mean() + 0.196, abs=0.03)


def test_bench_report(benchmark, tmp_path):
    """Runs set side by side that measured other prompts, other lengths or other ends of an answer."""
    setup = {"digest": "a", "count": 2, "max_new_tokens": 8, "stops": [1], "thinking": False, "temperature": 0.0,
             "top_k": 0, "top_p": 1.0, "seed": 0, "target": "T", "drafter": "D"}
    base = {"command": "speedup", "prompts": 2, "tau_micro": 5.25, "speedup": 1.5, "accuracy": {"target": None},
            "tokens_per_s": {"speculative": 1234.5}, "slots": [1, 0.5]}
    served_run = base | {"command": "serve", "speedup": {"value": 2.0, "low": 1.75, "high": 2.5}}
    names = []
    for name, made, change in (("a", base, {"drafter": "D"}), ("b", served_run, {"drafter": "E"}),
                               ("digest", base, {"digest": "b"}), ("limit", base, {"max_new_tokens": 9}),
                               ("stops", base, {"stops": [1, 2]})):
        names.append(str(tmp_path / f"{name}.json"))
        (tmp_path / f"{name}.json").write_text(json.dumps(made | {"setup": setup | change}))
    rows = benchmark("report", *names[:2])["rows"]
    assert rows["tau_micro"] == [5.25, 5.25] and rows["tokens_per_s, speculative"] == [1234.5, 1234.5]
    table = (tmp_path / "report.md").read_text()
    assert "| speedup | 1.500 | 2.000 [1.750, 2.500] |" in table and "| drafter | D | E |" in table
    assert (tmp_path / "report.png").stat().st_size > 1000
    for other, key in zip(names[2:], ("digest", "max_new_tokens", "stops")):
        with pytest.raises(SystemExit, match=f"cannot be compared, {key} is"):
            benchmark("report", names[0], other)
    (tmp_path / "line.json").write_text(json.dumps(base))
    for files, hint in ((names[:1], "at least two"), ([names[0], f"{tmp_path}/line.json"], "line.json is no report"),
                        ([names[0], "nowhere.json"], "nowhere.json is no report")):
        with pytest.raises(SystemExit, match=hint):
            benchmark("report", *files)


def test_bench_prompts_by_name(main, tmp_path, monkeypatch):
    """Another question than the published figures were measured with; a copy of a data set that is none of it."""
    files = {"math500": {"problem": "1+1?", "answer": "2"}, "gsm8k": {"question": "1+1?", "answer": "so\n#### 1,002"},
             "humaneval": {"task_id": "0", "prompt": "def f():"}}
    for name, row in files.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    suffix = "\nPlease reason step by step, and put your final answer within \\boxed{}."
    assert bench.load_questions(f"math500:{tmp_path}/math500.jsonl", 9) == [("1+1?" + suffix, "2")]
    assert bench.load_questions(f"gsm8k:{tmp_path}/gsm8k.jsonl", 9) == [("1+1?" + suffix, "1002")]
    (question, answer), = bench.load_questions(f"humaneval:{tmp_path}/humaneval.jsonl", 9)
    assert "```python\ndef f():\n```" in question and answer is None
    for name, hint in ((f"math500:{tmp_path}/gsm8k.jsonl", "row 1 is none of math500"), ("gsm8k:nowhere", "no file"),
                       ("gsm8k", "hub does not give"), ("mbpp", "none of nano, math500, gsm8k, humaneval")):
        with pytest.raises(ValueError, match=hint):
            bench.load_questions(name, 9)


def test_bench_times_the_first_draft(monkeypatch):
    """Failure 15: the drafter's first guess, or any round of either arm, is not in the seconds."""
    clock, prompt = [0.0], reference()[0]

    class Slow(Oracle):
        def propose(self, *args):
            clock[0] += 5.0
            return super().propose(*args)

    monkeypatch.setattr(draft_decode.time, "perf_counter", lambda: clock[0])
    _, rounds, seconds = run(small_target(), Slow(len(prompt), reference()[1], lambda: 3), prompt, 20, ())
    assert seconds == 5.0 * len(rounds) and len(rounds) == 5


def test_bench_exactness(benchmark, monkeypatch):
    """Failure 15: nobody compares outputs. Every arm is the target's own; a broken state is seen, and its margin."""
    args = ("exactness", "--limit=1", "--max_new_tokens=24", "--dtypes=float32", "--temperatures=0,1")
    rows = benchmark(*args)["rows"]
    names = {(r["drafter"], r["temperature"], r["against"]) for r in rows}
    kinds = ("trained", "random", "oracle", "wrong")
    arms = {(d, t, a) for d in kinds for t in (0, 1) for a in ("fixed shape", "one row")}
    assert names == arms | {(d, 0, "transformers") for d in kinds}
    assert all(r["identical"] == 1 and r["margin"] is None for r in rows if r["against"] == "fixed shape")
    assert {"dtype", "prompts", "margin"} < set(rows[0])
    commit = DecodeState.commit

    def forgets(self, n):  # failure 6: part of the recurrent state is lost
        commit(self, n)
        if isinstance(n, torch.Tensor):
            self.conv.zero_()

    monkeypatch.setattr(DecodeState, "commit", forgets)
    broken = [r for r in benchmark(*args, broken=True)["rows"]
              if r["against"] == "transformers" and r["drafter"] != "trained"]
    assert all(r["identical"] == 0 and r["margin"] > 0 for r in broken), [(r["drafter"], r["margin"]) for r in broken]


def test_bench_curve_and_coupling(benchmark):
    """An oracle whose tau is not what was asked for; a table that misses a kind of guess."""
    rows = benchmark("curve", "--limit=1", "--max_new_tokens=24")["rows"]
    tau = [r["tau"] for r in rows if r["drafter"] == "oracle"]
    assert tau[0] == 1 and tau[-1] == 16 and tau == sorted(tau) and rows[-1]["drafter"] == "trained"
    rows = benchmark("coupling", "--limit=1", "--max_new_tokens=8", "--temperatures=1,")["rows"]
    assert {r["guesses"] for r in rows} == {"greedy", "independent", "coupled"} and all(r["tau"] >= 1 for r in rows)


def test_bench_oracle_has_the_tau_that_was_asked_for():
    """A probability that does not give its tau: 1 + p + .. + p^(K-1), checked by drawing."""
    for tau in (1.5, 4.0, 12.0):
        p, g = bench.chance(tau, K), torch.Generator().manual_seed(0)
        right = (torch.rand(20000, K - 1, generator=g) < p).long().cumprod(-1).sum(-1)
        assert abs(1 + right.double().mean() - tau) < 0.1

# ----------------------------------------------------------------------------------------------------------------------
# command lines


@pytest.fixture
def main(monkeypatch, capsys):
    """main(script, *args) as from a shell: what it printed, or for a failure its one line. Variables are put back."""
    def call(script, *args):
        for name, value in list(vars(script).items()):
            monkeypatch.setattr(script, name, value)
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", [script.__file__, *args])
        try:
            script.main()
        except SystemExit as end:
            assert isinstance(end.code, str) and "\n" not in end.code, end.code  # a string: printed, and status 1
            return end.code
        return capsys.readouterr().out
    return call


@pytest.mark.parametrize("args, hint", (
    (("--prompt= ",), "error: the prompt is empty"),
    (("--raw", "--prompt=" + "7 " * 600), r"error: the prompt has 1\d\d\d tokens, too many .* 1024"),
    (("--target=nowhere", "--prompt=x"), "error: no .* in 'nowhere'"),
    (("--drafter=nowhere", "--prompt=x"), "error: no drafter in 'nowhere'.*train.py"),
    (("--dtype=float16", "--prompt=x"), "error: dtype = 'float16'"),
    (("--max_new_tokens=0", "--prompt=x"), "error: max_new_tokens = 0"),
    (("--promt=x",), "command line: unknown key 'promt', the nearest is 'prompt'")))
def test_cli_mistakes_end_in_one_line(main, args, hint):
    """A traceback, or success, for what a user can get wrong."""
    assert re.match(hint, main(draft_decode, *args))


def test_cli_decodes_and_compares(main):
    """Failure 15: a speedup reported without comparing outputs, or a rate that counts tokens it did not print."""
    out = main(draft_decode, "--prompt=What is 3 * 14?", "--max_new_tokens=12", "--device=cpu", "--dtype=float32")
    assert "12 tokens | " in out and out.rstrip().endswith("identical") and "speedup" in out


def nano_copy(folder, part, **files):
    """A copy of the nano target or drafter in which some files are others: bytes, None for none, or a function that
    makes the new bytes from the old."""
    shutil.copytree(os.path.join(NANO, part), folder)
    for name, change in files.items():
        path = folder / name.replace("__", ".")
        content = change(path.read_bytes()) if callable(change) else change
        path.unlink() if content is None else path.write_bytes(content)
    return f"--{part.removesuffix('-dflash')}={folder}"


def edited(**change):
    """An edit of a JSON file for nano_copy."""
    return lambda old: json.dumps({k: v for k, v in (json.loads(old) | change).items() if v is not ...}).encode()


def with_nan(name):
    """An edit of a safetensors file for nano_copy that puts a nan into one tensor."""
    def change(old):
        weights = safetensors.torch.load(old)
        weights[name].flatten()[0] = math.nan
        return safetensors.torch.save(weights)
    return change


def text(folder, content, name="x.jsonl"):
    """The path of a file with some content, text or bytes."""
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(folder / name)


def finished_rows(folder, vocab_size=512, cut=False):
    """Flags for train.py with rows of a vocabulary, their tokens cut off if asked for."""
    rows = [([1, 2, 3], [0, 1, 1])] * 4
    write_rows(str(folder / "rows"), {"train": rows, "val": rows},
               {"vocab_size": vocab_size, "tokenizer": fingerprint(os.path.join(NANO, "target"))})
    if cut:
        os.truncate(folder / "rows" / "train.tokens.bin", 13)
    return ["config/nano.py", f"--data={folder / 'rows'}", f"--out_dir={folder / 'run'}"]


CHAT = json.dumps({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}) + "\n"
BROKEN = {  # what a person gives: (script, arguments from a scratch folder, what the one line says)
    "truncated target": (draft_decode, lambda t: [nano_copy(
        t / "x", "target", model__safetensors=lambda old: old[:-9])], "cannot load .*model.safetensors"),
    "target with a missing shard": (draft_decode, lambda t: [nano_copy(
        t / "x", "target", model__safetensors=None)], "cannot load .*model.safetensors"),
    "target of other shapes": (draft_decode, lambda t: [nano_copy(
        t / "x", "target", config__json=edited(intermediate_size=400))], r"up_proj.weight is \[384, 128\], not \[400"),
    "target with fewer layers": (draft_decode, lambda t: [nano_copy(t / "x", "target", config__json=edited(
        num_hidden_layers=1, layer_types=["linear_attention"]))], "layers.1.input_layernorm.weight is left over"),
    "target with nan weights": (draft_decode, lambda t: [nano_copy(
        t / "x", "target", model__safetensors=with_nan("model.norm.weight"))], "norm.weight is not finite"),
    "target config that is not JSON": (draft_decode, lambda t: [nano_copy(
        t / "x", "target", config__json=b"{")], "cannot use .*config.json"),
    "target config that is a list": (draft_decode, lambda t: [nano_copy(
        t / "x", "target", config__json=b"[]")], "cannot use .*config.json"),
    "target config without a key": (draft_decode, lambda t: [nano_copy(
        t / "x", "target", config__json=edited(linear_key_head_dim=...))], "linear_key_head_dim"),
    "mixture of experts": (draft_decode, lambda t: [nano_copy(
        t / "x", "target", config__json=edited(num_experts=8))], "mixture-of-experts"),
    "target without tokenizer": (draft_decode, lambda t: [nano_copy(
        t / "x", "target", tokenizer__json=None)], "no tokenizer.json in"),
    "target without chat template": (draft_decode, lambda t: [nano_copy(t / "x", "target", chat_template__jinja=None)],
                                     "no chat template: .*--raw"),
    "tokenizer of another target": (draft_decode, lambda t: [nano_copy(
        t / "x", "target", tokenizer__json=lambda old: old.replace(b'"x": 87,', b'"x": 987,'))], "vocabulary of 512"),
    "hub id while offline": (draft_decode, lambda t: ["--target=Qwen/Qwen3.5-0.8B"], "hub does not give it.*folder"),
    "text from random weights": (draft_decode, lambda t: ["--target=random:27b"], "no tokenizer"),
    "truncated drafter": (draft_decode, lambda t: [nano_copy(
        t / "x", "drafter-dflash", model__safetensors=lambda old: old[:999])], "cannot load .*model.safetensors"),
    "drafter with nan weights": (draft_decode, lambda t: [nano_copy(
        t / "x", "drafter-dflash", model__safetensors=with_nan("fc.weight"))], "fc.weight is not finite"),
    "drafter of a larger target": (draft_decode, lambda t: [nano_copy(
        t / "x", "drafter-dflash", config__json=edited(num_target_layers=24))], "num_target_layers is 24, .* 12"),
    "config.json of another model": (draft_decode, lambda t: [nano_copy(
        t / "x", "drafter-dflash", config__json=edited(dflash_config=...))], "no dflash_config"),
    "prompt that fills the context": (draft_decode, lambda t: ["--prompt=" + "7 " * 600], "too many .* of 1024"),
    "unknown key": (math240k, lambda t: ["--sorce=x"], "unknown key 'sorce', the nearest is 'source'"),
    "unknown key in a file": (train, lambda t: [text(t, "lrr = 1", "x.py")], "x.py: unknown key 'lrr'"),
    "no such source": (math240k, lambda t: ["--source=no/rows", f"--target={NANO}/target"], "no file 'no/rows'"),
    "empty source": (math240k, lambda t: ["--source=" + text(t, ""), f"--target={NANO}/target"], "0 rows to train on"),
    "rows without an assistant": (math240k, lambda t: [
        "--source=" + text(t, '{"messages": [{"role": "user", "content": "q"}]}\n' * 3), f"--target={NANO}/target"],
        "0 rows to train on .* 3 were read, dropped: .*no assistant's answer.*3"),
    "line that is not JSON": (math240k, lambda t: [
        "--source=" + text(t, CHAT + '{"messages": ['), f"--target={NANO}/target"], "x.jsonl, line 2: "),
    "line that is not text": (math240k, lambda t: ["--source=" + text(t, b"{\xff}"), f"--target={NANO}/target"],
                              "x.jsonl, line 1: .*utf-8"),
    "broken parquet": (math240k, lambda t: ["--source=" + text(t, CHAT, "x.parquet"), f"--target={NANO}/target"],
                       "cannot read .*parquet"),
    "output below a file": (math240k, lambda t: ["--source=" + text(t, CHAT * 3), f"--out_dir={t}/x.jsonl/rows",
                                                 f"--target={NANO}/target"], "Not a directory"),
    "rows of another vocabulary": (train, lambda t: finished_rows(t, 600), "vocab_size 600, this target .* 512"),
    "rows cut off": (train, lambda t: finished_rows(t, cut=True), "(cannot read the train rows|3 tokens).*prepare.py"),
    "unfinished rows": (train, lambda t: finished_rows(t) + [f"--data={t}"], "no finished data: run python"),
    "no prompts": (regenerate, lambda t: ["--out=x"], "give --prompts and --out"),
    "prompts without a question": (regenerate, lambda t: ["--prompts=" + text(t, '{"a": 1}'),
                                                          f"--out={t}/y.jsonl"], "row 1: no question"),
    "problems without an answer": (math500, lambda t: ["--source=" + text(t, '{"problem": "1"}'), f"--out={t}/y"],
                                   "row 1: no text")}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_input_ends_in_one_line(main, monkeypatch, name, tmp_path):
    """A traceback, or success, for broken files, configs, folders: one line that names what is wrong, and status 1."""
    script, arguments, hint = BROKEN[name]
    monkeypatch.setattr(math240k, "out_dir", str(tmp_path / "rows")), monkeypatch.setattr(math240k, "num_proc", 1)
    extra = ["--prompt=x", "--device=cpu", "--dtype=float32"] if script is draft_decode else []
    said = main(script, *extra, *arguments(tmp_path))
    assert re.search(hint, said), said
    assert not os.path.exists(tmp_path / "rows" / "meta.json") or script is train


def test_save_into_a_folder_that_cannot_be_written(tmp_path):
    """A run of hours that ends in a traceback at its first checkpoint; a half-written folder taken for a whole one."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write the checkpoint .*Not a directory"):
        save_drafter(small_drafter(), str(tmp_path / "file" / "a-dflash"), "")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("args, hint", (
    (("--resume",), "error: nothing to resume"), (("--data=nowhere",), "error: no meta.json in 'nowhere'"),
    (("--mask_token_id=512",), "error: mask_token_id = 512 .* 512"), (("--taps=1,11",), "error: taps = .*0 .. 10"),
    (("--target=nowhere",), "error: no .* 'nowhere'"), (("--batch_size=64",), "error: 20 rows make no step")))
def test_cli_training_mistakes_end_in_one_line(main, small_run, args, hint):
    """A traceback after an hour, or a run that overwrites another."""
    assert re.match(hint, main(train, *args))

# ----------------------------------------------------------------------------------------------------------------------
# configuration

SCRIPT = '''"""
Trains a thing.

    python script.py --help
"""
import os
lr = 3e-4    # peak learning rate
steps = 100    # optimizer steps
compile = False    # torch.compile
prompt = "a # b"    # text; 'c' # d
limit: int | None = None    # prompts at most; None: all
revision: str | None = "main"
extra = None
ids = (3, 7)    # taps
betas = (0.9, 0.95)
names = ("q", "k")
free = ()
wide: tuple[int, ...] | None = None
out_dir = (
    "out"
)    # where checkpoints go
late: float = None
window = ("full", 128)
_hidden = 1
a, d = 1, 2
b = c = 3
N = 5
table = {}
def f():
    inner = 1
'''


@pytest.fixture
def script(tmp_path):
    """configure() over a fresh namespace of SCRIPT; config files are (name, text) pairs among the arguments."""
    def call(*args):
        path, argv = tmp_path / "script.py", []
        path.write_text(SCRIPT)
        namespace = {"__file__": str(path), "__name__": "script"}
        exec(compile(SCRIPT, str(path), "exec"), namespace)
        for arg in args:
            if isinstance(arg, tuple):
                (tmp_path / arg[0]).write_text(arg[1])
                arg = str(tmp_path / arg[0])
            argv.append(arg)
        values = configure(namespace, argv)
        assert all(namespace[k] == v and type(namespace[k]) is type(v) for k, v in values.items())
        assert "json" not in namespace and namespace["os"] is os
        return values
    return call


def message(script, *args):
    with pytest.raises(SystemExit) as end:
        script(*args)
    assert isinstance(end.value.code, str) and "\n" not in end.value.code  # a string: one line, and exit status 1
    return end.value.code


def test_config_defaults_in_source_order(script, capsys):
    """Keys that are not configuration (pairs, chains, constants), lost order, and noise."""
    keys = "lr steps compile prompt limit revision extra ids betas names free wide out_dir late window"
    assert list(script()) == keys.split() and capsys.readouterr().out == ""


@pytest.mark.parametrize("args, expected", (
    (("--compile", "--out-dir", "x y"), {"compile": True, "out_dir": "x y"}),
    (("--prompt=-a=b=", "--steps", "-1", "--lr", "-.5"), {"prompt": "-a=b=", "steps": -1, "lr": -.5}),
    (("--compile", ("c.py", "steps = 1")), {"compile": True, "steps": 1}), (("--compile", "0"), {"compile": False}),
    (("--compile=false",), {"compile": False}), (("--compile", "True"), {"compile": True}),
    (("--steps=1", "--steps=2"), {"steps": 2}), (("--lr=2",), {"lr": 2.0}), (("--lr=1e-4",), {"lr": 1e-4}),
    (("--prompt=1e-4",), {"prompt": "1e-4"}), (("--prompt=None",), {"prompt": "None"}),
    (("--prompt=",), {"prompt": ""}),
    (("--prompt", "x.py"), {"prompt": "x.py"}), (("--prompt='q'",), {"prompt": "'q'"}),
    (("--ids=1",), {"ids": (1,)}), (("--ids=[1,2]",), {"ids": (1, 2)}), (("--ids", "-1,2"), {"ids": (-1, 2)}),
    (("--ids=()",), {"ids": ()}), (("--betas=1,0.5",), {"betas": (1.0, 0.5)}),
    (("--names=a, b",), {"names": ("a", "b")}),
    (("--names=('a', 'b')",), {"names": ("a", "b")}), (("--free=1,'x',2.5",), {"free": (1, "x", 2.5)}),
    (("--wide=1,2",), {"wide": (1, 2)}), (("--wide=None",), {"wide": None}),
    (("--window='full',64",), {"window": ("full", 64)}), (("--limit=3", "--limit", "none"), {"limit": None}),
    (("--revision=None",), {"revision": None}), (("--revision=7",), {"revision": "7"}),
    (("--late=1",), {"late": 1.0}), (("--extra=(1, 2)",), {"extra": (1, 2)}), (("--extra=a b",), {"extra": "a b"}),
    (("--lr=1", ("a.py", "lr = 2 ** -3\nsteps = 5\n"), ("b.py", "steps = 6\nids = [1, 2]\n")),
     {"lr": 1.0, "steps": 6, "ids": (1, 2)}),
    ((("c.py", "import json\ndef f(): return 4\n_two = 2\nsteps = f() * _two\nfrom math import sqrt\nlr = sqrt(4)\n"),),
     {"steps": 8, "lr": 2.0})))
def test_config_values(script, args, expected):
    """A bool that eats the next word, strings evaluated as Python, '--ids=1' an int, a file that beats a flag."""
    values = script(*args)
    assert {k: (values[k], type(values[k])) for k in expected} == {k: (v, type(v)) for k, v in expected.items()}


@pytest.mark.parametrize("args, hint", (
    (("--step=5",), "command line: unknown key 'step', the nearest is 'steps'; --help"),
    (("--compile", "yes"), "stray 'yes'"), (("5",), "stray '5'"), (("-x.py",), "stray '-x.py'"), (("",), "stray ''"),
    (("--lr",), "--lr needs a value"), (("--lr", "--compile"), "--lr needs a value"),
    (("--prompt", "-"), "needs a value"),
    (("--",), "unknown key"), (("--_hidden=1",), "unknown key"), (("--N=1",), "unknown key"),
    (("--inner=1",), "unknown key"),
    (("--lr=fast",), "command line: lr = 'fast' is str, expected float"), (("--lr=None",), "lr"),
    (("--lr=True",), "lr"),
    (("--steps=1.5",), "steps"), (("--steps=True",), "steps"), (("--steps=1e3",), "steps"), (("--steps=",), "steps"),
    (("--compile=2",), "compile"), (("--compile=None",), "compile"), (("--limit=1.5",), "NoneType or int"),
    (("--ids=1,x",), "ids"), (("--ids=1,2.5",), "tuple of int"), (("--ids=1,True",), "tuple of int"),
    (("--window=full,64",), "tuple of"), (("--names=(1, 2)",), "tuple of str"), (("--betas=1,None",), "tuple of float"),
    (("none.py",), "none.py: no such config file"),
    ((("bad.py", "lrr = 1e-3\n"),), "bad.py: unknown key 'lrr', the nearest is 'lr'; --help lists all; a helper"),
    ((("bad.py", "steps = '9'"),), "bad.py: steps = '9' is str, expected int"),
    ((("bad.py", "compile = 1"),), "bad.py: "), ((("bad.py", "steps = True"),), "bad.py: "),
    ((("bad.py", "prompt = None"),), "bad.py: "), ((("bad.py", "ids = 3"),), "bad.py: "),
    ((("bad.py", "import os as lr"),), "bad.py: "), ((("bad.py", "extra = {}"),), "bad.py: "),
    ((("c.py", "lr = 1\nsteps = = 2\n"),), "c.py, line 2: SyntaxError"),
    ((("c.py", "exit()"),), "c.py, line 1: SystemExit"),
    ((("c.py", "import json\nlr = json.loads('{')\n"),), "c.py, line 2: JSONDecodeError"),
    ((("c.py", "def f():\n    raise ValueError('a\\nb')\nf()\n"),), "c.py, line 2: ValueError: a b")))
def test_config_mistakes(script, args, hint):
    """A typo or a wrong type that passes, and costs a run with the default; a traceback in place of a line."""
    assert hint in message(script, *args)


def test_config_prints_where_values_come_from(script, capsys):
    """Overrides that go unreported."""
    script("--lr=1", ("one.py", "lr = 0.5\nsteps = 5\n"), ("two.py", "steps = 6\n"))
    assert [line.rpartition("/")[2] for line in capsys.readouterr().out.splitlines()] == [
        "one.py: lr = 0.5", "one.py: steps = 5", "two.py: steps = 6", "command line: lr = 1.0"]


def test_config_second_call_keeps_types(tmp_path):
    """The type of a None key taken from what an earlier call in the same process put there."""
    (tmp_path / "s.py").write_text("extra = None\nlimit: int | None = None\n")
    namespace = {"__file__": str(tmp_path / "s.py"), "extra": None, "limit": None}
    configure(namespace, ["--extra=1", "--limit=2"])
    assert configure(namespace, ["--extra=word", "--limit=None"]) == {"extra": "word", "limit": None}


def test_config_help(script, capsys):
    """Comments cut at a '#' in a string or lost on a long assignment, missing keys, a failing status."""
    for flag in ("--help", "-h"):
        with pytest.raises(SystemExit) as end:
            script("--lr=1", flag)
        out = capsys.readouterr().out
        rows = [line for line in out.splitlines() if line.startswith("  --")]
        assert end.value.code == 0 and out.startswith("Trains a thing.\n\n") and len(rows) == 15
        assert len({row.index(" = ") for row in rows}) == len({row.index("  # ") for row in rows if "  # " in row}) == 1
        assert "'a # b'" in out and "# text; 'c' # d" in out and "# where checkpoints go" in out and "0.0003   " in out


def test_config_from_a_shell(tmp_path):
    """globals() of a real script not updated; errors on stdout, with a traceback or a zero status."""
    (tmp_path / "run.py").write_text("from configurator import configure\nx = 1    # one\ndef main(argv=None):\n"
                                     "    configure(globals(), argv)\n    print('x is', x)\nmain()\n")

    def shell(*args):
        return subprocess.run([sys.executable, "run.py", *args], cwd=tmp_path, env={**os.environ, "PYTHONPATH": ROOT},
                              capture_output=True, text=True)
    assert shell("--x", "2").stdout == "command line: x = 2\nx is 2\n" and shell("--help").returncode == 0
    bad = shell("--y=2")
    assert bad.returncode == 1 and bad.stdout == "" and bad.stderr.count("\n") == 1 and "'x'" in bad.stderr


def test_runs_ship_valid_configs():
    """A config file with a key or a type that train.py does not know: found at the start of a run of hours."""
    for name in sorted(os.listdir(os.path.join(ROOT, "config"))):
        if name.endswith(".py"):
            values = configure(dict(vars(train)), [os.path.join(ROOT, "config", name)])
            assert os.path.basename(values["out_dir"]).endswith("dflash"), name  # how vLLM knows the method


if __name__ == "__main__":
    words = sys.argv[1:]
    picked = ["-k", " or ".join(words)] if words and not any(w.startswith("-") for w in words) else words
    sys.exit(pytest.main([__file__, "-n", "auto", *picked]))  # a process a core, with one thread each
