"""
Trains the nano target's tokenizer on generated problems: byte-level BPE, 507 ids, a few seconds.

    python data/nano/make_tokenizer.py                      # writes data/nano/target
    python data/nano/make_tokenizer.py --out_dir=FOLDER

It mirrors Qwen3.5's in all but size: the same cut into words, each digit a token of its own, the
special tokens at the end of the ids, the same turns in the chat template, with thinking off unless
asked for. So the mask id is again the first id after the tokenizer: 507, while the nano target has
512 rows in its embedding.

Ids: 0..255 the bytes, 256..501 merges, then 502 <|endoftext|>, 503 <|im_start|>, 504 <|im_end|>,
505 <think>, 506 </think>.
"""
import json
import os
import sys

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
sys.path.insert(0, ROOT)  # the project's modules, from whatever folder this is run
from checkpoint import write_whole
from configurator import configure
from data.nano.problems import problems

out_dir = os.path.join(ROOT, "data", "nano", "target")  # where the tokenizer's files go

PROBLEMS = 20_000   # of training, on which merges are counted; more change only the rarest merges
MERGED = 502        # ids of bytes and merges
# decode(skip_special_tokens=True) drops these
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# as in Qwen3.5, these are text of the answer: one id each, never dropped
MARKERS = ("<think>", "</think>")

# The word cut of Qwen3.5, to the letter. Beside a config.json of that family (model_type qwen3_5,
# say) transformers loads a tokenizer class of its own, which puts this cut and NFC in place of
# those in tokenizer.json. Any other cut would be lost without a word, and the ids would be wrong.
# \p{N} alone makes each digit a token; a space joins the word after it, never a digit.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The last message of an assistant carries the same empty thought as the generation prompt. So the
# ids of a training row are those of its prompt, then the answer, then <|im_end|> and a newline.
TEMPLATE = r"""{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if loop.last and message.role == 'assistant' %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
    {{- message.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is true %}
        {{- '<think>\n' }}
    {%- else %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}
"""

# what stands in tokenizer_config.json beside the added tokens
CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": None,
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "unk_token": None,
    "add_prefix_space": False,
    # it would eat the space before a question mark, and text would not survive the round trip
    "clean_up_tokenization_spaces": False,
    "split_special_tokens": False,
}


def main(argv=None):
    config = configure(globals(), argv)
    tokenizer = train_tokenizer()
    save(tokenizer, config.out_dir)
    ids = [f"{token} {tokenizer.token_to_id(token)}" for token in SPECIAL + MARKERS]
    print(f"{config.out_dir}: {tokenizer.get_vocab_size()} ids, {', '.join(ids)}")


def train_tokenizer() -> Tokenizer:
    """The tokenizer, the same at every run: the corpus is fixed, merges are ordered by count and
    then by id."""
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    # All bytes are in the alphabet, not only those seen. So any text can be encoded, and there is
    # no unknown token.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(vocab_size=MERGED, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    count = tokenizer.get_vocab_size()
    assert count == MERGED, f"{count} ids after training, not {MERGED}"
    special = [AddedToken(token, normalized=False, special=True) for token in SPECIAL]
    tokenizer.add_special_tokens(special)
    markers = [AddedToken(token, normalized=False, special=False) for token in MARKERS]
    tokenizer.add_tokens(markers)
    return tokenizer


def corpus():
    """Questions, solutions, and what is in every row and so deserves a merge: names of roles."""
    for question, solution, _ in problems("train", PROBLEMS, task="tokenizer"):
        yield question
        yield solution
        yield "user\n"
        yield "assistant\n\n"


def save(tokenizer: Tokenizer, folder: str):
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    added_tokens = {}
    for token_id, token in sorted(tokenizer.get_added_tokens_decoder().items()):
        added_tokens[str(token_id)] = {
            "content": token.content,
            "lstrip": token.lstrip,
            "rstrip": token.rstrip,
            "normalized": token.normalized,
            "single_word": token.single_word,
            "special": token.special,
        }
    config = CONFIG | {"added_tokens_decoder": added_tokens}
    os.makedirs(folder, exist_ok=True)
    files = {
        "tokenizer.json": tokenizer.to_str(pretty=True) + "\n",
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
        "chat_template.jinja": TEMPLATE,
    }
    for name, text in files.items():
        write_whole(os.path.join(folder, name), text)


if __name__ == "__main__":
    main()
