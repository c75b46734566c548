"""Checks that every operator must pass. They see what `torch.library.opcheck` does not: layouts that its samples lack,
unwritten outputs, fake kernels that specialise on the batch, and mutations of fp8 tensors."""

import warnings

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.library import opcheck as torch_opcheck
from torch.utils._pytree import tree_leaves, tree_map

from dsv4_ops.registry import TABLE

POISON = 0xA5


def check_op(name: str, arguments: tuple) -> None:
    """Run op `name` real and fake on these arguments and compare everything that a graph relies on."""
    op = TABLE[name]
    mutated = {argument.name for argument in op.overload._schema.arguments if argument.is_write}
    inputs = _named_tensors(op, arguments)
    before = {key: _bytes(tensor) for key, tensor in inputs.items()}

    mode = FakeTensorMode()
    fake = op.overload(*tree_map(lambda leaf: mode.from_tensor(leaf) if isinstance(leaf, Tensor) else leaf, arguments))
    real = op.overload(*arguments)
    _assert_same_metadata(name, real, fake)

    after = {key: _bytes(tensor) for key, tensor in inputs.items()}
    changed = {key for key in inputs if before[key] != after[key]}
    assert changed <= mutated, f"{name} wrote {sorted(changed - mutated)}, which its schema does not declare"
    _assert_no_aliasing(name, real, inputs)
    if mutated:
        _assert_deterministic_mutation(name, arguments, inputs, before, after)
        return

    again = op.overload(*arguments)
    for first, second in zip(tree_leaves(real), tree_leaves(again), strict=True):
        assert _bytes(first) == _bytes(second), f"{name} gave two results for the same arguments"
    _assert_out_writes_everything(name, arguments, real)


def assert_mutates(name: str, arguments: tuple) -> None:
    """The op changes every argument that it declares as mutated, given arguments that make it write."""
    op = TABLE[name]
    mutated = {argument.name for argument in op.overload._schema.arguments if argument.is_write}
    inputs = _named_tensors(op, arguments)
    before = {key: _bytes(inputs[key]) for key in mutated}
    op.overload(*arguments)
    unchanged = {key for key in mutated if before[key] == _bytes(inputs[key])}
    assert mutated and not unchanged, (
        f"{name} declares {sorted(mutated)} as mutated, but {sorted(unchanged)} did not change"
    )


def check_symbolic_batch(name: str, make) -> None:
    """Trace the fake with a symbolic first dimension; `make(batch)` builds arguments. A guard is a specialisation."""
    batch = 5
    environment = ShapeEnv()
    mode = FakeTensorMode(shape_env=environment)

    def fakify(leaf):
        if not isinstance(leaf, Tensor):
            return leaf
        sizes = [DimDynamic.STATIC] * leaf.dim()
        if leaf.dim() and leaf.shape[0] == batch:
            sizes[0] = DimDynamic.DYNAMIC
        return mode.from_tensor(leaf, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))

    arguments = tree_map(fakify, make(batch))
    known = len(environment.guards)
    TABLE[name].overload(*arguments)
    guards = [str(guard.expr) for guard in environment.guards[known:]]
    assert not guards, f"the fake kernel of {name} depends on the batch: {guards}"


def opcheck(name: str, arguments: tuple) -> None:
    """`torch.library.opcheck`; its schema test cannot handle fp8 arguments, `check_op` covers mutation there."""
    tests = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if not any(isinstance(leaf, Tensor) and "float8" in str(leaf.dtype) for leaf in tree_leaves(arguments)):
        tests.append("test_schema")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch_opcheck(TABLE[name].overload, arguments, test_utils=tests)


def row_strided(tensor: Tensor, padding: int = 16) -> Tensor:
    """The same values in a tensor whose rows (last dimension) lie `padding` elements apart."""
    wide = torch.zeros(
        *tensor.shape[:-1], tensor.shape[-1] + padding, dtype=torch.uint8 if _is_fp8(tensor) else tensor.dtype
    )
    if _is_fp8(tensor):
        wide = wide.view(tensor.dtype)
    view = wide[..., : tensor.shape[-1]]
    view.copy_(tensor)
    return view


def assert_bits_equal(actual: Tensor, expected: Tensor) -> None:
    """Same shape, dtype and bytes (so -0 differs from 0, and NaN equals itself)."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype, (
        f"got {tuple(actual.shape)} {actual.dtype}, expected {tuple(expected.shape)} {expected.dtype}"
    )
    if not actual.numel():  # empty tensors may have strides that cannot be viewed as bytes
        return
    left, right = (tensor.contiguous().view(torch.uint8).flatten() for tensor in (actual, expected))
    if not torch.equal(left, right):
        first = int((left != right).nonzero()[0]) // actual.element_size()
        raise AssertionError(
            f"{int((left != right).sum())} bytes differ, first at element {first}: "
            f"{actual.flatten()[first]} instead of {expected.flatten()[first]}"
        )


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected|_2 / |expected|_2 in fp64."""
    actual, expected = actual.double(), expected.double()
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-300))


def _is_fp8(tensor: Tensor) -> bool:
    return tensor.dtype.is_floating_point and tensor.element_size() == 1


def _bytes(tensor: Tensor) -> bytes:
    storage = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    return storage.numpy().tobytes()


def _named_tensors(op, arguments: tuple) -> dict[str, Tensor]:
    names = [argument.name for argument in op.overload._schema.arguments][: len(arguments)]  # others have their default
    return {key: value for key, value in zip(names, arguments, strict=True) if isinstance(value, Tensor)}


def _metadata(tensor: Tensor) -> tuple:
    strides = tuple(stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)
    return tuple(tensor.shape), tensor.dtype, strides if tensor.numel() else None, tensor.storage_offset()


def _assert_same_metadata(name: str, real, fake) -> None:
    for index, (left, right) in enumerate(zip(tree_leaves(real), tree_leaves(fake), strict=True)):
        if isinstance(left, Tensor):
            assert _metadata(left) == _metadata(right), (
                f"{name} output {index}: real {_metadata(left)}, fake {_metadata(right)}"
            )


def _assert_no_aliasing(name: str, real, inputs: dict[str, Tensor]) -> None:
    outputs = [
        leaf.untyped_storage().data_ptr() for leaf in tree_leaves(real) if isinstance(leaf, Tensor) and leaf.numel()
    ]
    assert len(set(outputs)) == len(outputs), f"two outputs of {name} share storage"
    shared = set(outputs) & {tensor.untyped_storage().data_ptr() for tensor in inputs.values() if tensor.numel()}
    assert not shared, f"an output of {name} is a view of an input"


def _assert_deterministic_mutation(name: str, arguments: tuple, inputs, before, after) -> None:
    for key, tensor in inputs.items():
        storage = tensor.untyped_storage()
        storage.copy_(
            torch.frombuffer(bytearray(before[key]), dtype=torch.uint8).untyped_storage() if before[key] else storage
        )
    TABLE[name].overload(*arguments)
    for key, tensor in inputs.items():
        assert _bytes(tensor) == after[key], f"{name} left different bytes in {key} the second time"


def _assert_out_writes_everything(name: str, arguments: tuple, real) -> None:
    op = TABLE[name]
    buffers = {}
    for output, result in zip(op.outputs, tree_leaves(real), strict=True):
        buffer = torch.empty_strided(result.shape, result.stride(), dtype=result.dtype)
        buffer.untyped_storage().fill_(POISON)
        buffers[output] = buffer
    op.packet.out(*arguments, **buffers)
    for output, result in zip(op.outputs, tree_leaves(real), strict=True):
        assert_bits_equal(buffers[output], result)
