"""
Rows on disk, as prepare.py scripts write them and train.py reads them. A folder holds, for each split,

    SPLIT.tokens.bin   uint32, all rows one after another (uint16 would wrap at 65,536 ids)
    SPLIT.mask.bin     uint8, 1 where a token is supervised: the answer and its closing <|im_end|>
    SPLIT.offsets.bin  uint64, where each row begins, and the end of the last

and meta.json, written last: a folder without it was not finished.
"""
import json
import os

import numpy as np

FORMAT = 1


def write_rows(folder, splits, meta):
    """splits: {name: list of (token ids, mask)}; rows without a supervised token are dropped and counted. meta: what
    a reader checks, with at least vocab_size. Returns the whole of meta.json."""
    os.makedirs(folder, exist_ok=True)
    meta_path = os.path.join(folder, "meta.json")
    if os.path.exists(meta_path):
        os.remove(meta_path)  # from here on the folder is unfinished
    meta = {"format": FORMAT, **meta, "splits": {}}
    for name, rows in splits.items():
        kept = [(t, m) for t, m in rows if any(m)]
        arrays = {"tokens": np.concatenate([np.asarray(t, np.uint32) for t, _ in kept] or [np.empty(0, np.uint32)]),
                  "mask": np.concatenate([np.asarray(m, np.uint8) for _, m in kept] or [np.empty(0, np.uint8)]),
                  "offsets": np.cumsum([0] + [len(t) for t, _ in kept]).astype(np.uint64)}
        for kind, array in arrays.items():
            path = os.path.join(folder, f"{name}.{kind}.bin")
            array.tofile(path + ".tmp")
            os.replace(path + ".tmp", path)
        meta["splits"][name] = {"rows": len(kept), "dropped": len(rows) - len(kept), "tokens": len(arrays["tokens"]),
                                "supervised": int(arrays["mask"].sum())}
    with open(meta_path + ".tmp", "w") as f:
        json.dump(meta, f, indent=2)
    os.replace(meta_path + ".tmp", meta_path)
    return meta


class Rows:
    """The rows of one split, memory-mapped: len(rows), rows[i] -> (tokens, mask) as int64 arrays. tokenizer: the
    fingerprint that meta.json must hold; None: any.

    Raises ValueError, with what to run, when the folder is not finished or was made for another vocabulary.
    """
    def __init__(self, folder, split, vocab_size, tokenizer=None):
        hint = f"run python {os.path.join(folder, 'prepare.py')}"
        try:
            with open(os.path.join(folder, "meta.json")) as f:
                meta = json.load(f)
        except FileNotFoundError:
            raise ValueError(f"no meta.json in {folder!r}, so there is no finished data: {hint}") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"{folder}/meta.json is broken ({error}): {hint} again") from None
        if meta.get("format") != FORMAT or meta.get("vocab_size") != vocab_size:
            raise ValueError(f"{folder}/meta.json has format {meta.get('format')} and vocab_size "
                             f"{meta.get('vocab_size')}, this target wants {FORMAT} and {vocab_size}: {hint} for it")
        if tokenizer is not None and meta.get("tokenizer") != tokenizer:
            raise ValueError(f"the rows in {folder!r} were made with another tokenizer or chat template than this "
                             f"target's: {hint}")
        if not meta["splits"].get(split, {}).get("rows"):
            raise ValueError(f"{folder} has no rows in split {split!r}: {hint}")
        try:
            self.tokens, self.mask, self.offsets = (
                np.memmap(os.path.join(folder, f"{split}.{kind}.bin"), dtype, "r")
                for kind, dtype in (("tokens", np.uint32), ("mask", np.uint8), ("offsets", np.uint64)))
        except (OSError, ValueError) as error:  # missing; empty, or cut in the middle of a number
            raise ValueError(f"cannot read the {split} rows in {folder!r} ({error}): {hint} again") from None
        size = meta["splits"][split]["tokens"]
        if not len(self.tokens) == len(self.mask) == self.offsets[-1] == size:
            raise ValueError(f"{folder}/{split}.*.bin hold {len(self.tokens)} tokens, meta.json says {size}: "
                             f"{hint} again")

    def __len__(self):
        return len(self.offsets) - 1

    def __getitem__(self, i):
        row = slice(int(self.offsets[i]), int(self.offsets[i + 1]))
        return self.tokens[row].astype(np.int64), self.mask[row].astype(np.int64)
