"""
DFlash speculative decoding for Qwen3.5: the whole method, including training, in one file.

    python basic.py "What is 7 * 34?"    # decode with the shipped models and print every round
    python basic.py train                # train a new drafter for a minute, then decode with it

A language model, the *target*, generates one token per forward pass. In speculative decoding, a
small model, the *drafter*, guesses the next tokens, and one forward pass of the target checks them.
DFlash (Chen, Liang, Liu, arXiv 2602.06036) drafts a whole block at once. The drafter gets the
newest token, the *anchor*, and 15 mask tokens, and fills in all masks in one forward pass. It knows
the earlier text only through *features*: outputs of some of the target's layers. A *round* is one
draft and one check. *Tau* is the average number of tokens that a round adds.

This file is correct but slow: its target reads the guesses one by one. The other files read all of
them in one forward pass, and must remove the wrong ones from the memory of a Gated DeltaNet
afterwards (decode_state.py). train.py has 512 blocks per text, and loss.py never stores all logits.
"""
import argparse
import json
import sys
from pathlib import Path
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoTokenizer

NANO = Path(__file__).parent / "data" / "nano"
QUESTIONS = ("What is 7 * 34?", "What is 12 * 34?", "What is 83 - 47?", "2x + 3 = 11", "57 + 38")
SUPPORTED = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "attention_bias": False, "causal": False,
             "is_causal": False, "rope_scaling": None, "rope_type": "default", "rope_dim": None,
             "is_neox_style": True, "input_embedding_scale": 1, "projector_type": "dflash"}

class Model:
    """A checkpoint: config.json as a dict, and the tensors of model.safetensors by their names."""
    def __init__(self, folder, dtype=torch.float32):
        self.config = json.loads((folder / "config.json").read_text())
        inner = self.config.get("dflash_config", {})
        settings = self.config | self.config["rope_parameters"] | inner
        wrong = [k for k, value in SUPPORTED.items() if settings.get(k) not in (None, value)]
        if wrong or "sliding_attention" in self.config["layer_types"]:
            sys.exit(f"error: {folder} has {wrong or 'sliding_attention'}: use draft_decode.py")
        tensors = load_file(folder / "model.safetensors")
        self.weights = {name.removeprefix("model."): w.to(dtype) for name, w in tensors.items()}
        if self.config["tie_word_embeddings"]:
            self.weights["lm_head.weight"] = self.weights["embed_tokens.weight"]

    def layer(self, i):  # the weights of layer i, by their names inside the layer
        names = [name for name in self.weights if name.startswith(f"layers.{i}.")]
        return {name.removeprefix(f"layers.{i}."): self.weights[name] for name in names}

# Shapes: n tokens, H heads, Hkv key-value heads, D head width, K block size, V vocabulary size
def rms_norm(x, gain):
    return F.rms_norm(x, gain.shape, gain, 1e-6)

def mlp(x, w):
    gate = F.silu(x @ w["mlp.gate_proj.weight"].T)
    return (gate * (x @ w["mlp.up_proj.weight"].T)) @ w["mlp.down_proj.weight"].T

def heads(x, D):  # (n, H * D) -> (H, n, D)
    return x.unflatten(1, (-1, D)).transpose(0, 1)

def rotate(x, start, theta, dim):
    """Rotary embedding of x (H, n, D) at positions start .. start + n - 1. Channels i and i + dim/2
    form a 2D point, which is rotated by position / theta^(2i/dim). The rest stays unchanged."""
    frequencies = 1 / theta ** (torch.arange(0, dim, 2).float() / dim)
    angles = torch.arange(start, start + x.shape[1])[:, None] * frequencies  # (n, dim/2)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b, rest = x.split((dim // 2, dim // 2, x.shape[-1] - dim), -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)

def attention(q, k, v):
    """q (H, m, D); k, v (Hkv, n, D) -> (m, H * D). There is no mask: all queries see all keys."""
    o = F.scaled_dot_product_attention(q[None], k[None], v[None], enable_gqa=True)
    return o[0].transpose(0, 1).flatten(1)

# -------------------------------------------------------------------------- the target
def target_step(target, state, token):
    """Reads one token and updates the state. Returns the logits (V,) of the next token. The state,
    a dict that starts empty, holds the memory of each layer and the outputs of all layers."""
    x = target.weights["embed_tokens.weight"][token][None]                  # (1, width)
    outputs = []
    for i, kind in enumerate(target.config["layer_types"]):
        w = target.layer(i)
        mix = gated_delta_net if kind == "linear_attention" else gated_attention
        y = rms_norm(x, 1 + w["input_layernorm.weight"])  # the file has gain - 1
        x = x + mix(y, w, state.setdefault(i, {}), target.config)
        x = x + mlp(rms_norm(x, 1 + w["post_attention_layernorm.weight"]), w)
        outputs.append(x[0])
    state.setdefault("outputs", []).append(torch.stack(outputs))            # (layers, width)
    return target.weights["lm_head.weight"] @ rms_norm(x[0], 1 + target.weights["norm.weight"])

def gated_attention(x, w, memory, c):
    """x (1, width) attends to all tokens so far. The memory is a list of their keys and values."""
    D, rope = c["head_dim"], c["rope_parameters"]
    keys, values = memory.setdefault("keys", []), memory.setdefault("values", [])
    rotary = (len(keys), rope["rope_theta"], int(D * rope["partial_rotary_factor"]))
    q, gate = heads(x @ w["self_attn.q_proj.weight"].T, 2 * D).chunk(2, -1)  # (H, 1, D) both
    k = heads(x @ w["self_attn.k_proj.weight"].T, D)                         # (Hkv, 1, D)
    q = rotate(rms_norm(q, 1 + w["self_attn.q_norm.weight"]), *rotary)
    keys.append(rotate(rms_norm(k, 1 + w["self_attn.k_norm.weight"]), *rotary))
    values.append(heads(x @ w["self_attn.v_proj.weight"].T, D))
    o = attention(q, torch.cat(keys, 1), torch.cat(values, 1)) * gate.flatten().sigmoid()
    return o @ w["self_attn.o_proj.weight"].T

def gated_delta_net(x, w, memory, c):
    """x (1, width) reads from and writes to a memory of fixed size: one matrix S per head."""
    H, D = c["linear_num_key_heads"], c["linear_key_head_dim"]
    Hv, Dv = c["linear_num_value_heads"], c["linear_value_head_dim"]
    # a convolution mixes each channel with its values at the three tokens before
    kernel = w["linear_attn.conv1d.weight"][:, 0].T                         # (4, channels)
    last_three = memory.get("last_three", torch.zeros_like(kernel[1:]))
    inputs = torch.cat((last_three, x @ w["linear_attn.in_proj_qkv.weight"].T))
    memory["last_three"] = inputs[1:]
    q, k, v = F.silu((inputs * kernel).sum(0)).split((H * D, H * D, Hv * Dv))
    # make queries and keys unit vectors, and repeat them if there are more heads of values
    qk = torch.stack((q, k)).view(2, H, D)
    qk = qk / (qk.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    q, k = qk.repeat_interleave(Hv // H, 1)
    time_step = F.softplus(x[0] @ w["linear_attn.in_proj_a.weight"].T + w["linear_attn.dt_bias"])
    g = -w["linear_attn.A_log"].exp() * time_step
    beta = (x[0] @ w["linear_attn.in_proj_b.weight"].T).sigmoid()
    S = memory.get("S", x.new_zeros(Hv, D, Dv))
    o, memory["S"] = delta_rule(q, k, v.view(Hv, Dv), g, beta, S=S)
    gate = F.silu(x @ w["linear_attn.in_proj_z.weight"].T)
    o = rms_norm(o, w["linear_attn.norm.weight"]).flatten() * gate  # the weight is the gain
    return o @ w["linear_attn.out_proj.weight"].T

def delta_rule(q, k, v, g, beta, *, S):
    """One token of the gated delta rule (Yang, Kautz, Hatamizadeh, arXiv 2412.06464) in Hv heads.
    S (Hv, D, Dv) maps keys to values. q and k are (Hv, D), v is (Hv, Dv), and g and beta are (Hv,).
    S decays by the factor exp(g) <= 1. beta (0 .. 1) says how far an old value moves toward v."""
    S = S * g.exp()[:, None, None]                              # S decays
    stored = torch.einsum("hdv,hd->hv", S, k)                   # read the value stored under k
    change = beta[:, None] * (v - stored)                       # its correction
    S = S + torch.einsum("hd,hv->hdv", k, change)               # write the correction under k
    o = torch.einsum("hdv,hd->hv", S, q) / q.shape[-1] ** 0.5   # read the value stored under q
    return o, S

# -------------------------------------------------------------------------- the drafter
def draft_logits(drafter, target, outputs, anchor):
    """Logits (K - 1, V) of the K - 1 tokens after the anchor. outputs (n, layers, width): what the
    target's layers returned for the n tokens before. Embedding and head belong to the target."""
    options = drafter.config["dflash_config"]
    features = outputs[:, options["target_layer_ids"]].flatten(1)
    block = torch.tensor([anchor] + [options["mask_token_id"]] * (options["block_size"] - 1))
    hidden = drafter_hidden(drafter, features, target.weights["embed_tokens.weight"][block])
    return hidden[1:] @ target.weights["lm_head.weight"].T  # the anchor needs no guess

def drafter_hidden(drafter, features, x):
    """Hidden states (K, width) of an embedded block x (K, width) after n tokens with features.
    Each position attends to the n tokens and to the whole block, including the masks after it."""
    D, theta = drafter.config["head_dim"], drafter.config["rope_parameters"]["rope_theta"]
    context = features @ drafter.weights["fc.weight"].T
    context = rms_norm(context, drafter.weights["hidden_norm.weight"])      # (n, width)
    for i in range(drafter.config["num_hidden_layers"]):
        w = drafter.layer(i)
        y = rms_norm(x, w["input_layernorm.weight"])
        visible = torch.cat((context, y))   # all layers see the same context
        q = heads(y @ w["self_attn.q_proj.weight"].T, D)
        k = heads(visible @ w["self_attn.k_proj.weight"].T, D)
        v = heads(visible @ w["self_attn.v_proj.weight"].T, D)
        q = rotate(rms_norm(q, w["self_attn.q_norm.weight"]), len(context), theta, D)
        k = rotate(rms_norm(k, w["self_attn.k_norm.weight"]), 0, theta, D)
        x = x + attention(q, k, v) @ w["self_attn.o_proj.weight"].T
        x = x + mlp(rms_norm(x, w["post_attention_layernorm.weight"]), w)
    return rms_norm(x, drafter.weights["norm.weight"])

# -------------------------------------------------------------------------- decoding and training
def decode(target, drafter, state, prompt, end):
    """Yields three lists per round: accepted guesses, rejected guess (if any), the target's token.
    The first yield is not a round: it has the target's token after the prompt. A guess must equal
    the target's choice, so the drafter changes only how many tokens a round adds, not which."""
    for token in prompt:
        choice = target_step(target, state, token).argmax().item()
    yield [], [], [choice]
    while choice != end and len(state["outputs"]) < target.config["max_position_embeddings"]:
        # draft: the latest choice is the anchor, and the target has not read it yet
        logits = draft_logits(drafter, target, torch.stack(state["outputs"]), choice)
        guesses = logits.argmax(-1).tolist()
        # verify: the target reads the anchor, and then each guess that equals its latest choice
        accepted = []
        choice = target_step(target, state, choice).argmax().item()
        while choice != end and guesses and guesses[0] == choice:
            accepted.append(guesses.pop(0))
            choice = target_step(target, state, choice).argmax().item()
        yield accepted, guesses[:1], [choice]

def sample_loss(drafter, target, tokens, outputs, anchors):
    """Weighted mean of the cross entropy over all guesses of all blocks. tokens: a prompt and its
    response; guesses past the response have no loss. anchors: indices of tokens in the response."""
    losses, weights = [], []
    for anchor in anchors:
        logits = draft_logits(drafter, target, outputs[:anchor], tokens[anchor])
        labels = torch.tensor(tokens[anchor + 1:anchor + 1 + len(logits)])
        nll = F.cross_entropy(logits[:len(labels)], labels, reduction="none")
        # a guess is useful only if all guesses before it are right: weight exp(-(k - 1) / 7)
        weights.append(torch.exp(-torch.arange(len(labels)) / 7))
        losses.append(weights[-1] * nll)
    return torch.cat(losses).sum() / torch.cat(weights).sum()

def train(target, drafter, samples, steps=400):
    """Trains the drafter; the target is frozen. A sample is (tokens, outputs, prompt length)."""
    optimizer = torch.optim.AdamW(drafter.weights.values(), lr=1e-3, weight_decay=0)
    for step in range(1, steps + 1):
        tokens, outputs, start = samples[step % len(samples)]
        anchors = start + torch.randperm(len(tokens) - 1 - start)[:8]
        loss = sample_loss(drafter, target, tokens, outputs, anchors.tolist())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 40 == 0:
            print(f"step {step:3}: loss {loss.item():.3f}")

def answer(target, drafter, tokenizer, question, show=True):
    """Decodes, prints tau, and prints each round if show is set. Returns a sample for train()."""
    colors = ("\033[32m{}\033[0m", "\033[31m{}\033[0m", "\033[34m{}\033[0m")
    styles = colors if sys.stdout.isatty() else ("[{}]", "[-{}-]", "[+{}+]")
    message = {"role": "user", "content": question}
    prompt = tokenizer.apply_chat_template([message], add_generation_prompt=True, return_dict=False)
    tokens, state = list(prompt), {}
    for number, parts in enumerate(decode(target, drafter, state, prompt, tokenizer.eos_token_id)):
        texts = [tokenizer.decode(part, skip_special_tokens=True) for part in parts]
        line = "".join(style.format(text) for style, text in zip(styles, texts) if text)
        if show:
            print(line.replace("\n", "\\n"))
        tokens += parts[0] + parts[2]
    count = len(tokens) - len(prompt) - 1  # without the token that was chosen before round 1
    print(f"{count} tokens in {number} rounds: tau {count / max(1, number):.2f}")
    return tokens, torch.stack(state["outputs"]), len(prompt)

if __name__ == "__main__":
    torch.set_num_threads(1)  # the models are too small for more
    parser = argparse.ArgumentParser()
    parser.add_argument("prompt", help="a question, or the word train")
    parser.add_argument("--seed", type=int, default=0, help="of the new drafter")
    args = parser.parse_args()
    if not NANO.is_dir():
        sys.exit(f"error: no folder {NANO}: run basic.py in a complete copy of this project")
    target, drafter = Model(NANO / "target"), Model(NANO / "drafter-dflash")
    tokenizer = AutoTokenizer.from_pretrained(NANO / "target", trust_remote_code=False)
    if args.prompt == "train":
        torch.manual_seed(args.seed)
        for name, w in drafter.weights.items():
            new = torch.ones_like(w) if w.dim() == 1 else 0.06 * torch.randn_like(w)
            drafter.weights[name] = new.requires_grad_()
        # an untrained drafter costs only speed, because all answers are the target's own
        samples = [answer(target, drafter, tokenizer, text, show=False) for text in QUESTIONS]
        train(target, drafter, samples)
        args.prompt = "What is 8 * 34?"
    answer(target, drafter, tokenizer, args.prompt)
