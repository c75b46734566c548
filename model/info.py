"""`dsv4 info`: versions, devices, and which operator has a kernel where."""

import importlib.metadata
import platform

import torch

from dsv4_ops import ops, registry
from dsv4_ops.registry import TABLE, Cuda

PACKAGES = ("dsv4-ops", "torch", "safetensors", "tokenizers", "ninja", "transformers")


def print_info() -> None:
    print(f"python        {platform.python_version()} on {platform.platform()}")
    for package in PACKAGES:
        print(f"{package:<13} {_version(package)}")
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    print(f"CUDA          {torch.version.cuda or 'none: this torch is a CPU build'}")
    print(f"GPUs          {', '.join(f'{gpu.name} (sm_{gpu.major}{gpu.minor})' for gpu in gpus) or 'none'}")
    print(f"CPU threads   {torch.get_num_threads()}")
    print(f"CUDA kernels  {registry.why_no_cuda_library or registry.cuda_library}")
    references = sum(op.cuda is Cuda.REFERENCE for op in TABLE.values())
    print(f"operators     {len(TABLE)}; all run their reference on a CPU, {references} of them on CUDA too")
    for family in ops.FAMILIES:
        names = [
            op.name for op in TABLE.values() if op.reference.__module__ == family.__name__ or op.name in vars(family)
        ]
        print(f"  {family.__name__.rsplit('.', 1)[1]:<17} {', '.join(names)}")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
