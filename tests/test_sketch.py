"""Laws 1 to 3: the map is Algorithm 1; the sketch is linear, keeps inner products, and nests."""

import hashlib

import numpy as np
import pytest
import torch
from reference import shuffled, sketched

from rapidin_vdb.errors import SpecError
from rapidin_vdb.records import SketchSpec
from rapidin_vdb.sketch import BucketMap, Sketch, draw_shuffle, fold, padded_length
from rapidin_vdb.sketch.shuffle import draw_packed_signs
from rapidin_vdb.sketch.sketch import map_bytes


def sketch_of(spec: SketchSpec, grad: np.ndarray, cuts: tuple[int, ...] = ()) -> np.ndarray:
    """Our sketch, fed tensor by tensor."""
    parts = np.split(grad.astype(np.float32), cuts)
    sketch = Sketch(spec, [len(part) for part in parts])
    rapidgrad = torch.zeros(spec.width)
    for number, part in enumerate(parts):
        sketch.add(rapidgrad, number, torch.from_numpy(part))
    return rapidgrad.numpy()


@pytest.mark.parametrize("seed", [0, 42])
@pytest.mark.parametrize("shuffles", [0, 1, 20])
@pytest.mark.parametrize(("length", "width"), [(2, 2), (8, 2), (1000, 16), (5000, 4096), (70_000, 1024)])
def test_bucket_map_is_algorithm_1(length, width, shuffles, seed):
    spec = SketchSpec(width=width, shuffles=shuffles, seed=seed)
    made = BucketMap(spec, length)
    steps = draw_shuffle(spec, made.length)
    # Shuffling the coordinates' own numbers says which coordinate stands where.
    slow = np.empty(made.length, dtype=np.int64)
    slow[shuffled(np.arange(made.length), steps)] = np.arange(made.length)
    assert made.positions(0, made.length).tolist() == slow.tolist()
    buckets = made.buckets(0, made.length).numpy()
    assert buckets.tolist() == (slow // (made.length // width)).tolist()
    assert np.bincount(buckets, minlength=width).tolist() == [made.length // width] * width
    if shuffles and made.length > 8:
        assert slow.tolist() != list(range(made.length)), "a shuffle that moves nothing would pass all of the above"


def test_any_range_of_the_map_is_the_same_range_of_the_whole():
    made = BucketMap(SketchSpec(width=256, seed=3), 100_000)
    positions, negative = made.positions(0, made.length), made.negative(0, made.length)
    for start, stop in ((0, 1), (255, 257), (1000, 1000), (40_000, 99_999)):
        assert made.positions(start, stop).tolist() == positions[start:stop].tolist()
        assert made.negative(start, stop).tolist() == negative[start:stop].tolist()


@pytest.mark.parametrize("length", [3000, (1 << 31) - 1, (1 << 32) + 5, 6_738_415_616])
def test_compiled_and_torch_and_plain_integers_follow_alike(length):
    """Also past 2^31 and 2^32, where 32 bits no longer hold a position."""
    made = BucketMap(SketchSpec(width=64, shuffles=3, seed=11), length)
    steps = draw_shuffle(made.spec, made.length)
    inverses = [[np.argsort(step.row_permutation), np.argsort(step.column_permutation)] for step in steps]

    def follow(position: int) -> int:
        for rows, columns in inverses:
            below = made.length // len(rows)
            position = int(rows[position // below]) * below + position % below
            position = position - position % len(columns) + int(columns[position % len(columns)])
        return position

    start = length - 200
    slow = [follow(position) for position in range(start, length)]
    assert made.positions(start, length).tolist() == slow
    dtype = torch.int32 if made.length < 1 << 31 else torch.int64
    assert made._followed_by_torch(start, length, dtype, "cpu").tolist() == slow
    assert made.buckets(start, length).tolist() == [position // (made.length // 64) for position in slow]


@pytest.mark.parametrize("start", [0, 8, 256, 264, 1, 7, 250, 255, 1001])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 255, 256, 1000])
def test_packed_signs_are_the_signs(start, count):
    made = BucketMap(SketchSpec(width=256, seed=3), 100_000)
    negative, packed = made.negative(0, 4096).numpy()[start : start + count], made.signs(start, start + count).numpy()
    assert len(packed) == -(-count // 8)
    assert np.unpackbits(packed, count=count, bitorder="little").tolist() == negative.tolist()
    assert count < 255 or 0.3 < negative.mean() < 0.7


def test_permutations_leave_the_gpu_when_the_map_is_kept(monkeypatch):
    made = BucketMap(SketchSpec(width=64, shuffles=3), 5000)
    there = made._followed_by_torch(0, 100, torch.int32, "cpu")  # as on a GPU
    assert list(made._moved) == ["cpu"]
    made.leave_devices()
    assert made._moved == {}
    assert torch.equal(made._followed_by_torch(0, 100, torch.int32, "cpu"), there)
    left = []
    monkeypatch.setattr(BucketMap, "leave_devices", lambda made: left.append(made))
    for keep in ("device", "host", "nowhere"):
        Sketch(SketchSpec(width=64), [300], keep=keep)
    assert len(left) == 2, "composed again for every batch, they are needed again"


@pytest.mark.parametrize("keep", ["device", "host", "nowhere"])
@pytest.mark.parametrize(
    ("width", "narrow"),
    [(256, 256), (256, 64), (256, 1), (1 << 16, 1 << 15), (1 << 16, 64), (1 << 17, 1 << 16), (1 << 18, 1 << 17)],
)
def test_a_narrower_sketch_is_that_of_the_same_map_bit_for_bit(width, narrow, keep):
    lengths = [700, 300_000, 41]
    wide, own = Sketch(SketchSpec(width=width), lengths, keep=keep), Sketch(SketchSpec(width=narrow), lengths)
    shared = wide.narrowed(narrow)
    assert shared.spec == own.spec and wide.spec.width == width
    draw = torch.Generator().manual_seed(0)
    for number, length in enumerate(lengths):
        before = wide._tensor(number)
        for part, wanted in zip(shared._tensor(number), own._tensor(number), strict=True):
            assert part.dtype == wanted.dtype and torch.equal(part, wanted)
        assert all(map(torch.equal, wide._tensor(number), before)), "it is left as it was"
        grads, sums = torch.randn(3, length, generator=draw), torch.zeros(2, 3, narrow)
        for sketch, rapidgrads in zip((shared, own), sums, strict=True):
            sketch.add_batch(rapidgrads, number, grads, normalize=True)
            sketch.add_rows(rapidgrads[0], number, torch.tensor([2]), grads[:1, :9], normalize=False)
        assert torch.equal(*sums) and sums.any()


@pytest.mark.parametrize("narrow", [0, 48, 512])
def test_widths_that_are_no_fold_of_a_sketch(narrow):
    with pytest.raises(SpecError, match=f"width is {narrow}; wanted a power of two, at most 256"):
        Sketch(SketchSpec(width=256), [700]).narrowed(narrow)


def test_signs_are_balanced_and_independent_of_the_seed_next_door():
    count = 1 << 18
    first, second = (BucketMap(SketchSpec(width=16, seed=seed), count).negative(0, count).numpy() for seed in (1, 2))
    # Five standard deviations of a fair coin.
    for negative in (first, second, first ^ second):
        assert abs(negative.mean() - 0.5) < 5 * 0.5 / np.sqrt(count)


@pytest.mark.parametrize(
    ("spec", "count", "wanted"),
    [
        (SketchSpec(), 100_000, "be7ba0b482843bb6"),  # 2^17 with its padding, and 2^18: both kinds of length
        (SketchSpec(), 200_000, "270d7cd1ab0084f0"),
        (SketchSpec(width=1024, shuffles=100, seed=7), 300_000, "2cf1019c83074cd7"),
        (SketchSpec(width=64, shuffles=1, seed=1), 1000, "713a03dfc5806488"),
        (SketchSpec(width=2, shuffles=3, seed=0), 3, "937d994a6539e281"),
    ],
)
def test_draws_never_change(spec, count, wanted):
    """Databases on disk depend on it: if this fails, raise SCHEME instead of changing the number."""
    made = BucketMap(spec, count)
    digest = hashlib.sha256(made.positions(0, count).numpy().astype("<i8").tobytes())
    digest.update(made.negative(0, count).numpy().tobytes())
    assert digest.hexdigest()[:16] == wanted


@pytest.mark.parametrize(
    ("length", "wanted"),
    [(1 << 30, "de47570048c36e5b"), (1 << 31, "3cd9f683a974c2ee"), (1 << 32, "3cd9f683a974c2ee")],
)
def test_draws_of_long_gradients_never_change(length, wanted):
    """Those of models of billions of parameters, whose maps nobody would compose for a test."""
    digest = hashlib.sha256()
    for step in draw_shuffle(SketchSpec(shuffles=2), length):
        for permutation in (step.row_permutation, step.column_permutation):
            digest.update(np.asarray(permutation, "<i8").tobytes())
    assert digest.hexdigest()[:16] == wanted
    far = (1 << 31) + 5
    signs = hashlib.sha256(draw_packed_signs(SketchSpec(), far, far + 1000).tobytes())
    assert signs.hexdigest()[:16] == "f8f2df02d0b9d4c6"


@pytest.mark.parametrize("cuts", [(), (7, 900), (1, 2, 3, 999)])
def test_sketch_equals_the_slow_way_however_it_is_cut(cuts):
    spec = SketchSpec(width=64, shuffles=20, seed=5)
    grad = np.random.default_rng(0).standard_normal(1000)
    length = padded_length(1000, width=64)
    negative = BucketMap(spec, 1000).negative(0, length).numpy()
    slow = sketched(grad, length=length, steps=draw_shuffle(spec, length), negative=negative, width=64)
    np.testing.assert_allclose(sketch_of(spec, grad, cuts), slow, atol=1e-5)
    unsigned = sketched(grad, length=length, steps=draw_shuffle(spec, length), negative=negative & False, width=64)
    assert np.abs(slow - unsigned).max() > 1, "without signs the answer is another"


def test_sketch_is_linear():
    spec = SketchSpec(width=128, seed=9)
    first, second = np.random.default_rng(1).standard_normal((2, 3000))
    together = sketch_of(spec, 2 * first - 3 * second)
    np.testing.assert_allclose(together, 2 * sketch_of(spec, first) - 3 * sketch_of(spec, second), atol=1e-4)


def test_inner_products_are_kept_on_average_with_error_shrinking_as_the_root_of_the_width():
    draw = np.random.default_rng(2)
    first = draw.standard_normal(4000)
    second = 0.5 * first + draw.standard_normal(4000)
    first, second = first / np.linalg.norm(first), second / np.linalg.norm(second)
    exact, seeds = float(first @ second), 60
    spread = {}
    for width in (64, 256, 1024):
        specs = [SketchSpec(width=width, seed=seed) for seed in range(seeds)]
        errors = np.array([sketch_of(spec, first) @ sketch_of(spec, second) - exact for spec in specs])
        spread[width] = errors.std()
        assert abs(errors.mean()) < 4 * errors.std() / np.sqrt(seeds)
        # A random projection of unit vectors errs by about sqrt((1 + cos^2) / K).
        assert errors.std() == pytest.approx(np.sqrt((1 + exact**2) / width), rel=0.35)
    assert spread[64] / spread[1024] == pytest.approx(4, rel=0.5)


def test_structured_gradients_are_spread_too():
    """A block of equal coordinates, as an embedding row gives, must not meet in few buckets."""
    grad = np.zeros(1 << 16)
    grad[5000:5512] = 1.0
    norms = [np.linalg.norm(sketch_of(SketchSpec(width=1024, seed=seed), grad)) ** 2 / 512 for seed in range(40)]
    assert np.mean(norms) == pytest.approx(1, abs=4 * np.std(norms) / np.sqrt(40))
    assert np.std(norms) < 2 * np.sqrt(2 / 1024)


@pytest.mark.parametrize("factor", [2, 16])
def test_folding_a_rapidgrad_gives_the_narrower_one(factor):
    grad = np.random.default_rng(3).standard_normal(9000)
    wide = sketch_of(SketchSpec(width=512, seed=4), grad)
    narrow = sketch_of(SketchSpec(width=512 // factor, seed=4), grad)
    np.testing.assert_allclose(fold(torch.from_numpy(wide), 512 // factor).numpy(), narrow, atol=1e-4)
    assert np.abs(wide[: len(narrow)] - narrow).max() > 0.1


@pytest.mark.parametrize(
    ("spec", "length", "message"),
    [
        (SketchSpec(width=1000), 5000, "width is 1000; wanted a power of two, such as 512 or 1024"),
        (SketchSpec(width=8192), 5000, "width is 8192, but the gradient has only 5000 coordinates.*--width 4096"),
        (SketchSpec(width=0), 5000, "width is 0; wanted a power of two"),
        (SketchSpec(width=64, shuffles=-1), 5000, "shuffles is -1"),
        (SketchSpec(width=64, scheme=99), 5000, "scheme 99 is not known to this version"),
    ],
)
def test_specs_that_cannot_be_honoured(spec, length, message):
    with pytest.raises(SpecError, match=message):
        BucketMap(spec, length)
    with pytest.raises(SpecError, match="cannot fold 10 coordinates to width 4"):
        fold(torch.zeros(10), 4)


def test_gradients_are_added_in_parts(monkeypatch):
    from rapidin_vdb.sketch import sketch as module

    grad, spec = torch.randn(1003, generator=torch.Generator().manual_seed(2)), SketchSpec(width=64, shuffles=3)
    whole, parts = torch.zeros(64), torch.zeros(64)
    Sketch(spec, [1003]).add(whole, 0, grad)
    monkeypatch.setattr(module, "_ADDED", 64)
    Sketch(spec, [1003]).add(parts, 0, grad)
    torch.testing.assert_close(parts, whole)


def test_the_map_takes_half_of_the_free_memory_at_the_most(monkeypatch):
    spec, lengths = SketchSpec(width=64), [4000]
    taken = map_bytes(4000, 64)
    for free, place in ((2 * taken + 2, "device"), (2 * taken - 2, "nowhere")):
        monkeypatch.setattr("rapidin_vdb.sketch.sketch.free_bytes", lambda device, free=free: free)
        assert Sketch(spec, lengths).keep == place
