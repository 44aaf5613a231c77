import pytest
import torch

from refold.algebra import integer_grid
from refold.ops.bcq_linear import dequantise, pack, unpack

N, K, SIZE = 6, 72, 16
GROUPS = -(-K // SIZE)


def drawn(*shape, low=1, high=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, generator=generator)


def scales(counts, seed=0):
    """Scales that are these counts times a unit of few bits, so that every product is exact."""
    unit = drawn(N, GROUPS, low=1, high=200, seed=seed).double() / 256
    return counts.double() * unit, unit


def signs(planes, seed=1):
    return drawn(planes, N, K, low=0, high=2, seed=seed) * 2 - 1


@pytest.mark.parametrize("planes", [1, 2, 3, 4])
def test_uniform_scales_are_powers_of_two_times_one(planes):
    alpha = torch.rand(1, N, GROUPS)
    alpha[0, 0, 0] = 0
    grid = integer_grid.find(alpha, planes)
    powers = torch.tensor([2 ** (planes - 1 - i) for i in range(planes)])
    assert grid.counts[:, 1, 1].tolist() == powers.tolist()
    assert grid.counts[:, 0, 0].tolist() == [0] * planes
    assert torch.equal(grid.unit, alpha[0].double())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_the_smallest_integers_are_found(dtype):
    counts = torch.tensor([5, 3, 2])[:, None, None].expand(3, N, GROUPS).clone()
    counts[:, 0, 0] = torch.tensor([6, 3, 0])  # 2 and 1 times three units, and no third plane
    alpha, unit = scales(counts)
    grid = integer_grid.find(alpha.to(dtype), 3)
    assert grid.counts[:, 0, 0].tolist() == [2, 1, 0]
    assert grid.counts[:, 1, 1].tolist() == [5, 3, 2]
    assert grid.unit[1, 1] == unit[1, 1]
    assert grid.unit[0, 0] == 3 * unit[0, 0]


@pytest.mark.parametrize("place", [(2, 0, 0), (0, N - 1, GROUPS - 1)])
def test_one_unit_in_the_last_place_is_no_ratio(place):
    counts = torch.tensor([4, 2, 1])[:, None, None].expand(3, N, GROUPS)
    alpha = scales(counts)[0].float()
    assert integer_grid.find(alpha, 3) is not None
    alpha[place] = torch.nextafter(alpha[place], torch.tensor(9.0))
    assert integer_grid.find(alpha, 3) is None


def test_random_negative_and_infinite_scales_are_no_grid():
    alpha = torch.rand(3, N, 40) + 0.1
    assert integer_grid.find(alpha, 3) is None
    assert integer_grid.find(-alpha[:1], 3) is None
    grid = torch.ones(3, N, GROUPS)
    grid[1, 2, 1] = -1
    assert integer_grid.find(grid, 3) is None
    grid[1, 2, 1] = torch.inf
    assert integer_grid.find(grid, 3) is None


def test_past_a_byte_there_is_no_grid():
    counts = torch.tensor([254, 1])[:, None, None].expand(2, N, GROUPS)
    assert integer_grid.find(scales(counts)[0], 2) is not None
    assert integer_grid.find(scales(counts + torch.tensor([1, 0])[:, None, None])[0], 2) is None
    counts = torch.tensor([100, 99, 57])[:, None, None].expand(3, N, GROUPS)
    assert integer_grid.find(scales(counts)[0], 3) is None


@pytest.mark.parametrize(
    ("counts", "bits"),
    [
        ([1], 2), ([1, 1], 2), ([2, 1], 2), ([3, 1], 4), ([4, 2, 1], 4), ([5, 2], 4), ([8, 7], 4),
        ([8, 4, 2, 1], 4), ([8, 4, 3, 1], 8), ([9, 8], 8), ([201, 53], 8), ([201, 54], 8),
    ],
)  # fmt: skip
def test_the_codes_are_the_weights(counts, bits):
    planes = len(counts)
    alpha, _ = scales(torch.tensor(counts)[:, None, None].expand(planes, N, GROUPS))
    grid = integer_grid.find(alpha, planes)
    assert integer_grid.bits_needed(grid, (8, 2, 4)) == bits
    packed = pack(signs(planes))
    each = (unpack(p, K) for p in packed)
    codes = integer_grid.encode(each, grid, SIZE, bits)
    assert int(codes.codes.min()) >= -(2 ** (bits - 1))
    assert int(codes.codes.max()) < 2 ** (bits - 1)
    assert (codes.offset is not None) == integer_grid.needs_offset(grid, bits)

    def over(t):
        return t.repeat_interleave(SIZE, dim=1)[:, :K]

    weight = codes.codes * over(codes.scale)
    if codes.offset is not None:
        weight += over(codes.offset)
    assert torch.equal(weight, dequantise(packed, alpha, K, SIZE, torch.float64))


def test_groups_may_differ():
    counts = torch.tensor([4, 2, 1])[:, None, None].expand(3, N, GROUPS).clone()
    counts[:, 0, 0] = torch.tensor([8, 4, 3])  # 15: half integers in 4 bits
    counts[:, 1, 0] = torch.tensor([8, 3, 3])  # 14: halves without an offset
    counts[:, 2, 0] = 0
    alpha, _ = scales(counts)
    grid = integer_grid.find(alpha, 3)
    assert integer_grid.bits_needed(grid, (4,)) == 4
    packed = pack(signs(3))
    codes = integer_grid.encode((unpack(p, K) for p in packed), grid, SIZE, 4)
    assert (codes.offset != 0).nonzero().tolist() == [[0, 0]]
    assert (codes.codes[2, :SIZE] == 0).all()
    over = [t.repeat_interleave(SIZE, dim=1)[:, :K] for t in (codes.scale, codes.offset)]
    exact = dequantise(packed, alpha, K, SIZE, torch.float64)
    assert torch.equal(codes.codes * over[0] + over[1], exact)


def test_no_width_holds_it():
    counts = torch.tensor([9, 8])[:, None, None].expand(2, N, GROUPS)
    grid = integer_grid.find(scales(counts)[0], 2)
    assert integer_grid.bits_needed(grid, (2, 4)) is None
    assert integer_grid.bits_needed(grid, ()) is None


@pytest.mark.parametrize("bits", [4, 8])
def test_rounded_weights_are_the_nearest_of_the_best_scale(bits):
    alpha = (torch.rand(3, N, GROUPS) + 0.1).sort(0, descending=True)[0]
    alpha[:, 0, 0] = 0
    exact = dequantise(pack(signs(3)), alpha, K, SIZE, torch.float64)
    codes = integer_grid.requantise(exact, SIZE, bits)
    most = 2 ** (bits - 1) - 1
    assert codes.codes.abs().max() <= most
    assert codes.offset is None

    def over(t):
        return t.repeat_interleave(SIZE, dim=1)[:, :K]

    got = codes.codes * over(codes.scale)
    grouped = torch.nn.functional.pad(exact, (0, -K % SIZE)).unflatten(1, (-1, SIZE))
    plain = over(grouped.abs().amax(-1) / most)
    nearest = (exact / plain).nan_to_num().round() * plain
    assert (got - exact).norm() <= (nearest - exact).norm()
    assert (got - exact).norm() <= {4: 0.1, 8: 5e-3}[bits] * exact.norm()
    assert (got[0, :SIZE] == 0).all()
