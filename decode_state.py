"""
Decoding state, and how rejected guesses are rolled back. A forward is tentative; commit(n) keeps
its first n tokens.

    state = DecodeState(target, batch=1, length=512, tokens_per_forward=16)
    features, logits = prefill(target, prompts, state, target_layer_ids=(3, 7, 11))
    features, hidden = target(block, state, target_layer_ids=(3, 7, 11))    # 16 tokens
    state.commit(n)

Rejected guesses are easy to remove from a key-value cache, because the next block overwrites them.
The matrix S of a Gated DeltaNet is the hard part: a token that was written into S cannot be removed
again. So we store an S of committed tokens only, plus the delta-rule inputs of the few tokens
after it.

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

    A forward reads a block of K tokens and never changes what was committed before. commit(n) then
    adds the first n tokens of the block to the sequence. Each sequence has its own n and its own
    position, the number of committed tokens. There are no per-token copies of S, and no forward
    runs twice.

    Everything has a fixed place that follows from the position of its token. Therefore commit(n)
    only moves the position:

    keys, values  The key and value of position p are at place p. A mask hides later positions.
    conv          The short convolution mixes in the last 3 tokens. Its inputs are in a ring buffer
                  of K + 3 places, position p at place p mod (K + 3).
    S             Stored only at multiples of K tokens. There are two places: S after j chunks of K
                  tokens is in place j mod 2.
    delta_inputs  The *tail* is the committed tokens since the last multiple of K. The inputs of the
                  delta rule (q k v g beta) for the tail and the block are in a ring buffer of 2 K
                  places, position p at place p mod 2 K.

    A forward writes its block into the ring buffer, right after the tail. Then it runs the delta
    rule over the *window*, the two chunks after the stored S:

        position 37, K = 16         |      first chunk      |      second chunk      |
        S after 32 tokens           | 32 .. 36  | 37 .. 47  | 48 .. 52 |  53 .. 63   |
                                    |   tail    |        block         |   unused    |

    The tail has 0 to K - 1 tokens, so tail plus block have K to 2 K - 1. Together they always fill
    the first chunk and never exceed the window. On the way, the forward computes the state at the
    end of the first chunk, here after 48 tokens, and stores it in the other place of S.

    commit(n) moves the position to 37 + n, past at most one multiple of K. There are two cases.

    n = 5: the position stays below 48, so the next forward starts from the same S. The state after
    48 tokens contains rejected guesses. The next forward computes and stores it again.

        position 42                 |      first chunk      |      second chunk      |
        S after 32 tokens           | 32 .. 41  | 42 .. 47  | 48 .. 57 |             |
                                    |   tail    |     next block       |   unused    |

    n = 12: the position is 49, so the first chunk contains only committed tokens. The next
    forward starts from the other S, and its window is 16 places further on in the ring.

        position 49                 |      first chunk      |      second chunk      |
        S after 48 tokens           | 48 |     49 .. 63     | 64 |                   |
                                    |tail|      next block       |      unused       |

    So rejected guesses do no harm: the next block overwrites all of them before anything reads
    them. The unused places hold older inputs. These cannot affect the block, because the delta rule
    is causal. docs/round.html shows the window and the commit in each round of a real run.

    tokens_per_forward, K, is both the block size and the chunk length. K = 1 is the exception, and
    the fastest mode of the target alone. There are no guesses, so delta_step runs without a window
    and changes the only S in place, and commit(1) must follow. (Rows of the batch without a
    sequence commit 0 instead. Their S is garbage until the next prompt is prefilled into them.)

    For a fixed K, the bits of all results after the prompt do not depend on how the tokens are
    split into blocks. Chunks start at multiples of K, so a token always has the same place in its
    chunk and the same tokens before it. Later tokens enter with a factor of exactly 0. And a chunk
    has the same bits in the first half of the window as in the second. docs/exactness.md has the
    full argument.
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
        self.window_length = 0 if tokens_per_forward == 1 else 2 * tokens_per_forward
        self.past_length = config.linear_conv_kernel_dim - 1  # earlier tokens that a token mixes in
        self.conv_length = self.past_length + tokens_per_forward

        # Prompts are prefilled in segments of this many tokens. On a GPU the last segment is padded
        # to this length, so that prompts of all lengths share compiled code and CUDA graphs.
        self.segment_length = 2048 if weight.is_cuda else 1024
        self.pads_segments = weight.is_cuda

        self.position = torch.zeros(batch, dtype=torch.long, device=weight.device)
        kv_shape = (full_layers, batch, config.num_key_value_heads, length, config.head_dim)
        self.keys = weight.new_zeros(kv_shape)
        self.values = weight.new_zeros(kv_shape)
        self.S_count = 1 if tokens_per_forward == 1 else 2
        S_shape = (linear_layers, self.S_count, batch, config.linear_num_value_heads,
                   config.linear_key_head_dim, config.linear_value_head_dim)
        self.S = weight.new_zeros(S_shape, dtype=dtype)
        if tokens_per_forward == 1:
            # stored as S^T, so that the numbers that delta_step adds are next to each other
            self.S = self.S.mT.contiguous().mT
        window_shape = (linear_layers, batch, self.window_length, sum(delta_rule_widths(config)))
        self.delta_inputs = weight.new_zeros(window_shape, dtype=dtype)
        conv_shape = (linear_layers, batch, self.conv_length, conv_channels(config))
        self.conv = weight.new_zeros(conv_shape)

        # constants of all forwards
        self.all_positions = torch.arange(length, device=weight.device)      # 0 .. length - 1
        self.window_offsets = torch.arange(self.window_length, device=weight.device)
        self.sequences = torch.arange(batch, device=weight.device)           # (B,), for indexing
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

    def put(self, slots, other, rows):
        """Copy the given rows of another state, which can be shorter, into slots of this one.

        slots and rows are lists of places in the two batches. The rest of the keys and
        values becomes 0: an old NaN would survive the mask, because 0 * NaN is NaN.
        """
        self.position[slots] = other.position[rows]
        self.keys[:, slots] = 0
        self.values[:, slots] = 0
        self.keys[:, slots, :, :other.length] = other.keys[:, rows]
        self.values[:, slots, :, :other.length] = other.values[:, rows]
        self.S[:, :, slots] = other.S[:, :, rows]
        self.delta_inputs[:, slots] = other.delta_inputs[:, rows]
        self.conv[:, slots] = other.conv[:, rows]

    def reset(self):
        """Start again with empty sequences. Keys and values become 0 for the reason in put()."""
        self.position.zero_()
        self.keys.zero_()
        self.values.zero_()
        self.S.zero_()
        self.delta_inputs.zero_()
        self.conv.zero_()

    def begin_forward(self, T, segment=None):
        """Set what the layers need to know before they read T tokens.

        segment None: a block, T = K. Otherwise the tokens are part of a prompt, see Segment.

        When a CUDA graph is replayed, this Python code does not run, but the recorded kernels fill
        the same tensors again. So the code that reads these tensors must be in the same graph.
        """
        K = self.tokens_per_forward
        self.forward_is_block = segment is None
        self.has_static_shape = self.forward_is_block or self.pads_segments
        offsets = self.all_positions[:T]
        start = self.position[:, None]                                       # (B, 1)
        self.token_positions = start + offsets                               # (B, T)
        cos = self.cos[self.token_positions]
        sin = self.sin[self.token_positions]
        self.rotary = (cos, sin)

        # the place of S, and the places of the earlier tokens for the convolution
        chunk = self.position // K
        self.S_place = chunk % self.S_count                                  # (B,)
        past = self.all_positions[:self.past_length] - self.past_length      # -3, -2, -1
        past_places = (start + past) % self.conv_length                      # (B, 3)

        if self.forward_is_block:
            assert T == K, (T, K)
            self.next_S_place = (chunk + 1) % self.S_count
            self.conv_places = self.token_positions % self.conv_length       # (B, K)
            self.conv_read_places = torch.cat((past_places, self.conv_places), 1)
            self.mask = self.all_positions <= self.token_positions[..., None]  # (B, K, length)
            if K > 1:
                window_start = (chunk * K)[:, None]                          # (B, 1)
                window = window_start + self.window_offsets
                # places of the window and of the block in the ring buffer
                self.window_places = window % self.window_length             # (B, 2 K)
                self.block_places = self.token_positions % self.window_length    # (B, K)
                self.block_in_window = self.token_positions - window_start   # (B, K)
        else:
            self.segment_start = segment.start
            # as tensors, because a compiled layer that reads an int is compiled for each value
            token_count = segment.token_count
            end = self.position + token_count                                # (B,)
            self.next_S_place = end // K % self.S_count
            self.is_padding = offsets >= token_count[:, None]                # (B, T)
            self.conv_places = (end[:, None] + past) % self.conv_length      # (B, 3)
            self.conv_read_places = past_places
            # the last 3 tokens of the segment, counted from the 3 earlier ones in front
            self.last_positions = token_count[:, None] + self.all_positions[:self.past_length]

    def commit(self, n):
        """Keep the first n tokens of the last forward. n, 0 .. K: an int or a tensor (B,) or (1,).

        After a segment of a prompt, n is its token_count. The update is in place, because CUDA
        graphs hold the addresses of these tensors.
        """
        self.position += n


class LinearLayerState:
    """A linear layer's part of a DecodeState, as views of its tensors."""

    def __init__(self, state, index, config):
        self.state = state
        self.conv = state.conv[index]
        self.delta_inputs = state.delta_inputs[index]
        self.S = state.S[index]
        self.widths = delta_rule_widths(config)

    def convolution_input(self, qkv):
        """qkv (B, T, channels) after the few earlier tokens that the convolution needs.

        Before the start of a prompt these are zeros, which reset() wrote.
        """
        state = self.state
        sequences = state.sequences[:, None]
        if state.forward_is_block:
            self.conv[sequences, state.conv_places] = qkv
            return self.conv[sequences, state.conv_read_places]
        past = self.conv[sequences, state.conv_read_places]
        qkv = torch.cat((past, qkv), 1)
        # keep the last of the segment's tokens, not the padding
        last = qkv[sequences, state.last_positions]
        self.conv[sequences, state.conv_places] = last
        return qkv

    def delta_rule(self, q, k, v, g, beta):
        """Outputs (B, T, Hv, Dv) of the tokens, given the committed ones.

        Stores the state at the end of the first chunk, or after a segment of a prompt.
        """
        state = self.state
        if state.forward_is_block and state.tokens_per_forward == 1:
            o, S = delta_step(q, k, v, g, beta, S=self.S[0])
            self.S[0].copy_(S)
            return o.to(v.dtype)

        S = self.S[state.S_place, state.sequences]                           # (B, Hv, D, Dv)
        if not state.forward_is_block:
            # a segment of a prompt; padding causes no decay and writes nothing
            is_padding = state.is_padding[..., None]                         # (B, T, 1)
            g = g.masked_fill(is_padding, 0)
            beta = beta.masked_fill(is_padding, 0)
            o, S = gated_delta_rule(q, k, v, g, beta, S=S)  # in longer chunks
        else:
            o, S = self.delta_rule_of_block(q, k, v, g, beta, S=S)
        self.S[state.next_S_place, state.sequences] = S
        return o.to(v.dtype)

    def delta_rule_of_block(self, q, k, v, g, beta, *, S):
        """Outputs (B, K, Hv, Dv) of a block after its tail, and S at the end of the first chunk."""
        state = self.state
        sequences = state.sequences[:, None]
        # write the block after the tail
        inputs = [x.to(self.S.dtype).flatten(2) for x in (q, k, v, g, beta)]
        inputs = torch.cat(inputs, -1)                                       # (B, K, widths)
        self.delta_inputs[sequences, state.block_places] = inputs
        # run both chunks of the window, and keep the outputs of the block
        window = self.delta_inputs[sequences, state.window_places]           # (B, 2 K, widths)
        window_q, window_k, window_v, window_g, window_beta = window.split(self.widths, -1)
        window_q = window_q.unflatten(-1, q.shape[2:])
        window_k = window_k.unflatten(-1, k.shape[2:])
        window_v = window_v.unflatten(-1, v.shape[2:])
        o, S = delta_rule_of_window(window_q, window_k, window_v, window_g, window_beta, S=S)
        o = o[sequences, state.block_in_window]
        return o, S


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
        mask = causal_lower_right(T, end)  # the last token sees all keys
        return F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)


class Segment(NamedTuple):
    """Says that the tokens of a forward are part of a prompt, at the same place in all sequences.

    start         position of the first token. An int, because it decides how many keys are read
    token_count   how many of the tokens belong to each prompt, (B,) or (1,). The rest is padding
    """
    start: int
    token_count: torch.Tensor


def run_directly(name, function, *inputs):
    """Runs a forward. On a GPU, Graphs.run() of fast/cuda_graph.py takes its place. It records the
    forward under this name, and replays it."""
    return function(*inputs)


@torch.no_grad()
def prefill(target, prompts, state, target_layer_ids=(), run=run_directly):
    """Reset a state, and process B prompts of 1 to length - K tokens into it.

    prompts is a list of lists or a tensor (B, n). Returns the features (B, T, ...) of the prompts,
    and the logits (B, V) of their last tokens. T is the length of the longest prompt, or more if
    segments are padded. Ignore the features after the end of a prompt.

    All but the last 1 to K tokens are processed in segments, which always start at the same
    positions. The rest form one block without guesses, which starts at a multiple of K and is
    padded to K tokens. So the end of a prompt runs the same code as everything after it. With
    n = 37 and K = 16: a segment of 32 tokens, and a block of 5 tokens and padding.

    If segments are padded, all shapes depend only on B, segment_length, and length. So the bits of
    a sequence depend neither on its row nor on the other prompts.

    run(name, function, *inputs) runs a forward. There is one name for all blocks at the end of
    prompts, and one for each start of a padded segment. Other segments do not use run.
    """
    K = state.tokens_per_forward
    device = state.position.device
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    longest = int(lengths.max())
    assert lengths.min() >= 1 and longest <= state.length - K, (lengths, state.length, K)
    bulks = (lengths - 1) // K * K                                           # (B,)
    longest_bulk = int(bulks.max())
    block_positions = bulks[:, None] + torch.arange(K)                       # (B, K)

    # side by side, with enough padding for the last segment and block
    tokens = torch.zeros(len(prompts), longest + state.segment_length + K, dtype=torch.long)
    for row, prompt in zip(tokens, prompts):
        row[:len(prompt)] = torch.as_tensor(prompt)
    blocks = tokens.gather(1, block_positions).to(device)
    tokens = tokens.to(device)

    state.reset()
    all_features = []
    for start in range(0, longest_bulk, state.segment_length):
        token_count = (bulks - start).clamp(0, state.segment_length)
        token_count = token_count.to(device)
        forward = functools.partial(
            forward_and_commit, target, state, target_layer_ids, start=start)
        if state.pads_segments:
            end = min(start + state.segment_length, state.length)  # not past the buffer
            features, _ = run(("segment", start), forward, tokens[:, start:end], token_count)
        else:
            end = min(start + state.segment_length, longest_bulk)
            features, _ = forward(tokens[:, start:end], token_count)
        if target_layer_ids:
            # a copy, because the next replay can overwrite the outputs of this one
            all_features.append(features.clone())

    forward = functools.partial(forward_and_commit, target, state, target_layer_ids)
    rests = lengths - bulks
    rests = rests.to(device)
    block_features, hidden = run("end of a prompt", forward, blocks, rests)
    last_hidden = hidden[state.sequences, rests - 1]                         # (B, width)
    logits = target.logits(last_hidden)                                      # (B, V)
    if not target_layer_ids:
        return None, logits

    # put the features of each block right after those of its prompt's segments, over the padding
    room = torch.zeros_like(block_features)
    features = torch.cat((*all_features, room), 1)
    features[state.sequences[:, None], block_positions.to(device)] = block_features
    if not state.pads_segments:
        features = features[:, :longest]
    return features, logits


def forward_and_commit(target, state, target_layer_ids, tokens, n, *, start=None):
    """Features and hidden states of tokens (B, T). Commits the first n tokens; n is a tensor (B,).
    The tokens are a segment of a prompt at `start`, or a block if start is None."""
    segment = None if start is None else Segment(start, n)
    features, hidden = target(tokens, state, target_layer_ids, segment=segment)
    state.commit(n)
    return features, hidden
