"""
Trains the nano target's tokenizer on generated problems: byte-level BPE, 507 ids in all, a few seconds, no network.

    python data/nano/make_tokenizer.py              # writes data/nano/target
    python data/nano/make_tokenizer.py some/folder

It mirrors Qwen3.5's in all but size: the same cut into words, each digit a token of its own, the special tokens at
the end of the ids, the same turns in the chat template with thinking off unless asked for. So the mask id is again
the first id after the tokenizer: 507, while the nano target has 512 rows in its embedding.
Ids: 0..255 the bytes, 256..501 merges, then 502 <|endoftext|>, 503 <|im_start|>, 504 <|im_end|>, 505 <think>,
506 </think>.
"""

import json
import os
import sys

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)  # problems.py lies beside this file, whatever folder python was started from
from problems import problems

ROWS = 20_000        # training problems the merges are counted on; more changes only the rarest merges
MERGED = 502         # ids of bytes and merges
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # dropped by decode(skip_special_tokens=True)
MARKERS = ("<think>", "</think>")                          # text of the answer, as in Qwen3.5: one id each, kept

# the word cut of Qwen3.5, to the letter: beside a config.json of that family (model_type qwen3_5, say) transformers
# loads a class of its own, which puts this cut and NFC in place of those in tokenizer.json. Any other cut would be
# lost without a word and the ids be wrong. \p{N} alone makes each digit a token; a space joins the word after it,
# never a digit.
WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")

# the last assistant message carries the same empty thought as the generation prompt, so that the ids of a training
# row are those of its prompt, then the answer, then <|im_end|> and a newline
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

CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": None,
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "unk_token": None,
    "add_prefix_space": False,
    "clean_up_tokenization_spaces": False,  # it would eat the space before a question mark and break the round trip
    "split_special_tokens": False,
}

# ---------------------------------------------------------------------------------------------------------------------


def corpus():
    """Questions, solutions and the names of the roles, which stand in every row and so deserve a merge."""
    for question, solution, _ in problems("train", ROWS):
        yield question
        yield solution
        yield "user\n"
        yield "assistant\n\n"


def train_tokenizer() -> Tokenizer:
    """The tokenizer, the same at every run: merges are ordered by count, then by id, and the corpus is fixed."""
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    # the whole byte alphabet, not just the bytes seen: any text can be encoded and there is no unknown token
    tokenizer.train_from_iterator(corpus(), BpeTrainer(
        vocab_size=MERGED, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False))
    assert tokenizer.get_vocab_size() == MERGED, f"{tokenizer.get_vocab_size()} ids after training, not {MERGED}"
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in MARKERS])
    return tokenizer


def save(tokenizer: Tokenizer, folder: str):
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja, each whole or not at all."""
    added = {str(i): {"content": token.content, "lstrip": token.lstrip, "rstrip": token.rstrip,
                      "normalized": token.normalized, "single_word": token.single_word, "special": token.special}
             for i, token in sorted(tokenizer.get_added_tokens_decoder().items())}
    config = json.dumps(CONFIG | {"added_tokens_decoder": added}, indent=2)
    os.makedirs(folder, exist_ok=True)
    for name, text in (("tokenizer.json", tokenizer.to_str(pretty=True) + "\n"),
                       ("tokenizer_config.json", config + "\n"),
                       ("chat_template.jinja", TEMPLATE)):
        path = os.path.join(folder, name)
        with open(path + ".tmp", "w", encoding="utf-8", newline="\n") as f:
            f.write(text)
        os.replace(path + ".tmp", path)


if __name__ == "__main__":
    if len(sys.argv) > 2 or sys.argv[1:2] and sys.argv[1].startswith("-"):
        sys.exit("usage: python data/nano/make_tokenizer.py [folder]    (default: data/nano/target)")
    out = sys.argv[1] if len(sys.argv) == 2 else os.path.join(HERE, "target")
    trained = train_tokenizer()
    save(trained, out)
    print(f"{out}: {trained.get_vocab_size()} ids, " + ", ".join(f"{t} {trained.token_to_id(t)}"
                                                                for t in SPECIAL + MARKERS))
