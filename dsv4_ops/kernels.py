"""Loading the library of CUDA kernels when `dsv4_ops.ops` is imported on a machine with a GPU.

A machine where the library cannot be built or loaded can still use the operators on CPU tensors: the reason is kept,
and every call on a CUDA tensor raises an error that contains it. `require_kernels` raises it early.
"""

import torch

from dsv4_ops import registry


def load_kernels() -> None:
    """Load (and on first use build) the CUDA kernels for the visible GPUs, if there are any."""
    if not torch.cuda.is_available():
        cuda = torch.version.cuda
        found = f"this torch is built for CUDA {cuda} and sees no GPU" if cuda else "this torch is a CPU build"
        registry.why_no_cuda_library = f"There is no CUDA device: {found}."
        return
    from dsv4_ops.build import BuildError, load  # not needed, and not imported, on a machine without a GPU

    try:
        registry.cuda_library = str(load())
    except BuildError as error:
        registry.why_no_cuda_library = str(error)


def require_kernels() -> None:
    """Raise MissingKernelError with the reason unless the CUDA kernels are loaded."""
    if registry.why_no_cuda_library:
        raise registry.MissingKernelError(f"the CUDA kernels are not available. {registry.why_no_cuda_library}")
