"""
The drafter of DFlash (Chen, Liang, Liu, arXiv 2602.06036). The file name is nanoGPT's.

The drafter guesses a block of K tokens in one forward pass. The input is the embeddings of
[x_n, MASK, .., MASK]: the newest token, the *anchor*, at position n, and K - 1 masks. The drafter
knows the earlier text only through *features*: outputs of a few of the target's layers
(`target_layer_ids`), concatenated. `fc` mixes them, and every layer of the drafter attends to the
result, the *context*. The context ends before the anchor, because the target has not processed the
anchor yet. Position k of the block guesses the token at position n + k, not the token after it.
Position 0 is the anchor and guesses nothing.

The drafter has no embedding and no head. It uses those of the target, which are frozen.

Shapes: B batch, T tokens of a sequence, A anchors in a sequence, K block size, H heads, Hkv
key-value heads, D head width, V vocabulary size, and `width`, the width of the residual stream.

A copy of this file ships in every checkpoint as dflash.py. It needs only torch and transformers, so
AutoModel.from_pretrained(folder, trust_remote_code=True) loads it anywhere.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import PreTrainedModel
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config

# --------------------------------------------------------------------------------------------------
# the drafter


class DFlashDraftModel(PreTrainedModel):
    """The drafter. Its parameters have the names, shapes, and order of published checkpoints.

    config is a Qwen3Config with a dflash_config: block_size, mask_token_id, target_layer_ids, and
    optionally causal, which decides for all layers whether a block's attention is causal.
    """
    config_class = Qwen3Config
    base_model_prefix = ""

    def __init__(self, config):
        super().__init__(config)
        options = config.dflash_config
        # block_size is in dflash_config or at the top level: published files differ
        self.block_size = options.get("block_size") or config.block_size
        self.target_layer_ids = tuple(options["target_layer_ids"])
        self.mask_token_id = options["mask_token_id"]
        width = config.hidden_size
        feature_width = len(self.target_layer_ids) * width
        layers = [Layer(config, layer_type) for layer_type in config.layer_types]
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(width, config.rms_norm_eps)
        self.fc = nn.Linear(feature_width, width, bias=False)
        self.hidden_norm = RMSNorm(width, config.rms_norm_eps)
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)

    # These three methods serve decoding and training.

    def embed_block(self, tokens, embedding):
        """Embeddings (..., K, width) of [token, MASK, .., MASK] for each anchor token (...)."""
        shape = (*tokens.shape, self.block_size)
        ids = torch.full(shape, self.mask_token_id, device=tokens.device)
        ids[..., 0] = tokens
        return embedding[ids]

    def context(self, features):
        """The context (B, T, width) from features (B, T, len(target_layer_ids) * width).

        hidden_norm is applied once for all layers. Their input_layernorm is not applied to the
        context.
        """
        mixed = self.fc(features)
        return self.hidden_norm(mixed)

    def rotary(self, positions):
        """cos and sin for integer positions. All channels rotate, unlike in the target."""
        theta = self.config.rope_parameters["rope_theta"]
        return rotary_table(positions, self.config.head_dim, theta)

    # Decoding: one block per sequence. The cache holds each layer's keys and values by position.
    # write_context() fills the positions of committed tokens, for good. decode_block() writes its
    # block at the positions after them. The next write_context() overwrites the block.

    def new_cache(self, batch, length):
        """Keys and values of each layer for `length` positions, both (B, Hkv, length, D)."""
        shape = (batch, self.config.num_key_value_heads, length, self.config.head_dim)
        cache = []
        for _ in self.layers:
            keys = self.fc.weight.new_zeros(shape)
            values = self.fc.weight.new_zeros(shape)
            cache.append((keys, values))
        return cache

    def write_context(self, features, cache, position):
        """Write the keys and values of features (B, T, ...) into the cache, from position (B,) on.

        The last features may belong to rejected guesses. That is harmless, because the next block
        overwrites them.
        """
        T = features.shape[1]
        offsets = torch.arange(T, device=features.device)
        positions = position[:, None] + offsets                              # (B, T)
        context = self.context(features)
        rotary = self.rotary(positions)
        for layer, (keys, values) in zip(self.layers, cache):
            k, v = layer.self_attn.keys_values(context, rotary)
            write_at(keys, positions, k)
            write_at(values, positions, v)

    def draft_logits(self, anchor, target, cache, position):
        """Logits (B, K-1, V) for the tokens after the anchors (B,), which are at position (B,)."""
        embedded = self.embed_block(anchor, target.embed_tokens.weight)
        hidden = self.decode_block(embedded, cache, position)
        guesses = hidden[:, 1:]  # the anchor guesses nothing
        return target.logits(guesses.contiguous())

    def decode_block(self, embedded, cache, position):
        """Hidden states (B, K, width) of one embedded block per sequence.

        Its anchor is at position (B,). The cache holds the context of all positions before it.
        """
        K = embedded.shape[1]
        offsets = torch.arange(K, device=embedded.device)
        positions = position[:, None] + offsets                              # (B, K)
        rotary = self.rotary(positions)
        x = embedded
        for layer, (keys, values) in zip(self.layers, cache):
            x = layer.decode(x, rotary, keys, values, positions)
        return self.norm(x)

    # Training: many blocks of each sequence at once, which cannot attend to each other. Context and
    # blocks are separate inputs, so a layer computes the context's keys and values only once.

    def forward(self, features, embedded, anchors, new_attend=None):
        """Hidden states (B, A, K, width), which the target's head turns into guesses.

        features (B, T, ...)        of whole sequences
        embedded (B, A, K, width)   the blocks, from embed_block()
        anchors  (B, A)             positions of the anchors: ascending, then invalid ones (0)
        new_attend                  masked_attend() below, or a faster form from fast/
        """
        B, A, K, _ = embedded.shape
        T = features.shape[1]
        context = self.context(features)
        context_positions = torch.arange(T, device=features.device)
        offsets = torch.arange(K, device=features.device)
        block_positions = anchors[:, :, None] + offsets
        context_rotary = self.rotary(context_positions)
        block_rotary = self.rotary(block_positions)

        # layers with the same mask share an attention function
        if new_attend is None:
            new_attend = masked_attend
        attend = {}
        x = embedded
        for layer in self.layers:
            limits = layer.self_attn.limits
            if limits not in attend:
                visible = block_visibility(anchors, T, K, *limits)
                attend[limits] = new_attend(visible, anchors, T, K)
            x = layer(x, context, block_rotary, context_rotary, attend[limits])
        return self.norm(x)

# --------------------------------------------------------------------------------------------------
# the attention mask of training


def block_visibility(anchors, T, K, sliding_window=None, is_causal=False):
    """Defines which keys a query sees, by a function visible(batch, head, query, key).

    The arguments of visible() are integer tensors that broadcast; flex_attention expects this form.
    Queries are the positions of all A blocks, numbered 0 .. A K - 1. Keys are the T tokens of the
    sequence, then the block positions again: T .. T + A K - 1.

    In a full layer, a query sees the context strictly before its anchor and all K positions of its
    block, also the later ones. It never sees a different block. Causal layers and sliding windows
    hide a part of this, see narrow().
    """
    def visible(batch, head, query, key):
        block_of_query = query // K
        anchor = anchors[batch, block_of_query]
        before_anchor = key < anchor    # false for keys of blocks, because they are T or more
        block_of_key = (key - T) // K
        in_own_block = (key >= T) & (block_of_key == block_of_query)
        seen = before_anchor | in_own_block
        if sliding_window is None and not is_causal:
            return seen

        # Keys of other blocks get a meaningless position, but `seen` hides them already.
        query_position = anchor + query % K
        block_key_position = anchor + (key - T) % K
        key_position = torch.where(key < T, key, block_key_position)
        return narrow(seen, query_position, key_position, sliding_window, is_causal)

    return visible


def narrow(seen, query_position, key_position, sliding_window, is_causal):
    """Takes a full layer's mask `seen`, and removes what a causal layer or a window hides.

    A causal layer hides the positions after the query's own. A window of w shows the query's own
    position and w - 1 positions on either side.
    """
    if is_causal:
        seen = seen & (key_position <= query_position)
    if sliding_window is not None:
        seen = seen & (key_position > query_position - sliding_window)
        seen = seen & (key_position < query_position + sliding_window)
    return seen


def masked_attend(visible, anchors, T, K):
    """The plain form of training's attention, with one mask over all queries and keys.

    Returns attend(q, context_k, context_v, block_k, block_v) -> (B, H, A K, D) for q (B, H, A K,
    D), context_k, context_v (B, Hkv, T, D), and block_k, block_v (B, Hkv, A K, D).
    """
    B, A = anchors.shape
    device = anchors.device
    batch = torch.arange(B, device=device)[:, None, None]
    queries = torch.arange(A * K, device=device)[:, None]
    keys = torch.arange(T + A * K, device=device)
    mask = visible(batch, 0, queries, keys)                              # (B, A K, T + A K)
    mask = mask.unsqueeze(1)    # the same for all heads

    def attend(q, context_k, context_v, block_k, block_v):
        k = torch.cat((context_k, block_k), 2)
        v = torch.cat((context_v, block_v), 2)
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)

    return attend

# --------------------------------------------------------------------------------------------------
# layers


class Layer(nn.Module):
    """Attention, then the MLP, each on a normed copy of the residual stream (pre-norm)."""

    def __init__(self, config, layer_type):
        super().__init__()
        width = config.hidden_size
        self.self_attn = Attention(config, layer_type)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(width, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(width, config.rms_norm_eps)

    def forward(self, x, *attention_inputs):
        """Training: x (B, A, K, width). For the other arguments see Attention.forward."""
        normed = self.input_layernorm(x)
        attended = self.self_attn(normed, *attention_inputs)
        x = x + attended
        normed = self.post_attention_layernorm(x)
        return x + self.mlp(normed)

    def decode(self, x, rotary, keys, values, positions):
        """Decoding: x (B, K, width). For the other arguments see Attention.decode."""
        normed = self.input_layernorm(x)
        attended = self.self_attn.decode(normed, rotary, keys, values, positions)
        x = x + attended
        normed = self.post_attention_layernorm(x)
        return x + self.mlp(normed)


class Attention(nn.Module):
    """Grouped-query attention of a block's positions to [context | the block itself]."""

    def __init__(self, config, layer_type):
        super().__init__()
        self.head_dim = config.head_dim
        is_sliding = layer_type == "sliding_attention"
        sliding_window = config.sliding_window if is_sliding else None
        is_causal = config.dflash_config.get("causal", is_sliding)  # inside the block
        self.limits = (sliding_window, is_causal)                   # for narrow()
        width = config.hidden_size
        bias = config.attention_bias
        query_width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(width, query_width, bias=bias)
        self.k_proj = nn.Linear(width, kv_width, bias=bias)
        self.v_proj = nn.Linear(width, kv_width, bias=bias)
        self.o_proj = nn.Linear(query_width, width, bias=bias)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def project(self, x):
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def project_context(self, x):
        return self.k_proj(x), self.v_proj(x)

    def queries_keys_values(self, x, rotary):
        """q (..., H, D), k and v (..., Hkv, D) of the normed block x (..., width)."""
        q, k, v = self.project(x)
        q = self.q_norm(self.split_heads(q))
        k = self.k_norm(self.split_heads(k))
        v = self.split_heads(v)
        return rotate(q, rotary), rotate(k, rotary), v

    def keys_values(self, context, rotary):
        """k and v (..., Hkv, D) of the context (..., width), which has no queries."""
        k, v = self.project_context(context)
        k = self.k_norm(self.split_heads(k))
        v = self.split_heads(v)
        return rotate(k, rotary), v

    def split_heads(self, x):
        return x.unflatten(-1, (-1, self.head_dim))

    def forward(self, x, context, block_rotary, context_rotary, attend):
        """Training. x (B, A, K, width), context (B, T, width); attend: see masked_attend()."""
        A, K = x.shape[1:3]
        context_k, context_v = self.keys_values(context, context_rotary)
        context_k = context_k.transpose(1, 2)                                # (B, Hkv, T, D)
        context_v = context_v.transpose(1, 2)
        q, block_k, block_v = self.queries_keys_values(x, block_rotary)
        q = q.flatten(1, 2).transpose(1, 2)                                  # (B, H, A K, D)
        block_k = block_k.flatten(1, 2).transpose(1, 2)                      # (B, Hkv, A K, D)
        block_v = block_v.flatten(1, 2).transpose(1, 2)
        o = attend(q, context_k, context_v, block_k, block_v)
        o = o.transpose(1, 2)                                                # (B, A K, H, D)
        o = o.unflatten(1, (A, K)).flatten(3)                                # (B, A, K, H D)
        return self.o_proj(o)

    def decode(self, x, rotary, keys, values, positions):
        """Decoding. x (B, K, width) at positions (B, K).

        keys and values (B, Hkv, length, D): this layer's part of the cache. It holds the context of
        all positions before the block. The block's own keys and values go to the positions after
        them.
        """
        q, k, v = self.queries_keys_values(x, rotary)
        write_at(keys, positions, k)
        write_at(values, positions, v)

        # the mask of block_visibility() for one block: everything up to its last position,
        # because the buffer has stale data after that
        length = keys.shape[2]
        key_position = torch.arange(length, device=x.device)
        query_position = positions[:, :, None]
        last_position = query_position[:, -1:]
        mask = key_position <= last_position.expand_as(query_position)       # (B, K, length)
        mask = narrow(mask, query_position, key_position, *self.limits)

        q = q.transpose(1, 2)                                                # (B, H, K, D)
        o = masked_attention(q, keys, values, mask)
        o = o.transpose(1, 2).flatten(2)                                     # (B, K, H D)
        return self.o_proj(o)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        intermediate = config.intermediate_size
        self.gate_proj = nn.Linear(width, intermediate, bias=False)
        self.up_proj = nn.Linear(width, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, width, bias=False)

    def forward(self, x):
        gate, up = self.project(x)
        gated = F.silu(gate) * up
        return self.down_proj(gated)

    def project(self, x):
        return self.gate_proj(x), self.up_proj(x)


class RMSNorm(nn.Module):
    """w * x / rms(x), with statistics in fp32. In the target's norm the gain is 1 + w."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        width = x.shape[-1:]
        weight = to_fp32(self.weight)
        normed = F.rms_norm(to_fp32(x), width, weight, self.eps)
        return normed.to(x.dtype)


def to_fp32(x):
    """x in fp32, or unchanged if it is fp64. Statistics, softmax, and loss use this."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def write_at(buffer, positions, x):
    """Write x (B, T, Hkv, D) into a buffer (B, Hkv, length, D) at positions (B, T)."""
    sequences = torch.arange(x.shape[0], device=x.device)[:, None, None]
    heads = torch.arange(x.shape[2], device=x.device)[:, None]
    new = x.transpose(1, 2)                                                  # (B, Hkv, T, D)
    new = new.to(buffer.dtype)
    places = positions[:, None]                                              # (B, 1, T)
    buffer[sequences, heads, places] = new


def rotary_table(positions, dim, theta):
    """cos and sin (..., dim) in fp32 for integer positions (...).

    Channels i and i + dim/2 rotate together by the angle position * (1 / theta^(2i/dim)). The
    frequency is a quotient, like in transformers, because published weights were trained with it.
    theta^(-2i/dim) rounds differently, which changes cos by 0.01 at position 200,000.
    """
    channels = torch.arange(0, dim, 2, device=positions.device).float()
    frequencies = 1.0 / theta ** (channels / dim)
    angles = positions[..., None].float() * frequencies
    angles = torch.cat((angles, angles), -1)
    return angles.cos(), angles.sin()


def rotate(x, rotary):
    """Rotary embedding of x (..., T, H, D) by a table of cos and sin (..., T, dim).

    The first dim channels of each head rotate. The others, if dim < D, stay unchanged.
    """
    cos, sin = rotary
    dim = cos.shape[-1]
    cos = cos[..., None, :].to(x.dtype)
    sin = sin[..., None, :].to(x.dtype)
    turning = x[..., :dim]
    resting = x[..., dim:]
    first_half, second_half = turning.chunk(2, dim=-1)
    quarter_turn = torch.cat((-second_half, first_half), -1)
    turned = turning * cos + quarter_turn * sin
    if resting.shape[-1] == 0:
        return turned
    return torch.cat((turned, resting), -1)


def masked_attention(q, k, v, mask):
    """Attention (B, H, K, D) of a few queries to a whole buffer.

    q (B, H, K, D); k, v (B, Hkv, length, D); mask (B, K, length), true if a query sees a key.
    Hidden keys have a weight of exactly zero. The softmax is in fp32. For so few queries, two
    matmuls are several times faster on a GPU than library kernels.
    """
    B, H, K, D = q.shape
    Hkv = k.shape[1]
    # fold query heads that share a key head into the query axis, so that keys are not copied
    stacked = q.reshape(B, Hkv, -1, D)                              # (B, Hkv, H/Hkv * K, D)
    scores = to_fp32(stacked @ k.mT)
    scores = scores * D ** -0.5
    scores = scores.unflatten(2, (-1, K))                           # (B, Hkv, H/Hkv, K, length)
    hidden = ~mask[:, None, None]
    scores = scores.masked_fill(hidden, -torch.inf)
    weights = scores.softmax(-1).to(v.dtype)
    o = weights.flatten(2, 3) @ v
    return o.view(B, H, K, D)
