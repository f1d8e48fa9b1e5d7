"""
The target: the text model of Qwen3.5, a hybrid of Gated-DeltaNet and gated attention layers, in plain PyTorch.

    target = load_target("Qwen/Qwen3.5-0.8B")                 # a hub id, a folder of that form, or random:0.8b
    features, logits = target(tokens, taps=(1, 5), rows=slice(-1, None))   # training, scoring: a whole sequence
    state = DecodeState(target, 1, length=512)                             # decoding: once for the prompt
    features, logits = target.prefill(tokens, state, taps=(1, 5))          # and then
    features, logits = target(block, state, taps=(1, 5))                   # a forward proposes K rows
    state.commit(n)                                                        # and commit adopts the first n

Glossary, beside model.py's: C chunk length of the delta rule, N chunks, K rows of a decode forward. q k v g beta S:
query, key, value, log decay, write strength and state of the gated delta rule (Yang, Kautz, Hatamizadeh, arXiv
2412.06464). taps: the layers whose outputs are the drafter's features.
"""
import json
import os
import zlib
from dataclasses import dataclass, fields, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from jinja2 import TemplateError
from transformers import AutoTokenizer

from model import attend, checkpoint_folder, load_weights, pack, pack_linears, rotary_table, rotate, wide

# tokens of a delta-rule chunk in training and prefill: on a GPU fewer launches count for more than fewer operations.
CHUNK, CUDA_CHUNK = 64, 128  # decoding uses chunks of K, its block


@dataclass
class TargetConfig:
    """The keys of text_config in a Qwen3.5 config.json that decide the computation; widths in channels."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int = 4
    layer_types: tuple = ()             # empty: three linear layers, then one full, repeated
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e7
    partial_rotary_factor: float = 0.25
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 262144
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self):
        if not self.layer_types:
            pattern = ("linear_attention",) * 3 + ("full_attention",)
            self.layer_types = tuple(pattern[i % 4] for i in range(self.num_hidden_layers))
        kinds = set(self.layer_types) - {"linear_attention", "full_attention"}
        if kinds or len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(f"layer_types has {len(self.layer_types)} entries for {self.num_hidden_layers} layers; "
                             f"unknown kinds: {sorted(kinds)}")
        for many, few in (("linear_num_value_heads", "linear_num_key_heads"),
                          ("num_attention_heads", "num_key_value_heads")):
            if getattr(self, many) % getattr(self, few):
                raise ValueError(f"{many} = {getattr(self, many)} is no multiple of {few} = {getattr(self, few)}")

    @classmethod
    def from_dict(cls, config):
        """From a parsed config.json, nested (text_config) or flat. ValueError names the keys that are missing, or what
        the model is that we do not compute."""
        text = {**config, **(config.get("text_config") or {})}
        text |= text.get("rope_parameters") or text.get("rope_scaling") or {}
        if text.get("num_experts") or "moe" in str(text.get("model_type")):
            raise ValueError("this config.json describes a mixture-of-experts target; only dense ones are supported")
        for key, plain in (("rope_type", "default"), ("hidden_act", "silu"), ("quantization_config", None)):
            if text.get(key, plain) != plain:
                raise ValueError(f"{key} = {text[key]!r} is not supported, only {plain!r}")
        known = {f.name for f in fields(cls)}
        try:
            return cls(**{k: tuple(v) if k == "layer_types" else v for k, v in text.items() if k in known})
        except TypeError as error:
            raise ValueError(f"config.json is not that of a Qwen3.5 text model: {error}") from None


def public_size(hidden, mlp, layers, heads, kv_heads, value_heads, tied):
    """The config of a published size; what all of them share stands here."""
    return TargetConfig(248320, hidden, mlp, layers, heads, kv_heads, 256, 16, value_heads, 128, 128,
                        tie_word_embeddings=tied, eos_token_id=248044, pad_token_id=248044)


SIZES = {"0.8b": public_size(1024, 3584, 24, 8, 2, 16, True), "2b": public_size(2048, 6144, 24, 8, 2, 16, True),
         "4b": public_size(2560, 9216, 32, 16, 4, 32, True), "9b": public_size(4096, 12288, 32, 16, 4, 32, False),
         "27b": public_size(5120, 17408, 64, 24, 4, 48, False)}  # Qwen3.6-27B has the shape of Qwen3.5-27B

# ----------------------------------------------------------------------------------------------------------------------
# the gated delta rule:  S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,   o_t = S_t^T q_t / sqrt(D)


def gated_delta_rule(q, k, v, g, beta, S=None, chunk=None, keep=None):
    """The gated delta rule over chunks: parallel inside a chunk, one state update from chunk to chunk.

    q, k (B, T, H, D) of unit length; v (B, T, Hv, Dv), Hv a multiple of H; g, beta (B, T, Hv); S (B, Hv, D, Dv).
    Returns o (B, T, Hv, Dv) in v's dtype, and the state after `keep` chunks (None: after all), in fp32 or better.
    Tokens with beta = g = 0 leave the state as it is, to the bit; so the last chunk is padded with them.
    Source: arXiv 2412.06464, section 3.3 (the WY form of the product of Householder factors, solved, not inverted).
    """
    (B, T, Hv, Dv), D, kind = v.shape, q.shape[-1], v.dtype
    chunk = chunk or (CUDA_CHUNK if v.is_cuda else CHUNK)
    dtype = torch.promote_types(kind, torch.float32)                    # decay, solve and state are an fp32 island
    if q.shape[2] != Hv:
        q, k = (x.repeat_interleave(Hv // x.shape[2], dim=2) for x in (q, k))

    def chunks(x):                                                      # (B, T, H, ...) -> (BH, N, C, ...)
        x = x.to(dtype).transpose(1, 2)
        x = F.pad(x, (0, 0) * (x.dim() - 3) + (0, -T % chunk)) if T % chunk else x
        return x.contiguous().flatten(0, 1).unflatten(1, (-1, chunk))

    q, k, v, beta, c = chunks(q), chunks(k), chunks(v), chunks(beta), chunks(g).cumsum(-1)  # c: since the chunk began
    future = torch.ones(chunk, chunk, dtype=torch.bool, device=v.device).triu(1)
    # masked before exp: above the diagonal the difference is positive and would overflow
    decay = (c[..., :, None] - c[..., None, :]).masked_fill_(future, -torch.inf).exp_()      # (BH, N, C, C)
    grow, last = c.exp(), c[..., -1:]
    # what token t writes, given what those before it in the chunk wrote: (I + A) write = beta (v - exp(c) k S)
    A = (k @ k.mT).mul_(decay).mul_(beta[..., None])
    inverse = torch.linalg.solve_triangular(A, torch.eye(chunk, dtype=dtype, device=v.device).expand_as(A),
                                            upper=False, unitriangular=True) * beta[..., None, :]
    u, w, P = inverse @ v, (inverse * grow[..., None, :]) @ k, (q @ k.mT).mul_(decay)
    k, fade = (k * (last - c).exp()[..., None]).mT, last.exp()[..., None]
    S = q.new_zeros(B * Hv, D, Dv) if S is None else S.to(dtype).flatten(0, 1)
    N, kept, states, writes = c.shape[1], S, [], []
    keep = N if keep is None else keep
    # unbind: the gradient of u[:, i] would be a tensor as large as u, in every chunk
    for i, (u, w, k, fade) in enumerate(zip(*(x.unbind(1) for x in (u, w, k, fade)))):
        states.append(S)
        writes.append(torch.baddbmm(u, w, S, alpha=-1))
        if i < max(keep, N - 1):
            S = torch.baddbmm(S * fade, k, writes[i])
        kept = S if i < keep else kept
    scale = D ** -0.5
    o = (q @ torch.stack(states, 1)).mul_(grow[..., None] * scale).flatten(0, 1)
    o = o.baddbmm_(P.flatten(0, 1), torch.stack(writes, 1).flatten(0, 1), alpha=scale).unflatten(0, (-1, N))
    return o.flatten(1, 2)[:, :T].unflatten(0, (B, Hv)).transpose(1, 2).to(kind), kept.unflatten(0, (B, Hv))


def delta_step(q, k, v, g, beta, S):
    """One token of the gated delta rule, shapes as above with T = 1: the recurrence itself, the fastest form for it."""
    B, _, Hv, Dv = v.shape
    if q.shape[2] != Hv:
        q, k = (x.repeat_interleave(Hv // x.shape[2], dim=2) for x in (q, k))
    q, k, v = (wide(x).reshape(B * Hv, 1, -1) for x in (q, k, v))
    S = S.flatten(0, 1) * wide(g).exp().reshape(-1, 1, 1)
    S = torch.baddbmm(S, k.mT, (v - k @ S) * wide(beta).reshape(-1, 1, 1))
    o = q @ S * q.shape[-1] ** -0.5
    return o.view(B, 1, Hv, Dv), S.unflatten(0, (B, Hv))

# ----------------------------------------------------------------------------------------------------------------------
# layers; parameter names are those of the public checkpoint


class RMSNorm(nn.Module):
    """Zero-centred: (1 + w) * x / rms(x), statistics in fp32. The drafter's norm, unlike this one, is plain."""
    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(dim)), eps

    def forward(self, x):
        return F.rms_norm(wide(x), x.shape[-1:], 1 + wide(self.weight), self.eps).to(x.dtype)


def rowwise(f, x):
    """f(x), elementwise, of x (B, T, ...): row by row where a CPU would split a block's rows over threads. The split
    may fall inside a row, and there scalar code rounds exp otherwise than vector code: bits would depend on the row."""
    if x.device.type != "cpu" or x.numel() <= 32768 or x.shape[0] * x.shape[1] > 64:  # 32768: torch's least share
        return f(x)
    return torch.stack([f(row) for row in x.flatten(0, 1)]).view(x.shape)


class GatedRMSNorm(nn.Module):
    """w * x / rms(x) * silu(z), a plain gain; statistics and gate in fp32."""
    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x, z):
        normed = F.rms_norm(wide(x), x.shape[-1:], None, self.eps).to(x.dtype)
        return (self.weight * normed * rowwise(F.silu, wide(z))).to(x.dtype)


def linear(fan_in, fan_out):
    return nn.Linear(fan_in, fan_out, bias=False)


def unit(x):
    """x / sqrt(|x|^2 + 1e-6) over the last axis, in fp32: keys of unit length keep I - beta k k^T a contraction."""
    D = x.shape[-1]
    return F.rms_norm(wide(x), (D,), None, 1e-6 / D) * D ** -0.5


class Joined(nn.Module):
    """A module whose projections of one input are computed as one product: `join` makes their weights views of one
    tensor, under their own names. A row of a product does not depend on how many columns there are beside it."""
    joined = packed = None

    def join(self):
        weights = [getattr(self, name).weight for name in self.names]
        self.joined, start = torch.cat([w.data for w in weights]), 0
        for w in weights:
            w.data = self.joined[start:start + len(w)]
            start += len(w)
        self.packed = pack(self.joined)
        pack_linears(self, skip=self.names)

    def project(self, x):
        """The projections (B, T, width) of x, in the order of `names`."""
        weights = [getattr(self, name).weight for name in self.names]
        whole = torch.cat(weights) if self.joined is None else self.joined
        return (self.packed(x) if self.packed else F.linear(x, whole)).split([len(w) for w in weights], -1)


class GatedDeltaNet(Joined):
    """Token mixing by the gated delta rule, after a short causal depthwise convolution; gated norm; projection."""
    names = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")

    def __init__(self, c):
        super().__init__()
        self.heads, self.value_heads = c.linear_num_key_heads, c.linear_num_value_heads
        self.keys, self.values = self.heads * c.linear_key_head_dim, self.value_heads * c.linear_value_head_dim
        channels = 2 * self.keys + self.values
        self.in_proj_qkv = linear(c.hidden_size, channels)
        self.in_proj_z = linear(c.hidden_size, self.values)
        self.in_proj_b = linear(c.hidden_size, self.value_heads)
        self.in_proj_a = linear(c.hidden_size, self.value_heads)
        self.conv1d = nn.Conv1d(channels, channels, c.linear_conv_kernel_dim, groups=channels, bias=False)
        self.A_log = nn.Parameter(torch.empty(self.value_heads).uniform_(0.01, 16).log())
        self.dt_bias = nn.Parameter(torch.ones(self.value_heads))
        self.norm = GatedRMSNorm(c.linear_value_head_dim, c.rms_norm_eps)
        self.out_proj = linear(self.values, c.hidden_size)

    def forward(self, x, memory, rotary):
        T, taps = x.shape[1], self.conv1d.weight.shape[-1]
        qkv, z, b, a = self.project(x)
        # the convolution looks at the taps - 1 tokens before: zeros at the start, the state's memory in decoding
        qkv = F.pad(qkv, (0, 0, taps - 1, 0)) if memory is None else memory.convolve(qkv)
        weight = self.conv1d.weight[:, 0].T                                                  # (taps, channels)
        mixed = weight[0] * qkv[:, :T]
        for i in range(1, taps):
            mixed = mixed + weight[i] * qkv[:, i:i + T]
        qk, v = rowwise(F.silu, mixed).split((2 * self.keys, self.values), dim=-1)
        q, k = unit(qk.unflatten(-1, (2 * self.heads, -1))).chunk(2, dim=-2)
        v = v.unflatten(-1, (self.value_heads, -1))
        beta = b.sigmoid()
        g = -self.A_log.exp() * F.softplus(wide(a) + self.dt_bias)
        if memory is None:
            with torch.autocast(x.device.type, enabled=False):  # it would turn the fp32 island's products into bf16
                o, _ = gated_delta_rule(q, k, v, g, beta)
        else:
            o = memory.delta_rule(q, k, v, g, beta)
        return self.out_proj(self.norm(o, z.unflatten(-1, (self.value_heads, -1))).flatten(-2))


class GatedAttention(Joined):
    """Grouped-query attention with normed heads, partial rotary and a sigmoid gate on its output."""
    names = ("q_proj", "k_proj", "v_proj")

    def __init__(self, c):
        super().__init__()
        self.heads, self.kv_heads, self.dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.q_proj = linear(c.hidden_size, 2 * self.heads * self.dim)  # a head's query, then its gate, head by head
        self.k_proj = linear(c.hidden_size, self.kv_heads * self.dim)
        self.v_proj = linear(c.hidden_size, self.kv_heads * self.dim)
        self.o_proj = linear(self.heads * self.dim, c.hidden_size)
        self.q_norm, self.k_norm = RMSNorm(self.dim, c.rms_norm_eps), RMSNorm(self.dim, c.rms_norm_eps)

    def forward(self, x, memory, rotary):
        q, k, v = self.project(x)
        q, gate = q.unflatten(-1, (self.heads, -1)).chunk(2, dim=-1)                         # (B, T, H, D)
        k, v = (y.unflatten(-1, (self.kv_heads, -1)) for y in (k, v))
        q, k = rotate(self.q_norm(q), rotary), rotate(self.k_norm(k), rotary)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))                                     # (B, H, T, D)
        mask = None
        if memory is not None:
            k, v, mask = memory.attention(k, v)
        if mask is None:
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            o = attend(q, k, v, mask)
        return self.o_proj((o.transpose(1, 2) * rowwise(torch.sigmoid, gate)).flatten(-2))


class MLP(Joined):
    """SwiGLU."""
    names = ("gate_proj", "up_proj")

    def __init__(self, c):
        super().__init__()
        self.gate_proj = linear(c.hidden_size, c.intermediate_size)
        self.up_proj = linear(c.hidden_size, c.intermediate_size)
        self.down_proj = linear(c.intermediate_size, c.hidden_size)

    def forward(self, x):
        gate, up = self.project(x)
        return self.down_proj(rowwise(F.silu, gate) * up)


class Layer(nn.Module):
    """Mix tokens, then channels; both on a normed copy of the residual stream."""
    def __init__(self, c, kind):
        super().__init__()
        if kind == "linear_attention":
            self.linear_attn = GatedDeltaNet(c)
        else:
            self.self_attn = GatedAttention(c)
        self.mlp = MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x, memory, rotary):
        """x (B, T, hidden); memory: this layer's part of a DecodeState, or None for whole sequences."""
        mix = self.linear_attn if hasattr(self, "linear_attn") else self.self_attn
        x = x + mix(self.input_layernorm(x), memory, rotary)
        return x + self.mlp(self.post_attention_layernorm(x))

# ----------------------------------------------------------------------------------------------------------------------
# the decode state: a forward proposes, commit(n) adopts


class LinearMemory:
    """A linear layer's part of a DecodeState, as views of its tensors."""
    def __init__(self, state, index):
        self.state, self.conv, self.window = state, state.conv[index], state.window[index]
        self.S, self.S_next = state.S[index], state.S_next[index]

    def convolve(self, qkv):
        """The inputs (B, T, channels) with the taps - 1 that come before them."""
        past = self.conv.shape[1] - self.state.rows
        if self.state.bulk:
            qkv = F.pad(qkv, (0, 0, past, 0))
            self.conv[:, :past] = qkv[:, -past:]
            return qkv
        self.conv[:, past:] = qkv
        return self.conv

    def delta_rule(self, *qkvgb):
        """Outputs (B, T, Hv, Dv) of the rows, given the committed ones; keeps the next chunk's state aside."""
        state, kind = self.state, qkvgb[2].dtype
        if state.bulk:
            o, S = gated_delta_rule(*qkvgb)
            self.S.copy_(S)
        elif state.rows == 1:
            o, S = delta_step(*qkvgb, self.S)
            self.S_next.copy_(S)
        else:
            packed = torch.cat([x.to(self.S.dtype).flatten(2) for x in qkvgb], -1)
            self.window.index_copy_(1, state.slots, packed)
            parts = self.window.split([x[0, 0].numel() for x in qkvgb], -1)
            parts = (part.unflatten(-1, x.shape[2:]) for part, x in zip(parts, qkvgb))
            o, S = gated_delta_rule(*parts, self.S, chunk=state.rows, keep=1)
            self.S_next.copy_(S)
            o = o.index_select(1, state.slots)
        return o.to(kind)


class FullMemory:
    """A full-attention layer's part of a DecodeState, as views of its tensors."""
    def __init__(self, state, index):
        self.state, self.keys, self.values = state, state.keys[index], state.values[index]

    def attention(self, k, v):
        """All keys and values (B, H, length, D) after the rows' own, and the mask (K, length) of what a row may see."""
        self.keys.index_copy_(2, self.state.positions, k)
        self.values.index_copy_(2, self.state.positions, v)
        return (k, v, None) if self.state.bulk else (self.keys, self.values, self.state.mask)


class DecodeState:
    """What decoding remembers of B sequences at one common position, for at most `length` tokens. A forward of K rows
    reads it and fills scratch rows only; commit(n) makes the first n of them part of the sequence. Nothing is cropped,
    copied back or replayed.

    pos      tokens committed, a tensor, so that a round has static shapes and can be captured as a graph
    keys     and values of each full layer; rows past pos are scratch, hidden by the mask
    S        delta-rule state of each linear layer after b tokens, b = pos rounded down to a multiple of C = K
    window   q k v g beta of tokens b .. b + 2C - 1: the committed tail, the block, and rows that none of those sees
    conv     inputs of the short convolution: those of the taps - 1 tokens before pos, then the block's

    The chunk grid is absolute, so a token meets the same chunks in the same order however the sequence was cut: this
    makes its logits bit-identical for every cut. With K = 1 there is no window and the recurrence itself is run.
    """
    def __init__(self, target, batch, length, rows=16):
        c, weight = target.config, target.embed_tokens.weight
        assert length <= c.max_position_embeddings, (length, c.max_position_embeddings)
        self.rows, self.length = rows, length
        full = c.layer_types.count("full_attention")
        layers, width = len(c.layer_types) - full, 1 if rows == 1 else 2 * rows
        H, Hv, D, Dv = (c.linear_num_key_heads, c.linear_num_value_heads, c.linear_key_head_dim,
                        c.linear_value_head_dim)
        channels, dtype = 2 * H * D + Hv * Dv, torch.promote_types(weight.dtype, torch.float32)
        self.pos = torch.zeros((), dtype=torch.long, device=weight.device)
        self.keys = weight.new_zeros(full, batch, c.num_key_value_heads, length, c.head_dim)
        self.values = torch.zeros_like(self.keys)
        self.S = weight.new_zeros(layers, batch, Hv, D, Dv, dtype=dtype)
        self.S_next = torch.zeros_like(self.S)
        self.window = weight.new_zeros(layers, batch, width, channels + 2 * Hv, dtype=dtype)
        self.conv = weight.new_zeros(layers, batch, c.linear_conv_kernel_dim - 1 + rows, channels)
        self.steps = torch.arange(length, device=weight.device)
        self.cos, self.sin = rotary_table(self.steps, int(c.head_dim * c.partial_rotary_factor), c.rope_theta)
        of = {"linear_attention": iter([LinearMemory(self, i) for i in range(layers)]),
              "full_attention": iter([FullMemory(self, i) for i in range(full)])}
        self.layers = [next(of[kind]) for kind in c.layer_types]
        self.reset()

    def reset(self):
        """Begin anew with an empty sequence; scratch rows keep what they hold, as nothing sees them."""
        self.empty = True
        for kept in (self.pos, self.S, self.window, self.conv):
            kept.zero_()

    def begin(self, T):
        """Set the rows of a forward of T tokens; returns their rotary table."""
        self.bulk = T != self.rows  # the prompt, all at once
        assert self.empty or not self.bulk, f"{T} tokens for a state that takes {self.rows} rows after its prompt"
        positions = self.pos + self.steps[:T]
        self.positions, self.slots = positions, self.pos % self.rows + self.steps[:T]
        self.mask = self.steps <= positions[:, None] if not self.bulk else None              # (K, length)
        return self.cos.index_select(0, positions), self.sin.index_select(0, positions)

    def commit(self, n):
        """Adopt the first n rows (an int or a tensor, 0..K) of the last forward; after a bulk forward, all of them."""
        self.empty = False
        if not self.bulk:
            C, past = self.rows, self.conv.shape[2] - self.rows
            passed = self.pos % C + n >= C  # the block's chunk is complete: its state was computed by the forward
            torch.where(passed, self.S_next, self.S, out=self.S)
            if C > 1:
                self.window[:, :, :C] = torch.where(passed, self.window[:, :, C:], self.window[:, :, :C])
            self.conv[:, :, :past] = self.conv.index_select(2, n + self.steps[:past])
        self.pos += n

# ----------------------------------------------------------------------------------------------------------------------
# the model


class Target(nn.Module):
    """The text model of Qwen3.5; `config` is a TargetConfig."""
    compiled = packed_head = None

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c, kind) for kind in c.layer_types)
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        if not c.tie_word_embeddings:
            self.lm_head = linear(c.hidden_size, c.vocab_size)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    @property
    def head(self):
        """Weight (V, D) of the output head: the embedding's own where tied."""
        return (self.embed_tokens if self.config.tie_word_embeddings else self.lm_head).weight

    def forward(self, tokens, state=None, taps=(), rows=None):
        """tokens (B, T). Returns features (B, T, len(taps) * D), the residual stream after each tapped layer, before
        any norm (None without taps), and logits (B, R, V) of the rows that `rows` indexes (None: no head is run).
        With a state the tokens are the K rows that follow its position; without, they are whole sequences.
        """
        T = tokens.shape[1]
        x = self.embed_tokens(tokens)
        if state is None:
            c = self.config
            positions = torch.arange(T, device=tokens.device)
            rotary = rotary_table(positions, int(c.head_dim * c.partial_rotary_factor), c.rope_theta)
        else:
            rotary = state.begin(T)
        layers = self.compiled if self.compiled and state is not None and not state.bulk else self.layers
        last = len(self.layers) if rows is not None or state is not None else max(taps) + 1
        seen = {}
        for i, layer in enumerate(layers[:last]):
            x = layer(x, state and state.layers[i], rotary)
            if i in taps:
                seen[i] = x
        features = torch.cat([seen[i] for i in taps], -1) if taps else None
        return features, self.logits(self.norm(x[:, rows])) if rows is not None else None

    def logits(self, hidden):
        """Logits (..., V) of normed hidden states (..., hidden), the target's or a drafter's."""
        return self.packed_head(hidden) if self.packed_head else F.linear(hidden, self.head)

    @torch.no_grad()
    def prefill(self, tokens, state, taps=()):
        """Read prompts (B, n), 1 <= n <= length - K, into a state of K rows that is empty. Returns their features
        (B, n, ...), and the logits (B, V) of the last token.

        Whole chunks go through in bulk; the rest, 1 to K tokens, are a block whose rows are all accepted. So the
        state starts on the chunk grid, and decoding and prefill share the code of a block.
        """
        n, rows, parts = tokens.shape[1], state.rows, []
        assert 1 <= n <= state.length - rows and state.empty, (n, state.length, rows, state.empty)
        bulk = (n - 1) // rows * rows
        if bulk:
            parts.append(self(tokens[:, :bulk], state, taps)[0])
            state.commit(bulk)
        block = F.pad(tokens[:, bulk:], (0, bulk + rows - n))
        features, logits = self(block, state, taps, rows=slice(n - bulk - 1, n - bulk))
        state.commit(n - bulk)
        parts.append(features[:, :n - bulk] if taps else None)
        return torch.cat(parts, 1) if taps else None, logits[:, 0]

    def join(self):
        """Let every layer compute its projections of one input as one product; weights must not change after it."""
        for module in self.modules():
            if isinstance(module, Joined):
                module.join()
        self.packed_head = pack(self.head)
        return self

    def compile(self):
        """Compile the layers for the blocks of decoding, one by one, so that each kind is compiled once, and to the
        same bits whichever layers are tapped. The prompt, whose length varies, goes through the plain ones."""
        torch._dynamo.config.recompile_limit = 64  # kinds of layer x rows of a forward x lengths of the buffer
        self.compiled = [torch.compile(layer, dynamic=False) for layer in self.layers]
        return self


def check_device(device, dtype):
    """The torch dtype of a name, or ValueError when this machine has no such device or the name is none we run in."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device = {device!r}, but torch sees no GPU here: use --device=cpu")
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype = {dtype!r}: use float32 or bfloat16 (fp16 overflows in the decay's gate)")
    return getattr(torch, dtype)


def public_name(name):
    """Our name of a public checkpoint's tensor, or None for those of the vision tower and of multi-token prediction."""
    name = name.removeprefix("model.").removeprefix("language_model.")
    return None if name.startswith(("visual.", "mtp.")) else name


FP32 = ("linear_attn.A_log", "linear_attn.norm.weight")  # kept in fp32 whatever the model's dtype


def random_weights(config, device, dtype):
    """A Target with random weights, always the same, made in place in their dtype. The layers outweigh the embedding,
    as else a tied head would say the last token again and again."""
    with torch.device("meta"):
        target = Target(config)
    g, weights = torch.Generator(device).manual_seed(0), {}
    for name, p in target.named_parameters():
        w = torch.empty(p.shape, device=device, dtype=torch.float32 if name.endswith(FP32) else dtype)
        if w.dim() > 1:
            fan_in = w[0].numel()
            weights[name] = w.normal_(std=0.02 if name == "embed_tokens.weight" else fan_in ** -0.5, generator=g)
        elif name.endswith("A_log"):
            weights[name] = w.uniform_(0.01, 16, generator=g).log_()
        else:
            weights[name] = w.fill_(float(name.endswith(("dt_bias", "linear_attn.norm.weight"))))
    target.load_state_dict(weights, assign=True)
    return target.requires_grad_(False).eval()


def target_config(name):
    """(TargetConfig, folder) of a folder, a hub id, or random:SIZE[:LAYERS], whose folder is None. ValueError, naming
    the file and what is wrong, when it is none of a target that can be run here."""
    kind, _, rest = name.partition(":")
    if kind == "random":
        size, _, layers = rest.partition(":")
        config = SIZES.get(size.lower())
        count = int(layers) if layers.isdecimal() else config.num_hidden_layers if config and not layers else 0
        if not config or not 0 < count <= config.num_hidden_layers:
            raise ValueError(f"target = {name!r}: give random:SIZE or random:SIZE:LAYERS with a size of "
                             f"{', '.join(SIZES)} and no more layers than it has")
        return replace(config, num_hidden_layers=count, layer_types=config.layer_types[:count]), None
    folder = checkpoint_folder(name)
    path = os.path.join(folder, "config.json")
    if not os.path.isfile(path):
        raise ValueError(f"no config.json in {folder!r}: give the folder of a Qwen3.5 checkpoint, or a hub id")
    try:
        with open(path) as f:
            return TargetConfig.from_dict(json.load(f)), folder
    except (ValueError, TypeError, AttributeError, ZeroDivisionError) as error:  # not JSON, or not a target's
        raise ValueError(f"cannot use {path}: {' '.join(str(error).split())}") from None


def load_target(name, device="cpu", dtype="float32"):
    """A Target, frozen and in eval mode, from a folder with config.json and safetensors in the public layout, from a
    hub id, or with random weights: random:SIZE for a published size, random:SIZE:LAYERS for its first layers.

    Raises ValueError, naming the file and what is wrong, when there is no such target.
    """
    dtype = check_device(device, dtype)
    config, folder = target_config(name)
    if folder is None:
        return random_weights(config, device, dtype).join()
    with torch.device("meta"):
        target = Target(config)
    # a tied head is the embedding, even where a file repeats it
    head = {"lm_head.weight"} if config.tie_word_embeddings else ()
    return load_weights(target, folder, device, dtype, lambda key: None if public_name(key) in head else
                        public_name(key), FP32).join()

# ----------------------------------------------------------------------------------------------------------------------
# prompts: one function for decoding, benchmarks and data, so that no two of them use different templates


def load_tokenizer(name):
    """The tokenizer of a target's folder or hub id, with its chat template. ValueError when there is none."""
    _, folder = target_config(name)
    if folder is None:
        raise ValueError(f"target {name!r} has random weights and no tokenizer: it serves to measure speed and "
                         "exactness; for text give a folder or a hub id")
    if not os.path.isfile(os.path.join(folder, "tokenizer.json")):
        raise ValueError(f"no tokenizer.json in {folder!r}: copy it there from the checkpoint's publisher")
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # transformers raises OSError, ValueError and others for missing and broken files
        raise ValueError(f"no tokenizer in {folder!r}: {' '.join(str(error).split())}") from None


def fingerprint(name):
    """A checksum of a target's tokenizer and chat template, as rows made with another one would train in silence."""
    folder, total = checkpoint_folder(name), 0
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            with open(path, "rb") as f:
                content = f.read()
            if name == "tokenizer_config.json":  # some checkpoints keep the template here, among much that may change
                content = str(json.loads(content).get("chat_template", "")).encode()
            total = zlib.crc32(content, total)
    return total


def chat_prompt(tokenizer, prompt, thinking=False):
    """Token ids of a conversation and the opening of the answer. prompt: the user's text, or a list of {"role",
    "content"} that ends with the user's turn. thinking is passed on explicitly, as the default differs from one size
    of the public targets to another. ValueError when the tokenizer has no template, or its template refuses."""
    if not tokenizer.chat_template:
        raise ValueError("this tokenizer has no chat template: use that of a chat model, or continue text with --raw")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, enable_thinking=thinking,
                                             return_dict=False)
    except TemplateError as error:
        raise ValueError(f"the chat template refuses this conversation: {' '.join(str(error).split())}") from None


def stop_ids(tokenizer):
    """Ids that end an answer: those of <|im_end|> and <|endoftext|>, whichever the vocabulary has."""
    vocabulary = tokenizer.get_vocab()
    return {vocabulary[t] for t in ("<|im_end|>", "<|endoftext|>", tokenizer.eos_token) if t in vocabulary}
