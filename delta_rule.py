"""
The gated delta rule (Yang, Kautz, Hatamizadeh, arXiv 2412.06464), which updates the matrix S of a
Gated DeltaNet. basic.py defines it for one token. Here are three faster versions:

    delta_step              for one token, when the target decodes without a drafter
    gated_delta_rule        for whole sequences and long parts of a prompt
    delta_rule_of_window    for a block of guesses and the few tokens before it

Shapes: B batch, T tokens, C tokens of a chunk, N chunks, H heads of queries and keys, Hv heads of
values, D and Dv their widths.
"""
import torch
import torch.nn.functional as F

from model import to_fp32  # defined there, because model.py ships alone


def delta_step(q, k, v, g, beta, *, S):
    """The rule itself, for one token: delta_rule() of basic.py for a batch.

    A head keeps a matrix S (D, Dv) that maps keys to values. The product k S reads the value stored
    under k. A token first decays S by exp(g) <= 1. Then it reads the value stored under its key and
    moves the stored value towards the token's value v by the fraction beta. Its output is q S times
    D^-0.5.

    q, k (B, 1, H, D)    of unit length
    v (B, 1, Hv, Dv)     Hv is a multiple of H: several value heads share a key head
    g, beta (B, 1, Hv)   log of the decay, at most 0; and the fraction, 0 .. 1
    S (B, Hv, D, Dv)

    Returns o (B, 1, Hv, Dv) and the new S. The code has elementwise products and sums because
    torch.compile fuses these into a few kernels. It cannot fuse three matrix products.
    """
    Hv = v.shape[2]
    q, k = repeat_heads(q, k, Hv)
    q = to_fp32(q[:, 0]).unsqueeze(-1)                                       # (B, Hv, D, 1)
    k = to_fp32(k[:, 0]).unsqueeze(-1)
    v = to_fp32(v[:, 0]).unsqueeze(-2)                                       # (B, Hv, 1, Dv)
    g = to_fp32(g[:, 0])
    decay = g.exp()[..., None, None]                                         # (B, Hv, 1, 1)
    beta = to_fp32(beta[:, 0])[..., None, None]
    S = S * decay
    stored = (k * S).sum(2, keepdim=True)                                    # k S
    change = beta * (v - stored)
    S = S + k * change
    o = (q * S).sum(2)                                                       # (B, Hv, Dv)
    scale = q.shape[2] ** -0.5
    return o[:, None] * scale, S


def chunk_length(v):
    """Tokens per chunk in training and in most of a prompt, for v (B, T, Hv, Dv).

    Measured: CPUs are fastest at about half the head width, because longer chunks cost more FLOPs.
    On GPUs fewer launches matter more. Decoding uses chunks as long as its block, see DecodeState.
    """
    if v.is_cuda:
        return 128
    return max(16, v.shape[-1] // 2)


# --------------------------------------------------------------------------------------------------
# the rule in chunks
#
# All vectors are rows. Let S be the state before a chunk. Token t adds k_t^T W_t to the state, and
# we call W_t its write. First, take a chunk of two tokens. By definition
#
#     W_1 = beta_1 (v_1 - exp(g_1) k_1 S)
#     W_2 = beta_2 (v_2 - exp(g_1 + g_2) k_2 S - exp(g_2) (k_2 . k_1) W_1)
#
# At token 2, S has decayed twice, and what token 1 wrote has decayed once. With more tokens: until
# token t, S has decayed by the cumulative decay c_t, and the write of an earlier token s by the
# pair decay d_ts:
#
#     c_t  = exp(g_1 + g_2 + .. + g_t)                         cum_decay in the code
#     d_ts = c_t / c_s = exp(g_(s+1) + .. + g_t)               pair_decay in the code
#
# (1) W_t = beta_t (v_t - c_t k_t S - sum over s < t of d_ts (k_t . k_s) W_s)
#
# These are linear equations for all W_t of the chunk. As matrices:
#
#     W, k, v, q      one row per token of the chunk: C rows
#     d               (C, C), row t and column s
#     [x]             the diagonal matrix of the x_t
#     [x] k           row t of k times x_t. In the code: k * x[..., None]
#     Z [x]           column t of Z times x_t. In the code: Z * x[..., None, :]
#     X * Y           the elementwise product
#
# (2) (I + A) W = [beta] (v - [c] k S)
#     A = [beta] (d * k k^T) below the diagonal, and 0 elsewhere
#
# This is (1) with its sum moved to the left side. Multiply both sides by (I + A)^-1:
#
# (3) W = M (v - [c] k S)         M = (I + A)^-1 [beta]       (C, C)
#
# S is known only after the previous chunk. So the products without S come first, for all chunks
# in parallel:
#
# (4) W = U - Y S                 U = M v                     (C, Dv)
#                                 Y = M [c] k                 (C, D)
#
# Only W = U - Y S and the state after the C tokens of a chunk have to be computed one chunk after
# the other:
#
# (5) S <- c_C S + sum over s of d_Cs k_s^T W_s
#
# Once all W are known, the outputs follow for all chunks in parallel. Query t finds S and what
# the tokens s <= t wrote:
#
# (6) o = D^-0.5 ([c] q S + P W)
#     P = d * q k^T on and below the diagonal, and 0 above
#
# Source: arXiv 2412.06464, section 3.3. Our Y is the W of that paper, decayed.


def gated_delta_rule(q, k, v, g, beta, *, S=None, chunk=None):
    """The same rule for T tokens in chunks: parallel inside a chunk, one update of S per chunk.

    The shapes are the same as for delta_step, with T tokens instead of 1. S None: zeros. chunk:
    tokens per chunk. Returns o in v's dtype, and the last S in fp32 or fp64. The last chunk is
    padded with tokens of beta = g = 0. They write nothing and cause no decay, so S keeps its bits.

    If v is bf16, inputs and outputs of most matmuls are bf16, as in the rest of the model. Decays,
    A, its inverse, and S stay in fp32. (fp32 matmuls of a bf16 model use TF32 on a GPU, see
    fast/decoding.py.) The equations above are numbered (1) to (6).
    """
    B, T, Hv, Dv = v.shape
    D = q.shape[-1]
    if chunk is None:
        chunk = chunk_length(v)
    input_dtype = v.dtype
    dtype = torch.promote_types(input_dtype, torch.float32)
    q, k = repeat_heads(q, k, Hv)

    q = to_chunks(q, chunk, dtype)                                           # (B Hv, N, C, D)
    k = to_chunks(k, chunk, dtype)
    v = to_chunks(v, chunk, dtype)                                           # (B Hv, N, C, Dv)
    beta = to_chunks(beta, chunk, dtype)                                     # (B Hv, N, C)
    N = v.shape[1]
    cum_decay, pair_decay = cum_and_pair_decay(g, chunk, dtype)  # (B Hv, N, C), (B Hv, N, C, C)
    chunk_decay = cum_decay[..., -1:, None]    # c_C                         (B Hv, N, 1, 1)
    decay_to_end = pair_decay[..., -1, :]      # d_Cs                        (B Hv, N, C)

    # (2) to (4). Unlike in (2), this A has entries on its diagonal. The inverse ignores them. If v
    # is bf16, U, Y, P, k_to_end, and the writes W are bf16 too.
    k_kT = k @ k.mT
    A = k_kT.mul_(pair_decay)
    A = A.mul_(beta[..., None])                                              # [beta] (d * k k^T)
    M = inverse_of_unit_lower(A)
    M = M * beta[..., None, :]                                               # (I + A)^-1 [beta]
    Mc = M * cum_decay[..., None, :]                                         # M [c]
    q = q.to(input_dtype)
    k_rounded = k.to(input_dtype)
    v = v.to(input_dtype)
    U = M.to(input_dtype) @ v
    Y = Mc.to(input_dtype) @ k_rounded
    q_kT = q @ k_rounded.mT
    P = q_kT.mul_(pair_decay)                                                # d * q k^T
    k_to_end = (k * decay_to_end[..., None]).to(input_dtype)
    k_to_end_T = k_to_end.mT                                                 # (B Hv, N, D, C)

    # (4) and (5), from chunk to chunk. Use unbind, because in pretraining the backward of each
    # U[:, i] would allocate a tensor as large as U.
    if S is None:
        S = k.new_zeros(B * Hv, D, Dv)
    else:
        S = S.to(dtype)
        S = S.flatten(0, 1)
    U = U.unbind(1)
    Y = Y.unbind(1)
    k_to_end_T = k_to_end_T.unbind(1)
    chunk_decay = chunk_decay.unbind(1)
    states = []  # S at the start of each chunk
    writes = []  # W of each chunk
    for i in range(N):
        states.append(S)
        S_rounded = S.to(input_dtype)
        W = U[i] - Y[i] @ S_rounded
        writes.append(W)
        S = S * chunk_decay[i]
        S = S + k_to_end_T[i] @ W

    # (6), the outputs of all chunks at once
    scale = D ** -0.5
    states = torch.stack(states, 1)                                          # (B Hv, N, D, Dv)
    states = states.to(input_dtype)
    writes = torch.stack(writes, 1)                                          # (B Hv, N, C, Dv)
    o = to_fp32(q @ states)
    o = o.mul_(cum_decay[..., None] * scale)
    o = o.add_(P @ writes, alpha=scale)
    o = from_chunks(o, B, T)                                                 # (B, T, Hv, Dv)
    o = o.to(input_dtype)
    S = S.unflatten(0, (B, Hv))
    return o, S


def delta_rule_of_window(q, k, v, g, beta, *, S):
    """The same rule for the window of a decoding forward: two chunks of C tokens each, T = 2 C.

    decode_state.py says what the window contains and why we need the state after its first chunk,
    not after its last. Returns o and that state. Everything is fp32 or fp64.

    All matmuls are small here, so a GPU's time depends on their number. We stack keys and queries,
    the C queries of a chunk below its C keys. Then one product with k^T gives k k^T and q k^T, and
    one product with S gives k S and q S. So we compute W by (3), which needs just this k S. With
    (4), q S would be a separate product.
    """
    B, T, Hv, Dv = v.shape
    D = q.shape[-1]
    C = T // 2
    dtype = v.dtype
    q, k = repeat_heads(q, k, Hv)
    k = to_chunks(k, C, dtype)
    q = to_chunks(q, C, dtype)
    keys_queries = torch.cat((k, q), 2)                                      # (B Hv, 2, 2 C, D)
    k = keys_queries[:, :, :C]  # a view, so that compiled code stores k once
    v = to_chunks(v, C, dtype)                                               # (B Hv, 2, C, Dv)
    beta = to_chunks(beta, C, dtype)                                         # (B Hv, 2, C)
    cum_decay, pair_decay = cum_and_pair_decay(g, C, dtype)
    cum_decay = cum_decay[..., None]                                         # (B Hv, 2, C, 1)
    chunk_decay = cum_decay[:, :, -1:]         # c_C                         (B Hv, 2, 1, 1)
    decay_to_end = pair_decay[..., -1, :]      # d_Cs                        (B Hv, 2, C)

    k_kT, q_kT = (keys_queries @ k.mT).split(C, 2)                           # (B Hv, 2, C, C)
    A = k_kT * pair_decay
    A = A * beta[..., None]                                                  # [beta] (d * k k^T)
    P = q_kT * pair_decay
    # (3). The solver assumes a diagonal of 1, so it solves (I + A) M = [beta].
    diagonal_beta = beta.diag_embed()
    M = torch.linalg.solve_triangular(A, diagonal_beta, upper=False, unitriangular=True)
    k_to_end = k * decay_to_end[..., None]
    k_to_end_T = k_to_end.mT                                                 # (B Hv, 2, D, C)

    S = S.flatten(0, 1)                                                      # (B Hv, D, Dv)
    reads = []   # q S of each chunk
    writes = []  # W of each chunk
    for i in range(2):
        k_S, q_S = (keys_queries[:, i] @ S).split(C, 1)                      # (B Hv, C, Dv)
        difference = v[:, i] - cum_decay[:, i] * k_S
        W = M[:, i] @ difference
        reads.append(q_S)
        writes.append(W)
        if i == 0:  # (5): the state after the first chunk, where the second chunk starts
            S = S * chunk_decay[:, i]
            S = S + k_to_end_T[:, i] @ W

    reads = torch.stack(reads, 1)                                            # (B Hv, 2, C, Dv)
    writes = torch.stack(writes, 1)
    scale = D ** -0.5
    o = cum_decay * reads + P @ writes                                       # (6)
    o = from_chunks(o * scale, B, T)                                         # (B, T, Hv, Dv)
    S = S.unflatten(0, (B, Hv))
    return o, S


def cum_and_pair_decay(g, chunk, dtype):
    """c (B Hv, N, C) and d (B Hv, N, C, C) of gated_delta_rule() from g (B, T, Hv). d_ts is 0 for
    s > t."""
    log_decay = to_chunks(g, chunk, dtype).cumsum(-1)
    # Above the diagonal c_t / c_s is larger than 1, and exp could overflow. A mask after exp would
    # hide that, but the gradient would be 0 * inf. So we mask the argument.
    place = torch.arange(chunk, device=g.device)
    future = place[:, None] < place
    of_t = log_decay[..., :, None]
    of_s = log_decay[..., None, :]
    pair_decay = of_t - of_s
    pair_decay = pair_decay.masked_fill_(future, -torch.inf)
    pair_decay = pair_decay.exp_()
    cum_decay = log_decay.exp()
    return cum_decay, pair_decay


def inverse_of_unit_lower(A):
    """(I + A)^-1 for A (..., C, C). Only the entries below the diagonal are read.

    A GPU's triangular solver is slow for many rows, so long chunks are halved, down to 32 rows. One
    of the four quarters of I + A is 0. Call the others E, F, and G. Then

        [E 0]^-1   [    E^-1        0  ]
        [F G]    = [-G^-1 F E^-1   G^-1]

    because the product of both matrices is I. E and G have the form of I + A again.
    """
    C = A.shape[-1]
    if C <= 32 or C % 2 == 1:  # an odd chunk has no halves
        # the solver assumes a diagonal of 1, so it solves with I + A
        identity = torch.eye(C, dtype=A.dtype, device=A.device)
        identity = identity.expand_as(A)
        return torch.linalg.solve_triangular(A, identity, upper=False, unitriangular=True)
    half = C // 2
    below = A[..., half:, :half]                                             # F
    E = A[..., :half, :half]
    G = A[..., half:, half:]
    on_diagonal = torch.stack((E, G))
    E_inverse, G_inverse = inverse_of_unit_lower(on_diagonal)
    F_E_inverse = below @ E_inverse
    corner = -(G_inverse @ F_E_inverse)
    top = F.pad(E_inverse, (0, half))
    bottom = torch.cat((corner, G_inverse), -1)
    return torch.cat((top, bottom), -2)


def to_chunks(x, chunk, dtype):
    """(B, T, H, ...) -> (B H, N, C, ...), the last chunk padded with zeros."""
    x = x.to(dtype)
    x = x.transpose(1, 2)
    missing = -x.shape[2] % chunk
    if missing:
        after_T = (0, 0) * (x.dim() - 3) + (0, missing)
        x = F.pad(x, after_T)
    x = x.contiguous()
    x = x.flatten(0, 1)
    return x.unflatten(1, (-1, chunk))


def from_chunks(x, B, T):
    """(B H, N, C, ...) -> (B, T, H, ...), without the tokens that padded the last chunk."""
    x = x.unflatten(0, (B, -1))
    x = x.flatten(2, 3)                                                      # (B, H, N C, ...)
    x = x[:, :, :T]
    return x.transpose(1, 2)


def repeat_heads(q, k, value_heads):
    """q and k with each head repeated for the value heads that share it."""
    if q.shape[2] == value_heads:
        return q, k
    repeats = value_heads // q.shape[2]
    q = q.repeat_interleave(repeats, dim=2)
    k = k.repeat_interleave(repeats, dim=2)
    return q, k

