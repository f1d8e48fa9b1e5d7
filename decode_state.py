"""
What decoding remembers of a sequence. A forward proposes tokens, commit(n) adopts the first n.

    state = DecodeState(target, batch=1, length=512, tokens_per_forward=16)
    features, logits = prefill(target, prompt, state, target_layer_ids=(3, 7, 11))
    features, hidden = target(block, state, target_layer_ids=(3, 7, 11))    # 16 rows
    state.commit(n)

A row is one token's place in a forward. For a key-value cache it is easy to forget rejected
guesses: they are overwritten. The matrix S of a linear layer is the hard part, as what a token
wrote into it cannot be taken out again. This file keeps S where no guess has been yet, and beside
it the inputs of the delta rule for the few tokens since then.

Shapes: B batch, K rows of a forward, H heads of queries and keys, Hv heads of values, D and Dv
their widths.
"""
import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from fast.cuda_graph import Graphs
from model import masked_attention, rotary_table, write_at
from delta_rule import delta_rule_of_window, delta_step, gated_delta_rule
from target import conv_channels, delta_rule_widths


class DecodeState:
    """What decoding remembers of B sequences, each for at most `length` tokens.

    A forward of a block of K > 1 rows, an anchor and guesses, never changes the committed sequence.
    commit(n) then makes the first n of them part of it; each sequence has its own n and its own
    position. (A prompt is read before, in segments. There is nothing to reject in them, so their
    forwards change S itself.) No copy of S is kept for each token, and no second forward is needed.

    How can that be, as what is written into S cannot be undone? S is kept only at multiples of K
    tokens. Beside it stand the inputs of the delta rule (q k v g beta) for the tokens since then,
    the *tail*. They stand in a buffer for two chunks of K tokens, the *window*. A forward writes
    its block after the tail, and runs both chunks from S:

        position 37, K = 16         |      first chunk      |      second chunk      |
        S after 32 tokens           | 32 .. 36  | 37 .. 47  | 48 .. 52 |  53 .. 63   |
                                    |   tail    |        block         |   unused    |

    Three things always hold:

        A token's place in the window is its position minus 32, the position of S.
        The tail has less than K tokens; tail and block together have K to 2 K - 1.
        So the block reaches the end of the first chunk, and the window has room for it.

    The forward has the outputs of the block then, and on the way S_chunk_end, the state at the end
    of the first chunk.

    commit(n) moves the position to 37 + n, past one multiple of K at most. There are two cases.

    n = 5: the position is still below 48. S_chunk_end also holds guesses that were rejected, so it
    is dropped. S stays, and the next block is written from the new position on.

        position 42                 |      first chunk      |      second chunk      |
        S after 32 tokens           | 32 .. 41  | 42 .. 47  | 48 .. 57 |             |
                                    |   tail    |     next block       |   unused    |

    n = 12: the position has reached 48. All tokens of the first chunk are committed, no other one
    went into S_chunk_end, and it becomes S. The second chunk is copied over the first.

        position 49                 |      first chunk      |      second chunk      |
        S after 48 tokens           | 48 |     49 .. 63     | 64 |                   |
                                    |tail|      next block       |      unused       |

    So rejected guesses do no harm. Those in the first chunk are written over by the next block,
    before anything is computed from them. Those after the next block are seen by none of its rows:
    the delta rule is causal.

    position     tokens committed, (B,); a tensor, so that a round has static shapes (CUDA graphs)
    keys         and values of each full-attention layer; a mask hides from a row what comes after
                 it
    S            of each linear layer, after `position` rounded down to a multiple of K
    S_chunk_end  the same at the next multiple of K, as the last forward computed it; empty if K = 1
    window       q k v g beta of the 2 K tokens from S on, side by side in one tensor
    conv         inputs of the short convolution: the last tokens before `position`, then the block

    tokens_per_forward (K) is one number for three things: rows of a forward, tokens of a chunk, and the
    drafter's block, as a forward verifies one block.

    tokens_per_forward 1 is an exception, and the fastest way for the target alone. delta_step runs, and
    no window is needed. There is no guess to reject, so the forward changes S itself, and commit(1)
    must follow. (Decoder's idle slots commit 0 instead: their S means nothing.)

    For one K, the bits of what follows a prompt do not depend on how it was cut into blocks. Chunks
    begin at multiples of K, so a token always has the same place in its chunk and the same tokens
    before it. What comes after it enters with a factor of exactly 0. And a chunk has the same bits
    as the first of the window as it has as the second. docs/exactness.md has the argument in full.
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
        self.past_length = config.linear_conv_kernel_dim - 1  # tokens before a row that it mixes
        conv_length = self.past_length + tokens_per_forward

        # A prompt is read in segments of this many tokens. Where they are compiled, the last one is
        # padded to this length too: prompts of all lengths share compiled code and CUDA graphs.
        self.segment_length = 2048 if weight.is_cuda else 1024
        self.pads_segments = weight.is_cuda and target.compiled_layers is not None

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
        self.window = weight.new_zeros(window_shape, dtype=dtype)
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
        """Copy the one sequence of another state of this length into place `slot` of the B.

        All but S_chunk_end, which each forward computes anew.
        """
        self.position[slot] = other.position[0]
        self.keys[:, slot] = other.keys[:, 0]
        self.values[:, slot] = other.values[:, 0]
        self.S[:, slot] = other.S[:, 0]
        self.window[:, slot] = other.window[:, 0]
        self.conv[:, slot] = other.conv[:, 0]

    def reset(self):
        """Begin anew with empty sequences.

        Keys and values stay, as the mask hides them.
        """
        self.position.zero_()
        self.S.zero_()
        self.window.zero_()
        self.conv.zero_()

    def begin_forward(self, T, segment=None):
        """Set what the layers need to know of a forward of T rows.

        segment None: a block, T = K. Else the rows are part of a prompt, as the Segment says.

        Attention reads row_positions and mask; the delta rule window_positions, of a segment
        is_padding; the convolution last_places. A CUDA graph does not run these lines again, but it
        fills the tensors that they made. So what reads them has to be in the same graph.
        """
        self.forward_is_block = segment is None
        offsets = self.all_positions[:T]
        self.row_positions = self.position[:, None] + offsets                # (B, T)
        self.rotary = (self.cos[self.row_positions], self.sin[self.row_positions])
        if self.forward_is_block:
            assert T == self.tokens_per_forward, (T, self.tokens_per_forward)
            tail = self.position % self.tokens_per_forward
            self.window_positions = tail[:, None] + offsets                     # (B, K)
            self.mask = self.all_positions <= self.row_positions[..., None]  # (B, K, length)
        else:
            self.segment_start = segment.start
            # as tensors: a compiled layer that read the number would be compiled for each one
            self.is_padding = offsets >= segment.prompt_rows                 # (T,)
            self.last_places = segment.prompt_rows + self.all_positions[:self.past_length]

    def commit(self, n):
        """Adopt the first n rows of the last forward: an int or a tensor, (B,) or (1,), of 0 .. K.

        After a segment of a prompt n is its prompt_rows. Everything is written in place: CUDA
        graphs hold the addresses of these tensors.
        """
        if not self.forward_is_block:
            # the layers have already put the segment into S and into the convolution's memory
            self.position += n
            return
        K = self.tokens_per_forward
        n = torch.zeros_like(self.position) + n                              # (B,)
        if K > 1:
            # Does the first chunk of the window hold committed tokens only?
            is_complete = self.position % K + n >= K                         # (B,)
            is_complete = is_complete[:, None, None, None]  # for S (layers, B, Hv, D, Dv)
            torch.where(is_complete, self.S_chunk_end, self.S, out=self.S)
            first_chunk = self.window[:, :, :K]
            second_chunk = self.window[:, :, K:]
            is_complete = is_complete[..., 0]       # for the window (layers, B, 2 K, widths)
            torch.where(is_complete, second_chunk, first_chunk, out=first_chunk)
        # The convolution's memory is [the 3 tokens before the block | the block]. Once n rows are
        # adopted, the 3 last tokens stand n places further on:
        #     n = 2, K = 5:    t t t a b c d e    ->    t a b
        last_places = n[:, None] + self.all_positions[:self.past_length]     # (B, past_length)
        past = self.conv[:, :, :self.past_length]
        past.copy_(self.conv[:, self.sequences, last_places])
        self.position += n


class LinearLayerState:
    """A linear layer's part of a DecodeState, as views of its tensors."""

    def __init__(self, state, index, config):
        self.state = state
        self.conv = state.conv[index]
        self.window = state.window[index]
        self.S = state.S[index]
        self.S_chunk_end = state.S_chunk_end[index]
        self.widths = delta_rule_widths(config)

    def convolution_input(self, qkv):
        """qkv (B, T, channels) with the few tokens before it that the convolution looks at."""
        state = self.state
        past = self.conv[:, :state.past_length]  # zeros at the start of a prompt
        if state.forward_is_block:
            self.conv[:, state.past_length:] = qkv
            return self.conv
        qkv = torch.cat((past, qkv), 1)
        past.copy_(qkv[:, state.last_places])  # of the segment's tokens, not of its padding
        return qkv

    def delta_rule(self, q, k, v, g, beta):
        """Outputs (B, T, Hv, Dv) of the rows, given the committed tokens; fills S_chunk_end, or S
        for a segment of a prompt or for one row."""
        state = self.state
        if not state.forward_is_block:
            # a segment of a prompt; its padding fades nothing and writes nothing
            is_padding = state.is_padding[:, None]                           # (T, 1)
            g = g.masked_fill(is_padding, 0)
            beta = beta.masked_fill(is_padding, 0)
            o, S = gated_delta_rule(q, k, v, g, beta, self.S)  # in chunks of its own, longer ones
            self.S.copy_(S)
        elif state.tokens_per_forward == 1:
            o, S = delta_step(q, k, v, g, beta, self.S)
            self.S.copy_(S)
        else:
            # write the block after the tail
            inputs = [x.to(self.S.dtype).flatten(2) for x in (q, k, v, g, beta)]
            self.window[state.sequences, state.window_positions] = torch.cat(inputs, -1)
            # run the two chunks of the window, and keep the outputs of the block
            window_q, window_k, window_v, window_g, window_beta = self.window.split(self.widths, -1)
            o, S = delta_rule_of_window(
                window_q.unflatten(-1, q.shape[2:]),
                window_k.unflatten(-1, k.shape[2:]),
                window_v.unflatten(-1, v.shape[2:]),
                window_g,
                window_beta,
                self.S)
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
        """Outputs (B, H, T, D) of the rows, given the committed tokens.

        q (B, H, T, D); k, v (B, Hkv, T, D): they are written into the buffer first, at the rows'
        positions. Then each row attends to the buffer up to its own position.
        """
        state = self.state
        write_at(self.keys, state.row_positions, k.transpose(1, 2))
        write_at(self.values, state.row_positions, v.transpose(1, 2))
        if state.forward_is_block:
            return masked_attention(q, self.keys, self.values, state.mask)
        return self.segment_attention(q)

    @torch.compiler.disable  # it reads segment_start, and would be compiled for each value of that
    def segment_attention(self, q):
        """The same for a segment of a prompt, by a library's kernel."""
        T = q.shape[2]
        end = self.state.segment_start + T
        keys = self.keys[:, :, :end]
        values = self.values[:, :, :end]
        mask = causal_lower_right(T, end)  # the last row sees all, each row before it one less
        return F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)


class Segment(NamedTuple):
    """Says that the rows of a forward are part of a prompt, at the same place in all sequences.

    start           position of the first row. An int, as it decides how many keys attention reads
    prompt_rows     this many rows are tokens of the prompt, and those after them are padding. An
                    int or a tensor (1,)
    """
    start: int
    prompt_rows: int | torch.Tensor


@torch.no_grad()
def prefill(target, tokens, state, target_layer_ids=(), graphs=None):
    """Read prompts (B, n), 1 <= n <= length - K, into a state of K rows, from its beginning.

    Returns their features (B, n, ...), and the logits (B, V) of the last token.

    All but the last 1 to K tokens go through in segments, always cut at the same places, in the
    long chunks that chunk_length() of target.py names. The last ones are a block without guesses,
    whose chunk begins at a multiple of K. It is padded to K rows, of which the first `rest` are
    adopted, and the last of these gives the logits. So the end of a prompt goes through the same
    code as all that follows. With n = 37 and K = 16: 32 tokens in a segment, a block of 5.

    graphs: the Graphs of this state. They keep the block at the end for later prompts. Segments
    have one shape if they are padded, and then they are kept too: a graph for each place where one
    begins.
    """
    n = tokens.shape[1]
    K = state.tokens_per_forward
    assert 1 <= n <= state.length - K, (n, state.length, K)
    if graphs is None:
        graphs = Graphs(tokens.device)  # which is used once, so all forwards just run
    bulk = (n - 1) // K * K
    rest = n - bulk
    features = []
    state.reset()

    for start in range(0, bulk, state.segment_length):
        end = min(start + state.segment_length, bulk)
        segment = tokens[:, start:end]
        prompt_rows = torch.full((1,), end - start, device=tokens.device)
        forward = functools.partial(forward_and_commit, target, state, target_layer_ids, start)
        if state.pads_segments:
            padded_end = min(start + state.segment_length, state.length)  # the buffer's end
            segment = F.pad(segment, (0, padded_end - end))
            segment_features, _ = graphs.run(("segment", start), forward, segment, prompt_rows)
        else:
            segment_features, _ = forward(segment, prompt_rows)
        if target_layer_ids:
            # a copy, as the next graph may write over what this one returned
            features.append(segment_features[:, :end - start].clone())

    block = F.pad(tokens[:, bulk:], (0, K - rest))
    adopted = torch.full((1,), rest, device=tokens.device)
    forward = functools.partial(forward_and_commit, target, state, target_layer_ids, None)
    block_features, hidden = graphs.run("end of a prompt", forward, block, adopted)
    last_hidden = hidden[:, rest - 1:rest]
    logits = target.logits(last_hidden)[:, 0]
    if not target_layer_ids:
        return None, logits
    features.append(block_features[:, :rest])
    return torch.cat(features, 1), logits


def forward_and_commit(target, state, target_layer_ids, start, tokens, n):
    """Features and hidden states of tokens, of which the first n, a tensor (1,), are adopted. They
    are a segment of a prompt that begins at `start`, or a block where start is None."""
    segment = None if start is None else Segment(start, n)
    features, hidden = target(tokens, state, target_layer_ids, segment=segment)
    state.commit(n)
    return features, hidden
