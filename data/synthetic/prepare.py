"""
Samples of random tokens, to measure training without real data or real weights.

    python train.py config/phase1_2.py --target=random:0.8b --data=data/synthetic
    python data/synthetic/prepare.py --length=3072 --out_dir=out/samples   # all of one length

train.py runs this script if the samples are missing, so the first line is enough.
"""
import os
import sys

import numpy as np

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
sys.path.insert(0, ROOT)  # the project's modules, from any working directory
from tokenizer import tokenizer_fingerprint
from checkpoint import read_target_config
from configurator import configure
from data.samples import write_samples
from formats.files import one_line, printable

target = "random:0.8b"  # whose vocabulary and tokenizer the samples are for
out_dir = os.path.join(ROOT, "data", "synthetic")  # where the samples go
rows = 256              # samples of the split train
val_rows = 16           # samples of the split val
length = 0              # tokens per sample; 0: mixed lengths, similar to Phase 1.2's data
max_length = 3072       # max tokens per sample of mixed lengths
seed = 0                # of lengths and tokens


def random_samples(lengths, vocab_size, generator):
    """Yields samples (tokens, mask): a question of at most 100 tokens, then its answer.

    The frequencies of the ids follow Zipf's law, like words of a language. So a drafter can learn
    which ids are frequent, and its loss falls. The last id stays free for the mask.
    """
    for length in lengths:
        tokens = (generator.zipf(1.2, length) - 1) % (vocab_size - 1)
        yield tokens, np.arange(length) >= min(100, length // 2)


def main(argv=None):
    config = configure(globals(), argv)
    try:
        target_config, _ = read_target_config(config.target)
        fingerprint = tokenizer_fingerprint(config.target)
    except ValueError as error:
        sys.exit(f"error: {one_line(error)}")
    if config.length == 1 or config.length < 0:
        sys.exit(f"error: length = {config.length}: a sample has a question and an answer, so use "
                 "2 or more, or 0 for mixed lengths")

    vocab_size = target_config.vocab_size
    generator = np.random.default_rng(config.seed)
    splits = {}
    for split, count in (("train", config.rows), ("val", config.val_rows)):
        # lognormal, half of them under 1,000 tokens
        lengths = generator.lognormal(np.log(1000), 0.6, count)
        lengths = np.clip(lengths, 200, config.max_length).astype(int)
        if config.length:
            lengths = [config.length] * count
        splits[split] = random_samples(lengths, vocab_size, generator)
    meta = {"vocab_size": vocab_size, "tokenizer": fingerprint}
    counts = write_samples(config.out_dir, splits, meta)["splits"]["train"]
    average = counts["tokens"] / counts["rows"]
    print(printable(f"wrote {counts['rows']} samples of {average:,.0f} tokens on average to "
                    f"{config.out_dir}"))


if __name__ == "__main__":
    main()
