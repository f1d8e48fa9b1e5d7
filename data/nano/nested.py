"""
Writes the nano target once more, in the nested form of the public Qwen3.5 folders: SGLang reads no
other one.

    python data/nano/nested.py

The weights and the tokenizer are the same files. config.json has its keys under text_config. Beside
them stands what SGLang wants of a model that could see pictures: the shape of a tower, for which
there are no weights, and a preprocessor_config.json.
"""
import json
import os
import shutil
import sys

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
sys.path.insert(0, ROOT)  # the project's modules, from whatever folder this is run
from checkpoint import write_whole
from configurator import configure

target = os.path.join(ROOT, "data", "nano", "target")       # the folder that is read
out_dir = os.path.join(ROOT, "out", "nano-target-nested")   # the folder that is written


def main(argv=None):
    config = configure(globals(), argv)
    path = os.path.join(config.target, "config.json")
    if not os.path.exists(path):
        sys.exit(f"error: no config.json in {config.target!r}: name the folder of a target")
    with open(path) as f:
        flat = json.load(f)
    if "text_config" in flat:
        sys.exit(f"error: {config.target!r} has the nested form already")
    os.makedirs(config.out_dir, exist_ok=True)
    for name in sorted(os.listdir(config.target)):
        if name != "config.json":
            # copied beside its place, then moved there, so that no half of a file stands in it
            copy = os.path.join(config.out_dir, name)
            shutil.copyfile(os.path.join(config.target, name), copy + ".tmp")
            os.replace(copy + ".tmp", copy)
    write_json(config.out_dir, "preprocessor_config.json", PREPROCESSOR)
    write_json(config.out_dir, "config.json", nested(flat))
    print(f"wrote {config.out_dir}")


def nested(flat):
    """The nested config.json of a flat one.

    full_attention_interval: every so many layers the last one is a full one. SGLang reads it in
    place of layer_types. tie_word_embeddings and eos_token_id are read at the top.
    """
    interval = 1 + flat["layer_types"].index("full_attention")
    text = flat | {"full_attention_interval": interval}
    del text["architectures"]
    return {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": "qwen3_5",
        "dtype": flat["dtype"],
        "tie_word_embeddings": flat["tie_word_embeddings"],
        "eos_token_id": flat["eos_token_id"],
        "text_config": text,
        "vision_config": VISION | {"out_hidden_size": flat["hidden_size"]}}


def write_json(folder, name, value):
    write_whole(os.path.join(folder, name), json.dumps(value, indent=2) + "\n")


# The smallest tower: one layer of 64 channels.
VISION = {
    "model_type": "qwen3_5_vision",
    "depth": 1,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_heads": 4,
    "in_channels": 3,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 16,
    "hidden_act": "gelu_pytorch_tanh"}

# How a picture would become patches for it.
PREPROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen3VLProcessor",
    "size": {"shortest_edge": 1024, "longest_edge": 1048576},
    "patch_size": 16,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5]}


if __name__ == "__main__":
    main()
