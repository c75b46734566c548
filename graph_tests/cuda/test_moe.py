"""The routed experts on the GPU against the references on the CPU, which graph_tests/ops/test_moe.py judges.

Sums of the products with w1 and w3 are exact in fp32 for these inputs (dense apart), so both sides round the same gates
and ups. exp is the step that no two devices agree on: where the rounding of h falls the other way, h is 2^-8 of itself
away and its code at most one step, 2^-3, which an output of 128 columns of h feels as 2^-3 / sqrt(128) = 1.1e-2 in one
column, and the whole tensor as a hundredth of that. Leaving out the second quantisation would cost 2e-2.
"""

import pytest
import torch
from torch import Tensor

from graph_tests import checks
from graph_tests.cuda.kernel_checks import assert_rows_independent, check_kernel, on_cuda
from graph_tests.cuda.moe_inputs import FLASH, PRO, any_codes, choose, make, released, spoil
from graph_tests.ops import moe_cases as cpu
from graph_tests.ops.moe_cases import FORMATS, IDS

pytestmark = pytest.mark.cuda

OPS = torch.ops.dsv4
F32, BF16 = torch.float32, torch.bfloat16
SMALL = (256, 384)  # d, inner
SHARED = torch.zeros(3, 128, dtype=BF16)


def near(actual: Tensor, expected: Tensor) -> None:
    """Where both are finite they differ by 2^-8 of the norm; elsewhere both are not."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    finite = expected.isfinite()
    assert torch.equal(actual.isfinite(), finite)
    if finite.any():
        assert checks.relative_error(actual[finite], expected[finite]) < 2.0**-8


def call(kind: str, arguments: tuple) -> Tensor:
    return getattr(OPS, f"moe_{kind}")(*arguments)


def with_ids(kind: str, arguments: tuple, ids: Tensor) -> tuple:
    return (*arguments[: IDS[kind]], ids, *arguments[IDS[kind] + 1 :])


@pytest.mark.sanitize
@pytest.mark.parametrize(("rows", "experts"), [(3, 4), (5, 12)])  # two teams of warps, and three for MXFP4
@pytest.mark.parametrize("kind", FORMATS)
def test_few_tokens(kind, rows, experts):
    check_kernel(f"moe_{kind}", make(kind, choose(rows, experts, 2), 128, 128, experts), near)


@pytest.mark.sanitize
@pytest.mark.parametrize("kind", FORMATS)
def test_widths_that_no_tensor_core_takes(kind):
    check_kernel(f"moe_{kind}", cpu.make(kind, 3)[0], near)  # 64 and 96


@pytest.mark.parametrize("rows", [0, 1, 2, 7, 64, 65, 200])
@pytest.mark.parametrize("kind", FORMATS)
def test_any_number_of_tokens(kind, rows):
    check_kernel(f"moe_{kind}", make(kind, choose(rows, 12, 6), *SMALL, 12), near)


@pytest.mark.parametrize("kind", FORMATS)
def test_pairs_of_more_than_one_block(kind):
    """Pairs are sorted 2048 at a time: 40 slots for each of 64 tokens, which is as many as a decode step has."""
    check_kernel(f"moe_{kind}", make(kind, choose(64, 44, 40), 128, 128, 44), near)


@pytest.mark.parametrize("kind", FORMATS)
def test_every_count_of_pairs_of_an_expert(kind):
    """Tiles of 8 pairs, passes of 16, groups of 32 (or what fits) and the next."""
    counts = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 15, 16, 17, 24, 31, 32, 33]
    ids = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(1))].int()[:, None]
    check_kernel(f"moe_{kind}", make(kind, ids, 128, 256, len(counts)), near)


@pytest.mark.parametrize(("rows", "experts"), [(1, 4), (40, 4), (64, 4), (40, 80)])
@pytest.mark.parametrize("kind", FORMATS)
def test_all_tokens_on_one_expert(kind, rows, experts):
    """Of 80 experts: where experts have few pairs on average, a group has at most four, and one expert fills many."""
    check_kernel(f"moe_{kind}", make(kind, torch.full((rows, 3), 2, dtype=torch.int32), *SMALL, experts), near)


@pytest.mark.parametrize("rows", [2, pytest.param(30, marks=pytest.mark.sanitize)])
@pytest.mark.parametrize("kind", FORMATS)
def test_ids_that_are_no_experts_add_nothing(kind, rows):
    ids = torch.randint(-3, 9, (rows, 4), generator=torch.Generator().manual_seed(8), dtype=torch.int32)
    ids[0], ids[1] = -1, torch.tensor([6, 2**31 - 1, -(2**31), 3])
    arguments = make(kind, ids, *SMALL, 6)
    check_kernel(f"moe_{kind}", arguments, near)
    assert (call(kind, on_cuda(arguments))[0] == 0).all()


@pytest.mark.parametrize("kind", FORMATS)
def test_nothing_but_ids_that_are_no_experts(kind):
    check_kernel(f"moe_{kind}", make(kind, torch.full((5, 6), -1, dtype=torch.int32), *SMALL, 4), near)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_row_does_not_depend_on_the_batch(kind):
    arguments = make(kind, choose(64, 8, 6), *SMALL, 8, exact=False)
    assert_rows_independent(f"moe_{kind}", arguments, tuple(range(IDS[kind] + 2)), (0, 5, 63))


@pytest.mark.parametrize("kind", FORMATS)
def test_twenty_runs_give_the_same_bits(kind):
    arguments = on_cuda(make(kind, choose(20, 8, 6), *SMALL, 8, exact=False))
    first = call(kind, arguments)
    for _ in range(20):
        checks.assert_bits_equal(call(kind, arguments).cpu(), first.cpu())


@pytest.mark.parametrize("kind", FORMATS)
def test_replay_follows_the_ids(kind):
    arguments = on_cuda(make(kind, choose(4, 12, 6), *SMALL, 12))
    ids = arguments[IDS[kind]]
    graph = torch.cuda.CUDAGraph()
    call(kind, arguments)
    with torch.cuda.graph(graph):
        y = call(kind, arguments)
    for seed in (1, 2):
        ids.copy_(choose(4, 12, 6, seed))
        graph.replay()
        checks.assert_bits_equal(y.cpu(), call(kind, arguments).cpu())
    ids.fill_(-1)
    graph.replay()
    assert (y == 0).all()


@pytest.mark.parametrize("kind", FORMATS)
def test_strided_rows_and_more_dimensions(kind):
    arguments = make(kind, choose(6, 5, 3), *SMALL, 5)
    inputs = IDS[kind] + 2
    strided = tuple(checks.row_strided(a) for a in arguments[:inputs])
    check_kernel(f"moe_{kind}", (*strided, *arguments[inputs:]), near)
    shaped = tuple(a.unflatten(0, (2, 3)) for a in arguments[:inputs])
    check_kernel(f"moe_{kind}", (*shaped, *arguments[inputs:]), near)


@pytest.mark.parametrize("rows", [0, 1, 3, 40, 200])
@pytest.mark.parametrize("kind", FORMATS)
def test_shared_is_added_in_fp32_and_the_sum_rounded_once(kind, rows):
    """Few columns a thread, and eight; rows at a distance, and side by side."""
    arguments = make(kind, choose(rows, 12, 6), 1024, 128, 12)
    shared = torch.randn(rows, 1024, generator=torch.Generator().manual_seed(8)).bfloat16()
    check_kernel(f"moe_{kind}", (*arguments, shared), near)
    routed = call(kind, on_cuda(arguments))
    for given in on_cuda((shared, checks.row_strided(shared))):
        checks.assert_bits_equal(call(kind, (*on_cuda(arguments), given)), shared.cuda().add_(routed))


def test_shared_of_other_dtypes_and_widths():
    arguments = cpu.make("dense", 5, dtype=F32)[0]
    check_kernel("moe_dense", (*arguments, torch.randn(5, 64)), near)
    x, ids, weights, w1, w3, w2, limit = arguments
    odd = (x[:, :63].contiguous(), ids, weights, w1[..., :63].contiguous(), w3[..., :63].contiguous(),
           w2[:, :63].contiguous(), limit)  # fmt: skip
    check_kernel("moe_dense", (*odd, torch.randn(5, 63)), near)
    check_kernel("moe_dense", tuple(on_bf16(a) for a in (*odd, torch.randn(5, 63))), near)


def on_bf16(argument):
    """Activations and weights in bf16, route weights [T, k] as they are."""
    wide = isinstance(argument, Tensor) and argument.is_floating_point() and argument.shape[-1] > cpu.K
    return argument.bfloat16() if wide else argument


def test_one_global_scale_for_all_rows():
    arguments = list(make("nvfp4", choose(6, 5, 3), *SMALL, 5))
    arguments[2] = torch.tensor([0.375])
    check_kernel("moe_nvfp4", tuple(arguments), near)


@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_other_groups_of_x(kind, group):
    arguments = list(make(kind, choose(5, 4, 2), *SMALL, 4))
    arguments[1] = arguments[1].repeat_interleave(128 // group, 1) - torch.arange(SMALL[0] // group) % 2
    check_kernel(f"moe_{kind}", tuple(a.to(torch.uint8) if i == 1 else a for i, a in enumerate(arguments)), near)


def test_fp32_scales_of_blocks():
    arguments = list(make("fp8", choose(5, 4, 2), *SMALL, 4))
    for place in (5, 7, 9):
        scale = arguments[place]
        arguments[place] = torch.rand(scale.shape, generator=torch.Generator().manual_seed(place)) * 2 + 0.1
    check_kernel("moe_fp8", tuple(arguments), near)


@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (F32, BF16, BF16), (BF16, F32, BF16), (BF16, BF16, F32)])
def test_dense_of_other_dtypes(dtypes):
    x, ids, weights, w1, w3, w2, limit = make("dense", choose(5, 4, 2), *SMALL, 4)
    arguments = (x.to(dtypes[0]), ids, weights, w1.to(dtypes[1]), w3.to(dtypes[1]), w2.to(dtypes[2]), limit)
    check_kernel("moe_dense", arguments, near)


@pytest.mark.parametrize("kind", FORMATS)
def test_nan_stays_in_its_row(kind):
    arguments = spoil(kind, make(kind, choose(20, 6, 3), *SMALL, 6))
    check_kernel(f"moe_{kind}", arguments, near)
    y = call(kind, on_cuda(arguments)).cpu()
    assert y[3].isnan().all() and y[torch.arange(20) > 5].isfinite().all()


def test_nan_in_the_scale_of_an_mxfp4_weight_stays_visible():
    """The kernel reads byte 255 as infinity; an infinite gate would end at the limit and be a number again."""
    ids = torch.tensor([[0, 1], [2, 3], [1, 2]], dtype=torch.int32)
    arguments = list(make("mxfp4", ids, *SMALL, 4))
    arguments[5][1, 17, 3] = 255
    check_kernel("moe_mxfp4", tuple(arguments), near)
    y = call("mxfp4", on_cuda(tuple(arguments))).cpu()
    assert y[0].isnan().all() and y[2].isnan().all() and y[1].isfinite().all()


def test_codes_of_all_magnitudes():
    arguments = list(make("mxfp4", choose(9, 4, 2), *SMALL, 4, exact=False))
    arguments[0] = any_codes((9, SMALL[0]))
    check_kernel("moe_mxfp4", tuple(arguments), near)


@pytest.mark.parametrize("widths", [FLASH, PRO], ids=["flash", "pro"])
@pytest.mark.parametrize("kind", ["mxfp4", "nvfp4"])
def test_released_widths(kind, widths):
    check_kernel(f"moe_{kind}", released(kind, choose(1, 4, 3), *widths, 4), near)


@pytest.mark.parametrize("kind", ["mxfp4", "nvfp4"])
def test_released_widths_rows_alone_and_together(kind):
    arguments = on_cuda(released(kind, choose(64, 6, 3), *FLASH, 6))
    together = call(kind, arguments)
    for row in (0, 40):
        alone = tuple(a[row : row + 1] for a in arguments[: IDS[kind] + 2])
        checks.assert_bits_equal(call(kind, (*alone, *arguments[IDS[kind] + 2 :])).cpu(), together[row : row + 1].cpu())


def test_weights_beyond_2_to_the_31_bytes():
    """Three experts of 220, the first below 2^31 bytes and the others beyond, and the same three alone."""
    experts, chosen = 220, [3, 196, 219]
    ids = torch.tensor([chosen, chosen[::-1]], dtype=torch.int32)
    arguments = released("mxfp4", ids, *PRO, experts, "cuda")
    assert arguments[4].numel() > 2**31
    y = call("mxfp4", arguments)
    few = tuple(a[chosen].clone() if a.dim() == 3 else a for a in arguments[4:-1])
    renamed = torch.tensor([[0, 1, 2], [2, 1, 0]], dtype=torch.int32, device="cuda")
    expected = call("mxfp4", (*arguments[:2], renamed, arguments[3], *few, arguments[-1]))
    assert expected.abs().max() > 0
    checks.assert_bits_equal(y.cpu(), expected.cpu())


# ---- what the kernels refuse ----


def wrong(**changes) -> tuple[tuple, dict]:
    names = ("x", "x_scale", "ids", "weights", "w1", "w1_scale", "w3", "w3_scale", "w2", "w2_scale", "limit")
    arguments = dict(zip(names, on_cuda(make("mxfp4", choose(3, 4, 2), 128, 128, 4)), strict=True))
    arguments["shared"] = None
    out = {"y": torch.empty(3, 128, device="cuda"), "workspace": torch.empty(8192, dtype=torch.uint8, device="cuda")}
    for name, change in changes.items():
        holder = out if name in out else arguments
        holder[name] = change(holder[name])
    return tuple(arguments.values()), out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": lambda t: t.float()}, r"dsv4::moe_mxfp4: x must be \[..., \*\] float8_e4m3fn"),
        ({"x_scale": lambda t: t.expand(3, 5)}, r"x_scale must be \[T, d/group\] with group 32, 64 or 128"),
        ({"ids": lambda t: t.long()}, r"ids must be \[..., \*\] int32"),
        ({"ids": lambda t: t[:2]}, r"ids must be \[3, 2\] int32"),
        ({"weights": lambda t: t[:, :1]}, r"weights must be \[3, 2\] float32"),
        ({"w1": lambda t: t[..., :32]}, r"w1 must be \[E, I, d\] with d = 128, packed by two"),
        ({"w3": lambda t: t[:3]}, r"w3 must be \[4, 128, 64\] uint8"),
        ({"w3": lambda t: t.mT.contiguous().mT}, r"w3 must be contiguous"),
        ({"w2_scale": lambda t: t.cpu()}, r"w2_scale must be on cuda:0 like the other tensors"),
        ({"w2_scale": lambda t: t[..., :2]}, r"w2_scale must be \[4, 128, 4\] uint8"),
        ({"x": lambda t: t.new_zeros(3, 136)[:, :128]}, r"x must be rows that start at multiples of 16 bytes"),
        ({"y": lambda t: t[:2]}, r"y must be contiguous \[3, 128\] float32"),
        ({"shared": lambda t: SHARED.cuda()}, r"y must be contiguous \[3, 128\] bfloat16"),
        ({"shared": lambda t: SHARED.cuda()[:2], "y": lambda t: t.bfloat16()}, r"shared must be \[3, 128\] bfloat16"),
        ({"shared": lambda t: SHARED.cuda().float(), "y": lambda t: t.bfloat16()}, r"shared must be .* got .* float32"),
        ({"shared": lambda t: SHARED, "y": lambda t: t.bfloat16()}, r"shared must be on cuda:0"),
        ({"workspace": lambda t: t[:100]}, r"workspace must be at least 3104 uint8"),
        ({"workspace": lambda t: None}, r"workspace must be at least 3104 uint8 at a multiple of 16 bytes, got None"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    arguments, out = wrong(**changes)
    with pytest.raises(RuntimeError, match=message):
        OPS.moe_mxfp4.out(*arguments, **out)
