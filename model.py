"""
The drafter of DFlash and its loss.

DFlash (Chen, Liang, Liu, arXiv 2602.06036) drafts a block of K tokens in one forward. The input is
[x_n, MASK, .., MASK]: the embeddings of the last known token, the *anchor*, at position n, and of
K - 1 masks. (In decoding `anchor` is this token; in training `anchors` are positions of some.)
All that the drafter knows of the past are the *features*: hidden states which the target computed
anyway, at a few of its layers (`target_layer_ids`), concatenated. `fc` mixes them, and every layer
of the drafter sees the result as keys and values: its *context*. The context ends before the
anchor, since the anchor itself has not been through the target yet. The block has K *slots*. Slot k
guesses the token at position n + k, not the one after. Slot 0 is the anchor and guesses nothing.

The drafter has no embedding and no head of its own. It uses those of the target, which are frozen.

Shapes: B batch, T tokens of a sequence, A anchors in a sequence, K block size, H heads, Hkv
key-value heads, D head width, V vocabulary; `width` is that of the residual stream.

A copy of this file ships in every checkpoint as dflash.py, so that
AutoModel.from_pretrained(folder, trust_remote_code=True) loads it anywhere. It needs torch and
transformers only.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import PreTrainedModel
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config

# --------------------------------------------------------------------------------------------------
# the drafter


class DFlashDraftModel(PreTrainedModel):
    """The drafter. Parameter names, shapes and their order are those of published checkpoints.

    config is a Qwen3Config with a dflash_config: block_size, mask_token_id, target_layer_ids.
    """
    config_class = Qwen3Config
    base_model_prefix = ""

    def __init__(self, config):
        super().__init__(config)
        # block_size stands inside or at the top: published files differ
        self.block_size = config.dflash_config.get("block_size") or config.block_size
        self.target_layer_ids = tuple(config.dflash_config["target_layer_ids"])
        self.mask_token_id = config.dflash_config["mask_token_id"]
        feature_width = len(self.target_layer_ids) * config.hidden_size
        layers = [Layer(config, kind) for kind in config.layer_types]
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.fc = nn.Linear(feature_width, config.hidden_size, bias=False)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)

    # What decoding and training share.

    def embed_block(self, tokens, embedding):
        """Embeddings (..., K, width) of [token, MASK, .., MASK] for each anchor token (...)."""
        shape = (*tokens.shape, self.block_size)
        ids = torch.full(shape, self.mask_token_id, device=tokens.device)
        ids[..., 0] = tokens
        return embedding[ids]  # for few ids a GPU takes a quarter of F.embedding's time

    def context(self, features):
        """What every layer sees of the past, (B, T, width).

        features (B, T, len(target_layer_ids) * width). hidden_norm norms it once for all layers:
        their own input_layernorm is for the slots of the block only.
        """
        return self.hidden_norm(self.fc(features))

    def rotary(self, positions):
        """cos and sin for integer positions; unlike the target, the drafter rotates whole heads."""
        theta = self.config.rope_parameters["rope_theta"]
        return rotary_table(positions, self.config.head_dim, theta)

    # Decoding: one block a sequence. A cache holds the keys and values of each layer, by position.
    # write_context() writes those of committed positions, which stay. decode_block() writes its
    # block's after them, for this one forward: the next write_context() begins there.

    def new_cache(self, batch, length):
        """For each layer keys and values of `length` positions, (B, Hkv, length, D) both.

        Tensors of their own: torch.compile would copy a common one whole to write into a part.
        """
        shape = (batch, self.config.num_key_value_heads, length, self.config.head_dim)
        cache = []
        for _ in self.layers:
            keys = self.fc.weight.new_zeros(shape)
            values = self.fc.weight.new_zeros(shape)
            cache.append((keys, values))
        return cache

    def write_context(self, features, cache, position):
        """Write the keys and values of features (B, T, ...) into the cache, from position (B,) on.

        Features of rejected guesses may stand at the end, as the next block overwrites them.
        """
        T = features.shape[1]
        positions = position[:, None] + torch.arange(T, device=features.device)  # (B, T)
        context = self.context(features)
        rotary = self.rotary(positions)
        for layer, (keys, values) in zip(self.layers, cache):  # written in place
            k, v = layer.self_attn.keys_values(context, rotary)
            write_at(keys, positions, k)
            write_at(values, positions, v)

    def draft_logits(self, anchor, target, cache, position):
        """Logits (B, K-1, V) of the guesses for the tokens after the anchors (B,) at position (B,).
        """
        embedded = self.embed_block(anchor, target.embed_tokens.weight)
        hidden = self.decode_block(embedded, cache, position)
        hidden = hidden[:, 1:].contiguous()  # slot 0, the anchor, guesses nothing
        return target.logits(hidden)

    def decode_block(self, embedded, cache, position):
        """Hidden states (B, K, width) of one embedded block a sequence.

        Its anchor stands at position (B,). The cache holds the context of all positions before it.
        """
        K = embedded.shape[1]
        positions = position[:, None] + torch.arange(K, device=embedded.device)  # (B, K)
        rotary = self.rotary(positions)
        x = embedded
        for layer, (keys, values) in zip(self.layers, cache):
            x = layer.decode(x, rotary, keys, values, positions)
        return self.norm(x)

    def compile_decoding(self):
        """Compile the drafter's two parts of a decoding round."""
        # small kernels that do not wait for one another are launched as one
        options = {"combo_kernels": True}
        self.decode_block = torch.compile(self.decode_block, dynamic=False, options=options)
        self.write_context = torch.compile(self.write_context, options=options)

    # Training: many blocks of each sequence at once, which cannot see one another. The context is
    # apart from the blocks: a layer computes its keys and values once for all blocks.

    def forward(self, features, embedded, anchors, attend=None):
        """Hidden states (B, A, K, width), which the target's head turns into guesses.

        features (B, T, ...)        of whole sequences
        embedded (B, A, K, width)   the blocks, from embed_block()
        anchors  (B, A)             positions of the anchors, as sample_anchors() orders them
        attend                      None: flex_attention, which GPUs have; or what gives the same on
                                    CPUs, attention_by_anchor_groups of fast/cpu.py
        """
        B, A, K, _ = embedded.shape
        T = features.shape[1]
        device = features.device
        context = self.context(features)
        context_positions = torch.arange(T, device=device)
        block_positions = anchors[:, :, None] + torch.arange(K, device=device)
        context_rotary = self.rotary(context_positions)
        block_rotary = self.rotary(block_positions)

        # Who sees whom, one mask for each attention window: for flex_attention a BlockMask (its
        # blocks are tiles of scores, not ours), for `attend` the function that says it.
        masks = {}
        for sliding_window in {layer.self_attn.sliding_window for layer in self.layers}:
            mask = block_visibility(anchors, T, K, sliding_window)
            if attend is None:
                query_count = A * K
                key_count = T + query_count
                mask = block_mask(mask, B, query_count, key_count, device)
            masks[sliding_window] = mask

        x = embedded
        for layer in self.layers:
            mask = masks[layer.self_attn.sliding_window]
            x = layer(x, context, block_rotary, context_rotary, anchors, mask, attend)
        return self.norm(x)

# --------------------------------------------------------------------------------------------------
# who sees whom in training


def block_visibility(anchors, T, K, sliding_window=None):
    """The definition of what a block sees: the mask of training's attention.

    Returns visible(batch, head, query, key) over integer tensors that broadcast, which is also the
    form that flex_attention asks for. Queries are the slots of all A blocks, numbered 0 .. A K - 1.
    Keys are the T tokens of the sequence and, after them, the slots again: T .. T + A K - 1.

    A slot sees the context strictly before its anchor, and all K slots of its own block, those
    after it too. It never sees another block.

    Some published drafters have sliding layers. There a slot sees, of all this, only the last
    sliding_window positions up to its own: itself included, and none after it.
    """
    def visible(batch, head, query, key):
        anchor_position = anchors[batch, query // K]
        before_anchor = key < anchor_position  # a slot's number is T or more: never before it
        block_of_query = query // K
        block_of_key = (key - T) // K
        in_own_block = (key >= T) & (block_of_key == block_of_query)
        seen = before_anchor | in_own_block
        if sliding_window is not None:
            # By position in the sequence. For keys of other blocks it is wrong, but those are not
            # in `seen` anyway.
            query_position = anchor_position + query % K
            key_position_in_own_block = anchor_position + (key - T) % K
            key_position = torch.where(key < T, key, key_position_in_own_block)
            not_later = key_position <= query_position
            not_too_old = key_position > query_position - sliding_window
            seen = seen & not_later & not_too_old
        return seen
    return visible


# Compiled, as the plain functions would form all scores, and the visibility of all of them; once
# for each T, as shapes are static.
compiled_flex_attention = torch.compile(flex_attention, dynamic=False)
compiled_create_block_mask = torch.compile(create_block_mask, dynamic=False)

# How flex_attention's kernels are launched where a head has more than 128 channels. torch gives
# their backward 4 warps. With 8 it takes 4.2 ms in place of 6.5 at Phase 1.2's shape (H200), and
# gives the same bits. The prefix bwd_ says that it is for the backward alone.
WIDE_HEAD_OPTIONS = {"bwd_num_warps": 8}


def block_mask(visible, B, query_count, key_count, device):
    """What flex_attention makes of visible(): which tiles of 128 x 128 scores, which torch calls
    blocks, it has to compute."""
    create = compiled_create_block_mask
    if key_count <= 128:
        create = create_block_mask  # torch.compile has no code for a mask of a single tile
    return create(visible, B, None, query_count, key_count, device)

# --------------------------------------------------------------------------------------------------
# layers


class Layer(nn.Module):
    """Attention, then the MLP, each on a normed copy of the residual stream (pre-norm)."""

    def __init__(self, config, kind):
        super().__init__()
        self.self_attn = Attention(config, kind)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, *attention_inputs):
        """Training: x (B, A, K, width); the rest is handed on, see Attention.forward."""
        normed = self.input_layernorm(x)
        x = x + self.self_attn(normed, *attention_inputs)
        return x + self.mlp(self.post_attention_layernorm(x))

    def decode(self, x, rotary, keys, values, positions):
        """Decoding: x (B, K, width); see Attention.decode."""
        normed = self.input_layernorm(x)
        x = x + self.self_attn.decode(normed, rotary, keys, values, positions)
        return x + self.mlp(self.post_attention_layernorm(x))


class Attention(nn.Module):
    """Grouped-query attention from the slots of a block to [context | the block itself]."""

    def __init__(self, config, kind):
        super().__init__()
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        self.sliding_window = None
        if kind == "sliding_attention":
            self.sliding_window = config.sliding_window
            if not self.sliding_window:
                raise ValueError("config.json has sliding_attention layers but no sliding_window "
                                 "with use_sliding_window")
        width = config.hidden_size
        bias = config.attention_bias
        query_width = self.heads * self.head_dim
        kv_width = self.kv_heads * self.head_dim
        self.q_proj = nn.Linear(width, query_width, bias=bias)
        self.k_proj = nn.Linear(width, kv_width, bias=bias)
        self.v_proj = nn.Linear(width, kv_width, bias=bias)
        self.o_proj = nn.Linear(query_width, width, bias=bias)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def queries_keys_values(self, x, rotary):
        """q (..., H, D), k and v (..., Hkv, D) of the normed slots x (..., width)."""
        q, k, v = project(x, (self.q_proj, self.k_proj, self.v_proj))
        q = q.unflatten(-1, (self.heads, self.head_dim))
        k = k.unflatten(-1, (self.kv_heads, self.head_dim))
        v = v.unflatten(-1, (self.kv_heads, self.head_dim))
        return rotate(self.q_norm(q), rotary), rotate(self.k_norm(k), rotary), v

    def keys_values(self, context, rotary):
        """k and v (..., Hkv, D) of the context (..., width), which has no queries."""
        k, v = project(context, (self.k_proj, self.v_proj))
        k = k.unflatten(-1, (self.kv_heads, self.head_dim))
        v = v.unflatten(-1, (self.kv_heads, self.head_dim))
        return rotate(self.k_norm(k), rotary), v

    def forward(
            self, x, context, block_rotary, context_rotary, anchors, mask, attend):
        """Training. x (B, A, K, width), context (B, T, width), anchors (B, A).

        mask: a BlockMask of flex_attention, or for `attend` the function that it is made of.
        """
        A, K = x.shape[1:3]
        context_k, context_v = self.keys_values(context, context_rotary)
        context_k = context_k.transpose(1, 2)                                # (B, Hkv, T, D)
        context_v = context_v.transpose(1, 2)
        q, block_k, block_v = self.queries_keys_values(x, block_rotary)
        q = q.flatten(1, 2).transpose(1, 2)                                  # (B, H, A K, D)
        block_k = block_k.flatten(1, 2).transpose(1, 2)                      # (B, Hkv, A K, D)
        block_v = block_v.flatten(1, 2).transpose(1, 2)
        if attend is None:
            k = torch.cat((context_k, block_k), 2)
            v = torch.cat((context_v, block_v), 2)
            options = WIDE_HEAD_OPTIONS if self.head_dim > 128 else None
            o = compiled_flex_attention(
                q, k, v, block_mask=mask, enable_gqa=True, kernel_options=options)
        else:
            o = attend(
                q, context_k, context_v, block_k, block_v, anchors, mask)
        o = o.transpose(1, 2).unflatten(1, (A, K))                           # (B, A, K, H, D)
        return self.o_proj(o.flatten(3))

    def decode(self, x, rotary, keys, values, positions):
        """Decoding. x (B, K, width) at positions (B, K).

        keys and values (B, Hkv, length, D): this layer's part of the cache. It holds the context of
        all positions before the block; the block's own are written after it.
        """
        q, k, v = self.queries_keys_values(x, rotary)
        write_at(keys, positions, k)
        write_at(values, positions, v)

        # What block_visibility() says, for one block: all up to the block's last slot, and in a
        # sliding layer only the last positions up to the slot's own.
        key_position = torch.arange(keys.shape[2], device=x.device)
        query_position = positions[:, :, None]
        last_position = positions[:, -1:, None]
        mask = key_position <= last_position.expand_as(query_position)       # (B, K, length)
        if self.sliding_window is not None:
            mask = mask & (key_position <= query_position)
            mask = mask & (key_position > query_position - self.sliding_window)

        q = q.transpose(1, 2)                                                # (B, H, K, D)
        o = masked_attention(q, keys, values, mask)
        return self.o_proj(o.transpose(1, 2).flatten(2))


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
        gate, up = project(x, (self.gate_proj, self.up_proj))
        return self.down_proj(F.silu(gate) * up)


class RMSNorm(nn.Module):
    """w * x / rms(x), statistics in fp32. The target's norm has 1 + w in place of w."""

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
    """x in fp32, or unchanged if it is wider: statistics, softmax and loss are computed there."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.to(dtype)


def write_at(buffer, positions, x):
    """Write x (B, T, Hkv, D) into a buffer (B, Hkv, length, D) at positions (B, T)."""
    sequences = torch.arange(len(x), device=x.device)[:, None]
    buffer.transpose(1, 2)[sequences, positions] = x.to(buffer.dtype)


def project(x, layers):
    """What several linear layers make of x (..., width): a list of (..., their outputs).

    In decoding fast/projections.py may have joined their weights. Then each layer has a joined_weight,
    its own rows and those of the layers after it, and a packed_product; one product makes it all.
    """
    joined_weight = getattr(layers[0], "joined_weight", None)
    if joined_weight is None:
        return [layer(x) for layer in layers]
    if layers[0].packed_product is None:
        product = linear_product(x, joined_weight)
    else:
        product = layers[0].packed_product(x)  # of a packed copy, see fast/cpu.py
    widths = [layer.out_features for layer in layers]
    return product.split(widths, -1)


def linear_product(x, weight):
    """x W^T for x (..., inputs) and a weight W (outputs, inputs).

    One row in code that is compiled for a GPU is written as products and sums. torch.compile makes
    them one kernel with the norm or the gate beside them, faster than a library's product.
    """
    is_one_row = x.numel() == x.shape[-1]
    if is_one_row and x.is_cuda and torch.compiler.is_compiling():
        row = to_fp32(x.flatten())
        sums = (to_fp32(weight) * row).sum(-1)
        return sums.to(x.dtype).view(*x.shape[:-1], -1)
    return F.linear(x, weight)


def rotary_table(positions, dim, theta):
    """cos and sin (..., dim) in fp32 for integer positions (...).

    Channel i and channel i + dim/2 turn together, by the angle position * (1 / theta^(2i/dim)). The
    frequency is a quotient, as in transformers: theta^(-2i/dim) would be rounded differently. At
    position 200,000 that changes cos by 0.01, and published weights were trained with the quotient.
    """
    channels = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32)
    frequencies = 1.0 / theta ** (channels / dim)
    angles = positions[..., None].float() * frequencies
    angles = torch.cat((angles, angles), -1)
    return angles.cos(), angles.sin()


def rotate(x, rotary):
    """Rotary embedding of x (..., T, H, D) by a table of cos and sin (..., T, dim).

    The first dim channels of each head turn. The rest, if dim < D, stay as they are.
    """
    cos, sin = rotary
    dim = cos.shape[-1]
    cos = cos[..., None, :].to(x.dtype)
    sin = sin[..., None, :].to(x.dtype)
    turning, resting = x[..., :dim], x[..., dim:]
    first_half, second_half = turning.chunk(2, dim=-1)
    quarter_turn = torch.cat((-second_half, first_half), -1)
    turned = turning * cos + quarter_turn * sin
    if resting.shape[-1] == 0:
        return turned
    return torch.cat((turned, resting), -1)


def masked_attention(q, k, v, mask):
    """Attention (B, H, K, D) of a few queries to a whole buffer; a mask says what each one sees.

    q (B, H, K, D); k, v (B, Hkv, length, D); mask (B, K, length), true where a query sees a key.
    Keys that it does not see weigh exactly zero. The softmax is in fp32. It is written out as two
    products because for so few queries library kernels take several times as long on a GPU.
    """
    B, H, K, D = q.shape
    Hkv = k.shape[1]
    # the query heads of a key head stand as more queries, so no key is copied for them
    stacked = q.reshape(B, Hkv, -1, D)                              # (B, Hkv, H/Hkv * K, D)
    scores = to_fp32(stacked @ k.mT) * D ** -0.5
    scores = scores.unflatten(2, (-1, K))                           # (B, Hkv, H/Hkv, K, length)
    scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    weights = scores.softmax(-1).to(v.dtype)
    o = weights.flatten(2, 3) @ v
    return o.view(B, H, K, D)
