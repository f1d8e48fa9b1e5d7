"""
The target: the text model of Qwen3.5, a hybrid of Gated DeltaNet and gated attention layers.

    target = load_target("Qwen/Qwen3.5-0.8B")               # from checkpoint.py; frozen
    features, hidden = target(tokens, target_layer_ids=(3, 7, 11))     # whole sequences
    logits = target.logits(hidden)

Three out of four layers keep one matrix S per head instead of a key-value cache. The file begins
with the rule that updates S. basic.py defines it for one token. Here are three fast versions:

    delta_step              for one token, when the target decodes without a drafter
    gated_delta_rule        for whole sequences and long parts of a prompt
    delta_rule_of_window    for a block of guesses and the few tokens before it

The layers and the model follow. What decoding keeps of a sequence, and how it forgets a rejected
guess, is in decode_state.py.

Shapes: B batch, T tokens, C tokens of a chunk, N chunks, K rows of a decode forward, H heads of
queries and keys, Hv heads of values, D and Dv their widths, V vocabulary; `width` is that of the
residual stream.
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from cpu import rowwise  # applies a function; on CPUs so that a row's bits do not depend on others
# functions that both models need stand in the drafter's file, as it ships alone
from model import linear_product, project, rotary_table, rotate, to_fp32

# --------------------------------------------------------------------------------------------------
# the gated delta rule (Yang, Kautz, Hatamizadeh, arXiv 2412.06464)


def delta_step(q, k, v, g, beta, S):
    """The rule itself, for one token: delta_rule() of basic.py for a batch.

    A head keeps a matrix S (D, Dv) that maps keys to values. The product k S reads the value stored
    under k. A token first decays S by exp(g) <= 1. Then it reads the value stored under its key and
    moves that value towards its own value v by the fraction beta. Its output is q S times D^-0.5.

    q, k (B, 1, H, D)    of unit length
    v (B, 1, Hv, Dv)     Hv is a multiple of H: several value heads share a key head
    g, beta (B, 1, Hv)   log of the decay, at most 0; and the fraction, 0 .. 1
    S (B, Hv, D, Dv)

    Returns o (B, 1, Hv, Dv) and the new S. It is written as elementwise products and sums because
    torch.compile fuses these into a few kernels. It cannot fuse three matrix products.
    """
    Hv = v.shape[2]
    q, k = repeat_heads(q, k, Hv)
    q = to_fp32(q)[:, 0, :, :, None]                                         # (B, Hv, D, 1)
    k = to_fp32(k)[:, 0, :, :, None]
    v = to_fp32(v)[:, 0, :, None]                                            # (B, Hv, 1, Dv)
    decay = to_fp32(g)[:, 0, :, None, None].exp()                            # (B, Hv, 1, 1)
    beta = to_fp32(beta)[:, 0, :, None, None]
    S = S * decay
    stored = (k * S).sum(2, keepdim=True)                                    # k S
    S = S + k * (beta * (v - stored))
    o = (q * S).sum(2) * q.shape[2] ** -0.5                                  # (B, Hv, Dv)
    return o[:, None], S


def chunk_length(v):
    """Tokens of a chunk in training and in the bulk of a prompt, for v (B, T, Hv, Dv).

    Measured: a CPU is fastest at about half the width of a head, as longer chunks are more
    operations. On a GPU fewer launches count for more. Decoding takes chunks as long as its block,
    see DecodeState.
    """
    if v.is_cuda:
        return 128
    return max(16, v.shape[-1] // 2)


def gated_delta_rule(q, k, v, g, beta, S=None, chunk=None):
    """The same rule for T tokens in chunks: parallel inside a chunk, one update of S per chunk.

    Shapes as above, with T tokens instead of 1. S None: zeros. chunk: tokens of a chunk. Returns o
    in v's dtype, and the last S in fp32 or wider. The last chunk is padded with tokens of
    beta = g = 0, which write nothing and fade nothing: they change no bit of S.

    If v is bf16, as in a prompt or in training, what enters and leaves most products is rounded to
    bf16, as in all other products of the model. Fading, A, its inverse and S stay in fp32. (The
    products of fp32 in a bf16 model are TF32 on a GPU, see load_target.)

    How. All vectors are rows. Let S be the state before a chunk, and let token t write W_t: it adds
    k_t^T W_t to the state. First a chunk of two tokens. By the definition

        W_1 = beta_1 (v_1 - exp(g_1) k_1 S)
        W_2 = beta_2 (v_2 - exp(g_1 + g_2) k_2 S - exp(g_2) (k_2 . k_1) W_1)

    since token 2 finds S faded twice, and what token 1 wrote faded once. With more tokens, token t
    finds S times fade_t, which is from here on the product of all fadings up to token t; and what
    token s < t wrote times decay_ts:

        fade_t   = exp(g_1 + g_2 + .. + g_t)
        decay_ts = fade_t / fade_s = exp of the sum of all g after token s, up to token t

    (1) W_t = beta_t (v_t - fade_t k_t S - sum over s < t of decay_ts (k_t . k_s) W_s)

    These are linear equations for all W_t of the chunk. As matrices:

        W, k, v, q      a row for each token of the chunk: C rows
        decay           (C, C), row t and column s
        [x]             the diagonal matrix of the x_t. [x] k has row t times x_t, in the code
                        k * x[..., None]. Z [x] has column t times x_t: Z * x[..., None, :]
        X * Y           the product entry by entry

    (2) (I + A) W = [beta] (v - [fade] k S)
        A = [beta] (decay * k k^T) below the diagonal, and 0 elsewhere

    which is (1) with its sum brought to the left side. Both sides times (I + A)^-1 from the left:

    (3) W = M (v - [fade] k S)      M = (I + A)^-1 [beta]       (C, C)

    S is known only when the chunk before is done. So the products without it come first, for all
    chunks in parallel:

    (4) W = U - Y S                 U = M v                     (C, Dv)
                                    Y = M [fade] k              (C, D)

    What remains from chunk to chunk is W, and the state after the chunk of C tokens:

    (5) S <- fade_C S + sum over s of decay_Cs k_s^T W_s

    With all W known, the outputs follow for all chunks in parallel. Query t finds S, and what
    tokens s <= t wrote:

    (6) o = D^-0.5 ([fade] q S + P W)
        P = decay * q k^T up to the diagonal and with it, and 0 above

    Source: arXiv 2412.06464, section 3.3, which writes the inverse out (the WY form). Its W is Y
    here.
    """
    B, T, Hv, Dv = v.shape
    D = q.shape[-1]
    if chunk is None:
        chunk = chunk_length(v)
    input_dtype = v.dtype
    dtype = torch.promote_types(input_dtype, torch.float32)  # of all but what is rounded
    q, k = repeat_heads(q, k, Hv)

    def rounded(x):
        if x.dtype == input_dtype:
            return x  # a call of to() that changes nothing takes a microsecond
        return x.to(input_dtype)

    q = to_chunks(q, chunk, dtype)                                           # (B Hv, N, C, D)
    k = to_chunks(k, chunk, dtype)
    v = to_chunks(v, chunk, dtype)                                           # (B Hv, N, C, Dv)
    beta = to_chunks(beta, chunk, dtype)                                     # (B Hv, N, C)
    N = v.shape[1]
    fade, decay = fade_and_decay(g, chunk, dtype)         # (B Hv, N, C) and (B Hv, N, C, C)
    fade_of_chunk = fade[..., -1:, None]       # fade_C                      (B Hv, N, 1, 1)
    decay_to_end = decay[..., -1, :]           # decay_Cs                    (B Hv, N, C)

    # (2) to (4). A has entries on its diagonal here: the inverse does not read them. If v is bf16,
    # so are U, Y, P, k_to_end and the writes W.
    A = (k @ k.mT).mul_(decay).mul_(beta[..., None])                        # [beta] (decay * k k^T)
    M = inverse_of_unit_lower(A) * beta[..., None, :]                        # (I + A)^-1 [beta]
    U = rounded(M) @ rounded(v)
    Y = rounded(M * fade[..., None, :]) @ rounded(k)                         # M [fade] k
    P = (rounded(q) @ rounded(k).mT).mul_(decay)                             # decay * q k^T
    k_to_end = rounded(k * decay_to_end[..., None])
    k_to_end_T = k_to_end.mT                                                 # (B Hv, N, D, C)

    # (4), (5), from chunk to chunk. unbind, not an index: where a target is trained (data/nano does
    # that), the gradient of U[:, i] would be a tensor as large as U, in every chunk.
    if S is None:
        S = q.new_zeros(B * Hv, D, Dv)
    else:
        S = S.to(dtype).flatten(0, 1)
    U = U.unbind(1)
    Y = Y.unbind(1)
    k_to_end_T = k_to_end_T.unbind(1)
    fade_of_chunk = fade_of_chunk.unbind(1)
    states = []  # S at the beginning of each chunk
    writes = []  # W of each chunk
    for i in range(N):
        states.append(S)
        W = U[i] - Y[i] @ rounded(S)
        writes.append(W)
        S = S * fade_of_chunk[i] + k_to_end_T[i] @ W

    # (6): the outputs of all chunks at once
    scale = D ** -0.5
    states = torch.stack(states, 1)                                          # (B Hv, N, D, Dv)
    writes = torch.stack(writes, 1)                                          # (B Hv, N, C, Dv)
    o = to_fp32(rounded(q) @ rounded(states)).mul_(fade[..., None] * scale)
    o = o.add_(P @ writes, alpha=scale)
    o = rounded(from_chunks(o, B, T))                                        # (B, T, Hv, Dv)
    return o, S.unflatten(0, (B, Hv))


def delta_rule_of_window(q, k, v, g, beta, S):
    """The same for the window of a decode forward: two chunks of C tokens each, T = 2 C.

    decode_state.py says what stands in the window, and why the state is wanted after its first
    chunk, not at its end. Returns o, and that state. All is fp32 or wider, what is returned too.

    Here a GPU's time depends on how many products there are, as all of them are small. So keys and
    queries stand in one matrix, the C queries of a chunk below its C keys. One product with k^T
    gives k k^T and q k^T. One with S gives k S and q S: that is why W is computed from (3), which
    reads k S. From (4) it would take as many products for two chunks, and q S would be another one.
    """
    B, T, Hv, Dv = v.shape
    D = q.shape[-1]
    C = T // 2
    dtype = v.dtype
    q, k = repeat_heads(q, k, Hv)
    k = to_chunks(k, C, dtype)
    q = to_chunks(q, C, dtype)
    keys_queries = torch.cat((k, q), 2)                                      # (B Hv, 2, 2 C, D)
    k = keys_queries[:, :, :C]  # the same numbers: so compiled code writes them once
    v = to_chunks(v, C, dtype)                                               # (B Hv, 2, C, Dv)
    beta = to_chunks(beta, C, dtype)                                         # (B Hv, 2, C)
    fade, decay = fade_and_decay(g, C, dtype)
    fade = fade[..., None]                                                   # (B Hv, 2, C, 1)
    fade_of_chunk = fade[:, :, -1:]            # fade_C                      (B Hv, 2, 1, 1)
    decay_to_end = decay[..., -1, :]           # decay_Cs                    (B Hv, 2, C)

    k_kT, q_kT = (keys_queries @ k.mT).split(C, 2)                           # (B Hv, 2, C, C)
    A = k_kT * decay * beta[..., None]
    P = q_kT * decay
    # (3). The solver takes A's diagonal as 1, so it solves (I + A) M = [beta]
    M = torch.linalg.solve_triangular(A, beta.diag_embed(), upper=False, unitriangular=True)
    k_to_end_T = (k * decay_to_end[..., None]).mT                            # (B Hv, 2, D, C)

    S = S.flatten(0, 1)                                                      # (B Hv, D, Dv)
    reads = []   # q S of each chunk
    writes = []  # W of each chunk
    for i in range(2):
        k_S, q_S = (keys_queries[:, i] @ S).split(C, 1)                      # (B Hv, C, Dv)
        W = M[:, i] @ (v[:, i] - fade[:, i] * k_S)
        reads.append(q_S)
        writes.append(W)
        if i == 0:  # (5): the state after the first chunk, with which the second begins
            S = S * fade_of_chunk[:, i] + k_to_end_T[:, i] @ W

    reads = torch.stack(reads, 1)                                            # (B Hv, 2, C, Dv)
    writes = torch.stack(writes, 1)
    o = (fade * reads + P @ writes) * D ** -0.5                              # (6)
    return from_chunks(o, B, T), S.unflatten(0, (B, Hv))


def fade_and_decay(g, chunk, dtype):
    """fade (B Hv, N, C) and decay (B Hv, N, C, C), as gated_delta_rule defines them, from g
    (B, T, Hv). decay_ts is 0 for s > t."""
    log_fade = to_chunks(g, chunk, dtype).cumsum(-1)
    # Above the diagonal fade_t / fade_s is above 1, and exp could overflow. A mask after it would
    # hide that, but the gradient would be 0 times infinity. So the argument of exp is masked.
    place = torch.arange(chunk, device=g.device)
    future = place[:, None] < place
    decay = log_fade[..., :, None] - log_fade[..., None, :]
    decay = decay.masked_fill_(future, -torch.inf).exp_()
    return log_fade.exp(), decay


def inverse_of_unit_lower(A):
    """(I + A)^-1 for A (..., C, C), of which only what stands below the diagonal is read.

    A GPU's triangular solver is slow for many rows, so long chunks are halved, down to 32 rows. Of
    the four quarters of I + A one is 0. Call the others E, F and G. Then

        [E 0]^-1   [    E^-1        0  ]
        [F G]    = [-G^-1 F E^-1   G^-1]

    as the product of both matrices shows. E and G are again of this form.
    """
    C = A.shape[-1]
    if C <= 32 or C % 2 == 1:  # an odd chunk has no halves
        # the solver takes the diagonal as 1: so it solves with I + A
        identity = torch.eye(C, dtype=A.dtype, device=A.device).expand_as(A)
        return torch.linalg.solve_triangular(A, identity, upper=False, unitriangular=True)
    half = C // 2
    below = A[..., half:, :half]                                             # F
    on_diagonal = torch.stack((A[..., :half, :half], A[..., half:, half:]))
    E_inverse, G_inverse = inverse_of_unit_lower(on_diagonal)
    corner = -(G_inverse @ (below @ E_inverse))
    top = F.pad(E_inverse, (0, half))
    bottom = torch.cat((corner, G_inverse), -1)
    return torch.cat((top, bottom), -2)


def to_chunks(x, chunk, dtype):
    """(B, T, H, ...) -> (B H, N, C, ...), the last chunk padded with zeros."""
    x = x.to(dtype).transpose(1, 2)
    missing = -x.shape[2] % chunk
    if missing:
        after_T = (0, 0) * (x.dim() - 3) + (0, missing)
        x = F.pad(x, after_T)
    x = x.contiguous().flatten(0, 1)
    return x.unflatten(1, (-1, chunk))


def from_chunks(x, B, T):
    """(B H, N, C, ...) -> (B, T, H, ...), without the tokens that padded the last chunk."""
    x = x.unflatten(0, (B, -1)).flatten(2, 3)                                # (B, H, N C, ...)
    return x[:, :, :T].transpose(1, 2)


def repeat_heads(q, k, value_heads):
    """q and k with each head repeated for the value heads that share it."""
    if q.shape[2] == value_heads:
        return q, k
    repeats = value_heads // q.shape[2]
    q = q.repeat_interleave(repeats, dim=2)
    k = k.repeat_interleave(repeats, dim=2)
    return q, k

# --------------------------------------------------------------------------------------------------
# layers; parameter names are those of the public checkpoint


class GatedDeltaNet(nn.Module):
    """Token mixing by the gated delta rule, after a short causal depthwise convolution."""

    def __init__(self, config):
        super().__init__()
        self.heads = config.linear_num_key_heads
        self.value_heads = config.linear_num_value_heads
        self.key_width = config.linear_num_key_heads * config.linear_key_head_dim
        self.value_width = config.linear_num_value_heads * config.linear_value_head_dim
        channels = conv_channels(config)
        self.in_proj_qkv = Linear(config.hidden_size, channels)
        self.in_proj_z = Linear(config.hidden_size, self.value_width)
        self.in_proj_b = Linear(config.hidden_size, self.value_heads)
        self.in_proj_a = Linear(config.hidden_size, self.value_heads)
        self.conv1d = nn.Conv1d(
            channels, channels, config.linear_conv_kernel_dim, groups=channels, bias=False)
        fading_rate = torch.empty(self.value_heads).uniform_(0.01, 16)
        self.A_log = nn.Parameter(fading_rate.log())
        self.dt_bias = nn.Parameter(torch.ones(self.value_heads))
        self.norm = GatedRMSNorm(config.linear_value_head_dim, config.rms_norm_eps)
        self.out_proj = Linear(self.value_width, config.hidden_size)

    def forward(self, x, layer_state, rotary):
        """x (B, T, width). Positions act through the recurrence, so rotary is not used."""
        qkv, z, b, a = project(
            x, (self.in_proj_qkv, self.in_proj_z, self.in_proj_b, self.in_proj_a))
        q, k, v = self.convolve_and_split(qkv, layer_state)

        # the share of what is stored under its key that a token replaces, and the log of S's
        # fading, g = -exp(A_log) softplus(a + dt_bias), as in Mamba: a rate times a time step
        beta = b.sigmoid()
        time_step = F.softplus(to_fp32(a) + self.dt_bias)
        g = -self.A_log.exp() * time_step

        if layer_state is None:
            # under autocast, in which data/nano trains a target, fp32 products would become bf16
            with torch.autocast(x.device.type, enabled=False):
                o, _ = gated_delta_rule(q, k, v, g, beta)
        else:
            o = layer_state.delta_rule(q, k, v, g, beta)

        # the outputs of the heads, normed and gated, and mixed
        z = z.unflatten(-1, (self.value_heads, -1))
        return self.out_proj(self.norm(o, z).flatten(-2))

    def convolve_and_split(self, qkv, layer_state):
        """q, k (B, T, H, D) of unit length and v (B, T, Hv, Dv): convolution, SiLU, heads."""
        T = qkv.shape[1]
        conv_width = self.conv1d.weight.shape[-1]

        # the few tokens before: zeros at the start of a sequence, else what the state remembers
        if layer_state is None:
            qkv = F.pad(qkv, (0, 0, conv_width - 1, 0))
        else:
            qkv = layer_state.convolution_input(qkv)

        # Written out instead of calling conv1d: elementwise sums have one order in any shape.
        weight = self.conv1d.weight[:, 0].T                              # (conv_width, channels)
        mixed = weight[0] * qkv[:, :T]
        for i in range(1, conv_width):
            mixed = mixed + weight[i] * qkv[:, i:i + T]
        mixed = rowwise(F.silu, mixed)

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
        query_width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, 2 * query_width)  # a head's query, then its gate
        self.k_proj = Linear(config.hidden_size, kv_width)
        self.v_proj = Linear(config.hidden_size, kv_width)
        self.o_proj = Linear(query_width, config.hidden_size)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x, layer_state, rotary):
        """x (B, T, width)."""
        q, k, v = project(x, (self.q_proj, self.k_proj, self.v_proj))
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

        o = o.transpose(1, 2) * rowwise(torch.sigmoid, gate)
        return self.o_proj(o.flatten(-2))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        gate, up = project(x, (self.gate_proj, self.up_proj))
        return self.down_proj(rowwise(F.silu, gate) * up)


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
        """x (B, T, width); layer_state: this layer's part of a DecodeState, None without one."""
        mixer = self.linear_attn if self.is_linear else self.self_attn
        x = x + mixer(self.input_layernorm(x), layer_state, rotary)
        return x + self.mlp(self.post_attention_layernorm(x))


class RMSNorm(nn.Module):
    """(1 + w) * x / rms(x), statistics in fp32. The drafter's norm has w in place of 1 + w."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))
        self.eps = eps

    def forward(self, x):
        gain = 1 + to_fp32(self.weight)
        normed = F.rms_norm(to_fp32(x), x.shape[-1:], gain, self.eps)
        return normed.to(x.dtype)


class GatedRMSNorm(nn.Module):
    """w * x / rms(x) * silu(z), with a plain gain w; statistics and gate in fp32."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x, z):
        normed = F.rms_norm(to_fp32(x), x.shape[-1:], None, self.eps)
        gate = rowwise(F.silu, to_fp32(z))
        gated = self.weight * normed.to(x.dtype) * gate
        return gated.to(x.dtype)


def unit_length(x):
    """x / sqrt(|x|^2 + 1e-6) over the last axis, in fp32.

    With |k| = 1 a token cannot blow S up. It takes away a share beta of what is stored under k,
    S <- S - beta k^T (k S), and of no other direction.
    """
    D = x.shape[-1]
    # rms(x) is |x| / sqrt(D)
    return F.rms_norm(to_fp32(x), (D,), None, 1e-6 / D) * D ** -0.5


class Linear(nn.Linear):
    """A linear layer without a bias, whose product of one row suits a GPU."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x):
        return linear_product(x, self.weight)

# --------------------------------------------------------------------------------------------------
# the model


@dataclass
class TargetConfig:
    """The keys of text_config in a Qwen3.5 config.json that decide what is computed."""
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
        # several query heads share a key head, and in linear layers several value heads do
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
    compiled_layers = None
    compiled_norm = None
    packed_head = None      # the head's product from a packed weight, where cpu.py made one

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, kind) for kind in config.layer_types)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens, state=None, target_layer_ids=(), features_only=False, segment=None):
        """Features and hidden states of tokens (B, T).

        Without a state the tokens are whole sequences. With one (decode_state.py) they follow its
        position: they are a block of K rows, or part of a prompt if a Segment is given.

        Returns features (B, T, len(target_layer_ids) * width), the residual stream after each of
        these layers, before any norm, in ascending order (None if no layer is named); and the
        normed hidden states (B, T, width) of which logits() makes logits. With features_only
        nothing above the last of the named layers is run, and the hidden states are None.
        """
        T = tokens.shape[1]
        layers = self.layers
        norm = self.norm
        if state is None:
            positions = torch.arange(T, device=tokens.device)
            rotary_dim = int(self.config.head_dim * self.config.partial_rotary_factor)
            rotary = rotary_table(positions, rotary_dim, self.config.rope_theta)
        else:
            state.begin_forward(T, segment)
            rotary = state.rotary
            # compiled layers are for forwards that always have the same shape
            if self.compiled_layers and (state.forward_is_block or state.pads_segments):
                layers = self.compiled_layers
                norm = self.compiled_norm
        if features_only:
            if not target_layer_ids:
                raise ValueError("features_only without target_layer_ids: name the layers whose "
                                 "outputs are wanted")
            layers = layers[:max(target_layer_ids) + 1]

        if state is None:
            x = self.embed_tokens(tokens)
        else:
            # an index is faster on a GPU for few tokens, but slow where a gradient is wanted
            x = self.embed_tokens.weight[tokens]
        features = []
        for i, layer in enumerate(layers):
            layer_state = None if state is None else state.layers[i]
            x = layer(x, layer_state, rotary)
            if i in target_layer_ids:
                features.append(x)
        features = torch.cat(features, -1) if features else None
        hidden = None if features_only else norm(x)
        return features, hidden

    @property
    def head_weight(self):
        """Weight (V, width) of the output head: the embedding's own where tied."""
        if self.config.tie_word_embeddings:
            return self.embed_tokens.weight
        return self.lm_head.weight

    def logits(self, hidden):
        """Logits (..., V) of normed hidden states (..., width), the target's or a drafter's."""
        if self.packed_head is not None:
            return self.packed_head(hidden)
        return F.linear(hidden, self.head_weight)

    def compile_decoding(self):
        """Compile the layers and the last norm for blocks, and for padded segments of a prompt.

        One by one: each kind of layer is compiled once for each of the two. Compiled together,
        layers would be fused in another way where one of them feeds the drafter, and round
        differently. Segments that are not padded vary in length, and go through the plain layers.
        """
        # kinds of layer x (block sizes and segments) x buffer lengths
        torch._dynamo.config.recompile_limit = 64
        # small kernels that do not wait for one another are launched as one
        options = {"combo_kernels": True}
        self.compiled_layers = [
            torch.compile(layer, dynamic=False, options=options) for layer in self.layers]
        self.compiled_norm = torch.compile(self.norm.forward, dynamic=False)
        return self
