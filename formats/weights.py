"""
The weights of a checkpoint: safetensors files, checked before a module is built.
"""
import os
from typing import NamedTuple

import torch
from safetensors import safe_open

from formats.files import LINE, one_line, read_json, short, where

DTYPES = ("BF16", "F16", "F32")


class StoredTensor(NamedTuple):
    """Where a tensor is, and its shape."""
    path: str
    key: str        # its name in the file
    shape: list


def stored_tensors(folder, our_name, num_hidden_layers):
    """{name in the module: StoredTensor} of all tensors in a checkpoint, read from the headers.

    our_name(name in the file) is the name in the module, or None for a tensor to skip.
    ValueError for a file that is broken or outside the folder, a tensor that is there twice, dtypes
    that would be rounded or mean something else, such as integers, and if config.json has more
    layers than the files.
    """
    path = os.path.join(folder, "model.safetensors.index.json")
    found = {}
    try:
        files = ["model.safetensors"]
        if os.path.lexists(path):  # it names the files of a checkpoint in several
            files = sorted(set(read_json(path)["weight_map"].values()))
        for file in files:
            path = os.path.join(folder, file)
            check_location(folder, path)
            with safe_open(path, "pt") as f:
                for key in f.keys():
                    name = our_name(key)
                    if name is None:
                        continue
                    tensor = f.get_slice(key)
                    if tensor.get_dtype() not in DTYPES:
                        raise ValueError(f"{short(key)} is {tensor.get_dtype()}; weights must be "
                                         f"{', '.join(DTYPES)}")
                    if name in found:
                        raise ValueError(f"{short(key)} is in the checkpoint twice")
                    found[name] = StoredTensor(path, key, tensor.get_shape())
    except Exception as error:  # a broken file has errors of a dozen types
        raise ValueError(f"cannot load {where(path, 70)}: {one_line(error, 110)}") from None
    last = f"layers.{num_hidden_layers - 1}"
    if not any(name.startswith(f"{last}.") for name in found):
        raise ValueError(f"config.json has {num_hidden_layers} layers, but in the weights {last} "
                         "is missing")
    return found


def check_location(folder, path):
    """ValueError unless `path` is a regular file in the folder, or a link in the hub's cache."""
    if not os.path.isfile(path):
        raise ValueError("no such file")
    folder = os.path.realpath(folder)
    # cache/models--owner--name/snapshots/COMMIT/FILE is a link to cache/models--owner--name/blobs
    snapshots = os.path.dirname(folder)
    blobs = os.path.join(os.path.dirname(snapshots), "blobs")
    real = os.path.dirname(os.path.realpath(path))
    is_in_cache = os.path.basename(snapshots) == "snapshots" and real == blobs
    if real != folder and not is_in_cache:
        raise ValueError("it is outside of the checkpoint's folder: copy the file into it")


def load_weights(module, folder, stored, device, dtype, *, fp32=()):
    """Give a module on the meta device its stored tensors. Return it frozen, in eval mode.

    fp32: endings of the names of weights that stay in fp32.
    ValueError for tensors that are missing, left over, of a different shape, or not finite.
    """
    wrong = []
    expected = {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
    for name, (_, _, shape) in stored.items():
        if name not in expected:
            wrong.append(f"{one_line(name, 50)} is left over")
        elif shape != expected[name]:
            wrong.append(f"{name} is {shape}, not {expected[name]}")
    wrong += [f"{name} is missing" for name in expected if name not in stored]
    refuse(wrong, f"of {where(folder, 30)} differ from config.json")

    # Read one tensor at a time and open its file again for each. The pages of a mapped file count
    # as memory until it is closed, so the host needs the module and one tensor.
    weights = {}
    for name in expected:
        path, key, _ = stored[name]
        tensor_dtype = torch.float32 if name.endswith(tuple(fp32)) else dtype
        with safe_open(path, "pt") as f:
            weights[name] = f.get_tensor(key).to(device, tensor_dtype, copy=True)
        if not weights[name].sum().isfinite():  # one pass, no copy
            wrong.append(f"{name} is not finite")
    refuse(wrong, f"of {where(folder, 30)} are broken")
    module.load_state_dict(weights, assign=True)
    return module.requires_grad_(False).eval()


def refuse(wrong, reason):
    """ValueError that shows three of the tensors that are wrong, and how many there are."""
    if wrong:
        examples = "; ".join(wrong[:3])
        raise ValueError(one_line(f"{len(wrong)} tensors {reason}: {examples}", LINE))
