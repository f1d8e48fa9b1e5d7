r"""
Makes the nano target from nothing: its tokenizer, then its weights.

    python data/nano/pretrain.py                                     # some hours on two cores
    python data/nano/pretrain.py --device=cuda --micro_batch=128     # minutes

The target is a small hybrid like Qwen3.5, and it learns the mix of problems.py. Its tokenizer is
byte-level BPE. It works like Qwen3.5's but has 507 ids: 0..255 the bytes, 256..501 merges, then 502
<|endoftext|>, 503 <|im_start|>, 504 <|im_end|>, 505 <think>, 506 </think>. The mask id is the first
id after the tokenizer, as in Qwen3.5: 507. Three files in data/nano/target are written by hand: the
shape in config.json, tokenizer_config.json, and the chat template.
"""
import itertools
import math
import os
import random
import sys
import time

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
sys.path.insert(0, ROOT)  # the project's modules, from any working directory
from tokenizer import chat_prompt, tokenizer_in
from checkpoint import FP32_WEIGHTS, parse_dtype, read_target_config, save_weights
from configurator import configure
from data.nano.problems import problems
from formats.files import printable, write_whole
from target import Target

out_dir = os.path.join(ROOT, "data", "nano", "target")  # where the target goes
device = "cpu"              # cpu or cuda
steps = 2500                # optimizer steps
batch_size = 128            # problems per step, about 89 tokens each
lr = 1.5e-3                 # peak learning rate
warmup = 60                 # steps of linear warm-up
decay = 0.4                 # fraction of the steps, at the end, with linear decay to zero
weight_decay = 0.05         # of AdamW
seed = 0                    # of weights and batch order
micro_batch = 32            # problems per forward and backward; few enough for a CPU's caches

BY_HAND = ("config.json", "tokenizer_config.json", "chat_template.jinja")
POOL = 32       # batches whose problems are sorted by length together, to save padding
PAD = 502       # <|endoftext|>

# Qwen3.5's own pattern. If a folder has a config.json of that family, transformers loads its own
# tokenizer class, which replaces the pattern and the normalizer of tokenizer.json by this pattern
# and NFC. Any other pattern would silently be lost, and the ids would be wrong. \p{N} makes each
# digit a token. A space joins the word after it, never a digit.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def main(argv=None):
    config = configure(globals(), argv)
    try:
        parse_dtype(config.device, "float32")
    except ValueError as error:
        sys.exit(f"error: {error}")
    os.makedirs(config.out_dir, exist_ok=True)
    for name in BY_HAND:
        with open(os.path.join(out_dir, name)) as f:
            write_whole(os.path.join(config.out_dir, name), f.read())
    write_whole(os.path.join(config.out_dir, "tokenizer.json"), train_tokenizer())
    tokenizer = tokenizer_in(config.out_dir)

    torch.manual_seed(config.seed)
    target_config, _ = read_target_config(config.out_dir)
    target = Target(target_config).to(config.device)
    # Only matrices decay, not gains and biases.
    matrices = {"params": [p for p in target.parameters() if p.dim() >= 2]}
    vectors = {"params": [p for p in target.parameters() if p.dim() < 2], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW(
        [matrices, vectors], lr=config.lr, betas=(0.9, 0.98), weight_decay=config.weight_decay)
    print(f"{sum(p.numel() for p in target.parameters()):,} parameters, "
          f"{config.steps * config.batch_size:,} problems")

    started = time.time()
    for step, (tokens, weights) in enumerate(make_batches(tokenizer, config)):
        # linear warm-up, constant, linear decay to zero
        up = (step + 1) / config.warmup
        down = (config.steps - step) / (config.decay * config.steps)
        for group in optimizer.param_groups:
            group["lr"] = config.lr * min(1.0, up, down)
        loss = add_gradients(target, tokens, weights, config)
        norm = torch.nn.utils.clip_grad_norm_(target.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == config.steps - 1:
            print(f"step {step:5d} | loss {loss.item():.4f} | norm {norm.item():.2f} | "
                  f"{time.time() - started:.0f} s", flush=True)

    weights = {}  # in bf16, except those that stay in fp32
    for name, weight in target.state_dict().items():
        dtype = torch.float32 if name.endswith(FP32_WEIGHTS) else torch.bfloat16
        weights["model." + name] = weight.to("cpu", dtype).contiguous()
    save_weights(weights, os.path.join(config.out_dir, "model.safetensors"))
    print(printable(f"wrote {config.out_dir}"))


def train_tokenizer():
    """The content of tokenizer.json. It is the same in every run, because the corpus is fixed, and
    merges are ordered by count and then by id."""
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    # The alphabet has all bytes, so any text can be encoded without an unknown token.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(vocab_size=502, initial_alphabet=alphabet, show_progress=False)
    texts = []
    for question, solution, _ in problems("train", 20_000, task="tokenizer"):
        texts += [question, solution, "user\n", "assistant\n\n"]  # every prompt has these roles
    tokenizer.train_from_iterator(texts, trainer)
    # decode(skip_special_tokens=True) drops the first three. Thoughts are text of the answer.
    for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"):
        tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)])
    for token in ("<think>", "</think>"):
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=False)])
    return tokenizer.to_str(pretty=True) + "\n"


def make_batches(tokenizer, config):
    """The batches (tokens, weights) of all steps, both (B, T).

    A weight belongs to a token's own loss: 1 in the answer, 0 in the prompt and in the padding.
    """
    stream = problems("train", config.steps * config.batch_size)
    for pool in range(math.ceil(config.steps / POOL)):
        chosen = itertools.islice(stream, POOL * config.batch_size)
        encoded = [encode(tokenizer, question, solution) for question, solution, _ in chosen]
        encoded.sort(key=lambda sample: len(sample[0]))
        # Samples of similar length form a batch. The batches come in random order.
        starts = list(range(0, len(encoded), config.batch_size))
        random.Random(f"{config.seed}-{pool}").shuffle(starts)
        for start in starts:
            tokens, weights = zip(*encoded[start:start + config.batch_size])
            yield pad(tokens, PAD).to(config.device), pad(weights, 0).to(config.device)


def encode(tokenizer, question, solution):
    """(token ids, weights) of a problem, both (T,)."""
    prompt = chat_prompt(tokenizer, question)
    answer = tokenizer.encode(solution + "<|im_end|>")
    weights = [0.0] * len(prompt) + [1.0] * len(answer)
    return torch.tensor(prompt + answer), torch.tensor(weights)


def pad(sequences, value):
    """Sequences as one tensor (B, T). T is a multiple of 16: few shapes, so memory is reused."""
    padded = pad_sequence(sequences, batch_first=True, padding_value=value)
    return F.pad(padded, (0, -padded.shape[1] % 16), value=value)


def add_gradients(target, tokens, weights, config):
    """Forward and backward of a batch (B, T), one micro-batch at a time. Returns the mean loss."""
    loss = 0.0
    total_weight = weights[:, 1:].sum()
    micro_batches = zip(tokens.split(config.micro_batch), weights.split(config.micro_batch))
    for micro_tokens, micro_weights in micro_batches:
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


if __name__ == "__main__":
    main()
