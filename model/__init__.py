"""DeepSeek-V4 as an nn.Module on the dsv4 operators."""

from model.errors import CheckpointError, UserError
from model.loading import load, refit

__all__ = ["CheckpointError", "UserError", "load", "refit"]
