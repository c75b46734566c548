"""DeepSeek-V4 kernels as torch.library operators: importing this package defines `torch.ops.dsv4.*`."""
