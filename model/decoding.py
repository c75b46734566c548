"""Decode steps and their tokens for a host that reads late: CUDA graphs on a GPU, plain calls on a CPU."""

from typing import Protocol

from dsv4_ops.graphs import DecodeGraph, batch_buckets
from model.transformer import DeepseekV4


class Decoder(Protocol):
    """Step i writes the tokens with number i; `start` says which number comes next."""

    def start(self, index: int) -> None: ...

    def publish(self) -> None: ...

    def step(self, rows: int) -> None: ...

    def tokens(self, index: int) -> list[int]: ...


class DirectDecoder:
    """Calls of `model.decode_step`, as they are."""

    def __init__(self, model: DeepseekV4):
        self.model = model

    def start(self, index: int) -> None:
        pass

    def publish(self) -> None:
        pass

    def step(self, rows: int) -> None:
        self.model.decode_step()

    def tokens(self, index: int) -> list[int]:
        ring = self.model.state.output
        return ring[index % ring.shape[0]].tolist()


def make_decoder(model: DeepseekV4, *, progress: bool = False) -> Decoder:
    """A decoder of the model's present state. On a GPU this captures graphs: seconds, or minutes if it must compile."""
    if model.state.token.device.type == "cuda":
        return capture_decode(model, progress=progress)
    return DirectDecoder(model)


def capture_decode(model: DeepseekV4, buckets: tuple[int, ...] | None = None, *, progress: bool = False) -> DecodeGraph:
    """Capture `model.decode_step` for every batch bucket. The state is afterwards what it was before."""
    state = model.state
    buckets = buckets or batch_buckets(state.sizes.max_batch)
    small = state.small_buffers()
    kept = [buffer.clone() for buffer in small]
    state.active.fill_(False)  # an inactive row writes no cache
    try:
        return DecodeGraph(model.decode_step, state.output, buckets, progress=progress)
    finally:
        for buffer, value in zip(small, kept, strict=True):
            buffer.copy_(value)
