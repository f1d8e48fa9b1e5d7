"""
Rows on disk, as prepare.py scripts write them and train.py reads them. A folder holds, for each split,

    SPLIT.tokens.bin   uint32, all rows one after another (uint16 would wrap at 65,536 ids)
    SPLIT.mask.bin     uint8, 1 where a token is supervised: the answer and its closing <|im_end|>
    SPLIT.offsets.bin  uint64, where each row begins, and the end of the last

and meta.json, written last: a folder without it was not finished. Rows go to disk as they come, so that no data set
has to fit into memory. Also here: reading rows of public data sets, read_source.
"""
import array
import contextlib
import glob
import json
import os

import numpy as np

FORMAT = 1

# ----------------------------------------------------------------------------------------------------------------------
# writing and reading tokens


class Writer:
    """One split being written: add() rows, then close() for its entry in meta.json."""
    def __init__(self, folder, split, vocab_size):
        self.paths = {kind: os.path.join(folder, f"{split}.{kind}.bin") for kind in ("tokens", "mask", "offsets")}
        self.tokens, self.mask = (open(self.paths[kind] + ".tmp", "wb") for kind in ("tokens", "mask"))
        self.offsets, self.vocab_size, self.dropped, self.supervised = array.array("Q", [0]), vocab_size, 0, 0

    def add(self, tokens, mask):
        """Append a row of token ids and 0/1 flags; a row without a supervised token is dropped and counted."""
        tokens, mask = np.asarray(tokens), np.asarray(mask, np.uint8)
        if not mask.any():
            self.dropped += 1
            return
        if not 0 <= tokens.min() <= tokens.max() < self.vocab_size:
            raise ValueError(f"row {len(self.offsets) - 1} has token ids {tokens.min()}..{tokens.max()}, outside the "
                             f"vocabulary of {self.vocab_size}: this tokenizer is not the target's")
        self.tokens.write(tokens.astype(np.uint32).tobytes())
        self.mask.write(mask.tobytes())
        self.offsets.append(self.offsets[-1] + len(tokens))
        self.supervised += int(mask.sum())

    def close(self):
        self.tokens.close(), self.mask.close()
        np.array(self.offsets, np.uint64).tofile(self.paths["offsets"] + ".tmp")
        for path in self.paths.values():
            os.replace(path + ".tmp", path)
        return {"rows": len(self.offsets) - 1, "dropped": self.dropped, "tokens": self.offsets[-1],
                "supervised": self.supervised}


@contextlib.contextmanager
def writers(folder, splits, meta):
    """Writers {split: Writer} for a folder; on leaving, meta (what a reader checks, with at least vocab_size; the body
    may add to it) is completed and written. After an exception the folder stays unfinished."""
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, "meta.json")
    if os.path.exists(path):
        os.remove(path)  # from here on the folder is unfinished
    files = {split: Writer(folder, split, meta["vocab_size"]) for split in splits}
    yield files
    meta |= {"format": FORMAT, "splits": {split: file.close() for split, file in files.items()}}
    with open(path + ".tmp", "w") as f:
        json.dump(meta, f, indent=2)
    os.replace(path + ".tmp", path)


def write_rows(folder, splits, meta):
    """splits: {name: iterable of (token ids, mask)}. Returns the whole of meta.json."""
    with writers(folder, splits, meta := dict(meta)) as files:
        for name, rows in splits.items():
            for row in rows:
                files[name].add(*row)
    return meta


class Rows:
    """The rows of one split, memory-mapped: len(rows), rows[i] -> (tokens, mask) as int64 arrays. tokenizer: the
    fingerprint that meta.json must hold; None: any.

    Raises ValueError, with what to run, when the folder is not finished or was made for another vocabulary.
    """
    def __init__(self, folder, split, vocab_size, tokenizer=None):
        script = os.path.join(folder, "prepare.py")
        hint = f"run python {script}" if os.path.isfile(script) else \
            f"run python data/math240k/prepare.py --out_dir={folder} --target=... --source=..."
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

# ----------------------------------------------------------------------------------------------------------------------
# reading public data sets


def source_files(source):
    """The JSON lines and parquet files that a path names: itself, or those in its folder, sorted."""
    if os.path.isfile(source):
        return [source]
    files = sorted(path for end in ("*.jsonl", "*.parquet") for path in glob.glob(os.path.join(source, end)))
    if not files:
        raise ValueError(f"{source!r} holds no .jsonl or .parquet file")
    return files


def read_source(source, split="train", part=None):
    """Rows, as dicts, of a file of JSON lines or parquet, of a folder of such files, or of a hub data set's split;
    part: its configuration, where it has several.

    Raises ValueError, naming the file and line, for what cannot be read; a row that is no dict is such a line.
    """
    if not os.path.exists(source):
        import datasets  # here, as it costs a second that local files need not pay
        try:
            yield from datasets.load_dataset(source, part, split=split)
        except Exception as error:  # offline, unknown, gated, a broken copy: a dozen types of four libraries
            raise ValueError(f"no file {source!r}, and the hub does not give such a data set ({type(error).__name__}): "
                             "copy its files here and give the path of their folder instead") from None
        return
    for path in source_files(source):
        if path.endswith(".parquet"):
            import pyarrow.parquet
            try:
                for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1024):
                    yield from batch.to_pylist()
            except (OSError, pyarrow.ArrowException) as error:
                raise ValueError(f"cannot read {path}: {' '.join(str(error).split())}") from None
            continue
        with open(path, "rb") as f:
            for number, line in enumerate(f, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError("no JSON object")
                except ValueError as error:  # not JSON, or not text
                    raise ValueError(f"{path}, line {number}: {error}") from None
                yield row


def conversation(row):
    """The messages [{"role", "content"}, ..] of a row in the public form, under "conversations" or "messages", or a
    word on why there are none."""
    messages = row.get("conversations") or row.get("messages")
    if not isinstance(messages, list) or not messages:
        return "no conversation"
    if not all(isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
               for m in messages):
        return "a message without role and content"
    return [{"role": m["role"], "content": m["content"]} for m in messages]
