"""
Trains the nano target from nothing: a Qwen3.5-shaped hybrid of 12 layers that learns the mix of
problems.py: word problems, plain arithmetic, and texts to refuse.

    python data/nano/pretrain.py                                     # some hours on two cores
    python data/nano/pretrain.py --device=cuda --micro_batch=128     # minutes

It writes data/nano/target. Run again after an interruption it goes on from its last save. Every
batch is a pure function of (seed, step).
"""
import json
import math
import os
import random
import sys
import time

import torch
import torch.nn.functional as F

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
sys.path.insert(0, ROOT)  # the project's modules, from whatever folder this is run
from tokenizer import tokenizer_in
from checkpoint import (FP32_WEIGHTS, parse_dtype, parse_target_config, save_weights,
                        write_whole)
from configurator import configure
from data.nano.problems import problems
from target import Target

out_dir = os.path.join(ROOT, "data", "nano", "target")  # has the tokenizer; gets config and weights
state_path = os.path.join(ROOT, "out", "pretrain.pt")   # weights and moments of the run so far
device = "cpu"              # cpu or cuda
steps = 2500                # optimizer steps
batch_size = 128            # problems a step, about 89 tokens each
num_layers = 12             # three linear, one full, repeated
hidden_size = 128           # channels of the residual stream
intermediate_size = 384     # channels of the SwiGLU
lr = 1.5e-3                 # peak learning rate
warmup = 60                 # steps up to it, linear
decay = 0.4                 # share of the steps, the last ones, in which it goes to zero, linear
weight_decay = 0.05         # of AdamW
seed = 0                    # of weights and batch order
micro_batch = 32            # problems in one forward and backward: few enough for a CPU's caches
save_every = 100            # steps between saves of state_path

POOL = 32       # batches whose problems are sorted by length together, so that little is padded
PAD = 502       # <|endoftext|>


def main(argv=None):
    config = configure(globals(), argv)
    if not os.path.isfile(os.path.join(config.out_dir, "tokenizer.json")):
        sys.exit(f"error: no tokenizer.json in {config.out_dir!r}: make it first, "
                 f"python data/nano/make_tokenizer.py --out_dir={config.out_dir}")
    try:
        parse_dtype(config.device, "float32")
        tokenizer = tokenizer_in(config.out_dir)
    except ValueError as error:
        sys.exit(f"error: {error}")
    torch.manual_seed(config.seed)
    target = Target(parse_target_config(public_config(config))).to(config.device)
    optimizer = new_optimizer(target, config)
    first_step = load_state(target, optimizer, config)
    parameters = sum(parameter.numel() for parameter in target.parameters())
    count = config.steps * config.batch_size
    print(f"{parameters:,} parameters, {count:,} problems")

    rows = [(question, solution) for question, solution, _ in problems("train", count)]
    started = time.time()
    tokens_seen = 0
    batches = make_batches(tokenizer, rows, first_step, config)
    for step, (tokens, weights) in enumerate(batches, first_step):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        loss = add_gradients(target, tokens, weights, config)
        norm = torch.nn.utils.clip_grad_norm_(target.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

        tokens_seen += tokens.numel()
        steps_done = step + 1
        is_last = steps_done == config.steps
        if step % 10 == 0 or is_last:
            seconds = time.time() - started
            speed = tokens_seen / seconds
            minutes_left = (config.steps - step) * seconds / (steps_done - first_step) / 60
            print(f"step {step:5d} | loss {loss.item():.4f} | norm {norm.item():.2f} | "
                  f"{speed:,.0f} tokens/s | {minutes_left:.0f} min left", flush=True)
        if steps_done % config.save_every == 0 or is_last:
            save_state(target, optimizer, steps_done, config)
    save_target(target, config)
    print(f"wrote {config.out_dir}")


def add_gradients(target, tokens, weights, config):
    """Forward and backward of a batch (B, T), a micro-batch at a time. Returns the mean loss."""
    loss = 0.0
    total_weight = weights[:, 1:].sum()
    micro_batches = zip(tokens.split(config.micro_batch), weights.split(config.micro_batch))
    for micro_tokens, micro_weights in micro_batches:
        # Products in bf16 are a third faster on a CPU that has it. The delta rule and the norms
        # keep to fp32 by themselves.
        with torch.autocast(config.device, torch.bfloat16):
            _, hidden = target(micro_tokens)
            logits = target.logits(hidden)
        # the logits at a token are for the next one; class channels come second: (B, V, T-1)
        logits = logits[:, :-1].float().transpose(1, 2)
        nll = F.cross_entropy(logits, micro_tokens[:, 1:], reduction="none")
        # divided by the whole batch's weight, so that the sum over micro-batches is its mean
        share = (nll * micro_weights[:, 1:]).sum() / total_weight
        share.backward()
        loss += share.detach()
    return loss


def learning_rate(step, config):
    """Linear up, flat, linear down to zero."""
    up = (step + 1) / config.warmup
    down = (config.steps - step) / (config.decay * config.steps)
    return config.lr * min(1.0, up, down)


def new_optimizer(target, config):
    """AdamW that decays matrices only, not gains and biases."""
    matrices = []
    vectors = []
    for parameter in target.parameters():
        if parameter.dim() < 2:
            vectors.append(parameter)
        else:
            matrices.append(parameter)
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98))

# --------------------------------------------------------------------------------------------------
# batches


def make_batches(tokenizer, rows, first_step, config):
    """Batches (tokens, weights), both (B, T), from a step on.

    A weight is that of a token's own loss: 1 in the answer, 0 in the prompt and in the padding.
    """
    pool_size = POOL * config.batch_size
    for pool in range(first_step // POOL, math.ceil(config.steps / POOL)):
        encoded = encode(tokenizer, rows[pool * pool_size:(pool + 1) * pool_size])
        encoded.sort(key=lambda row: len(row[0]))
        # neighbours are of one length and make a batch; the batches come in random order
        starts = list(range(0, len(encoded), config.batch_size))
        random.Random(f"{config.seed}-{pool}").shuffle(starts)
        already_done = max(0, first_step - pool * POOL)
        for start in starts[already_done:]:
            yield pad(encoded[start:start + config.batch_size], config.device)


def pad(rows, device):
    """(tokens, weights) of rows (token ids, prompt length)."""
    longest = max(len(token_ids) for token_ids, _ in rows)
    T = math.ceil(longest / 16) * 16  # few different shapes, so that memory is used again
    tokens = []
    weights = []
    for token_ids, prompt_length in rows:
        answer_length = len(token_ids) - prompt_length
        padding = T - len(token_ids)
        tokens.append(token_ids + [PAD] * padding)
        weights.append([0.0] * prompt_length + [1.0] * answer_length + [0.0] * padding)
    return torch.tensor(tokens, device=device), torch.tensor(weights, device=device)


def encode(tokenizer, rows):
    """[(token ids, prompt length)] of rows (question, solution).

    A row is the chat template's prompt, the solution and <|im_end|>. This is chat_prompt for many
    rows at once, which is faster; a test compares the two.
    """
    conversations = [[{"role": "user", "content": question}] for question, _ in rows]
    texts = tokenizer.apply_chat_template(
        conversations, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    prompts = tokenizer(texts, add_special_tokens=False)["input_ids"]
    solutions = [solution + "<|im_end|>" for _, solution in rows]
    answers = tokenizer(solutions, add_special_tokens=False)["input_ids"]
    return [(prompt + answer, len(prompt)) for prompt, answer in zip(prompts, answers)]

# --------------------------------------------------------------------------------------------------
# files


def public_config(config):
    """config.json's keys in the public form: a text-only model, as transformers'
    Qwen3_5ForCausalLM loads it."""
    pattern = ["linear_attention"] * 3 + ["full_attention"]
    layer_types = [pattern[i % 4] for i in range(config.num_layers)]
    return {
        "architectures": ["Qwen3_5ForCausalLM"],
        "model_type": "qwen3_5_text",
        "dtype": "bfloat16",
        "vocab_size": 512,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "layer_types": layer_types,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_output_gate": True,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "linear_conv_kernel_dim": 4,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.02,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "use_cache": True,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
            "mrope_section": [3, 3, 2],
            "mrope_interleaved": True,
        },
        "bos_token_id": None,
        "eos_token_id": 504,
        "pad_token_id": PAD,
    }


def save_target(target, config):
    """The folder that load_target and transformers read: config.json, and weights in bf16 but for
    those that stay in fp32."""
    weights = {}
    for name, weight in target.state_dict().items():
        weight = weight.detach().cpu()
        if not name.endswith(FP32_WEIGHTS):
            weight = weight.to(torch.bfloat16)
        weights["model." + name] = weight.contiguous()
    os.makedirs(config.out_dir, exist_ok=True)
    path = os.path.join(config.out_dir, "model.safetensors")
    save_weights(weights, path + ".tmp")
    os.replace(path + ".tmp", path)
    config_json = json.dumps(public_config(config), indent=2)
    write_whole(os.path.join(config.out_dir, "config.json"), config_json)


def recipe(config):
    """What must not change when a run goes on."""
    return [
        config.steps, config.batch_size, config.num_layers, config.hidden_size,
        config.intermediate_size, config.lr, config.warmup, config.decay, config.weight_decay,
        config.seed,
    ]


def save_state(target, optimizer, steps_done, config):
    """Write state_path, whole or not at all."""
    os.makedirs(os.path.dirname(config.state_path), exist_ok=True)
    state = {
        "target": target.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": steps_done,
        "recipe": recipe(config),
    }
    torch.save(state, config.state_path + ".tmp")
    os.replace(config.state_path + ".tmp", config.state_path)


def load_state(target, optimizer, config):
    """Load state_path if it is there; returns how many steps were done."""
    path = config.state_path
    if not os.path.isfile(path):
        return 0
    state = torch.load(path, map_location=config.device, weights_only=True)
    if state["recipe"] != recipe(config):
        sys.exit(f"error: {path} is of another run, {state['recipe']} and not {recipe(config)}: "
                 "move it away")
    target.load_state_dict(state["target"])
    optimizer.load_state_dict(state["optimizer"])
    print(f"{path}: going on from step {state['step']}")
    return state["step"]


if __name__ == "__main__":
    main()
