"""
The target: the text model of Qwen3.5, a hybrid of Gated DeltaNet and gated attention layers.

    target = load_target("Qwen/Qwen3.5-0.8B")               # from checkpoint.py; frozen
    features, hidden = target(tokens, target_layer_ids=(3, 7, 11))     # whole sequences
    logits = target.logits(hidden)

Three out of four layers are Gated DeltaNets. They keep one matrix S per head instead of a key-value
cache, and delta_rule.py updates it. decode_state.py keeps what decoding needs of a sequence, and
rolls back rejected guesses. Parameters have the names of the public checkpoints.

Shapes: B batch, T tokens, K tokens of a block, H query heads (in a Gated DeltaNet also key heads),
Hkv key-value heads of attention, Hv value heads of a Gated DeltaNet, D and Dv the widths of heads,
V vocabulary; `width` is the residual stream's width.
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from delta_rule import gated_delta_rule
from model import rotary_table, rotate, to_fp32  # in the drafter's file, because that ships alone

# --------------------------------------------------------------------------------------------------
# layers


class GatedDeltaNet(nn.Module):
    """Mixes tokens by the gated delta rule, after a short causal convolution of each channel."""

    def __init__(self, config):
        super().__init__()
        self.heads = config.linear_num_key_heads
        self.value_heads = config.linear_num_value_heads
        self.key_width = config.linear_num_key_heads * config.linear_key_head_dim
        self.value_width = config.linear_num_value_heads * config.linear_value_head_dim
        width = config.hidden_size
        channels = conv_channels(config)
        self.in_proj_qkv = nn.Linear(width, channels, bias=False)
        self.in_proj_z = nn.Linear(width, self.value_width, bias=False)
        self.in_proj_b = nn.Linear(width, self.value_heads, bias=False)
        self.in_proj_a = nn.Linear(width, self.value_heads, bias=False)
        self.conv1d = nn.Conv1d(
            channels, channels, config.linear_conv_kernel_dim, groups=channels, bias=False)
        decay_rate = torch.empty(self.value_heads).uniform_(0.01, 16)
        self.A_log = nn.Parameter(decay_rate.log())
        self.dt_bias = nn.Parameter(torch.ones(self.value_heads))
        self.norm = GatedRMSNorm(config.linear_value_head_dim, config.rms_norm_eps)
        self.out_proj = nn.Linear(self.value_width, width, bias=False)
        self.act = nn.SiLU()

    def forward(self, x, layer_state, rotary):
        """x (B, T, width). rotary is not used: the recurrence knows the order."""
        qkv, z, b, a = self.project(x)
        q, k, v = self.convolve_and_split(qkv, layer_state)

        # beta is the fraction of an old value that a token replaces. g is the log of S's decay: a
        # rate times a time step, g = -exp(A_log) softplus(a + dt_bias), as in Mamba.
        beta = b.sigmoid()
        time_step = F.softplus(to_fp32(a) + self.dt_bias)
        g = -self.A_log.exp() * time_step

        if layer_state is None:
            # pretraining of the nano target uses autocast, which would make these products bf16
            with torch.autocast(x.device.type, enabled=False):
                o, _ = gated_delta_rule(q, k, v, g, beta)
        else:
            o = layer_state.delta_rule(q, k, v, g, beta)

        # norm and gate the output of each head, then mix the heads
        z = z.unflatten(-1, (self.value_heads, -1))
        return self.out_proj(self.norm(o, z).flatten(-2))

    def project(self, x):
        return self.in_proj_qkv(x), self.in_proj_z(x), self.in_proj_b(x), self.in_proj_a(x)

    def convolve_and_split(self, qkv, layer_state):
        """q, k (B, T, H, D) of unit length and v (B, T, Hv, Dv) from qkv (B, T, channels)."""
        T = qkv.shape[1]
        conv_width = self.conv1d.weight.shape[-1]

        # put the inputs of the last 3 tokens in front: stored ones, or zeros at the start of a text
        if layer_state is None:
            qkv = F.pad(qkv, (0, 0, conv_width - 1, 0))
        else:
            qkv = layer_state.convolution_input(qkv)

        # written out, because conv1d may add in an order that depends on T
        weight = self.conv1d.weight[:, 0].T                              # (conv_width, channels)
        mixed = weight[0] * qkv[:, :T]
        for i in range(1, conv_width):
            mixed = mixed + weight[i] * qkv[:, i:i + T]
        mixed = self.act(mixed)

        qk, v = mixed.split((2 * self.key_width, self.value_width), dim=-1)
        qk = qk.unflatten(-1, (2 * self.heads, -1))
        q, k = unit_length(qk).chunk(2, dim=-2)
        v = v.unflatten(-1, (self.value_heads, -1))
        return q, k, v


class GatedAttention(nn.Module):
    """Grouped-query attention: normed heads, partial rotary, a sigmoid gate on the output."""

    def __init__(self, config):
        super().__init__()
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        width = config.hidden_size
        query_width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(width, 2 * query_width, bias=False)  # per head: query, then gate
        self.k_proj = nn.Linear(width, kv_width, bias=False)
        self.v_proj = nn.Linear(width, kv_width, bias=False)
        self.o_proj = nn.Linear(query_width, width, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.gate_act = nn.Sigmoid()

    def forward(self, x, layer_state, rotary):
        """x (B, T, width)."""
        q, k, v = self.project(x)
        q, gate = q.unflatten(-1, (self.heads, -1)).chunk(2, dim=-1)         # (B, T, H, D)
        k = k.unflatten(-1, (self.kv_heads, -1))                             # (B, T, Hkv, D)
        v = v.unflatten(-1, (self.kv_heads, -1))
        q = rotate(self.q_norm(q), rotary).transpose(1, 2)                   # (B, H, T, D)
        k = rotate(self.k_norm(k), rotary).transpose(1, 2)
        v = v.transpose(1, 2)

        if layer_state is None:
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            o = layer_state.attention(q, k, v)

        o = o.transpose(1, 2) * self.gate_act(gate)
        return self.o_proj(o.flatten(-2))

    def project(self, x):
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act = nn.SiLU()

    def forward(self, x):
        gate, up = self.project(x)
        return self.down_proj(self.act(gate) * up)

    def project(self, x):
        return self.gate_proj(x), self.up_proj(x)


class Layer(nn.Module):
    """Mix tokens, then channels, each on a normed copy of the residual stream (pre-norm)."""

    def __init__(self, config, kind):
        super().__init__()
        self.is_linear = kind == "linear_attention"
        if self.is_linear:
            self.linear_attn = GatedDeltaNet(config)
        else:
            self.self_attn = GatedAttention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, layer_state, rotary):
        """x (B, T, width). layer_state: this layer's part of a DecodeState, or None."""
        mixer = self.linear_attn if self.is_linear else self.self_attn
        x = x + mixer(self.input_layernorm(x), layer_state, rotary)
        return x + self.mlp(self.post_attention_layernorm(x))


class RMSNorm(nn.Module):
    """(1 + w) * x / rms(x), with statistics in fp32. In the drafter's norm the gain is w."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))
        self.eps = eps

    def forward(self, x):
        gain = 1 + to_fp32(self.weight)
        normed = F.rms_norm(to_fp32(x), x.shape[-1:], gain, self.eps)
        return normed.to(x.dtype)


class GatedRMSNorm(nn.Module):
    """w * x / rms(x) * silu(z). The gain is w here. Statistics and gate are in fp32."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps
        self.act = nn.SiLU()

    def forward(self, x, z):
        normed = F.rms_norm(to_fp32(x), x.shape[-1:], None, self.eps)
        gate = self.act(to_fp32(z))
        gated = self.weight * normed.to(x.dtype) * gate
        return gated.to(x.dtype)


def unit_length(x):
    """x / sqrt(|x|^2 + 1e-6) over the last axis, in fp32.

    Keys of length 1 keep S bounded: the update S <- S - beta k^T (k S) removes the fraction beta of
    what S stores under k, and nothing in other directions.
    """
    D = x.shape[-1]
    # rms(x) is |x| / sqrt(D)
    return F.rms_norm(to_fp32(x), (D,), None, 1e-6 / D) * D ** -0.5

# --------------------------------------------------------------------------------------------------
# the model


@dataclass
class TargetConfig:
    """The settings in a Qwen3.5 config.json that affect the computation."""
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
            repeats = self.num_hidden_layers // 4 + 1
            self.layer_types = (pattern * repeats)[:self.num_hidden_layers]
        unknown = set(self.layer_types) - {"linear_attention", "full_attention"}
        if unknown or len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(f"layer_types has {len(self.layer_types)} entries for "
                             f"{self.num_hidden_layers} layers; unknown kinds: {sorted(unknown)}")
        # several value heads, or several query heads, share a key head
        for many, few in (("linear_num_value_heads", "linear_num_key_heads"),
                          ("num_attention_heads", "num_key_value_heads")):
            number_of_many = getattr(self, many)
            number_of_few = getattr(self, few)
            if number_of_many % number_of_few:
                raise ValueError(f"{many} = {number_of_many} is no multiple of "
                                 f"{few} = {number_of_few}")


def delta_rule_widths(c):
    """How many numbers a token has in q, k, v, g and beta of a linear layer."""
    value_heads = c.linear_num_value_heads
    q = c.linear_num_key_heads * c.linear_key_head_dim
    k = q
    v = value_heads * c.linear_value_head_dim
    g = value_heads
    beta = value_heads
    return q, k, v, g, beta


def conv_channels(c):
    """Channels of the short convolution: q, k and v together."""
    return sum(delta_rule_widths(c)[:3])


class Target(nn.Module):
    """The text model of Qwen3.5; config is a TargetConfig."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, kind) for kind in config.layer_types)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens, state=None, target_layer_ids=(), features_only=False, segment=None):
        """Features and hidden states of tokens (B, T).

        Without a state, the tokens are whole sequences. With a state (decode_state.py), they follow
        the tokens that it holds: a block of K tokens, or a part of a prompt if a Segment is given.

        Returns features (B, T, len(target_layer_ids) * width) and hidden states (B, T, width). The
        features are the residual stream after each of these layers, before any norm. They are in
        ascending order of the ids. Without ids, None is returned instead. logits() turns the hidden
        states, which are normed, into logits. With features_only, the layers above the last id do
        not run and hidden states are None.
        """
        T = tokens.shape[1]
        if state is None:
            positions = torch.arange(T, device=tokens.device)
            rotary_dim = int(self.config.head_dim * self.config.partial_rotary_factor)
            rotary = rotary_table(positions, rotary_dim, self.config.rope_theta)
        else:
            state.begin_forward(T, segment)
            rotary = state.rotary
        layers = self.layers
        if features_only:
            if not target_layer_ids:
                raise ValueError("features_only without target_layer_ids: name the layers whose "
                                 "outputs you need")
            layers = layers[:max(target_layer_ids) + 1]

        x = self.embed_tokens(tokens)
        features = []
        for i, layer in enumerate(layers):
            layer_state = None if state is None else state.layers[i]
            x = layer(x, layer_state, rotary)
            if i in target_layer_ids:
                features.append(x)
        features = torch.cat(features, -1) if features else None
        hidden = None if features_only else self.norm(x)
        return features, hidden

    @property
    def head_weight(self):
        """Weight (V, width) of the output head. A tied head is the embedding."""
        if self.config.tie_word_embeddings:
            return self.embed_tokens.weight
        return self.lm_head.weight

    def logits(self, hidden):
        """Logits (..., V) of normed hidden states (..., width), the target's or a drafter's."""
        return F.linear(hidden, self.head_weight)
