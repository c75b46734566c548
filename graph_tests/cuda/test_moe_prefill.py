"""The experts of more tokens than a decode step has, on the GPU against the references, as in test_moe.py.

Here the pairs of an expert are rows of products on the tensor cores, cut into blocks of up to 128 rows. On a GPU where
no kernel does that, the decode kernels take these calls and have to pass the same tests.

MXFP4 products run on the tensor cores' FP8, which cut off what lies 13 bits below the largest product of 32
(fp8_products.py): the sum of a stage of 128 columns, four instructions, loses up to 4 * 34 * 2^-13 of sum|x w|. Tests
whose operands are small integers have exact gates nevertheless, and of the loss in w2 `near` has room for five times
what such products computed on the CPU lose. Where gates are not exact either, h is quantised another way here and
there; then those products are the judge, to the bit.
"""

import pytest
import torch

from dsv4_ops.ops.moe_workspace import prefill_bytes
from graph_tests import checks
from graph_tests.cuda.fp8_products import folded_experts
from graph_tests.cuda.kernel_checks import NEEDS_HOPPER, bits, check_kernel, on_cuda
from graph_tests.cuda.moe_inputs import FLASH, PRO, choose, make, released, spoil
from graph_tests.cuda.test_moe import call, near
from graph_tests.ops.moe_cases import FORMATS, IDS
from graph_tests.ops.operands import fp8_rows, mxfp4_weight, nvfp4

pytestmark = pytest.mark.cuda

OPS = torch.ops.dsv4
SMALL = (256, 384)  # d, inner


def shuffled(counts: list[int]) -> torch.Tensor:
    """One slot for each row, so that expert e has counts[e] rows."""
    ids = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(1))].int()[:, None]


@pytest.mark.sanitize
@pytest.mark.parametrize("kind", FORMATS)
def test_seventy_tokens(kind):
    check_kernel(f"moe_{kind}", make(kind, choose(70, 3, 2), 128, 128, 3), near)


@pytest.mark.parametrize("rows", [65, 200, 700])
@pytest.mark.parametrize("kind", FORMATS)
def test_any_number_of_tokens(kind, rows):
    check_kernel(f"moe_{kind}", make(kind, choose(rows, 12, 6), *SMALL, 12), near)


@pytest.mark.parametrize("kind", FORMATS)
def test_every_size_of_a_block(kind):
    """Blocks have 16, 32, .. 128 rows; an expert has none, one, or several of nearly the same size."""
    ids = shuffled([1, 17, 33, 49, 65, 81, 97, 113, 0, 128, 129, 130, 250])
    check_kernel(f"moe_{kind}", make(kind, ids, 128, 256, 13), near)


@pytest.mark.parametrize("widths", [(128, 128), (384, 128), (640, 896)])
@pytest.mark.parametrize("kind", FORMATS)
def test_widths_that_do_not_fill_a_tile(kind, widths):
    """w2 in parts of 256 rows; scales of FP4 in 16 bytes, which serve 512 or 256 columns, of rows that are shorter."""
    check_kernel(f"moe_{kind}", make(kind, choose(80, 4, 2), *widths, 4), near)


@pytest.mark.parametrize("kind", FORMATS)
def test_more_tiles_than_multiprocessors(kind):
    """A CTA goes on to another tile, whose weights and rows are copied while it finishes the one before."""
    check_kernel(f"moe_{kind}", make(kind, shuffled([40] * 60 + [0] * 4), 256, 512, 64), near)


@pytest.mark.parametrize("rows", [65, 300])
@pytest.mark.parametrize("kind", FORMATS)
def test_all_tokens_on_one_expert(kind, rows):
    check_kernel(f"moe_{kind}", make(kind, torch.full((rows, 1), 2, dtype=torch.int32), *SMALL, 4), near)


@pytest.mark.parametrize("kind", FORMATS)
def test_ids_that_are_no_experts_add_nothing(kind):
    ids = torch.randint(-3, 9, (90, 4), generator=torch.Generator().manual_seed(8), dtype=torch.int32)
    ids[0], ids[1] = -1, torch.tensor([6, 2**31 - 1, -(2**31), 3])
    arguments = make(kind, ids, *SMALL, 6)
    check_kernel(f"moe_{kind}", arguments, near)
    assert (call(kind, on_cuda(arguments))[0] == 0).all()
    check_kernel(f"moe_{kind}", make(kind, torch.full((70, 6), -1, dtype=torch.int32), *SMALL, 4), near)


@pytest.mark.parametrize("shift", [14, 90, -100])
@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_scales_of_any_size(kind, shift):
    """Scales of w1 and w3 beyond those whose factor is a bf16, with x the other way: the same products."""
    arguments = list(make(kind, choose(70, 4, 2), *SMALL, 4))
    for place, change in ((1, -shift), (5, shift), (7, shift), (9, min(shift, 20))):
        arguments[place] = (arguments[place].int() + change).to(torch.uint8)
    check_kernel(f"moe_{kind}", tuple(arguments), near)


@pytest.mark.parametrize("spread", [11, 12, 16, 40])
def test_scales_that_do_not_fold_into_one_e4m3_code(spread):
    """Scales of groups beside each other, and of stages of 128 columns, that are 2^spread apart.

    Every other token has x where a third of the rows has small scales, and is larger by as much.
    """
    arguments = list(make("mxfp4", choose(70, 4, 2), 512, 384, 4))
    for place in (0, 1, 5, 7, 9):
        arguments[place] = arguments[place].clone()
    for place in (5, 7, 9):
        scale = arguments[place]
        scale[:, ::3, 1::4] -= spread
        scale[:, 1::3, 4:8] -= spread
        scale[:, 2::3, :4] -= spread
        scale[:, 5::16, 2::4] += spread // 2
    arguments[0].view(torch.uint8).view(70, 4, 4, 32)[::2, :, [0, 2, 3]] = 0
    arguments[1][::2] += spread

    def compare(actual, expected):
        near(actual[::2], expected[::2])
        near(actual[1::2], expected[1::2])

    check_kernel("moe_mxfp4", tuple(arguments), compare)


@pytest.mark.parametrize("largest", [4, 100, 254])
def test_all_scales_in_one_row(largest):
    """Scales from 0 to `largest` in neighbouring groups of one expert's w1, and codes of both signs."""
    arguments = list(make("mxfp4", choose(70, 3, 2), 1024, 128, 3))
    scale = arguments[5] = arguments[5].clone()
    scale[1] = (torch.arange(128 * 32).view(128, 32) * 37 % (largest + 1)).to(torch.uint8)
    check_kernel("moe_mxfp4", tuple(arguments), near)


def test_random_codes_and_scales_of_nvfp4():
    check_kernel("moe_nvfp4", make("nvfp4", choose(150, 5, 3), *SMALL, 5, exact=False), near)


def test_random_codes_and_scales_of_mxfp4():
    """Of gates as large as any, one in about 2^11 is so small beside its products that they may lose it altogether."""

    def compare(actual, expected):
        assert torch.equal(actual.isfinite(), expected.isfinite())
        assert checks.relative_error(actual, expected) < 2.0**-4

    check_kernel("moe_mxfp4", make("mxfp4", choose(150, 5, 3), *SMALL, 5, exact=False), compare)


def differing_rows(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual != expected).any(-1).double().mean())


@NEEDS_HOPPER
@pytest.mark.parametrize("spread", [7, 30])
def test_mxfp4_products_are_those_of_truncated_sums(spread):
    """The bits of products that lose what FP8 tensor cores lose, in order, with scales up to 2^spread apart.

    What is left are the last bits of silu in fp32, of about 2^-22: they decide about the bf16 bits of one h in 2^14,
    and of a sixteenth of these about the code. A row has 768 h, so a row in some hundreds differs.
    """
    arguments = list(make("mxfp4", choose(100, 4, 2), *SMALL, 4, exact=False, limit=10.0))
    generator = torch.Generator().manual_seed(1)
    for place, low, high in ((1, 126, 129), *((weight, 119 - spread, 119) for weight in (5, 7, 9))):
        arguments[place] = torch.randint(low, high, arguments[place].shape, generator=generator).to(torch.uint8)
    truncated = folded_experts(*arguments)

    def compare(actual, expected):
        assert differing_rows(expected, truncated) == 1, "products without loss have other bits in every row"
        assert differing_rows(actual, truncated) < 2.0**-4

    check_kernel("moe_mxfp4", tuple(arguments), compare)


@pytest.mark.parametrize("kind", FORMATS)
def test_twenty_runs_give_the_same_bits(kind):
    arguments = on_cuda(make(kind, choose(150, 8, 6), *SMALL, 8, exact=False))
    first = call(kind, arguments)
    for _ in range(20):
        checks.assert_bits_equal(call(kind, arguments).cpu(), first.cpu())


@pytest.mark.parametrize("kind", FORMATS)
def test_replay_follows_the_ids(kind):
    arguments = on_cuda(make(kind, choose(100, 12, 6), *SMALL, 12))
    ids = arguments[IDS[kind]]
    graph = torch.cuda.CUDAGraph()
    call(kind, arguments)
    with torch.cuda.graph(graph):
        y = call(kind, arguments)
    for new in (choose(100, 12, 6, 1), torch.full((100, 6), 7, dtype=torch.int32)):
        ids.copy_(new)
        graph.replay()
        checks.assert_bits_equal(y.cpu(), call(kind, arguments).cpu())
    ids.fill_(-1)
    graph.replay()
    assert (y == 0).all()


@pytest.mark.parametrize("kind", FORMATS)
def test_strided_rows_and_more_dimensions(kind):
    arguments = make(kind, choose(72, 5, 3), *SMALL, 5)
    inputs = IDS[kind] + 2
    strided = tuple(checks.row_strided(a) for a in arguments[:inputs])
    check_kernel(f"moe_{kind}", (*strided, *arguments[inputs:]), near)
    shaped = tuple(a.unflatten(0, (8, 9)) for a in arguments[:inputs])
    check_kernel(f"moe_{kind}", (*shaped, *arguments[inputs:]), near)


@pytest.mark.parametrize("kind", FORMATS)
def test_nan_stays_in_its_row(kind):
    arguments = spoil(kind, make(kind, choose(70, 6, 3), *SMALL, 6))
    check_kernel(f"moe_{kind}", arguments, near)
    y = call(kind, on_cuda(arguments)).cpu()
    assert y[3].isnan().all() and y[torch.arange(70) > 5].isfinite().all()


def test_nan_in_the_scale_of_an_mxfp4_weight_stays_visible():
    arguments = list(make("mxfp4", shuffled([30, 40, 0, 20]), *SMALL, 4))
    arguments[5][1, 17, 3] = 255
    check_kernel("moe_mxfp4", tuple(arguments), near)
    y = call("mxfp4", on_cuda(tuple(arguments))).cpu()
    assert torch.equal(y.isnan().any(1), arguments[2][:, 0] == 1)


@pytest.mark.parametrize(("kind", "widths"), [("mxfp4", FLASH), ("nvfp4", FLASH), ("mxfp4", PRO)])
def test_released_widths(kind, widths):
    check_kernel(f"moe_{kind}", released(kind, choose(70, 3, 2), *widths, 3), near)


def test_weights_beyond_2_to_the_31_bytes():
    """Three experts of 220, the first below 2^31 bytes and the others beyond, and the same three alone."""
    experts, chosen = 220, torch.tensor([3, 196, 219])
    few = choose(70, 3, 2)
    arguments = released("mxfp4", chosen[few.long()].int(), *PRO, experts, "cuda")
    assert arguments[4].numel() > 2**31
    y = call("mxfp4", arguments)
    weights = tuple(a[chosen.cuda()].clone() if a.dim() == 3 else a for a in arguments[4:-1])
    expected = call("mxfp4", (*arguments[:2], few.cuda(), arguments[3], *weights, arguments[-1]))
    assert expected.abs().max() > 0
    checks.assert_bits_equal(y.cpu(), expected.cpu())


@NEEDS_HOPPER
def test_the_workspace_is_what_python_allocates():
    """The `.out` overload checks the size that csrc/moe computes; `prefill_bytes` computes the same."""
    arguments = on_cuda(make("mxfp4", choose(70, 5, 3), *SMALL, 5))
    size = prefill_bytes(210, 5, *SMALL)
    y = torch.empty(70, SMALL[0], device="cuda")
    OPS.moe_mxfp4.out(*arguments, y=y, workspace=torch.empty(size, dtype=torch.uint8, device="cuda"))
    checks.assert_bits_equal(y.cpu(), call("mxfp4", arguments).cpu())
    with pytest.raises(RuntimeError, match=f"workspace must be at least {size} uint8"):
        OPS.moe_mxfp4.out(*arguments, y=y, workspace=torch.empty(size - 1, dtype=torch.uint8, device="cuda"))


# ---- FP4 linears, which run through the same products ----


@pytest.mark.parametrize(("rows", "n", "k", "group"), [(65, 128, 128, 32), (130, 384, 512, 64), (300, 640, 896, 128)])
def test_linear_mxfp4_of_many_rows(rows, n, k, group):
    generator = torch.Generator().manual_seed(rows)
    x, _ = fp8_rows((rows, k), generator, True, group)
    weight, _ = mxfp4_weight(n, k, generator, True)
    check_kernel("linear_mxfp4", (*x, *weight), bits)


@pytest.mark.parametrize(
    ("rows", "n", "k", "one"), [(65, 128, 128, True), (130, 384, 512, False), (300, 640, 896, False)]
)
def test_linear_nvfp4_of_many_rows(rows, n, k, one):
    generator = torch.Generator().manual_seed(rows)
    x, _ = nvfp4((rows, k), generator, True, (1,) if one else (rows, 1))
    weight, _ = nvfp4((n, k), generator, True, (1,))
    check_kernel("linear_nvfp4", (*x, *weight), bits)
