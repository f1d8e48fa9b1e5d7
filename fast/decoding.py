"""
Makes a loaded target and drafter decode faster:

    fast.prepare_for_decoding(target, drafter)                  # once, after loading
    fast.prepare_for_decoding(target, drafter, compile=True)    # takes a minute or two, then faster

target.py and model.py show the mathematics in plain PyTorch. Here each slow class of them has a
faster subclass. The call changes the class of every such module. Weights keep their names and their
values. Decoding returns the same tokens, but compiled code can round differently.

    joined weights   Layers with the same input (q, k, v) become one matmul. On a GPU a small matmul
                     takes as long as a matmul of several times its size.
    packed weights   On a CPU, large weights are stored in the order in which oneDNN reads them.
    few tokens       On a CPU, activation functions run on few tokens at a time, because the bits of
                     a token would depend on the split between threads otherwise (fast/cpu.py).
    1-token matmuls  In compiled code for a GPU, the matmul of one token is written as a sum.
    compiled layers  torch.compile for the forwards whose shapes never change.
"""
import contextlib

import torch
import torch.nn as nn
import torch.nn.functional as F

from fast.cpu import on_few_tokens, pack_weight, use_one_thread_if_small
from model import MLP as DrafterMLP
from model import Attention, DFlashDraftModel, to_fp32
from target import MLP as TargetMLP
from target import RMSNorm as TargetRMSNorm
from target import GatedAttention, GatedDeltaNet, Layer, Target

# --------------------------------------------------------------------------------------------------
# matmuls


def product(x, weight, packed=None):
    """x W^T for x (..., inputs) and a weight W (outputs, inputs); packed: its PackedWeight or None.

    torch.compile fuses the sum for one token with the norm or the gate next to it, and then it is
    faster than a library's matmul.
    """
    if packed is not None:
        return packed.product(x)
    is_one_token = x.numel() == x.shape[-1]
    if is_one_token and x.is_cuda and torch.compiler.is_compiling():
        sums = (to_fp32(weight) * to_fp32(x.flatten())).sum(-1)
        return sums.to(x.dtype).view(*x.shape[:-1], -1)
    return F.linear(x, weight)


class FastLinear(nn.Linear):
    """A linear layer that is not part of a joined matmul."""

    def prepare(self):
        self.packed = pack_weight(self.weight)

    def forward(self, x):
        if self.bias is not None:
            return super().forward(x)
        return product(x, self.weight, self.packed)


class FastEmbedding(nn.Embedding):
    """For the few tokens of a block, indexing takes a quarter of F.embedding's time on a GPU."""

    def prepare(self):
        pass

    def forward(self, tokens):
        return self.weight[tokens]


class Joined:
    """A module whose project() multiplies its input with the weights of several layers at once.

    Each output of a matmul depends only on its own row of the weight, so joining weights changes no
    output. The joined weights are one tensor, and each layer's weight becomes a view of it.
    """

    joined_names = ()

    def prepare(self):
        """Join the weights. They must not change any more."""
        layers = [getattr(self, name) for name in self.joined_names]
        self.joined_widths = [layer.out_features for layer in layers]
        self.joined_weight = torch.cat([layer.weight.data for layer in layers])
        for layer, part in zip(layers, self.joined_weight.split(self.joined_widths)):
            layer.weight.data = part
        self.joined_bias = None
        if layers[0].bias is not None:
            self.joined_bias = torch.cat([layer.bias.data for layer in layers])
        self.packed = pack_weight(self.joined_weight)

    def project(self, x):
        outputs = product(x, self.joined_weight, self.packed)
        if self.joined_bias is not None:
            outputs = outputs + self.joined_bias
        return outputs.split(self.joined_widths, -1)


class FastGatedDeltaNet(Joined, GatedDeltaNet):
    joined_names = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")


class FastGatedAttention(Joined, GatedAttention):
    joined_names = ("q_proj", "k_proj", "v_proj")


class FastTargetMLP(Joined, TargetMLP):
    joined_names = ("gate_proj", "up_proj")


class FastDrafterMLP(Joined, DrafterMLP):
    joined_names = ("gate_proj", "up_proj")


class FastDrafterAttention(Joined, Attention):
    joined_names = ("q_proj", "k_proj", "v_proj")

    def project_context(self, x):
        """The context needs keys and values, but no queries."""
        query_width, *key_value_widths = self.joined_widths
        outputs = product(x, self.joined_weight[query_width:])
        if self.joined_bias is not None:
            outputs = outputs + self.joined_bias[query_width:]
        return outputs.split(key_value_widths, -1)


class FastTarget(Target):
    """Outside the layers, only the head is large. A tied head is the embedding's weight."""

    def prepare(self):
        self.packed_head = pack_weight(self.head_weight)

    def forward(self, tokens, state=None, target_layer_ids=(), features_only=False, segment=None):
        with tf32_if_bfloat16(self):
            return super().forward(tokens, state, target_layer_ids, features_only, segment)

    def logits(self, hidden):
        if self.packed_head is not None:
            return self.packed_head.product(hidden)
        return super().logits(hidden)


@contextlib.contextmanager
def tf32_if_bfloat16(target):
    """Let a bf16 target multiply fp32 numbers in TF32 in a `with` block. Otherwise change nothing.

    A bf16 target multiplies in fp32 only inside the delta rule, whose inputs had 8 bits. So the 11
    bits of TF32 are enough, and faster on a GPU (docs/speed.md). The setting is global, so it is
    restored for the caller's own code.
    """
    setting = torch.backends.cuda.matmul
    before = setting.fp32_precision
    if target.embed_tokens.weight.dtype != torch.bfloat16 or before == "tf32":
        yield
        return
    setting.allow_tf32 = True
    try:
        yield
    finally:
        setting.allow_tf32 = False       # because allow_tf32 changes more than fp32_precision
        setting.fp32_precision = before

# --------------------------------------------------------------------------------------------------
# activation functions on a CPU


class FewTokensSiLU(nn.SiLU):
    def prepare(self):
        pass

    def forward(self, x):
        return on_few_tokens(F.silu, x)


class FewTokensSigmoid(nn.Sigmoid):
    def prepare(self):
        pass

    def forward(self, x):
        return on_few_tokens(torch.sigmoid, x)

# --------------------------------------------------------------------------------------------------
# compiled forwards


class CompiledLayer(Layer):
    """A layer of the target, compiled for blocks and padded segments. Other shapes vary.

    All layers of a kind share compiled code. The stack is not compiled as a whole, because then a
    layer that feeds the drafter would be fused, and rounded, differently from the others.
    """

    def forward(self, x, layer_state, rotary):
        if layer_state is not None and layer_state.state.has_static_shape:
            return self.compiled_forward(self, x, layer_state, rotary)
        return super().forward(x, layer_state, rotary)


class CompiledNorm(TargetRMSNorm):
    """The last norm of the target. On a GPU all shapes that it gets are static."""

    def forward(self, x):
        return self.compiled_forward(self, x)


class CompiledDrafter(DFlashDraftModel):
    """The drafter's two parts of a round."""

    def decode_block(self, embedded, cache, position):
        return self.compiled_decode_block(self, embedded, cache, position)

    def write_context(self, features, cache, position):
        return self.compiled_write_context(self, features, cache, position)


def compile_for_decoding(target, drafter=None):
    """Compile the forwards that decoding runs. Each is compiled when it first runs."""
    # at most: kinds of layer x (block sizes + lengths of segments) x buffer lengths
    torch._dynamo.config.recompile_limit = 64
    options = {"combo_kernels": True}  # fuses independent small kernels into one launch
    compiled_forward = torch.compile(Layer.forward, dynamic=False, options=options)
    for layer in target.layers:
        layer.__class__ = CompiledLayer
        layer.compiled_forward = compiled_forward
    if target.embed_tokens.weight.is_cuda:
        target.norm.__class__ = CompiledNorm
        target.norm.compiled_forward = torch.compile(TargetRMSNorm.forward, dynamic=False)
    if isinstance(drafter, DFlashDraftModel):
        drafter.__class__ = CompiledDrafter
        drafter.compiled_decode_block = torch.compile(
            DFlashDraftModel.decode_block, dynamic=False, options=options)
        drafter.compiled_write_context = torch.compile(
            DFlashDraftModel.write_context, options=options)

# --------------------------------------------------------------------------------------------------
# the call

JOINED = {
    GatedDeltaNet: FastGatedDeltaNet,
    GatedAttention: FastGatedAttention,
    TargetMLP: FastTargetMLP,
    Attention: FastDrafterAttention,
    DrafterMLP: FastDrafterMLP,
}
FEW_TOKENS = {nn.SiLU: FewTokensSiLU, nn.Sigmoid: FewTokensSigmoid}


def prepare_for_decoding(target, drafter=None, compile=False):
    """Make a frozen target and its drafter decode faster, in place. A second call changes nothing.

    drafter: a DFlashDraftModel, or None, or an object without modules, which stays as it is.
    """
    on_gpu = target.embed_tokens.weight.is_cuda
    change_classes([target], {Target: FastTarget})
    change_classes([target.embed_tokens], {nn.Embedding: FastEmbedding})
    join_projections(target.layers)
    if not on_gpu:
        change_classes(target.modules(), FEW_TOKENS)
        use_one_thread_if_small(target)
    if isinstance(drafter, DFlashDraftModel) and on_gpu:
        join_projections(drafter)
    elif isinstance(drafter, DFlashDraftModel):
        # On a CPU, joining would gain 1 %, but large weights could not be packed.
        change_classes(drafter.modules(), {nn.Linear: FastLinear})
    if compile:
        compile_for_decoding(target, drafter)


def join_projections(model):
    """Join the projections inside a module. All other linear layers become FastLinear."""
    change_classes(model.modules(), JOINED)
    joined = set()
    for module in model.modules():
        if isinstance(module, Joined):
            joined.update(getattr(module, name) for name in module.joined_names)
    others = [module for module in model.modules() if module not in joined]
    change_classes(others, {nn.Linear: FastLinear})


def change_classes(modules, faster):
    """Give each of the modules its faster class, if it has one. faster: {class: subclass}."""
    for module in list(modules):
        subclass = faster.get(type(module))
        if subclass is not None:
            module.__class__ = subclass
            module.prepare()
