"""Checks that every CUDA kernel must pass. The judge is the reference on the CPU, on the same bytes.

`check_kernel` runs an op on copies of CPU arguments (same strides) and demands that

- the outputs are those of the reference, by `compare` (bits unless a test derives a tolerance),
- every output element is written (outputs start as poison) and nothing else is (arguments keep their bytes),
- a second run gives the same bits,
- the op can be captured in a CUDA graph, and replays write the same bits again into outputs that were poisoned between
  them (what follows from inputs that change between replays is tested with the decode step).
"""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import dsv4_ops.ops  # noqa: F401  (fills the table)
from dsv4_ops.registry import TABLE, Op
from graph_tests.checks import POISON, assert_bits_equal

Compare = Callable[[Tensor, Tensor], None]
REPLAYS = 3
NEEDS_HOPPER = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="no Hopper GPU"
)


def bits(actual: Tensor, expected: Tensor) -> None:
    """The same bytes, but a NaN may be any NaN: CPUs and GPUs make them with different signs and payloads."""
    assert_bits_equal(_one_nan(actual), _one_nan(expected))


def close(relative: float, absolute: float = 0.0) -> Compare:
    """|actual - expected| <= absolute + relative * |expected| for every element; infinities and NaN must agree."""

    def compare(actual: Tensor, expected: Tensor) -> None:
        assert actual.shape == expected.shape and actual.dtype == expected.dtype
        torch.testing.assert_close(actual.float(), expected.float(), rtol=relative, atol=absolute, equal_nan=True)

    return compare


def almost_bits(share: float, steps: int = 1) -> Compare:
    """All but `share` of the elements have the same bits; the others are at most `steps` representable values away.

    For values that are rounded (to bf16, E4M3, E2M1 pairs excepted) after a sum whose order differs.
    """

    def compare(actual: Tensor, expected: Tensor) -> None:
        assert actual.shape == expected.shape and actual.dtype == expected.dtype
        left, right = _ordered(actual), _ordered(expected)
        distance = (left - right).abs()
        different = float((distance > 0).double().mean()) if distance.numel() else 0.0
        assert different <= share, f"{different:.2%} of the elements differ, allowed {share:.2%}"
        largest = int(distance.max()) if distance.numel() else 0
        assert largest <= steps, f"an element is {largest} representable values away, allowed {steps}"

    return compare


def on_cuda(arguments: tuple) -> tuple:
    """Copies of CPU arguments on the GPU with the same strides. Tensors that share storage share it there too."""
    storages: dict[int, Tensor] = {}

    def move(leaf):
        if not isinstance(leaf, Tensor) or leaf.is_cuda:  # what is too large for two copies is made on the GPU
            return leaf
        storage = leaf.untyped_storage()
        raw = torch.empty(0, dtype=torch.uint8).set_(storage)
        copy = storages.setdefault(storage.data_ptr() or id(leaf), raw.cuda())
        moved = torch.empty(0, dtype=leaf.dtype, device="cuda")
        return moved.set_(copy.untyped_storage(), leaf.storage_offset(), leaf.shape, leaf.stride())

    return tree_map(move, arguments)


def check_kernel(name: str, arguments: tuple, compare: Compare | tuple[Compare, ...] = bits) -> None:
    """Compare op `name` on the GPU with its reference; `compare` is one judge, or one for each output (or each mutated
    argument, in the order of the schema)."""
    op = TABLE[name]
    if op.alloc is None:
        _check_mutating(op, arguments, compare)
        return
    expected = _as_tuple(op.overload(*arguments))
    device_arguments = on_cuda(arguments)
    before = [_bytes(leaf) for leaf in device_arguments]
    actual = _run_poisoned(op, device_arguments)
    assert [_bytes(leaf) for leaf in device_arguments] == before, f"{name} wrote to an argument"
    for index, judge in enumerate(_judges(compare, len(expected))):
        _judge(judge, actual[index].cpu(), expected[index], f"{name} output {op.outputs[index]}")
    again = _as_tuple(op.overload(*device_arguments))
    for first, second in zip(actual, again, strict=True):
        assert_bits_equal(second.cpu(), first.cpu())
    _check_replay(op, device_arguments, actual)


def assert_rows_independent(name: str, arguments: tuple, batched: tuple[int, ...], rows: tuple[int, ...]) -> None:
    """Rows alone give the bits that they give in the batch. `batched` are the places of arguments with a row dimension
    in front; outputs have it in front."""
    op = TABLE[name]
    device_arguments = on_cuda(arguments)
    together = _as_tuple(op.overload(*device_arguments))
    for row in rows:
        alone = list(device_arguments)
        for place in batched:
            alone[place] = alone[place][row : row + 1]
        for one, all_rows in zip(_as_tuple(op.overload(*alone)), together, strict=True):
            assert_bits_equal(one.cpu(), all_rows[row : row + 1].cpu())


def _check_mutating(op: Op, arguments: tuple, compare) -> None:
    places = [i for i, argument in enumerate(op.overload._schema.arguments) if argument.is_write]
    fresh, second = on_cuda(arguments), on_cuda(arguments)
    expected = tuple(_clone(leaf) for leaf in arguments)
    op.overload(*expected)
    before = [_bytes(leaf) for leaf in fresh]
    op.overload(*fresh)
    for index, leaf in enumerate(fresh):
        assert index in places or _bytes(leaf) == before[index], f"{op.name} wrote to argument {index}"
    for place, judge in zip(places, _judges(compare, len(places)), strict=True):
        argument = op.overload._schema.arguments[place].name
        _judge(judge, _whole(fresh[place]).cpu(), _whole(expected[place]), f"{op.name} argument {argument}")
    op.overload(*second)
    for place in places:
        assert _bytes(second[place]) == _bytes(fresh[place]), f"{op.name} is not deterministic"
    _check_mutating_replay(op, on_cuda(arguments), fresh, places)


def _check_mutating_replay(op: Op, arguments: tuple, expected: tuple, places: list[int]) -> None:
    """Capture on a copy, restore the state that the warm-up changed, replay once."""
    saved = {place: _whole(arguments[place]).clone() for place in places}
    graph = _captured(lambda: op.overload(*arguments))
    for place, state in saved.items():
        _whole(arguments[place]).copy_(state)
    graph.replay()
    torch.cuda.synchronize()
    for place in places:
        assert _bytes(arguments[place]) == _bytes(expected[place]), f"{op.name}: a graph replay differs from a call"


def _check_replay(op: Op, arguments: tuple, expected: tuple) -> None:
    results: list[tuple] = []
    graph = _captured(lambda: results.append(_as_tuple(op.overload(*arguments))))
    for _ in range(REPLAYS):
        for result in results[-1]:
            if result.numel():
                torch.empty(0, dtype=torch.uint8, device="cuda").set_(result.untyped_storage()).fill_(POISON)
        graph.replay()
    torch.cuda.synchronize()
    for result, wanted in zip(results[-1], expected, strict=True):
        assert_bits_equal(result.cpu(), wanted.cpu())


def _captured(call: Callable) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The CUDA Graph is empty")  # no rows: nothing to launch
        with torch.cuda.graph(graph):
            call()
    return graph


def _run_poisoned(op: Op, arguments: tuple) -> tuple:
    """The outputs of the functional op, after `.out` gave the same into poisoned outputs and a poisoned workspace."""
    functional = _as_tuple(op.overload(*arguments))
    out = {}
    for output, result in zip(op.outputs, functional, strict=True):
        buffer = torch.empty_strided(result.shape, result.stride(), dtype=result.dtype, device="cuda")
        torch.empty(0, dtype=torch.uint8, device="cuda").set_(buffer.untyped_storage()).fill_(POISON)
        out[output] = buffer
    if "workspace" in {argument.name for argument in op.packet.out._schema.arguments}:
        out["workspace"] = op.workspace(*arguments)
        out["workspace"].view(torch.uint8).fill_(POISON)
    op.packet.out(*arguments, **out)
    torch.cuda.synchronize()
    for output, result in zip(op.outputs, functional, strict=True):
        assert_bits_equal(out[output].cpu(), result.cpu())
    return functional


def _judge(judge: Compare, actual: Tensor, expected: Tensor, what: str) -> None:
    try:
        judge(actual, expected)
    except AssertionError as error:
        raise AssertionError(f"{what}: {error}") from None


def _judges(compare, count: int) -> tuple[Compare, ...]:
    return compare if isinstance(compare, tuple) else (compare,) * count


def _as_tuple(value) -> tuple:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _clone(leaf):
    """A copy with the same strides and storage size."""
    if not isinstance(leaf, Tensor):
        return leaf
    return torch.empty(0, dtype=leaf.dtype).set_(
        leaf.untyped_storage().clone(), leaf.storage_offset(), leaf.shape, leaf.stride()
    )


def _whole(tensor: Tensor) -> Tensor:
    """Everything in the tensor's storage: padding of a pool must not be written either."""
    raw = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
    usable = raw.numel() // tensor.element_size() * tensor.element_size()
    return raw[:usable].view(tensor.dtype)


def _bytes(leaf) -> bytes:
    if not isinstance(leaf, Tensor):
        return b""
    return torch.empty(0, dtype=torch.uint8, device=leaf.device).set_(leaf.untyped_storage()).cpu().numpy().tobytes()


def _one_nan(tensor: Tensor) -> Tensor:
    if tensor.dtype == torch.float8_e4m3fn:
        codes = tensor.view(torch.uint8)
        return torch.where((codes & 0x7F) == 0x7F, 0x7F, codes)
    return torch.where(tensor.isnan(), torch.nan, tensor) if tensor.dtype.is_floating_point else tensor


def _ordered(tensor: Tensor) -> Tensor:
    """Integers in the order of the values: neighbouring values are 1 apart."""
    width = {1: torch.int8, 2: torch.int16, 4: torch.int32}[tensor.element_size()]
    raw = tensor.contiguous().view(width).long()
    lowest = torch.iinfo(width).min
    return torch.where(raw < 0, lowest - raw, raw)
