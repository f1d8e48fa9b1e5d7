"""
The drafter of DFlash and its loss. A copy of this file ships in every checkpoint as dflash.py; it needs torch and
transformers only, with what these bring, so that AutoModel.from_pretrained(folder, trust_remote_code=True) loads it
anywhere.

DFlash (Chen, Liang, Liu, arXiv 2602.06036): a few bidirectional layers guess a block of K tokens in one forward. Their
input is [x_n, MASK, .., MASK], the embeddings of the last known token, the *anchor*, and of K - 1 masks; what they know
of the past are the target's own hidden states, the *features*, mixed by `fc` and given to every layer as keys and
values. Row k of the block guesses the token at position n + k (no shift); row 0 is the anchor and guesses nothing.

Glossary: B batch, T tokens, A anchors of a row, K block size, L layers, H heads, D head width, V vocabulary.
"""
import json
import os
import shutil

import torch
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import PreTrainedModel
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config


def wide(x):
    """x in fp32, or as it is if wider: statistics, softmax and loss are computed there."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rotary_table(positions, dim, theta):
    """cos and sin (..., dim) of integer positions, in fp32: the half-split form, frequencies theta^(-2i/dim)."""
    frequency = theta ** (-torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim)
    angle = positions[..., None].float() * frequency
    angle = torch.cat((angle, angle), -1)
    return angle.cos(), angle.sin()


def rotate(x, rotary):
    """Rotary embedding of the first channels of x (..., T, H, D), as many as the table (..., T, dim) has."""
    cos, sin = (y[..., None, :].to(x.dtype) for y in rotary)
    turned, rest = x[..., :cos.shape[-1]], x[..., cos.shape[-1]:]
    a, b = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-b, a), -1) * sin
    return torch.cat((turned, rest), -1) if rest.shape[-1] else turned


LARGE = 1 << 18  # numbers in a weight from which packing it pays


def pack(weight):
    """The function x -> x W^T of a frozen weight (N, K) that is large and on a CPU, from a copy in oneDNN's blocked
    order: one row runs 1.3 times as fast as by F.linear, sixteen two to four times, and a row's bits depend on it
    alone. None for others, where F.linear serves."""
    kinds = [torch.float32] if torch.backends.mkldnn.is_available() else []
    kinds += [torch.bfloat16] if kinds and torch.ops.mkldnn._is_mkldnn_bf16_supported() else []  # not on older CPUs
    if weight.device.type != "cpu" or weight.numel() < LARGE or weight.dtype not in kinds:
        return None
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 16)
    return torch.compiler.disable(lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""))


def pack_linears(module, skip=()):
    """Let the projections of a frozen module, but for those named in `skip`, use packed weights; returns the module."""
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear) and part.bias is None and name not in skip:
            if times := pack(part.weight):
                part.forward = times
    return module


def attend(q, k, v, mask):
    """Grouped-query attention (B, H, K, D) of a few rows q (B, H, K, D) over a whole buffer k, v (B, Hkv, T, D), of
    which each row sees what the mask (K, T) says: two products and a softmax in fp32 with weights of exactly zero
    elsewhere. For so few rows library kernels take several times as long on a GPU."""
    B, H, K, D = q.shape
    scores = wide(q.reshape(B, k.shape[1], -1, D) @ k.mT) * D ** -0.5                        # (B, Hkv, H/Hkv K, T)
    p = scores.unflatten(2, (-1, K)).masked_fill(~mask, -torch.inf).softmax(-1)
    return (p.to(v.dtype).flatten(2, 3) @ v).view(B, H, K, D)

# ----------------------------------------------------------------------------------------------------------------------
# attention of training: the rows of A blocks, A K of them, to keys [T of context | A K of the blocks themselves]


def sight(anchors, T, K, window=None):
    """see(b, h, q, key): whether row q of batch row b may see that key; integer tensors that broadcast. A block sees
    the context strictly before its anchor and its own K rows, never another block; in a sliding layer (window) it is
    causal inside. It is the definition for both forms of attention below, and a mask_mod of flex_attention."""
    def see(b, h, q, key):
        anchor = anchors[b, q // K]
        seen = (key < anchor) | ((key >= T) & ((key - T) // K == q // K))  # anchor < T
        if window is not None:
            row, at = anchor + q % K, torch.where(key < T, key, anchor + (key - T) % K)
            seen = seen & (at <= row) & (at > row - window)
        return seen
    return see


# compiled, as the plain function would form all scores; shapes are static, so once for each row length
flex = torch.compile(flex_attention, dynamic=False)


@torch.compiler.disable  # its shapes follow the data
def grouped_attention(q, ck, cv, k, v, anchors, see, group=8):
    """The form for CPUs: groups of anchors, which ascend, each with the context before its last one and no more.

    q (B, H, A K, D); ck, cv (B, Hkv, T, D) of the context, k, v (B, Hkv, A K, D) of the blocks; see from sight().
    Returns (B, H, A K, D). The heads of one key head are stacked as rows, so no key is copied for them.
    """
    (B, A), Hkv, R, rows = anchors.shape, k.shape[1], q.shape[1] // k.shape[1], q.shape[2]
    batch, step, out = torch.arange(B, device=q.device)[:, None, None], rows // A * group, []
    for i, last in zip(range(0, rows, step), anchors.split(group, 1)):
        own, limit = slice(i, i + step), int(last.max())
        index = torch.arange(rows, device=q.device)[own]
        mask = see(batch, 0, index[:, None], torch.cat((torch.arange(limit, device=q.device), ck.shape[2] + index)))
        keys, values = (torch.cat((x[:, :, :limit], y[:, :, own]), 2) for x, y in ((ck, k), (cv, v)))
        o = F.scaled_dot_product_attention(q[:, :, own].unflatten(1, (Hkv, R)).flatten(2, 3), keys, values,
                                           mask[:, None].repeat(1, 1, R, 1))
        out.append(o.unflatten(2, (R, -1)).flatten(1, 2))
    return torch.cat(out, 2)

# ----------------------------------------------------------------------------------------------------------------------
# layers; names, shapes and order are those of the public checkpoints


class RMSNorm(nn.Module):
    """Plain: w * x / rms(x), statistics in fp32. The target's, unlike this one, is zero-centred."""
    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        return F.rms_norm(wide(x), x.shape[-1:], wide(self.weight), self.eps).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention from the rows of a block to [context | the block itself], the whole head rotated."""
    def __init__(self, c, kind):
        super().__init__()
        self.heads, self.kv_heads, self.dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        # a sliding layer is causal inside the block, and its window counts the token itself; a full one sees it whole
        self.window = c.sliding_window if kind == "sliding_attention" else None
        if kind == "sliding_attention" and not self.window:
            raise ValueError("config.json has sliding_attention layers but no sliding_window with use_sliding_window")
        self.q_proj = nn.Linear(c.hidden_size, self.heads * self.dim, bias=c.attention_bias)
        self.k_proj = nn.Linear(c.hidden_size, self.kv_heads * self.dim, bias=c.attention_bias)
        self.v_proj = nn.Linear(c.hidden_size, self.kv_heads * self.dim, bias=c.attention_bias)
        self.o_proj = nn.Linear(self.heads * self.dim, c.hidden_size, bias=c.attention_bias)
        self.q_norm, self.k_norm = RMSNorm(self.dim, c.rms_norm_eps), RMSNorm(self.dim, c.rms_norm_eps)

    def keys_values(self, x, rotary):
        """k and v (..., T, Hkv, D) of x (..., T, hidden): of context, which has no layer norm, or of normed rows."""
        k, v = (proj(x).unflatten(-1, (self.kv_heads, self.dim)) for proj in (self.k_proj, self.v_proj))
        return rotate(self.k_norm(k), rotary), v

    def queries(self, x, rotary):
        return rotate(self.q_norm(self.q_proj(x).unflatten(-1, (self.heads, self.dim))), rotary)

    def visible(self, query, key):
        """Whether a row at position `query` may see a block key at `key`, both integer tensors that broadcast."""
        if self.window is None:
            return torch.ones_like(query - key, dtype=torch.bool)
        return (key <= query) & (key > query - self.window)

    def train_form(self, x, context, rotary, context_rotary, anchors, mask):
        """x (B, A, K, hidden), context (B, T, hidden), anchors (B, A), mask from sight(), or a BlockMask made of it."""
        B, A, K, _ = x.shape
        ck, cv = (y.transpose(1, 2) for y in self.keys_values(context, context_rotary))      # (B, Hkv, T, D)
        k, v = (y.flatten(1, 2).transpose(1, 2) for y in self.keys_values(x, rotary))        # (B, Hkv, A K, D)
        q = self.queries(x, rotary).flatten(1, 2).transpose(1, 2)                            # (B, H, A K, D)
        if isinstance(mask, BlockMask):
            o = flex(q, torch.cat((ck, k), 2), torch.cat((cv, v), 2), block_mask=mask, enable_gqa=True)
        else:
            o = grouped_attention(q, ck, cv, k, v, anchors, mask)
        return self.o_proj(o.transpose(1, 2).unflatten(1, (A, K)).flatten(3))

    def decode_form(self, x, rotary, keys, values, rows):
        """x (B, K, hidden) at positions `rows` (K,); keys and values (B, Hkv, length, D), whose rows before the block
        hold the context. The block's own are written after it, where the next context will replace them."""
        k, v = self.keys_values(x, rotary)
        keys.index_copy_(2, rows, k.transpose(1, 2).to(keys.dtype))
        values.index_copy_(2, rows, v.transpose(1, 2).to(values.dtype))
        token = torch.arange(keys.shape[2], device=x.device)
        mask = (token <= rows[-1]) & self.visible(rows[:, None], token)
        q = self.queries(x, rotary).transpose(1, 2)
        o = attend(q, keys, values, mask)
        return self.o_proj(o.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU."""
    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c, kind):
        super().__init__()
        self.self_attn = Attention(c, kind)
        self.mlp = MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x, attend, *args):
        """x (..., K, hidden); attend, one of Attention's two forms, is given the normed rows and the rest."""
        x = x + attend(self.self_attn, self.input_layernorm(x), *args)
        return x + self.mlp(self.post_attention_layernorm(x))

# ----------------------------------------------------------------------------------------------------------------------
# the drafter


class DFlashDraftModel(PreTrainedModel):
    """The drafter. It has no embedding and no head of its own: the target's are used, for blocks and for guesses."""
    config_class = Qwen3Config
    base_model_prefix = ""

    def __init__(self, config):
        super().__init__(config)
        self.block_size = config.dflash_config.get("block_size") or config.block_size
        self.taps = tuple(config.dflash_config["target_layer_ids"])
        self.mask_token_id = config.dflash_config["mask_token_id"]
        self.layers = nn.ModuleList(Layer(config, kind) for kind in config.layer_types)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.fc = nn.Linear(len(self.taps) * config.hidden_size, config.hidden_size, bias=False)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)

    def rotary(self, positions):
        return rotary_table(positions, self.config.head_dim, self.config.rope_parameters["rope_theta"])

    def context(self, features):
        """What every layer sees of the past, (B, T, hidden), from features (B, T, taps * hidden)."""
        return self.hidden_norm(self.fc(features))

    def block(self, tokens, embedding):
        """Embeddings (..., K, hidden) of [token, MASK, .., MASK] for each of the anchor tokens (...)."""
        ids = torch.full((*tokens.shape, self.block_size), self.mask_token_id, device=tokens.device)
        ids[..., 0] = tokens
        return F.embedding(ids, embedding)

    def forward(self, features, blocks, anchors, flex=False):
        """Training: many blocks of each row at once.

        features (B, T, taps * hidden) of whole rows; blocks (B, A, K, hidden) from block(); anchors (B, A), ascending
        positions in the row; flex: attend by flex_attention, for GPUs. Returns the hidden states (B, A, K, hidden)
        that the target's head turns into guesses.
        """
        (B, A, K, _), T, device = blocks.shape, features.shape[1], features.device
        context, masks = self.context(features), {}
        rotary = self.rotary(anchors[:, :, None] + torch.arange(K, device=device))
        past = self.rotary(torch.arange(T, device=device))
        for window in {layer.self_attn.window for layer in self.layers}:
            see = sight(anchors, T, K, window)
            masks[window] = create_block_mask(see, B, None, A * K, T + A * K, device) if flex else see
        x = blocks
        for layer in self.layers:
            x = layer(x, Attention.train_form, context, rotary, past, anchors, masks[layer.self_attn.window])
        return self.norm(x)

    def new_state(self, batch, length, like):
        """Keys and values of `length` positions for each layer, (L, 2, B, Hkv, length, D)."""
        c = self.config
        return like.new_zeros(len(self.layers), 2, batch, c.num_key_value_heads, length, c.head_dim)

    def remember(self, features, state, pos):
        """Write the keys and values of features (B, T, ...) that begin at position pos (an int or a tensor). Of a
        verified block all K rows may be given: those past the accepted ones are overwritten before they are seen."""
        rows = pos + torch.arange(features.shape[1], device=features.device)
        context, rotary = self.context(features), self.rotary(rows)
        for layer, kv in zip(self.layers, state):
            for kept, new in zip(kv, layer.self_attn.keys_values(context, rotary)):
                kept.index_copy_(2, rows, new.transpose(1, 2).to(kept.dtype))

    def guess(self, block, state, pos):
        """Decoding: the hidden states (B, K, hidden) of one block whose anchor stands at position pos, all before it
        being remembered in `state`."""
        rows = pos + torch.arange(block.shape[1], device=block.device)
        rotary, x = self.rotary(rows), block
        for layer, (keys, values) in zip(self.layers, state):
            x = layer(x, Attention.decode_form, rotary, keys, values, rows)
        return self.norm(x)

    def compile_decoding(self):
        """Compile the two parts of a decoding round that are the drafter's; prompts of any length share one graph."""
        self.guess, self.remember = torch.compile(self.guess, dynamic=False), torch.compile(self.remember)

    def propose(self, anchor, target, state, pos, pick):
        """Guesses (B, K-1) for the tokens after the anchors (B,) at position pos: what `pick` makes of the logits
        (B, K-1, V) of the slots."""
        hidden = self.guess(self.block(anchor, target.embed_tokens.weight), state, pos)
        return pick(target.logits(hidden[:, 1:]))

# ----------------------------------------------------------------------------------------------------------------------
# training: anchors, labels, loss


def sample_anchors(supervised, count, generator):
    """Anchors (B, count), ascending, and whether each is real, (B, count).

    supervised (B, T) marks the tokens of responses. An anchor and the token after it are both supervised; anchors of
    a row differ. A row with fewer candidates than `count` is filled with unreal ones at position 0, so that shapes
    never vary. The generator alone decides: same seed, same anchors.
    """
    B, T = supervised.shape
    allowed = F.pad(supervised[:, :-1] & supervised[:, 1:], (0, max(1, count - T + 1)))
    score = torch.rand(allowed.shape, generator=generator).to(supervised.device).masked_fill(~allowed, -1.0)
    score, anchors = score.topk(count, dim=1)
    anchors = torch.where(score >= 0, anchors, T).sort(dim=1).values  # unreal ones last
    return torch.where(anchors < T, anchors, 0), anchors < T


def block_labels(tokens, supervised, anchors, real, K, gamma):
    """Labels x_{anchor+k} and weights exp(-(k-1)/gamma), k = 1..K-1, both (B, A, K-1).

    The weight is zero past the end of the response that holds the anchor, and for unreal anchors.
    Source: arXiv 2602.06036, equation for the position-decayed loss.
    """
    B, T = tokens.shape
    k = torch.arange(1, K, device=tokens.device)
    at = anchors[:, :, None] + k                                                             # (B, A, K-1)
    inside = F.pad(supervised, (0, K)).gather(1, at.flatten(1)).view_as(at)
    labels = F.pad(tokens, (0, K)).gather(1, at.flatten(1)).view_as(at)
    inside = inside.long().cumprod(-1)  # a later response of the same row is not the anchor's
    return labels, inside * real[:, :, None] * torch.exp(-(k - 1) / gamma)


def dpace(q, inside, smooth):
    """Weights (N, K-1) that follow the drafter's own confidence: w_j = sum over m >= j of s_1 .. s_m, where
    s_i = (1 - a) q_i + a, is what the log of q_j adds to the expected length of the accepted prefix.

    q (N, K-1) probabilities of the true tokens; inside (N, K-1) is 0 past the response; smooth is a in 0 .. 1.
    Source: arXiv 2605.18810. There the loss is divided by the rows of a batch, here by the sum of all weights.
    """
    prefix = (((1 - smooth) * q + smooth) * (inside > 0)).cumprod(-1)
    return prefix.flip(-1).cumsum(-1).flip(-1)


def head_chunk(hidden, weight, labels, w, smooth, backward):
    """One chunk of blocks: nll (N, K-1), whether the greedy guess is right, the weights used, and the gradient of
    sum w nll by hidden (N, K-1, hidden), if wanted. The logits become the gradient in place: one (N, K-1, V) in all."""
    # flat: rows of blocks are strided, and for those CPUs take a batched product that is three times as slow
    logits = wide(F.linear(hidden.flatten(0, 1), weight)).view(*labels.shape, -1)
    top, guess = logits.max(-1, keepdim=True)
    label = logits.gather(-1, labels[..., None]) - top
    logits.sub_(top).exp_()
    total = logits.sum(-1, keepdim=True)
    nll = (total.log() - label)[..., 0]
    w = w if smooth is None else dpace((-nll).exp(), w, smooth)
    if not backward:
        return nll, guess[..., 0] == labels, w, None
    scale = w[..., None].to(logits.dtype)
    logits.mul_(scale / total).scatter_add_(-1, labels[..., None], -scale)  # w (softmax - onehot)
    grad = logits.to(hidden.dtype).flatten(0, 1) @ weight
    return nll, guess[..., 0] == labels, w, grad.view_as(hidden)


class FrozenHeadLoss(torch.autograd.Function):
    """sum_i w_i nll_i over blocks of rows (N, K-1, hidden) and the gradient by the rows, in one pass over chunks.

    The head is frozen, so its gradient is not needed, and (softmax - onehot) W is known as soon as a chunk's logits
    are: they are computed once and never stored. Peak memory is chunk x V, not N x V.
    """
    @staticmethod
    def forward(ctx, hidden, weight, labels, w, chunk, smooth, one):
        weight, parts, n = weight.to(hidden.dtype), [], max(1, chunk // labels.shape[1])
        for i in range(0, len(hidden), n):
            parts.append(one(hidden[i:i + n], weight, labels[i:i + n], w[i:i + n], smooth, ctx.needs_input_grad[0]))
        nll, correct, w = (torch.cat(x) for x in list(zip(*parts))[:3])
        ctx.save_for_backward(torch.cat([part[3] for part in parts]) if ctx.needs_input_grad[0] else None)
        ctx.mark_non_differentiable(nll, correct, w)
        return (nll * w).sum(), nll, correct, w

    @staticmethod
    def backward(ctx, scale, *_):
        return ctx.saved_tensors[0] * scale, None, None, None, None, None, None


def block_loss(hidden, head, labels, weights, chunk=1024, smooth=None, one=head_chunk):
    """The loss of training blocks as a *sum*; divide by the sum of all weights of the step, over micro-batches and
    ranks, so that neither split changes it.

    hidden (B, A, K, hidden) from forward; head (V, hidden); labels, weights (B, A, K-1); chunk: rows of logits that
    exist at once, in whole blocks; smooth: None, or D-PACE's a, and then weights only say which slots count; one:
    head_chunk, or a compiled one. Returns the scalar sum of weight * nll, and per slot, all (B, A, K-1): nll, whether
    the greedy guess is right, and the weight. Row 0 of a block is its anchor: it has no loss and never meets the head.
    """
    rows, labels, w = (x.flatten(0, 1) for x in (hidden[:, :, 1:], labels, weights))
    loss, *slots = FrozenHeadLoss.apply(rows, head, labels, w, chunk, smooth, one)
    return loss, *(x.view_as(weights) for x in slots)

# ----------------------------------------------------------------------------------------------------------------------
# checkpoints


def drafter_config(target, layers, taps, mask_token_id, heads, kv_heads, head_dim, mlp, block_size=16):
    """A Qwen3Config of a drafter for a target with the given TargetConfig; ValueError if it has no such layers.

    rope_theta is the target's; its partial rotary factor is not taken over, the drafter rotates its whole head.
    """
    if list(taps) != sorted(set(taps)) or not taps or taps[0] < 0 or taps[-1] > target.num_hidden_layers - 2:
        raise ValueError(f"taps = {tuple(taps)} must ascend, differ and stay within 0 .. {target.num_hidden_layers - 2}"
                         f", as the target has {target.num_hidden_layers} layers")
    return Qwen3Config(
        block_size=block_size, num_target_layers=target.num_hidden_layers,
        dflash_config={"block_size": block_size, "mask_token_id": mask_token_id, "target_layer_ids": list(taps)},
        num_hidden_layers=layers, layer_types=["full_attention"] * layers, hidden_size=target.hidden_size,
        intermediate_size=mlp, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim,
        rope_parameters={"rope_type": "default", "rope_theta": target.rope_theta}, rms_norm_eps=target.rms_norm_eps,
        vocab_size=target.vocab_size, max_position_embeddings=target.max_position_embeddings,
        tie_word_embeddings=False, eos_token_id=target.eos_token_id,
        pad_token_id=target.eos_token_id if target.pad_token_id is None else target.pad_token_id)


def public_config(c):
    """config.json's content as every loader reads it, from a Qwen3Config. It is written by hand because transformers 5
    drops the top-level rope_theta, and readers of that key would fall back to 10000 without a word."""
    theta, kinds = c.rope_parameters["rope_theta"], list(c.layer_types)
    sliding = c.sliding_window if "sliding_attention" in kinds else None
    return {
        "architectures": ["DFlashDraftModel"], "model_type": "qwen3",
        "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
        "block_size": c.dflash_config["block_size"], "dflash_config": dict(c.dflash_config),
        "num_target_layers": c.num_target_layers, "num_hidden_layers": c.num_hidden_layers, "layer_types": kinds,
        "hidden_size": c.hidden_size, "intermediate_size": c.intermediate_size,
        "num_attention_heads": c.num_attention_heads, "num_key_value_heads": c.num_key_value_heads,
        "head_dim": c.head_dim, "hidden_act": "silu", "rms_norm_eps": c.rms_norm_eps,
        "attention_bias": c.attention_bias, "attention_dropout": 0.0, "initializer_range": c.initializer_range,
        "max_position_embeddings": c.max_position_embeddings, "vocab_size": c.vocab_size, "tie_word_embeddings": False,
        "use_cache": True, "rope_theta": theta, "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta}, "use_sliding_window": sliding is not None,
        "sliding_window": sliding, "max_window_layers": c.num_hidden_layers, "bos_token_id": None,
        "eos_token_id": c.eos_token_id, "pad_token_id": c.pad_token_id, "dtype": "bfloat16", "torch_dtype": "bfloat16"}


def save_drafter(drafter, folder, card, extra=None):
    """Write a checkpoint as engines read it: config.json, model.safetensors (bf16), dflash.py, README.md (card).

    extra: {file name: object} for torch.save beside them. The folder appears whole, under its name, or not at all.
    ValueError when it cannot be written.
    """
    part = folder.rstrip("/") + ".part"
    tensors = {k: v.detach().to("cpu", torch.bfloat16).contiguous() for k, v in drafter.state_dict().items()}
    config = json.dumps(public_config(drafter.config), indent=2) + "\n"
    try:
        shutil.rmtree(part, ignore_errors=True)
        os.makedirs(part)
        save_file(tensors, os.path.join(part, "model.safetensors"), metadata={"format": "pt"})
        for name, value in (extra or {}).items():
            torch.save(value, os.path.join(part, name))
        shutil.copyfile(__file__, os.path.join(part, "dflash.py"))
        for name, text in (("config.json", config), ("README.md", card)):
            with open(os.path.join(part, name), "w") as f:
                f.write(text)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(part, folder)
    except OSError as error:
        raise ValueError(f"cannot write the checkpoint {folder!r}: {error}") from None


def newest(folder):
    """The folder itself if it is a checkpoint, or its last step-* one, as a training run writes them."""
    steps = sorted(name for name in (os.listdir(folder) if os.path.isdir(folder) else ())
                   if name.startswith("step-") and not name.endswith(".part"))
    if os.path.isfile(os.path.join(folder, "config.json")) or not steps:
        return folder
    return os.path.join(folder, steps[-1])


def checkpoint_folder(name):
    """The folder of a checkpoint: `name` itself, or for a hub id such as Qwen/Qwen3.5-0.8B the hub's copy, which is
    downloaded once. ValueError when the hub does not give it."""
    if os.path.exists(name) or name.count("/") != 1 or name[0] in "./~":
        return name
    try:
        return snapshot_download(name, allow_patterns=("*.json", "*.safetensors", "*.jinja", "*.txt"))
    except Exception as error:  # offline, unknown, gated: a dozen types of three libraries
        raise ValueError(f"no folder {name!r}, and the hub does not give it ({type(error).__name__}): copy the "
                         "checkpoint here and give its folder") from None


def load_weights(module, folder, device, dtype, public=lambda name: name, fp32=()):
    """Give a module made on the meta device the weights of a folder's safetensors, whole or in shards.

    public: maps a file's name of a tensor to the module's; None skips it. Names that end in one of fp32 stay in fp32.
    Tensors go one by one to the device, from a file mapped anew for each, as pages that were read count as memory until
    it is closed: the host needs the module and one tensor. ValueError names every tensor that is missing, left over, of
    another shape or not finite, or the file that cannot be read.
    """
    expected = {name: list(w.shape) for name, w in module.state_dict().items()}
    found, wrong, weights = {}, [], {}
    index, path = os.path.join(folder, "model.safetensors.index.json"), os.path.join(folder, "model.safetensors")
    try:
        files = [path]
        if os.path.isfile(index):
            path = index
            with open(index) as f:
                files = [os.path.join(folder, name) for name in sorted(set(json.load(f)["weight_map"].values()))]
        for path in files:
            with safe_open(path, "pt") as f:
                for key in f.keys():
                    name, shape = public(key), f.get_slice(key).get_shape()
                    if name in expected and shape != expected[name]:
                        wrong.append(f"{name} is {shape}, not {expected[name]}")
                    elif name is not None and name not in expected:
                        wrong.append(f"{name} is left over")
                    found[name] = path, key
        wrong += [f"{name} is missing" for name in expected if name not in found]
        for name in () if wrong else expected:
            path, key = found[name]
            kind = torch.float32 if name.endswith(tuple(fp32)) else dtype
            with safe_open(path, "pt") as f:
                weights[name] = f.get_tensor(key).to(device, kind, copy=True)
            if not weights[name].sum().isfinite():  # one pass without a copy; a sum that overflows is no weight either
                wrong.append(f"{name} is not finite")
    except Exception as error:  # safetensors' own for a broken file, OSError for a missing one, no memory left
        raise ValueError(f"cannot load {path!r}: {' '.join(str(error).split())}") from None
    if wrong:
        raise ValueError(f"{folder!r} does not hold the weights that its config.json describes: {', '.join(wrong)}")
    module.load_state_dict(weights, assign=True)
    return module.requires_grad_(False).eval()


def read_config(folder):
    """The Qwen3Config of a published drafter. ValueError for keys that are missing, that contradict each other, or that
    ask for what this file does not compute, as such a drafter would load and guess badly without a word."""
    with open(os.path.join(folder, "config.json")) as f:
        raw = json.load(f)
    for name in ("dflash_config", "hidden_size", "num_hidden_layers"):
        if name not in raw:
            raise ValueError(f"it has no {name}")
    own, rope = raw["dflash_config"], raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    for name, inner in (("block_size", own), ("rope_theta", rope)):
        given = {places[name] for places in (raw, inner) if places.get(name) is not None}
        if len(given) != 1:
            raise ValueError(f"{name} is {raw[name]} at the top and {inner[name]} inside" if given else
                             f"it has no {name}")
        raw[name] = given.pop()
    foreign = {k: v for k, v in own.items() if v and k not in ("block_size", "mask_token_id", "target_layer_ids")}
    for name, plain in (("partial_rotary_factor", 1), ("rope_type", "default"), ("hidden_act", "silu")):
        value = rope.get(name, raw.get(name, plain))
        foreign |= {} if value == plain else {name: value}
    if foreign:
        raise ValueError(f"it asks for {foreign}, which model.py does not compute")
    taps, mask = own["target_layer_ids"], own["mask_token_id"]
    if taps != sorted(set(taps)) or not taps or taps[0] < 0 or mask < 0:
        raise ValueError(f"target_layer_ids = {taps} must ascend and mask_token_id = {mask} not be negative")
    raw["dflash_config"] = own | {"block_size": raw["block_size"]}
    raw["rope_parameters"], raw["rope_scaling"] = {"rope_type": "default", "rope_theta": raw.pop("rope_theta")}, None
    # without this flag transformers forgets the window, and some published configs leave it out
    raw["use_sliding_window"] = raw.get("use_sliding_window") or "sliding_attention" in raw.get("layer_types", ())
    return Qwen3Config.from_dict(raw)


def load_drafter(name, target, device="cpu", dtype="float32"):
    """A frozen drafter from a checkpoint folder or a hub id, checked against the TargetConfig it shall draft for.

    Raises ValueError, with the two numbers that differ, when there is none or it belongs to another target.
    """
    folder = newest(checkpoint_folder(name))
    if not os.path.isfile(os.path.join(folder, "config.json")):
        raise ValueError(f"no drafter in {folder!r}: give a folder with config.json, or train one: "
                         "python train.py config/nano.py")
    try:
        config = read_config(folder)
        taps, mask = config.dflash_config["target_layer_ids"], config.dflash_config["mask_token_id"]
        config.num_target_layers = getattr(config, "num_target_layers", target.num_hidden_layers)
        with torch.device("meta"):
            drafter = DFlashDraftModel(config)
    except Exception as error:  # not JSON, keys missing, and what transformers' own checks raise
        raise ValueError(f"{folder}/config.json is not a DFlash drafter's: {' '.join(str(error).split())}; "
                         "give the folder or hub id of one") from None
    for key, own, other in (("hidden_size", config.hidden_size, target.hidden_size),
                            ("vocab_size", config.vocab_size, target.vocab_size),
                            ("num_target_layers", config.num_target_layers, target.num_hidden_layers)):
        if own != other:
            raise ValueError(f"the drafter in {folder!r} does not fit this target: {key} is {own}, "
                             f"the target's {other}; give --target and --drafter of one pair")
    if max(taps) > target.num_hidden_layers - 2 or mask >= target.vocab_size:
        raise ValueError(f"the drafter in {folder!r} does not fit this target: last tap {max(taps)} of "
                         f"{target.num_hidden_layers} layers, mask id {mask} of {target.vocab_size} ids")
    return pack_linears(load_weights(drafter, folder, device, getattr(torch, dtype)))
