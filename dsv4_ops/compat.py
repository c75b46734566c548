"""What depends on the torch version. No other file asks for it."""

import torch

SUPPORTED = ((2, 11), (2, 13))


def check_torch_version() -> None:
    """Fail at import with a sentence rather than later inside a compiler."""
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if not SUPPORTED[0] <= version <= SUPPORTED[1]:
        low, high = (".".join(map(str, bound)) for bound in SUPPORTED)
        raise ImportError(f"dsv4_ops works with torch {low} to {high}, found {torch.__version__}")
