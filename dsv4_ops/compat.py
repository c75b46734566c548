"""Everything that differs between torch 2.11 and 2.13. No other file asks for a torch version."""

import torch

# With Tag.out Inductor allocates the outputs of an op itself and calls its `.out` overload.
OUT_TAGS = (torch.Tag.out,) if hasattr(torch.Tag, "out") else ()
