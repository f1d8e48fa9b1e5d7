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

from model import to_fp32  # in the drafter's file, because that file ships alone

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
    fade, decay = cum_and_pair_decay(g, chunk, dtype)         # (B Hv, N, C) and (B Hv, N, C, C)
    decay_of_chunk = fade[..., -1:, None]       # fade_C                      (B Hv, N, 1, 1)
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
    decay_of_chunk = decay_of_chunk.unbind(1)
    states = []  # S at the beginning of each chunk
    writes = []  # W of each chunk
    for i in range(N):
        states.append(S)
        W = U[i] - Y[i] @ rounded(S)
        writes.append(W)
        S = S * decay_of_chunk[i] + k_to_end_T[i] @ W

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
    fade, decay = cum_and_pair_decay(g, C, dtype)
    fade = fade[..., None]                                                   # (B Hv, 2, C, 1)
    decay_of_chunk = fade[:, :, -1:]            # fade_C                      (B Hv, 2, 1, 1)
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
            S = S * decay_of_chunk[:, i] + k_to_end_T[:, i] @ W

    reads = torch.stack(reads, 1)                                            # (B Hv, 2, C, Dv)
    writes = torch.stack(writes, 1)
    o = (fade * reads + P @ writes) * D ** -0.5                              # (6)
    return from_chunks(o, B, T), S.unflatten(0, (B, Hv))


def cum_and_pair_decay(g, chunk, dtype):
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

