"""
Writes the nano target in the nested form of the public Qwen3.5 folders. SGLang reads no other form.

    python data/nano/nested.py

The weights and the tokenizer are the same files. In config.json, all keys move to text_config.
SGLang also needs the description of an image encoder, although there are no weights for it, and a
preprocessor_config.json.
"""
import json
import os
import shutil
import sys

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
sys.path.insert(0, ROOT)  # the project's modules, from any working directory
from configurator import configure
from formats.files import printable, where, write_whole

target = os.path.join(ROOT, "data", "nano", "target")       # the folder that is read
out_dir = os.path.join(ROOT, "out", "nano-target-nested")   # the folder that is written

PATCHES = {"patch_size": 16, "temporal_patch_size": 2}
VISION = PATCHES | {  # the smallest image encoder: one layer of 64 channels
    "model_type": "qwen3_5_vision", "hidden_act": "gelu_pytorch_tanh", "depth": 1, "num_heads": 4,
    "hidden_size": 64, "intermediate_size": 64, "in_channels": 3, "spatial_merge_size": 2,
    "num_position_embeddings": 16}
PREPROCESSOR = PATCHES | {
    "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen3VLProcessor",
    "size": {"shortest_edge": 1024, "longest_edge": 1048576}, "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


def main(argv=None):
    config = configure(globals(), argv)
    try:
        with open(os.path.join(config.target, "config.json")) as f:
            text = json.load(f)
    except FileNotFoundError:
        sys.exit(f"error: no config.json in {where(config.target)!r}: name the folder of a target")
    if "text_config" in text:
        sys.exit(f"error: {where(config.target)!r} has the nested form already")
    # SGLang reads full_attention_interval instead of layer_types, and it reads tie_word_embeddings
    # and eos_token_id at the top level.
    nested = {key: text[key] for key in ("dtype", "tie_word_embeddings", "eos_token_id")} | {
        "architectures": ["Qwen3_5ForConditionalGeneration"], "model_type": "qwen3_5",
        "text_config": text, "vision_config": VISION | {"out_hidden_size": text["hidden_size"]}}
    del text["architectures"]
    text["full_attention_interval"] = 1 + text["layer_types"].index("full_attention")

    shutil.copytree(config.target, config.out_dir, dirs_exist_ok=True)
    for name, content in (("preprocessor_config", PREPROCESSOR), ("config", nested)):
        path = os.path.join(config.out_dir, name + ".json")
        write_whole(path, json.dumps(content, indent=2) + "\n")
    print(printable(f"wrote {config.out_dir}"))


if __name__ == "__main__":
    main()
