"""
Decoding state, and how rejected guesses are rolled back. A forward is tentative; commit(n) keeps
its first n tokens.

    state = DecodeState(target, batch=1, length=512, tokens_per_forward=16)
    features, logits = prefill(target, prompt, state, target_layer_ids=(3, 7, 11))
    features, hidden = target(block, state, target_layer_ids=(3, 7, 11))    # 16 tokens
    state.commit(n)

Rejected guesses are easy to remove from a key-value cache, because the next block overwrites them.
The matrix S of a Gated DeltaNet is the hard part: a token that was written into S cannot be removed
again. So we store an S of committed tokens only, plus the delta-rule inputs of the few tokens
since.

Shapes: B batch, K tokens of a block, H heads of queries and keys, Hv heads of values, D and Dv
their widths.
"""
import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from delta_rule import delta_rule_of_window, delta_step, gated_delta_rule
from model import masked_attention, rotary_table, write_at
from target import conv_channels, delta_rule_widths


class DecodeState:
    """The state of B sequences, each of at most `length` tokens.

    Reading a block of K > 1 tokens never changes the committed sequence. commit(n) then adds
    the first n tokens of the block to it. Each sequence has its own n and its own position. There
    are no per-token copies of S and no second forward. (Prompts have nothing to reject, so their
    forwards change S directly.)

    The trick: store S only at multiples of K tokens. For the tokens since then, the *tail*, store
    the inputs of the delta rule (q k v g beta). They are in a buffer for two chunks of K tokens,
    the *window*. A forward writes its block after the tail and runs both chunks from S:

        position 37, K = 16         |      first chunk      |      second chunk      |
        S after 32 tokens           | 32 .. 36  | 37 .. 47  | 48 .. 52 |  53 .. 63   |
                                    |   tail    |        block         |   unused    |

    Three things are always true:

        A token's place in the window is its position minus 32, the position of S.
        The tail has 0 to K - 1 tokens, so tail plus block have K to 2 K - 1.
        So they fill the first chunk and fit into the window.

    The forward yields the outputs of the block and, on the way, S_chunk_end: the state at the end
    of the first chunk.

    commit(n) moves the position to 37 + n, past at most one multiple of K. There are two cases.

    n = 5: the position stays below 48. S_chunk_end contains rejected guesses, so it is dropped. S
    stays, and the next block is written from the new position on.

        position 42                 |      first chunk      |      second chunk      |
        S after 32 tokens           | 32 .. 41  | 42 .. 47  | 48 .. 57 |             |
                                    |   tail    |     next block       |   unused    |

    n = 12: the position reaches 48. The first chunk contains only committed tokens, so S_chunk_end
    becomes S. The second chunk is copied over the first.

        position 49                 |      first chunk      |      second chunk      |
        S after 48 tokens           | 48 |     49 .. 63     | 64 |                   |
                                    |tail|      next block       |      unused       |

    So rejected guesses do no harm. The next block overwrites those that it covers before anything
    reads them. Those after the next block cannot affect it, because the delta rule is causal.

    position      number of committed tokens, (B,). A tensor, so that a round has static shapes
    keys, values  of each full-attention layer. A mask hides later positions from a token
    S             of each linear layer, after `position` tokens rounded down to a multiple of K
    S_chunk_end   the same at the next multiple of K, from the last forward; empty if K = 1
    delta_inputs  the window: q k v g beta of the 2 K tokens from S on, side by side in one tensor
    conv          inputs of the short convolution: the last tokens before `position`, then the block

    tokens_per_forward, K, plays three roles: tokens per forward, tokens per chunk, and block size.

    tokens_per_forward = 1 is the exception, and the fastest mode of the target alone. delta_step
    runs, without a window. There are no guesses, so the forward changes S directly, and commit(1)
    must follow. (Idle slots commit 0 instead. Their S means nothing.)

    For a fixed K, results after the prompt are bitwise the same however tokens are split into
    blocks. Chunks start at multiples of K, so a token always has the same place in its chunk and
    the same tokens before it. Later tokens enter with a factor of exactly 0. And a chunk has the
    same bits in the first half of the window as in the second. docs/exactness.md has the full
    argument.
    """

    def __init__(self, target, batch, length, tokens_per_forward=16):
        config = target.config
        max_length = config.max_position_embeddings
        assert length <= max_length, (length, max_length)
        self.tokens_per_forward = tokens_per_forward
        self.length = length
        weight = target.embed_tokens.weight  # for dtype and device
        dtype = torch.promote_types(weight.dtype, torch.float32)
        full_layers = config.layer_types.count("full_attention")
        linear_layers = len(config.layer_types) - full_layers
        window_length = 0 if tokens_per_forward == 1 else 2 * tokens_per_forward
        self.past_length = config.linear_conv_kernel_dim - 1  # earlier tokens that a token mixes in
        conv_length = self.past_length + tokens_per_forward

        # Prompts are prefilled in segments of this many tokens. On a GPU the last segment is padded
        # to this length, so that prompts of all lengths share compiled code and CUDA graphs.
        self.segment_length = 2048 if weight.is_cuda else 1024
        self.pads_segments = weight.is_cuda

        self.position = torch.zeros(batch, dtype=torch.long, device=weight.device)
        kv_shape = (full_layers, batch, config.num_key_value_heads, length, config.head_dim)
        self.keys = weight.new_zeros(kv_shape)
        self.values = weight.new_zeros(kv_shape)
        S_shape = (linear_layers, batch, config.linear_num_value_heads,
                   config.linear_key_head_dim, config.linear_value_head_dim)
        self.S = weight.new_zeros(S_shape, dtype=dtype)
        chunk_end_shape = (linear_layers, 0) if tokens_per_forward == 1 else S_shape
        self.S_chunk_end = weight.new_zeros(chunk_end_shape, dtype=dtype)
        window_shape = (linear_layers, batch, window_length, sum(delta_rule_widths(config)))
        self.delta_inputs = weight.new_zeros(window_shape, dtype=dtype)
        self.conv = weight.new_zeros(linear_layers, batch, conv_length, conv_channels(config))

        # constants of all forwards
        self.all_positions = torch.arange(length, device=weight.device)      # 0 .. length - 1
        self.sequences = torch.arange(batch, device=weight.device)[:, None]  # (B, 1), for indexing
        rotary_dim = int(config.head_dim * config.partial_rotary_factor)
        self.cos, self.sin = rotary_table(self.all_positions, rotary_dim, config.rope_theta)

        self.layers = self.layer_states(config)

    def layer_states(self, config):
        """Each layer's part, as views of the tensors above."""
        layers = []
        next_linear = 0
        next_full = 0
        for kind in config.layer_types:
            if kind == "linear_attention":
                layers.append(LinearLayerState(self, next_linear, config))
                next_linear += 1
            else:
                layers.append(FullLayerState(self, next_full))
                next_full += 1
        return layers

    def put(self, slot, other):
        """Copy the one sequence of another state of this length into a slot, one of the B places.

        S_chunk_end is not copied, because each forward computes it again.
        """
        self.position[slot] = other.position[0]
        self.keys[:, slot] = other.keys[:, 0]
        self.values[:, slot] = other.values[:, 0]
        self.S[:, slot] = other.S[:, 0]
        self.delta_inputs[:, slot] = other.delta_inputs[:, 0]
        self.conv[:, slot] = other.conv[:, 0]

    def reset(self):
        """Start again with empty sequences. Keys and values stay, because the mask hides them."""
        self.position.zero_()
        self.S.zero_()
        self.delta_inputs.zero_()
        self.conv.zero_()

    def begin_forward(self, T, segment=None):
        """Set what the layers need to know before they read T tokens.

        segment None: a block, T = K. Otherwise the tokens are part of a prompt, see Segment.

        Attention reads token_positions and mask, the delta rule window_positions or is_padding, and
        the convolution last_positions. A replayed CUDA graph skips this Python code but refills
        these tensors. So the code that reads them must be in the same graph.
        """
        self.forward_is_block = segment is None
        self.has_static_shape = self.forward_is_block or self.pads_segments
        offsets = self.all_positions[:T]
        self.token_positions = self.position[:, None] + offsets              # (B, T)
        self.rotary = (self.cos[self.token_positions], self.sin[self.token_positions])
        if self.forward_is_block:
            assert T == self.tokens_per_forward, (T, self.tokens_per_forward)
            tail = self.position % self.tokens_per_forward
            self.window_positions = tail[:, None] + offsets                  # (B, K)
            self.mask = self.all_positions <= self.token_positions[..., None]  # (B, K, length)
        else:
            self.segment_start = segment.start
            # as tensors, because a compiled layer that reads an int is compiled for each value
            self.is_padding = offsets >= segment.token_count                 # (T,)
            self.last_positions = segment.token_count + self.all_positions[:self.past_length]

    def commit(self, n):
        """Keep the first n tokens of the last forward: an int or a tensor, (B,) or (1,), of 0 .. K.

        After a segment of a prompt, n is its token_count. All updates are in place, because CUDA
        graphs hold the addresses of these tensors.
        """
        if not self.forward_is_block:
            # the layers have already updated S and the convolution's memory
            self.position += n
            return
        K = self.tokens_per_forward
        n = torch.zeros_like(self.position) + n                              # (B,)
        if K > 1:
            # Does the first chunk of the window contain only committed tokens?
            is_complete = self.position % K + n >= K                         # (B,)
            is_complete = is_complete[:, None, None, None]  # for S (layers, B, Hv, D, Dv)
            torch.where(is_complete, self.S_chunk_end, self.S, out=self.S)
            first_chunk = self.delta_inputs[:, :, :K]
            second_chunk = self.delta_inputs[:, :, K:]
            is_complete = is_complete[..., 0]  # for delta_inputs (layers, B, 2 K, widths)
            torch.where(is_complete, second_chunk, first_chunk, out=first_chunk)
        # conv holds [the 3 tokens before the block | the block]. After n committed tokens, the last
        # 3 tokens are n places further on:
        #     n = 2, K = 5:    t t t a b c d e    ->    t a b
        last_positions = n[:, None] + self.all_positions[:self.past_length]  # (B, past_length)
        past = self.conv[:, :, :self.past_length]
        past.copy_(self.conv[:, self.sequences, last_positions])
        self.position += n


class LinearLayerState:
    """A linear layer's part of a DecodeState, as views of its tensors."""

    def __init__(self, state, index, config):
        self.state = state
        self.conv = state.conv[index]
        self.delta_inputs = state.delta_inputs[index]
        self.S = state.S[index]
        self.S_chunk_end = state.S_chunk_end[index]
        self.widths = delta_rule_widths(config)

    def convolution_input(self, qkv):
        """qkv (B, T, channels) with the few earlier tokens that the convolution needs in front."""
        state = self.state
        past = self.conv[:, :state.past_length]  # zeros at the start of a prompt
        if state.forward_is_block:
            self.conv[:, state.past_length:] = qkv
            return self.conv
        qkv = torch.cat((past, qkv), 1)
        past.copy_(qkv[:, state.last_positions])  # of the prompt's tokens, not of the padding
        return qkv

    def delta_rule(self, q, k, v, g, beta):
        """Outputs (B, T, Hv, Dv) of the tokens, given the committed ones. Updates S_chunk_end for a
        block, and S for a segment of a prompt or a 1-token forward."""
        state = self.state
        if not state.forward_is_block:
            # a segment of a prompt; padding causes no decay and writes nothing
            is_padding = state.is_padding[:, None]                           # (T, 1)
            g = g.masked_fill(is_padding, 0)
            beta = beta.masked_fill(is_padding, 0)
            o, S = gated_delta_rule(q, k, v, g, beta, S=self.S)  # in longer chunks
            self.S.copy_(S)
        elif state.tokens_per_forward == 1:
            o, S = delta_step(q, k, v, g, beta, S=self.S)
            self.S.copy_(S)
        else:
            # write the block after the tail
            inputs = [x.to(self.S.dtype).flatten(2) for x in (q, k, v, g, beta)]
            self.delta_inputs[state.sequences, state.window_positions] = torch.cat(inputs, -1)
            # run both chunks of the window, and keep the outputs of the block
            window_inputs = self.delta_inputs.split(self.widths, -1)
            window_q, window_k, window_v, window_g, window_beta = window_inputs
            o, S = delta_rule_of_window(
                window_q.unflatten(-1, q.shape[2:]),
                window_k.unflatten(-1, k.shape[2:]),
                window_v.unflatten(-1, v.shape[2:]),
                window_g,
                window_beta,
                S=self.S)
            self.S_chunk_end.copy_(S)
            o = o[state.sequences, state.window_positions]
        return o.to(v.dtype)


class FullLayerState:
    """A full-attention layer's part of a DecodeState, as views of its tensors."""

    def __init__(self, state, index):
        self.state = state
        self.keys = state.keys[index]
        self.values = state.values[index]

    def attention(self, q, k, v):
        """Outputs (B, H, T, D) of the tokens, given the committed ones.

        q (B, H, T, D); k, v (B, Hkv, T, D). k and v are written into the buffer at the positions of
        their tokens. Then each token attends to the buffer up to its own position.
        """
        state = self.state
        write_at(self.keys, state.token_positions, k.transpose(1, 2))
        write_at(self.values, state.token_positions, v.transpose(1, 2))
        if state.forward_is_block:
            return masked_attention(q, self.keys, self.values, state.mask)
        return self.segment_attention(q)

    @torch.compiler.disable  # because it reads segment_start, it would be compiled for each value
    def segment_attention(self, q):
        """The same for a segment of a prompt, with a library kernel."""
        T = q.shape[2]
        end = self.state.segment_start + T
        keys = self.keys[:, :, :end]
        values = self.values[:, :, :end]
        mask = causal_lower_right(T, end)  # the last token sees all, each earlier one sees one less
        return F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)


class Segment(NamedTuple):
    """Says that the tokens of a forward are part of a prompt, at the same place in all sequences.

    start         position of the first token. An int, because it decides how many keys are read
    token_count   this many tokens belong to the prompt, and the rest is padding. An int or a tensor
                  (1,)
    """
    start: int
    token_count: int | torch.Tensor


def run_directly(name, function, *inputs):
    """Runs a forward. fast/cuda_graph.py has a form that records it under its name and replays
    it."""
    return function(*inputs)


@torch.no_grad()
def prefill(target, tokens, state, target_layer_ids=(), run=run_directly):
    """Process prompts (B, n), 1 <= n <= length - K, into a state, from its beginning.

    Returns their features (B, n, ...), and the logits (B, V) of the last token.

    All but the last 1 to K tokens are processed in segments, which always start at the same
    positions. The rest form one block without guesses, which starts at a multiple of K. It is
    padded to K tokens, of which the first `rest` are committed, and the last of these gives the
    logits. So the end of a prompt runs the same code as everything after it. With n = 37 and K =
    16: a segment of 32 tokens and a block of 5.

    run: runs each forward. Blocks at the end of a prompt share one name, because they have one
    shape. Segments have one name per start if they are padded, and otherwise run directly.
    """
    n = tokens.shape[1]
    K = state.tokens_per_forward
    assert 1 <= n <= state.length - K, (n, state.length, K)
    bulk = (n - 1) // K * K
    rest = n - bulk
    features = []
    state.reset()

    for start in range(0, bulk, state.segment_length):
        end = min(start + state.segment_length, bulk)
        segment = tokens[:, start:end]
        token_count = torch.full((1,), end - start, device=tokens.device)
        forward = functools.partial(
            forward_and_commit, target, state, target_layer_ids, start=start)
        if state.pads_segments:
            padded_end = min(start + state.segment_length, state.length)  # not past the buffer
            segment = F.pad(segment, (0, padded_end - end))
            segment_features, _ = run(("segment", start), forward, segment, token_count)
        else:
            segment_features, _ = forward(segment, token_count)
        if target_layer_ids:
            # a copy, because the next replay can overwrite the outputs of this one
            features.append(segment_features[:, :end - start].clone())

    block = F.pad(tokens[:, bulk:], (0, K - rest))
    committed = torch.full((1,), rest, device=tokens.device)
    forward = functools.partial(forward_and_commit, target, state, target_layer_ids)
    block_features, hidden = run("end of a prompt", forward, block, committed)
    last_hidden = hidden[:, rest - 1:rest]
    logits = target.logits(last_hidden)[:, 0]
    if not target_layer_ids:
        return None, logits
    features.append(block_features[:, :rest])
    return torch.cat(features, 1), logits


def forward_and_commit(target, state, target_layer_ids, tokens, n, *, start=None):
    """Features and hidden states of tokens, of which the first n, a tensor (1,), are committed.
    They are a segment of a prompt at `start`, or a block if start is None."""
    segment = None if start is None else Segment(start, n)
    features, hidden = target(tokens, state, target_layer_ids, segment=segment)
    state.commit(n)
    return features, hidden
