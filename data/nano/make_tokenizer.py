r"""
Trains the nano target's tokenizer on generated problems: byte-level BPE, 507 ids, a few seconds.

    python data/nano/make_tokenizer.py                      # writes data/nano/target
    python data/nano/make_tokenizer.py --out_dir=FOLDER

It works like Qwen3.5's but is smaller: it cuts text into words in the same way, each digit is a
token, special tokens have the last ids, and the chat template has the same turns, with thinking off
by default. The script writes tokenizer.json and copies the other two files from data/nano/target.

Ids: 0..255 the bytes, 256..501 merges, then 502 <|endoftext|>, 503 <|im_start|>, 504 <|im_end|>,
505 <think>, 506 </think>. The mask id is the first id after the tokenizer, as in Qwen3.5: 507.
"""
import os
import sys

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
sys.path.insert(0, ROOT)  # the project's modules, from any working directory
from checkpoint import write_whole
from configurator import configure
from data.nano.problems import problems

out_dir = os.path.join(ROOT, "data", "nano", "target")  # where the tokenizer's files go

COPIED = ("chat_template.jinja", "tokenizer_config.json")  # files that are written by hand
PROBLEMS = 20_000   # of training, on which merges are counted; more change only the rarest merges
MERGED = 502        # ids of bytes and merges
# decode(skip_special_tokens=True) drops these.
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# These are text of the answer, as in Qwen3.5: one id each, never dropped.
MARKERS = ("<think>", "</think>")

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
    tokenizer = train_tokenizer()
    os.makedirs(config.out_dir, exist_ok=True)
    path = os.path.join(config.out_dir, "tokenizer.json")
    write_whole(path, tokenizer.to_str(pretty=True) + "\n")
    for name in COPIED:
        with open(os.path.join(out_dir, name)) as f:
            write_whole(os.path.join(config.out_dir, name), f.read())
    print(f"{config.out_dir}: {tokenizer.get_vocab_size()} ids")


def train_tokenizer() -> Tokenizer:
    """The same tokenizer in every run, because the corpus is fixed, and merges are ordered by count
    and then by id."""
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    # The alphabet has all bytes, so any text can be encoded without an unknown token.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(vocab_size=MERGED, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    for token in SPECIAL:
        tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)])
    for token in MARKERS:
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=False)])
    return tokenizer


def corpus():
    """Questions, solutions, and the names of the roles, because every prompt has them."""
    for question, solution, _ in problems("train", PROBLEMS, task="tokenizer"):
        yield from (question, solution, "user\n", "assistant\n\n")


if __name__ == "__main__":
    main()
