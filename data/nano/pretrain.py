"""
Trains the nano target from scratch: a small hybrid like Qwen3.5 that learns the mix of problems.py:
word problems, plain arithmetic, and texts to refuse. Its shape is in data/nano/target/config.json.

    python data/nano/pretrain.py                                     # some hours on two cores
    python data/nano/pretrain.py --device=cuda --micro_batch=128     # minutes

It writes model.safetensors and config.json into a folder that has the tokenizer.
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
sys.path.insert(0, ROOT)  # the project's modules, from any working directory
from tokenizer import chat_prompt, tokenizer_in
from checkpoint import FP32_WEIGHTS, parse_dtype, parse_target_config, save_weights, write_whole
from configurator import configure
from data.nano.problems import problems
from target import Target

out_dir = os.path.join(ROOT, "data", "nano", "target")  # has the tokenizer, and gets the weights
device = "cpu"              # cpu or cuda
steps = 2500                # optimizer steps
batch_size = 128            # problems per step, about 89 tokens each
lr = 1.5e-3                 # peak learning rate
warmup = 60                 # steps of linear warm-up
decay = 0.4                 # fraction of the steps, at the end, with linear decay to zero
weight_decay = 0.05         # of AdamW
seed = 0                    # of weights and batch order
micro_batch = 32            # problems per forward and backward; few enough for a CPU's caches

SHAPE = os.path.join(ROOT, "data", "nano", "target", "config.json")
POOL = 32       # batches whose problems are sorted by length together, to save padding
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
    with open(SHAPE) as f:
        shape = json.load(f)
    torch.manual_seed(config.seed)
    target = Target(parse_target_config(shape)).to(config.device)
    optimizer = new_optimizer(target, config)
    count = config.steps * config.batch_size
    print(f"{sum(p.numel() for p in target.parameters()):,} parameters, {count:,} problems")

    samples = [(question, solution) for question, solution, _ in problems("train", count)]
    started = time.time()
    for step, (tokens, weights) in enumerate(make_batches(tokenizer, samples, config)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        loss = add_gradients(target, tokens, weights, config)
        norm = torch.nn.utils.clip_grad_norm_(target.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == config.steps - 1:
            print(f"step {step:5d} | loss {loss.item():.4f} | norm {norm.item():.2f} | "
                  f"{time.time() - started:.0f} s", flush=True)
    save_target(target, shape, config.out_dir)
    print(f"wrote {config.out_dir}")


def add_gradients(target, tokens, weights, config):
    """Forward and backward of a batch (B, T), one micro-batch at a time. Returns the mean loss."""
    loss = 0.0
    total_weight = weights[:, 1:].sum()
    for first in range(0, len(tokens), config.micro_batch):
        micro_tokens = tokens[first:first + config.micro_batch]
        micro_weights = weights[first:first + config.micro_batch]
        # Products in bf16 are a third faster on a CPU that supports them. The delta rule and the
        # norms stay in fp32.
        with torch.autocast(config.device, torch.bfloat16):
            _, hidden = target(micro_tokens)
            logits = target.logits(hidden)
        # The logits at a token are for the next one. cross_entropy wants the classes second.
        logits = logits[:, :-1].float().transpose(1, 2)  # (B, V, T-1)
        nll = F.cross_entropy(logits, micro_tokens[:, 1:], reduction="none")
        # Divide by the weight of the whole batch. Then the micro-batches add up to its mean.
        part = (nll * micro_weights[:, 1:]).sum() / total_weight
        part.backward()
        loss += part.detach()
    return loss


def learning_rate(step, config):
    """Linear warm-up, constant, linear decay to zero."""
    up = (step + 1) / config.warmup
    down = (config.steps - step) / (config.decay * config.steps)
    return config.lr * min(1.0, up, down)


def new_optimizer(target, config):
    """AdamW. Only matrices decay, not gains and biases."""
    matrices = {"params": [p for p in target.parameters() if p.dim() >= 2]}
    vectors = {"params": [p for p in target.parameters() if p.dim() < 2], "weight_decay": 0.0}
    return torch.optim.AdamW(
        [matrices, vectors], lr=config.lr, betas=(0.9, 0.98), weight_decay=config.weight_decay)


def make_batches(tokenizer, samples, config):
    """The batches (tokens, weights) of all steps, both (B, T).

    A weight belongs to a token's own loss: 1 in the answer, 0 in the prompt and in the padding.
    """
    pool_size = POOL * config.batch_size
    for pool in range(math.ceil(config.steps / POOL)):
        encoded = encode(tokenizer, samples[pool * pool_size:(pool + 1) * pool_size])
        encoded.sort(key=lambda sample: len(sample[0]))
        # Samples of similar length form a batch. The batches come in random order.
        starts = list(range(0, len(encoded), config.batch_size))
        random.Random(f"{config.seed}-{pool}").shuffle(starts)
        for start in starts:
            yield pad(encoded[start:start + config.batch_size], config.device)


def pad(samples, device):
    """(tokens, weights) of samples (token ids, prompt length)."""
    longest = max(len(token_ids) for token_ids, _ in samples)
    T = math.ceil(longest / 16) * 16  # few different shapes, so that memory is reused
    tokens = torch.full((len(samples), T), PAD)
    weights = torch.zeros(len(samples), T)
    for i, (token_ids, prompt_length) in enumerate(samples):
        tokens[i, :len(token_ids)] = torch.tensor(token_ids)
        weights[i, prompt_length:len(token_ids)] = 1
    return tokens.to(device), weights.to(device)


def encode(tokenizer, samples):
    """[(token ids, prompt length)] of samples (question, solution)."""
    encoded = []
    for question, solution in samples:
        prompt = chat_prompt(tokenizer, question)
        answer = tokenizer.encode(solution + "<|im_end|>")
        encoded.append((prompt + answer, len(prompt)))
    return encoded


def save_target(target, shape, out_dir):
    """Write config.json and the weights: bf16, except the weights that stay in fp32."""
    weights = {}
    for name, weight in target.state_dict().items():
        weight = weight.detach().cpu()
        if not name.endswith(FP32_WEIGHTS):
            weight = weight.to(torch.bfloat16)
        weights["model." + name] = weight.contiguous()
    path = os.path.join(out_dir, "model.safetensors")
    save_weights(weights, path)
    write_whole(os.path.join(out_dir, "config.json"), json.dumps(shape, indent=2))


if __name__ == "__main__":
    main()
