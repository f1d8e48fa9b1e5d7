"""
Training samples on disk. The scripts in data/ write them, and train.py reads them. A sample is one
row of a data set as token ids, with a flag for each supervised token. A folder holds, for each
split,

    SPLIT.tokens.bin   uint32, all samples one after another (uint16 would wrap at 65,536 ids)
    SPLIT.mask.bin     uint8, 1 for a supervised token: the answer and its closing <|im_end|>
    SPLIT.offsets.bin  uint64, where each sample begins, and the end of the last one

and meta.json, which is written last: a folder without it is unfinished. Each sample goes to disk at
once, so a data set can be larger than the memory.
"""
import array
import contextlib
import glob
import json
import operator
import os
import shlex

import numpy as np

from formats.files import (
    one_line, printable, read_json, short, where, whole_file, write_whole)

FORMAT = 1  # of the folder, in meta.json
CONTENTS = ("tokens", "mask", "offsets")  # the files of a split


class Samples:
    """The samples of one split: len(samples), and samples[i] -> (tokens, mask) as int64 arrays.

    vocab_size and tokenizer (tokenizer_fingerprint, or None for any) are the target's. Raises
    ValueError, which says what to run, if the folder is unfinished or was made for a different
    target.
    """
    def __init__(self, folder, split, vocab_size, tokenizer=None):
        hint = how_to_make(folder)
        name = where(folder)
        meta = read_meta(folder, hint)
        if meta.get("format") != FORMAT or meta.get("vocab_size") != vocab_size:
            raise ValueError(
                f"{name}/meta.json has format {short(meta.get('format'))} and vocab_size "
                f"{short(meta.get('vocab_size'))}, this target wants {FORMAT} and {vocab_size}: "
                f"{hint} for it")
        if tokenizer is not None and meta.get("tokenizer") != tokenizer:
            raise ValueError(
                f"the samples in {name!r} were made with another tokenizer or chat template than "
                f"this target's: {hint}")
        if split not in meta["splits"] or not meta["splits"][split]["rows"]:
            raise ValueError(f"{name} has no samples in split {split!r}: {hint}")

        # The files are mapped into memory, so only the samples that are used come from disk.
        path = os.path.join(folder, split)
        try:
            self.tokens = np.memmap(f"{path}.tokens.bin", np.uint32, "r")
            self.mask = np.memmap(f"{path}.mask.bin", np.uint8, "r")
            self.offsets = np.memmap(f"{path}.offsets.bin", np.uint64, "r")
        except (OSError, ValueError) as error:  # missing, empty, or cut inside a number
            raise ValueError(f"cannot read the {split} rows in {name!r} ({one_line(error)}): "
                             f"{hint} again") from None
        size = meta["splits"][split]["tokens"]
        if not len(self.tokens) == len(self.mask) == self.offsets[-1] == size:
            raise ValueError(f"{where(path)}.*.bin hold {len(self.tokens)} tokens, meta.json says "
                             f"{size}: {hint} again")

    def __len__(self):
        return len(self.offsets) - 1

    def __getitem__(self, i):
        begin = int(self.offsets[i])
        end = int(self.offsets[i + 1])
        return self.tokens[begin:end].astype(np.int64), self.mask[begin:end].astype(np.int64)


def how_to_make(folder):
    """The command that makes a folder's samples, for an error message."""
    script = os.path.join(folder, "prepare.py")
    if os.path.isfile(script):
        return f"run python {shlex.quote(printable(script))}"
    folder = shlex.quote(printable(folder))
    return f"run python data/conversations.py --out_dir={folder} --target=... --source=..."


def read_meta(folder, hint):
    """The content of a folder's meta.json. hint: the command that makes the folder's samples."""
    try:
        meta = read_json(os.path.join(folder, "meta.json"))
        for counts in meta["splits"].values():
            if not 0 <= operator.index(counts["rows"]) <= operator.index(counts["tokens"]):
                raise ValueError("more rows than tokens")
    except FileNotFoundError:
        raise ValueError(
            f"no meta.json in {where(folder)!r}, so there is no finished data: {hint}") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{where(folder)}/meta.json is broken ({one_line(error)}): {hint} again") from None
    return meta


class SplitWriter:
    """Writes one split: add() for each sample, close() at the end. files: a whole_file() for each
    of CONTENTS."""
    def __init__(self, files, vocab_size):
        self.files = dict(zip(CONTENTS, files))
        self.offsets = array.array("Q", [0])
        self.vocab_size = vocab_size
        self.dropped = 0
        self.supervised = 0

    def add(self, tokens, mask):
        """Append a sample of token ids and 0/1 flags. Without a supervised token, only count it."""
        tokens = np.asarray(tokens)
        mask = np.asarray(mask, np.uint8)
        if not mask.any():
            self.dropped += 1
            return
        smallest = tokens.min()
        largest = tokens.max()
        if smallest < 0 or largest >= self.vocab_size:
            raise ValueError(
                f"sample {len(self.offsets) - 1} has token ids {smallest}..{largest}, outside the "
                f"vocabulary of {self.vocab_size}: this tokenizer is not the target's")
        self.files["tokens"].write(tokens.astype(np.uint32).tobytes())
        self.files["mask"].write(mask.tobytes())
        self.offsets.append(self.offsets[-1] + len(tokens))
        self.supervised += int(mask.sum())

    def close(self):
        """Write the offsets; returns the split's counts for meta.json."""
        self.files["offsets"].write(self.offsets.tobytes())
        return {
            "rows": len(self.offsets) - 1,
            "dropped": self.dropped,
            "tokens": self.offsets[-1],
            "supervised": self.supervised,
        }


@contextlib.contextmanager
def split_writers(folder, splits, meta):
    """{split: SplitWriter} for a folder, for use in a with statement.

    meta is what a reader checks, at least vocab_size. The body of the with statement can add to it,
    and then it is completed and written. After an exception the folder stays unfinished.
    """
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, "meta.json")
    if os.path.lexists(path):
        os.remove(path)  # from here on the folder is unfinished
    for left_over in glob.glob(os.path.join(glob.escape(folder), "*.bin.*.tmp")):
        os.remove(left_over)  # a killed run left it
    writers = {}
    with contextlib.ExitStack() as stack:
        for split in splits:
            paths = [os.path.join(folder, f"{split}.{content}.bin") for content in CONTENTS]
            files = [stack.enter_context(whole_file(path)) for path in paths]
            writers[split] = SplitWriter(files, meta["vocab_size"])
        yield writers
        meta["format"] = FORMAT
        meta["splits"] = {split: writer.close() for split, writer in writers.items()}
    write_whole(path, json.dumps(meta, indent=2))


def write_samples(folder, splits, meta):
    """Write {split: iterable of (tokens, mask)}. Returns the content of meta.json."""
    meta = dict(meta)
    with split_writers(folder, splits, meta) as writers:
        for split, samples in splits.items():
            for tokens, mask in samples:
                writers[split].add(tokens, mask)
    return meta
