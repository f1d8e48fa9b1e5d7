"""
The gated delta rule: its chunked forms and its 1-token form equal the definition in basic.py.
"""
import itertools

import pytest
import torch
import torch.nn.functional as F

import basic
from delta_rule import (chunk_length, delta_rule_of_window, delta_step, gated_delta_rule,
                        inverse_of_unit_lower)
from tests.common import apart, random_normal


def kernel_inputs(T, B=2, H=2, Hv=4, D=8, Dv=6, seed=0):
    """(q, k, v, g, beta) and S, in fp64. A tenth of the decays g is -50, which forgets everything,
    and a tenth is 0, which forgets nothing."""
    draw = random_normal(seed, torch.float64)
    q = F.normalize(draw(B, T, H, D), dim=-1)
    k = F.normalize(draw(B, T, H, D), dim=-1)
    extreme = draw(B, T, Hv)
    g = -F.softplus(draw(B, T, Hv))
    g[extreme > 1.3] = -50.0
    g[extreme < -1.3] = 0.0
    v = draw(B, T, Hv, Dv)
    beta = draw(B, T, Hv).sigmoid()
    S = draw(B, Hv, D, Dv)
    return (q, k, v, g, beta), S


def definition(q, k, v, g, beta, *, S):
    """basic.py's rule, token by token, for each sequence of a batch. Returns o and the last S."""
    repeats = v.shape[2] // q.shape[2]
    q = q.repeat_interleave(repeats, 2)
    k = k.repeat_interleave(repeats, 2)
    last_S = S.clone()
    o = torch.empty_like(v)
    for b, t in itertools.product(range(v.shape[0]), range(v.shape[1])):
        token = (x[b, t] for x in (q, k, v, g, beta))
        o[b, t], last_S[b] = basic.delta_rule(*token, S=last_S[b])
    return o, last_S


def check_against_definition(results, inputs, S, tolerance=1e-12):
    """results: the o and S that some form of the rule made of the inputs and the first S."""
    o, last_S = results
    o_true, S_true = definition(*inputs, S=S)
    assert apart(o, o_true) < tolerance
    assert apart(last_S, S_true) < tolerance


@pytest.mark.parametrize("chunk", (4, 16, 64))
@pytest.mark.parametrize("T", (1, 15, 16, 17, 63, 64, 65, 130))
def test_kernel_equals_recurrence(T, chunk):
    """Failure 8: the chunked form sums, decays, or pads differently from the definition, or it
    overflows for strong decay."""
    inputs, S = kernel_inputs(T)
    results = gated_delta_rule(*inputs, S=S, chunk=chunk)
    check_against_definition(results, inputs, S)
    # without a state it begins with zeros
    results = gated_delta_rule(*inputs, chunk=chunk)
    check_against_definition(results, inputs, torch.zeros_like(S))


@pytest.mark.parametrize("chunk", (4, 16, 40))
def test_kernel_of_a_window_equals_recurrence(chunk):
    """Failure 8: a window returns the state after both chunks instead of the first, or its second
    chunk starts from a different state."""
    inputs, S = kernel_inputs(2 * chunk)
    o, state = delta_rule_of_window(*inputs, S=S)
    o_true, _ = definition(*inputs, S=S)
    _, S_true = definition(*[x[:, :chunk] for x in inputs], S=S)
    assert apart(o, o_true) < 1e-12
    assert apart(state, S_true) < 1e-12


def test_kernel_step_equals_recurrence():
    """Failure 8: the 1-token form drifts from the definition, or sums in bf16. Only the output is
    rounded."""
    inputs, S = kernel_inputs(1)
    check_against_definition(delta_step(*inputs, S=S), inputs, S)
    inputs = [x.bfloat16() for x in inputs]
    o_true, S_true = definition(*[x.double() for x in inputs], S=S)
    o, last_S = delta_step(*inputs, S=S.float())
    assert last_S.dtype == torch.float32
    assert apart(o, o_true) < 2e-3
    assert apart(last_S, S_true) < 1e-5


@pytest.mark.parametrize("width, expected", ((16, 16), (32, 16), (48, 24), (128, 64)))
def test_kernel_chunks_are_half_a_head_on_a_cpu(width, expected):
    """Longer chunks cost more operations, and shorter ones more calls."""
    assert chunk_length(torch.empty(1, 1, 1, width)) == expected


@pytest.mark.parametrize("C", (1, 31, 32, 33, 34, 48, 66, 128))
def test_kernel_inverse_of_every_size(C):
    """Failure 8: halves are put together wrongly, or an odd size is cut. The inverse reads numbers
    on or above the diagonal, or is not exactly 0 there, so a token depends on later ones."""
    A = random_normal(C, torch.float64)(2, 3, C, C) / C
    below = A.tril(-1)
    identity = torch.eye(C, dtype=torch.float64)
    on_and_above = torch.ones(C, C).triu().bool()
    inverse = inverse_of_unit_lower(A.masked_fill(on_and_above, torch.nan))
    assert apart(inverse @ (identity + below), identity.expand_as(A)) < 1e-12
    assert torch.equal(inverse.triu(), identity.expand_as(A))


def test_kernel_is_finite_in_fp32():
    """A decay of exp(50) above the diagonal: infinity times a zero of the mask is nan, in the
    output or, if the mask comes after exp, in the gradient."""
    (q, k, v, _, beta), S = kernel_inputs(130)
    every_third = torch.arange(130)[None, :, None] % 3 == 0
    g = torch.where(every_third, 0.0, -50.0).expand(2, 130, 4)
    inputs = [x.float().requires_grad_() for x in (q, k, v, g, beta)]
    o, state = gated_delta_rule(*inputs, S=S.float())
    (o.sum() + state.sum()).backward()
    for x in (o, state, *[x.grad for x in inputs]):
        assert x.isfinite().all()
    doubles = [x.detach().double() for x in inputs]
    check_against_definition((o.detach(), state.detach()), doubles, S, tolerance=1e-5)


def test_kernel_in_bf16_decays_in_fp32():
    """The decay of a chunk is summed in bf16, which has three digits. Only inputs and outputs of
    matmuls are rounded, and with v in fp32 nothing is."""
    inputs, S = kernel_inputs(130)
    q, k, v, g, beta = [x.bfloat16() for x in inputs]
    exact = [x.double() for x in (q, k, v, g, beta)]
    for of_dtype, tolerance in ((v, 5e-3), (v.float(), 1e-5)):
        o, last_S = gated_delta_rule(q, k, of_dtype, g, beta, S=S.float())
        assert o.dtype == of_dtype.dtype
        check_against_definition((o, last_S), exact, S, tolerance)


def test_kernel_in_bf16_keeps_S_in_fp32():
    """S is rounded to bf16 after each chunk, so small writes of many tokens are lost."""
    (q, k, v, g, beta), S = kernel_inputs(512, B=1)
    no_decay = torch.zeros_like(g)
    inputs = [x.bfloat16() for x in (q, k, v, no_decay, 0.02 * beta)]
    _, S_true = definition(*[x.double() for x in inputs], S=S)
    _, last_S = gated_delta_rule(*inputs, S=S.float())
    assert last_S.dtype == torch.float32
    assert apart(last_S, S_true) < 1e-3  # 9e-3 if it is rounded
