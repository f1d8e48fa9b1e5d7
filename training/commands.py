"""
The commands that train.py prints: to resume a run, and to use its drafter. A shell reads them as
they are, also if a path contains a space.
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
    pair = [f"--target={config.target}", f"--drafter={folder}"]
    if config.target.startswith("random:"):
        command = ["python", "bench.py", "exactness", *pair, "--prompts=random:64:256"]
        return f"measure: {shlex.join(command)}"
    meta = read_meta(config.data, "")
    thinking = ["--thinking"] if meta.get("thinking") else []
    server = [config.target, "--dtype", "bfloat16", "--port", "30000"]
    vllm = {"method": "dflash", "model": folder, "num_speculative_tokens": config.block_size - 1}
    commands = {
        "decode": ["python", "draft_decode.py", *pair, *thinking, "--prompt=..."],
        "measure": [
            "python", "bench.py", "acceptance", *pair, *thinking,
            f"--prompts={prompts_for(config.data, meta)}"],
        "SGLang": [
            "sglang", "serve", "--model-path", *server, "--attention-backend", "triton",
            "--linear-attn-backend", "triton", "--mamba-radix-cache-strategy", "extra_buffer",
            "--speculative-algorithm", "DFLASH", "--speculative-draft-model-path", folder,
            "--speculative-num-draft-tokens", str(config.block_size)],
        "vLLM": [
            "vllm", "serve", *server, "--language-model-only", "--attention-backend", "flash_attn",
            "--no-enable-prefix-caching", "--speculative-config", json.dumps(vllm)],
    }
    return "\n".join(f"{name}: {shlex.join(words)}" for name, words in commands.items())


def prompts_for(data, meta):
    """The prompts for bench.py: the rows that the samples come from, or a benchmark like them."""
    source = str(meta.get("source"))
    if os.path.exists(source):
        return source
    return "nano" if os.path.basename(os.path.realpath(data)) == "nano" else "math500"
