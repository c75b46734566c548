"""DeepSeek-V4 kernels as torch.library operators: importing `dsv4_ops.ops` defines `torch.ops.dsv4.*`."""

from dsv4_ops.compat import check_torch_version

check_torch_version()
