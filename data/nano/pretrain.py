"""
Trains the nano target from nothing: a Qwen3.5-shaped hybrid of 12 layers that solves the problems of problems.py.

    python data/nano/pretrain.py                    # an hour or two on two cores; writes data/nano/target
    python data/nano/pretrain.py --device=cuda      # minutes

Run again after an interruption it goes on from its last save. Every batch is a pure function of (seed, step).
"""
import json
import math
import os
import random
import sys
import time

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path[:0] = [ROOT, os.path.join(ROOT, "data", "nano")]  # the project's modules, from whatever folder this is run
from configurator import configure
from problems import problems
from target import Target, TargetConfig, check_device, load_tokenizer

out_dir = os.path.join(ROOT, "data", "nano", "target")   # holds the tokenizer; gets config.json and the weights
state_path = os.path.join(ROOT, "out", "pretrain.pt")    # weights and moments of the run so far
device = "cpu"          # cpu or cuda
steps = 1100            # optimizer steps
batch_size = 96         # problems a step, about 118 tokens each
layers = 12             # three linear, one full, repeated
width = 128             # hidden channels
mlp = 384               # channels of the SwiGLU
lr = 2e-3               # peak learning rate
warmup = 60             # steps up to it, linear
decay = 0.4             # share of the steps, the last ones, in which the rate goes down to zero, linear
weight_decay = 0.05     # AdamW's
seed = 0                # of weights and batch order
micro_batch = 32        # problems in one forward and backward: small enough for the caches of a CPU
save_every = 100        # steps between saves of state_path

POOL = 32  # batches whose problems are sorted by length together, so that a batch is hardly padded


def target_config():
    """config.json's keys in the public form; a text-only model, as transformers' Qwen3_5ForCausalLM loads it."""
    return {"architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5_text", "dtype": "bfloat16",
            "vocab_size": 512, "hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers,
            "layer_types": ["full_attention" if i % 4 == 3 else "linear_attention" for i in range(layers)],
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "hidden_act": "silu",
            "attention_bias": False, "attention_dropout": 0.0, "attn_output_gate": True,
            "linear_num_key_heads": 4, "linear_num_value_heads": 4, "linear_key_head_dim": 32,
            "linear_value_head_dim": 32, "linear_conv_kernel_dim": 4, "rms_norm_eps": 1e-6, "initializer_range": 0.02,
            "max_position_embeddings": 1024, "tie_word_embeddings": True, "use_cache": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25,
                                "mrope_section": [3, 3, 2], "mrope_interleaved": True},
            "bos_token_id": None, "eos_token_id": 504, "pad_token_id": 502}


def encode(tokenizer, rows):
    """(tokens, prompt length) of each (question, solution): the chat template's prompt, the answer, <|im_end|>."""
    prompts = tokenizer.apply_chat_template([[{"role": "user", "content": q}] for q, _ in rows], tokenize=False,
                                            add_generation_prompt=True, enable_thinking=False)
    prompts = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    answers = tokenizer([s + "<|im_end|>" for _, s in rows], add_special_tokens=False)["input_ids"]
    return [(p + a, len(p)) for p, a in zip(prompts, answers)]


def batches(tokenizer, rows, start):
    """Batches (tokens, weights) from step `start` on; a weight is that of a token's own loss, 0 for prompts."""
    size = POOL * batch_size
    for pool in range(start // POOL, math.ceil(steps / POOL)):
        encoded = sorted(encode(tokenizer, rows[pool * size:(pool + 1) * size]), key=lambda row: len(row[0]))
        order = list(range(0, len(encoded), batch_size))
        random.Random(f"{seed}-{pool}").shuffle(order)
        for i in order[max(0, start - pool * POOL):]:
            batch = encoded[i:i + batch_size]
            T = -(-max(len(t) for t, _ in batch) // 16) * 16  # few shapes, so that memory is used again
            tokens = torch.tensor([t + [502] * (T - len(t)) for t, _ in batch])
            weights = torch.tensor([[0.0] * n + [1.0] * (len(t) - n) + [0.0] * (T - len(t)) for t, n in batch])
            yield tokens.to(device), weights.to(device)


def rate(step):
    """The learning rate: linear up, flat, linear down to zero."""
    return lr * min(1.0, (step + 1) / warmup, (steps - step) / (decay * steps))


def save(target, path):
    """The folder that load_target and transformers read: config.json and bf16 weights, A_log and gated norm fp32."""
    os.makedirs(path, exist_ok=True)
    tensors = {"model." + k: v.detach().cpu().to(v.dtype if k.endswith(("A_log", "linear_attn.norm.weight"))
                                                 else torch.bfloat16).contiguous()
               for k, v in target.state_dict().items()}
    save_file(tensors, os.path.join(path, "model.safetensors.tmp"), metadata={"format": "pt"})
    with open(os.path.join(path, "config.json.tmp"), "w") as f:
        json.dump(target_config(), f, indent=2)
    for name in ("model.safetensors", "config.json"):
        os.replace(os.path.join(path, name + ".tmp"), os.path.join(path, name))


def main():
    configure(globals())
    torch.manual_seed(seed)
    try:
        check_device(device, "float32")
        tokenizer = load_tokenizer(out_dir)
    except ValueError as error:
        sys.exit(f"error: {error}\nthe tokenizer comes first: python data/nano/make_tokenizer.py {out_dir}")
    recipe = [steps, batch_size, layers, width, mlp, lr, warmup, decay, weight_decay, seed]
    target = Target(TargetConfig.from_dict(target_config())).to(device)
    plain = [p for p in target.parameters() if p.dim() < 2]
    matrices = [p for p in target.parameters() if p.dim() >= 2]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": weight_decay},
                                   {"params": plain, "weight_decay": 0.0}], lr=lr, betas=(0.9, 0.98))
    start = 0
    if os.path.isfile(state_path):
        saved = torch.load(state_path, map_location=device, weights_only=True)
        if saved["recipe"] != recipe:
            sys.exit(f"error: {state_path} is of another run, {saved['recipe']} and not {recipe}: move it away")
        target.load_state_dict(saved["target"])
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["step"]
        print(f"{state_path}: going on from step {start}")
    print(f"{sum(p.numel() for p in target.parameters()):,} parameters, {steps * batch_size:,} problems")
    rows = [(q, s) for q, s, _ in problems("train", steps * batch_size)]
    began, seen = time.time(), 0
    for step, (tokens, weights) in enumerate(batches(tokenizer, rows, start), start):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        loss = 0.0
        for part, weight in zip(tokens.split(micro_batch), weights.split(micro_batch)):
            # products in bf16 (a third faster on a CPU that has it); the delta rule and the norms keep fp32 themselves
            with torch.autocast(device, torch.bfloat16):
                _, logits = target(part, rows=slice(None))
            nll = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), part[:, 1:], reduction="none")
            share = (nll * weight[:, 1:]).sum() / weights[:, 1:].sum()
            share.backward()
            loss += share.detach()
        norm = torch.nn.utils.clip_grad_norm_(target.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen += tokens.numel()
        if step % 10 == 0 or step == steps - 1:
            speed = seen / (time.time() - began)
            left = (steps - step) * (time.time() - began) / (step - start + 1) / 60
            print(f"step {step:5d} | loss {loss.item():.4f} | norm {norm.item():.2f} | {speed:,.0f} tokens/s | "
                  f"{left:.0f} min left", flush=True)
        if (step + 1) % save_every == 0 or step + 1 == steps:
            os.makedirs(os.path.dirname(state_path), exist_ok=True)
            torch.save({"target": target.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1,
                        "recipe": recipe}, state_path + ".tmp")
            os.replace(state_path + ".tmp", state_path)
    save(target, out_dir)
    print(f"wrote {out_dir}")


if __name__ == "__main__":
    main()
