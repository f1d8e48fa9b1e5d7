"""
Rows of random tokens, to measure training before real rows or real weights are at hand.

    python train.py config/phase1_2.py --target=random:0.8b --data=data/synthetic
    python data/synthetic/prepare.py --length=3072 --out_dir=out/rows   # rows of one length
    python data/synthetic/prepare.py --target=DIR                       # for another target

The first line needs no other: train.py runs this script when the rows are missing.
"""
import os
import sys

import numpy as np

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
sys.path.insert(0, ROOT)  # the project's modules, from whatever folder this is run
from tokenizer import tokenizer_fingerprint
from checkpoint import read_target_config
from configurator import configure
from data.samples import write_samples

target = "random:0.8b"  # whose vocabulary and tokenizer the rows are for
out_dir = os.path.join(ROOT, "data", "synthetic")  # where the rows go
rows = 256              # of the split train
val_rows = 16           # of the split val
length = 0              # tokens of every row; 0: mixed lengths, as those of Phase 1.2's data
max_length = 3072       # tokens of a row of mixed lengths at most
seed = 0                # of lengths and tokens


def mixed_lengths(count, generator, longest=3072):
    """Lengths of `count` rows: lognormal, half of them under 1,000 tokens, from 200 to longest.

    An assumption: Phase 1.2's rows could not be read here. They are math questions with worked
    answers, cut at 3,072 tokens.
    """
    lengths = generator.lognormal(np.log(1000), 0.6, count)
    return np.clip(lengths, 200, longest).astype(int)


def random_row(length, vocab_size, generator):
    """(tokens, mask) of one row: a question of at most 100 tokens, then its answer.

    How often an id occurs follows Zipf's law, as words of a language do. So a drafter can at least
    learn which ids are frequent, and its loss falls. The last id stays free for the mask.
    """
    tokens = (generator.zipf(1.2, length) - 1) % (vocab_size - 1)
    mask = np.arange(length) >= min(100, length // 2)
    return tokens, mask


def random_rows(lengths, vocab_size, generator):
    for length in lengths:
        yield random_row(length, vocab_size, generator)


def main(argv=None):
    config = configure(globals(), argv)
    try:
        target_config, _ = read_target_config(config.target)
        fingerprint = tokenizer_fingerprint(config.target)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if config.length == 1 or config.length < 0:
        sys.exit(f"error: length = {config.length}: a row has a question and an answer, so 2 "
                 "tokens or more; 0 stands for mixed lengths")

    generator = np.random.default_rng(config.seed)
    splits = {}
    for split, count in (("train", config.rows), ("val", config.val_rows)):
        lengths = mixed_lengths(count, generator, config.max_length)
        if config.length:
            lengths = [config.length] * count
        splits[split] = random_rows(lengths, target_config.vocab_size, generator)
    meta = {"vocab_size": target_config.vocab_size, "tokenizer": fingerprint}
    counts = write_samples(config.out_dir, splits, meta)["splits"]["train"]
    print(f"wrote {counts['rows']} rows of {counts['tokens'] / counts['rows']:,.0f} tokens on "
          f"average to {config.out_dir}")


if __name__ == "__main__":
    main()
