"""
The commands that train.py prints. They can be pasted into a shell, also if a path has a space.
"""
import json
import os
import shlex
import sys

from data.samples import read_meta
from training.parallel import world_size


def how_to_resume(step, folder):
    """The message of a stopped run, with its own command and --resume."""
    words = [word for word in sys.argv[1:] if word != "--resume"]
    arguments = shlex.join([*words, "--resume"])
    command = "python" if world_size() == 1 else "torchrun ... (same options)"
    return (f"stopped at step {step}, checkpoint saved to {folder}. "
            f"To resume: {command} train.py {arguments}")


def how_to_use(config, folder):
    """The commands that decode with the drafter in a folder, measure it, and serve it."""
    target = shlex.quote(config.target)
    drafter = shlex.quote(folder)
    if config.target.startswith("random:"):  # it has no text
        return ("measure: python bench.py exactness --prompts=random:64:256 "
                f"--target={target} --drafter={drafter}")
    meta = read_meta(config.data, "")
    pair = f"--target={target} --drafter={drafter}"
    if meta.get("thinking"):
        pair += " --thinking"
    # the rows that the samples come from, or else a benchmark like them
    prompts = str(meta.get("source"))
    if not os.path.exists(prompts):
        is_nano = os.path.basename(os.path.realpath(config.data)) == "nano"
        prompts = "nano" if is_nano else "math500"
    vllm = {"method": "dflash", "model": folder, "num_speculative_tokens": config.block_size - 1}
    return f"""decode: python draft_decode.py {pair} --prompt="..."
measure: python bench.py acceptance {pair} --prompts={shlex.quote(prompts)}
SGLang: sglang serve --model-path {target} --dtype bfloat16 --port 30000 \
--attention-backend triton --linear-attn-backend triton \
--mamba-radix-cache-strategy extra_buffer --speculative-algorithm DFLASH \
--speculative-draft-model-path {drafter} --speculative-num-draft-tokens {config.block_size}
vLLM: vllm serve {target} --dtype bfloat16 --port 30000 --language-model-only \
--attention-backend flash_attn --no-enable-prefix-caching \
--speculative-config {shlex.quote(json.dumps(vllm))}"""
