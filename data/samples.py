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
import contextlib
import glob
import json
import operator
import os
import shlex

import numpy as np

from formats.files import (
    one_line, open_regular, read_json, short, where, whole_file, write_whole)

FORMAT = 1  # of the folder, in meta.json


class Samples:
    """The samples of one split: len(samples), and samples[i] -> (tokens, mask) as int64 arrays.

    vocab_size and tokenizer (tokenizer_fingerprint, or None for any) are the target's. Raises
    ValueError, which says what to run, if the folder is unfinished or was made for a different
    target.
    """
    def __init__(self, folder, split, vocab_size, tokenizer=None):
        hint = how_to_make(folder)
        meta = read_meta(folder, hint)
        if meta.get("format") != FORMAT or meta.get("vocab_size") != vocab_size:
            raise ValueError(
                f"meta.json has format {short(meta.get('format'), 9)} and vocab_size "
                f"{short(meta.get('vocab_size'), 9)}, this target wants {FORMAT} and {vocab_size}: "
                f"{hint}")
        if tokenizer is not None and meta.get("tokenizer") != tokenizer:
            raise ValueError("the samples were made with another tokenizer or chat template than "
                             f"this target's: {hint}")
        counts = meta["splits"].get(split)
        if not counts or not counts["rows"]:
            raise ValueError(f"no samples in split {split!r}: {hint}")

        # The files are mapped into memory, so only the samples that are used come from disk.
        path = os.path.join(folder, split)
        try:
            self.tokens = np.memmap(open_regular(f"{path}.tokens.bin"), np.uint32, "r")
            self.mask = np.memmap(open_regular(f"{path}.mask.bin"), np.uint8, "r")
            self.offsets = np.memmap(open_regular(f"{path}.offsets.bin"), np.uint64, "r")
        except (OSError, ValueError) as error:  # missing, empty, or cut inside a number
            reason = one_line(error, 50)
            raise ValueError(f"cannot read the {split} rows ({reason}): {hint}") from None
        if not len(self.tokens) == len(self.mask) == self.offsets[-1] == counts["tokens"]:
            raise ValueError(f"{split}.*.bin hold {len(self.tokens)} tokens, meta.json says "
                             f"{counts['tokens']}: {hint}")
        if not (self.offsets[1:] > self.offsets[:-1]).all():
            raise ValueError(f"{split}.offsets.bin is broken, offsets must ascend: {hint}")

    def __len__(self):
        return len(self.offsets) - 1

    def __getitem__(self, i):
        begin = int(self.offsets[i])
        end = int(self.offsets[i + 1])
        return self.tokens[begin:end].astype(np.int64), self.mask[begin:end].astype(np.int64)


def how_to_make(folder):
    """The command that makes a folder's samples, for an error message. It names the folder."""
    script = os.path.join(folder, "prepare.py")
    if os.path.isfile(script):
        return f"run python {shlex.quote(where(script, 90))}"
    folder = shlex.quote(where(folder, 40))
    return f"run python data/conversations.py --out_dir={folder} --target=... --source=..."


def read_meta(folder, hint):
    """The content of a folder's meta.json. hint: the command that makes the folder's samples."""
    try:
        meta = read_json(os.path.join(folder, "meta.json"))
        for counts in meta["splits"].values():
            if not 0 <= operator.index(counts["rows"]) <= operator.index(counts["tokens"]):
                raise ValueError("more rows than tokens")
    except FileNotFoundError:
        raise ValueError(f"no meta.json in {where(folder, 40)!r}, so there is no finished data: "
                         f"{hint}") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"meta.json is broken ({one_line(error, 60)}): {hint}") from None
    return meta


class SplitWriter:
    """Writes the samples of one split to three open files. counts: for meta.json."""
    def __init__(self, files, vocab_size):
        self.tokens_file, self.mask_file, self.offsets_file = files
        self.vocab_size = vocab_size
        self.counts = {"rows": 0, "dropped": 0, "tokens": 0, "supervised": 0}
        self.write_offset()

    def add(self, tokens, mask):
        """Append a sample of token ids and 0/1 flags. Without a supervised token, only count it."""
        tokens = np.asarray(tokens)
        mask = np.asarray(mask, np.uint8)
        if not mask.any():
            self.counts["dropped"] += 1
            return
        smallest = tokens.min()
        largest = tokens.max()
        if smallest < 0 or largest >= self.vocab_size:
            raise ValueError(
                f"sample {self.counts['rows']} has token ids {smallest}..{largest}, outside the "
                f"vocabulary of {self.vocab_size}: this tokenizer is not the target's")
        self.tokens_file.write(tokens.astype(np.uint32).tobytes())
        self.mask_file.write(mask.tobytes())
        self.counts["rows"] += 1
        self.counts["tokens"] += len(tokens)
        self.counts["supervised"] += int(mask.sum())
        self.write_offset()

    def write_offset(self):
        """Where the next sample begins."""
        self.offsets_file.write(np.uint64(self.counts["tokens"]).tobytes())


@contextlib.contextmanager
def split_writers(folder, splits, meta):
    """{split: SplitWriter} for a folder, for use in a with statement.

    meta is what a reader checks, at least vocab_size. The body of the with statement can add to it,
    and then it is completed and written. After an exception the folder stays unfinished.
    """
    os.makedirs(folder, exist_ok=True)
    meta_path = os.path.join(folder, "meta.json")
    with contextlib.suppress(FileNotFoundError):
        os.remove(meta_path)  # from here on the folder is unfinished
    for left_over in glob.glob(os.path.join(glob.escape(folder), "*.bin.*.tmp")):
        os.remove(left_over)  # a killed run left it
    writers = {}
    with contextlib.ExitStack() as stack:
        for split in splits:
            files = []
            for content in ("tokens", "mask", "offsets"):
                path = os.path.join(folder, f"{split}.{content}.bin")
                files.append(stack.enter_context(whole_file(path)))
            writers[split] = SplitWriter(files, meta["vocab_size"])
        yield writers
    meta["format"] = FORMAT
    meta["splits"] = {split: writer.counts for split, writer in writers.items()}
    write_whole(meta_path, json.dumps(meta, indent=2))


def write_samples(folder, splits, meta):
    """Write {split: iterable of (tokens, mask)}. Returns the content of meta.json."""
    meta = dict(meta)
    with split_writers(folder, splits, meta) as writers:
        for split, samples in splits.items():
            for tokens, mask in samples:
                writers[split].add(tokens, mask)
    return meta
