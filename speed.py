"""
What `python bench.py speed` measures: steps, rounds, prefill, the delta-rule kernel and training steps, each in
interleaved repeats beside transformers on the same weights, and beside the floor that this machine's own rates, read in
the same run, set for it: bytes of weights over the copy bandwidth, or operations over the rate of a large product.
"""
import copy
import functools
import math
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from tqdm import tqdm

import train
from draft_decode import Decoder, Sampling
from model import DFlashDraftModel, block_labels, block_loss, drafter_config, head_chunk, pack_linears, sample_anchors
from target import SIZES, DecodeState, gated_delta_rule, load_target

# ----------------------------------------------------------------------------------------------------------------------
# clocks and rates


def clock():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def progress(items):
    return tqdm(items, leave=False, disable=not sys.stderr.isatty())


def seconds(f, count=1):
    began = clock()
    for _ in range(count):
        f()
    return (clock() - began) / count


def race(arms, repeats=5):
    """{name: [seconds of each repeat]} of functions that return seconds, one after another in alternating order."""
    found = {name: [] for name in arms}
    for i in progress(range(repeats + 1)):
        for name in list(arms)[::1 if i % 2 else -1]:
            elapsed = arms[name]()
            found[name] += [elapsed] if i else []  # the first is the warm-up
    return found


def bandwidth(device):
    """Bytes a second of a copy, read and written, between tensors whose pages are there."""
    big = torch.ones((1 << 31 if device.startswith("cuda") else 1 << 28) // 4, device=device)
    out = torch.ones_like(big)
    return 2 * big.nbytes / median(race({"copy": lambda: seconds(lambda: out.copy_(big), 3)})["copy"])


def throughput(device, dtype):
    """Operations a second of a product at the widths of the MLP, of as many rows as suit the machine."""
    rows, kind = 16384 if device.startswith("cuda") else 1024, getattr(torch, dtype)
    a, b = torch.randn(rows, 1024, device=device).to(kind), torch.randn(1024, 3584, device=device).to(kind)
    return 2 * rows * 1024 * 3584 / median(race({"product": lambda: seconds(lambda: a @ b, 3)})["product"])


def row(name, found, floor=None, peer="transformers", **more):
    """A row of the report from race()'s findings: "ours", and "peer" if there is one; ratio: the median of ratios."""
    ours, theirs = found["ours"], found.get("peer")
    return {"name": name, "seconds": median(ours), "floor_seconds": floor, "peer": peer if theirs else None,
            "peer_seconds": median(theirs) if theirs else None,
            "ratio": median([b / a for a, b in zip(ours, theirs)]) if theirs else None, **more}


def weight_bytes(*modules):
    """Bytes of the weights that a forward reads: all, a tied one once, but of an untied embedding only some rows."""
    return sum(p.nbytes for m in modules for name, p in m.named_parameters()
               if name != "embed_tokens.weight" or m.config.tie_word_embeddings)


def reads(model, draft):
    """Bytes of weights that a step of the target reads, and a round of both models, which reads the head twice."""
    step = weight_bytes(model)
    return {"step": step, "round": step + weight_bytes(draft) + model.head.nbytes}


def where(device):
    return torch.cuda.get_device_name() if device.startswith("cuda") else f"{torch.get_num_threads()} CPU threads"


# ----------------------------------------------------------------------------------------------------------------------
# the rows


@torch.inference_mode()
def decoding_rows(model, draft, theirs, copy_rate):
    """After 256 tokens: a step of the target alone, a step of a block's rows with all their logits, and a round of
    drafter and target, which reads the head twice. Peers: transformers' forward of as many tokens with its cache; for
    the round a token of its generate."""
    device, K = model.embed_tokens.weight.device, draft.block_size
    count = 4 if device.type == "cpu" and model.embed_tokens.weight.numel() > 1e8 else 32
    x = torch.arange(256 + K, device=device)[None] % 100
    past = theirs(x[:, :256], use_cache=True).past_key_values
    decoders = {name: Decoder(model, arm, 1024, rows, Sampling()) for name, arm, rows in (
        ("one row", None, 1), ("block", None, K), ("round", draft, K))}
    for decoder in decoders.values():
        decoder.prefill(x[0, :256].tolist())

    def ours(name):
        decoders[name].state.pos.fill_(256)
        return seconds(decoders[name].run, count)

    def forward(n):
        cache = copy.deepcopy(past)
        return seconds(lambda: theirs(x[:, 256:256 + n], past_key_values=cache), count)

    def generated():
        cache, ids = copy.deepcopy(past), x[:, :257]
        return seconds(lambda: theirs.generate(ids, past_key_values=cache, attention_mask=torch.ones_like(ids),
                                               do_sample=False, min_new_tokens=count, max_new_tokens=count,
                                               pad_token_id=0)) / count

    found = race({name: functools.partial(ours, name) for name in decoders} | {
        "forward of one": lambda: forward(1), "forward of sixteen": lambda: forward(K), "generate": generated})
    size = reads(model, draft)
    return [row(name, {"ours": found[arm], "peer": found[peer]}, size[read] / copy_rate, f"transformers, {peer}")
            for name, arm, peer, read in (("target step, one row", "one row", "forward of one", "step"),
                                          ("target step, sixteen rows", "block", "forward of sixteen", "step"),
                                          ("round of draft and verify", "round", "generate", "round"))]


@torch.inference_mode()
def prefill_rows(model, theirs, lengths, rate):
    """Reading a prompt, its last logits included."""
    rows, layer_ops = [], 2 * sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n
                                  and "head" not in n)
    device = model.embed_tokens.weight.device
    for n in (n for n in lengths if n + 16 <= model.config.max_position_embeddings):
        x = torch.arange(n, device=device)[None] % 1000
        state = DecodeState(model, 1, n + 16)

        def ours():
            state.reset()
            return seconds(lambda: model.prefill(x, state))

        found = race({"ours": ours, "peer": lambda: seconds(lambda: theirs(x, logits_to_keep=1))})
        rows.append(row(f"prefill, {n:,} tokens", found, layer_ops * n / rate))
    return rows


def kernel_rows(lengths, device):
    """The chunked delta rule alone, 16 heads of 128, forward, and forward with backward."""
    from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule
    rows = []
    for n in lengths:
        g = torch.Generator(device).manual_seed(0)
        q, k, v = (torch.randn(1, n, 16, 128, device=device, generator=g) for _ in range(3))
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        beta, decay = (torch.rand(1, n, 16, device=device, generator=g) for _ in range(2))
        inputs = [x.requires_grad_() for x in (q, k, v, -decay, beta)]

        def both(f):
            o = f(*inputs)[0]
            torch.autograd.grad(o.sum(), inputs)

        def forward(f):
            with torch.no_grad():
                f(*inputs)

        for name, mode in (("forward", forward), ("forward and backward", both)):
            found = race({"ours": lambda: seconds(lambda: mode(gated_delta_rule)),
                          "peer": lambda: seconds(lambda: mode(torch_chunk_gated_delta_rule))})
            rows.append(row(f"delta rule, {n:,} tokens, {name}", found))
    return rows


WIDTHS = SIZES["0.8b"]


def phase1_2_drafter(config):
    return DFlashDraftModel(drafter_config(config, 5, (3, 7, 11, 15, 19), config.vocab_size - 1, 8, 2, 256, 3584))


def peak_bytes():
    """The most memory that this process ever held."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM"))


def in_own_process(f, *args):
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(f, *args).result()


@torch.inference_mode()
def memory_rows():
    """Peak memory of one generation with target and drafter at Qwen3.5-0.8B's widths, in float32 on a CPU, after 256
    and after 4,096 tokens, every round made to end 16 tokens later; state_bytes: of the buffers it began with."""
    model = load_target("random:0.8b")
    draft = pack_linears(phase1_2_drafter(model.config).requires_grad_(False).eval())
    decoder, rows, began = Decoder(model, draft, 8192, draft.block_size, Sampling()), [], peak_bytes()
    decoder.prefill(list(range(64)))
    held = decoder.memory.nbytes + sum(x.nbytes for x in vars(decoder.state).values() if torch.is_tensor(x))
    for tokens in (256, 4096):
        positions = range(decoder.state.pos.item(), tokens, draft.block_size)
        t = seconds(lambda at=iter(positions): (decoder.state.pos.fill_(next(at)), decoder.run()), len(positions))
        rows.append({"name": f"decoding, {tokens:,} tokens", "seconds": t, "floor_seconds": None, "peer": None,
                     "peer_seconds": None, "ratio": None, "peak_bytes": peak_bytes(), "state_bytes": held})
    print(f"decoding: {began / 1e9:.3f} GB with weights and buffers; of those, buffers for 8,192 tokens "
          f"{held / 1e9:.3f} GB; {(rows[1]['peak_bytes'] - rows[0]['peak_bytes']) / 1e6:.1f} MB more at 4,096 tokens "
          "than at 256")
    return rows


def training_row(T, A):
    """Seconds of one forward and backward of T tokens with A anchors, the better of two, the floor, and the peak memory
    of the process that ran it, which should be one of its own. The floor is train.operations over the throughput: with
    1,024 tokens and 128 anchors, 2,048 rows, in units of 1e9 operations: layers 6 x 81.3 M x 2,048 = 999, keys and
    values of the context 32, fc 21, attention 12 x 10,240 x 2,048 x 528 = 133, head 4 x 254 M x 1,920 = 1,953."""
    draft = phase1_2_drafter(WIDTHS)
    head = torch.empty(WIDTHS.vocab_size, WIDTHS.hidden_size).normal_(std=0.02)
    tokens, features = torch.randint(0, WIDTHS.vocab_size, (1, T)), torch.randn(1, T, 5 * WIDTHS.hidden_size)
    seconds, rates = math.inf, [throughput("cpu", "float32")]
    for _ in range(2):
        began = time.perf_counter()
        at, real = sample_anchors(tokens >= 0, A, torch.Generator().manual_seed(0))
        labels, weights = block_labels(tokens, tokens >= 0, at, real, 16, 7.0)
        hidden = draft(features, draft.block(tokens.gather(1, at), head), at)
        block_loss(hidden, head, labels, weights, 256)[0].backward()
        seconds = min(seconds, time.perf_counter() - began)
        rates.append(throughput("cpu", "float32"))
    return {"name": f"training, {T} tokens, {A} anchors", "seconds": seconds, "peak_bytes": peak_bytes(),
            "floor_seconds": train.operations(draft, 1, T, A) / max(rates)}


def training_rows():
    """The training rows, and whether time is affine in the number of anchors. Peer: SpecForge's step as measured on two
    cores of another machine, so the ratio to it says less than that to the floor."""
    rows, peers = [], {(512, 32): 12.5, (1024, 128): 65.8}
    for T, A in progress(((512, 32), (1024, 32), (1024, 64), (1024, 128), (1024, 256))):
        made = in_own_process(training_row, T, A)
        peer = peers.get((T, A))
        rows.append(made | {"peer": peer and "SpecForge, elsewhere", "peer_seconds": peer,
                            "ratio": peer and peer / made["seconds"]})
    A = torch.tensor([[1.0, 32], [1, 64], [1, 128], [1, 256]], dtype=torch.float64)
    seconds, peaks = (torch.tensor([[made[key]] for made in rows[1:]], dtype=torch.float64)
                      for key in ("seconds", "peak_bytes"))
    error = ((A @ torch.linalg.lstsq(A, seconds).solution) / seconds - 1).abs().max().item()
    per_anchor = torch.linalg.lstsq(A, peaks).solution[1].item()
    print(f"training: affine in the anchors within {error:.1%}; {per_anchor / 1e6:.1f} MB an anchor")
    return rows


def phase1_2_run(model, rows, **keys):
    """A train.Run of Phase 1.2's drafter over rows, with those of train.py's keys set."""
    vars(train).update(keys)
    train.repeatable()
    torch.manual_seed(0)
    draft = phase1_2_drafter(model.config).to(model.embed_tokens.weight.device)
    if train.compile:
        train.compile_layers(model, draft)
    return train.Run(model, draft, draft, torch.optim.AdamW(draft.parameters(), lr=3e-4), train.Batches(rows), 1 << 30)


def split(run):
    """Seconds of each part of a micro-batch's way to the next weights, the device awaited after each."""
    marks, draft = [(None, clock())], run.drafter

    def mark(name):
        marks.append((name, clock()))

    tokens, supervised = run.batches[0]
    mark("data")
    with torch.no_grad():
        features, _ = run.model(tokens, taps=draft.taps)
    mark("target forward")
    at, real = sample_anchors(supervised, train.anchors, torch.Generator().manual_seed(0))
    labels, weights = block_labels(tokens, supervised, at, real, draft.block_size, train.gamma)
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=train.dtype == "bfloat16"):
        hidden = draft(features, draft.block(tokens.gather(1, at), run.model.embed_tokens.weight), at,
                       train.attention == "flex")
    mark("drafter forward")
    loss = block_loss(hidden, run.model.head, labels, weights, train.head_rows, None,
                      train.compiled_chunk if train.compile else head_chunk)[0]
    mark("head and loss")
    loss.backward()
    mark("backward")
    torch.nn.utils.clip_grad_norm_(draft.parameters(), train.clip)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    mark("optimizer")
    return {name: t - before for (_, before), (name, t) in zip(marks, marks[1:])}


def step_rows(model, device, dtype, rate):
    """Whole training steps of Phase 1.2, of rows of 3,072 tokens and of a mix like the real data's, which has 1,200 on
    average: 4 rows a step, 512 anchors each. The floor is train.operations over the rate of a large product. What is
    compiled comes last, as the layers stay so."""
    made, r, V, full = [], np.random.default_rng(0), model.config.vocab_size, [3072] * 64
    mix = np.clip(r.lognormal(math.log(1000), 0.6, 256), 200, 3072).astype(int)
    for name, lengths, keys in (
            ("3,072 tokens", full, {}), ("3,072 tokens, head_rows 4096", full, {"head_rows": 4096}),
            ("mixed lengths", mix, {}), ("3,072 tokens, grouped attention", full, {"attention": "grouped"}),
            ("3,072 tokens, --compile", full, {"compile": True}), ("mixed lengths, --compile", mix, {"compile": True})):
        rows = [(r.integers(0, V, n), np.arange(n) >= min(100, n // 2)) for n in lengths]
        run = phase1_2_run(model, rows, **{
            "device": device, "dtype": dtype, "attention": "flex", "anchors": 512, "head_rows": 1024, "compile": False,
            "batch_size": 2, "accumulation": 2} | keys)
        began, count = clock(), 2 if "attention" in keys else 8  # the grouped form takes ten seconds a step
        if lengths is mix:
            train.warm_up(run)
        for _ in range(2):
            train.train_step(run)
        warm, graphs = clock() - began, counters["stats"]["unique_graphs"]
        torch.cuda.reset_peak_memory_stats()
        seconds, tokens, work = [], 0, 0
        for _ in range(count):
            tokens += sum(run.batches.lengths[run.batches.chosen(2 * run.step + i)].sum() for i in range(2))
            began = clock()
            work += train.train_step(run)[2]
            seconds.append(clock() - began)
        total = sum(seconds)
        m = {"name": f"training step, {name}", "seconds": median(seconds), "floor_seconds": work / count / rate,
             "peak_bytes": torch.cuda.max_memory_allocated(), "peer": None, "peer_seconds": None, "ratio": None,
             "samples_per_s": 4 * count / total, "tokens_per_s": int(tokens) / total, "mfu": train.mfu(work / total),
             "recompiled": counters["stats"]["unique_graphs"] - graphs, "warm_up_s": warm,
             "split": [split(run) for _ in range(3)][-1]}
        made.append(m)
        print(f"{m['name']}: {m['samples_per_s']:.2f} samples/s, {m['tokens_per_s']:,.0f} tokens/s without padding, "
              f"{m['mfu'] or 0:.1%} MFU, {m['recompiled']} recompiled after {warm:.0f} s of warm-up; ms of a part: "
              + ", ".join(f"{part} {1e3 * t:.1f}" for part, t in m["split"].items()), flush=True)
    return made


def measure(model, draft, theirs, device, dtype, parts):
    """The parts named, as a table and as a dict for the JSON line."""
    cuda = device.startswith("cuda")
    copy_rate, rate = bandwidth(device), throughput(device, dtype)
    print(f"{dtype} on {where(device)}, torch {torch.__version__}: copies {copy_rate / 1e9:,.0f} GB/s, products "
          f"{rate / 1e12:.2f} TFLOP/s\n")
    made = {"decoding": lambda: decoding_rows(model, draft, theirs, copy_rate),
            "prefill": lambda: prefill_rows(model, theirs, (512, 1024, 4096, 16384) if cuda else (512, 1024), rate),
            "kernel": lambda: kernel_rows((2048, 16384) if cuda else (2048,), device),
            "memory": lambda: in_own_process(memory_rows),
            "training": (lambda: step_rows(model, device, dtype, rate)) if cuda else training_rows}
    if unknown := set(parts) - set(made):
        raise ValueError(f"parts = {parts}: {unknown.pop()!r} is none of {', '.join(made)}")
    rows = [row for part in parts for row in made[part]()]
    print(f"{'':44} {'ms':>10} {'x floor':>8} {'peer ms':>10} {'ratio':>7} {'peak GB':>8}")
    for r in rows:
        floor = f"{r['seconds'] / r['floor_seconds']:8.2f}" if r["floor_seconds"] else f"{'-':>8}"
        peer = f"{1e3 * r['peer_seconds']:10.3f} {r['ratio']:6.2f}x" if r["ratio"] else f"{'-':>10} {'-':>7}"
        peak = f"{r['peak_bytes'] / 1e9:8.2f}" if r.get("peak_bytes") else ""
        print(f"{r['name']:44} {1e3 * r['seconds']:10.3f} {floor} {peer} {peak}")
    return {"device": where(device), "dtype": dtype, "torch": torch.__version__, "copy_bytes_per_s": copy_rate,
            "operations_per_s": rate, "rows": rows}
