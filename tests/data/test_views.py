"""Where crops lie, what they show, and what the photometric operations do to them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from scipy.stats import binomtest, ks_2samp
from torch import Tensor
from torchvision.transforms import RandomResizedCrop, v2

from dino_value.config import ViewsConfig
from dino_value.data import open_views
from dino_value.data import views as module
from dino_value.data.sampling import Stream
from dino_value.data.sampling import key as derive
from dino_value.data.views import (
    BACKENDS,
    Draws,
    FolderViews,
    MemoryViews,
    augment,
    crop,
    draw,
    photometric,
    sample_boxes,
)
from dino_value.errors import UserError

SCALES = {"global": (0.4, 1.0), "local": (0.05, 0.4)}
# wide and tall: the aspect is out of range, and tries run out
SIZES = {"square": (96, 96), "rooms": (120, 160), "panorama": (40, 200), "tower": (200, 40)}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES.keys())
def test_boxes_are_distributed_as_torchvisions(
    size: tuple[int, int], scale: tuple[float, float], generator: torch.Generator
) -> None:
    """The largest gap between the cumulative distributions of 4,000 draws each; 0.045 is exceeded once in 1,500."""
    height, width = size
    boxes = sample_boxes(4000, height, width, scale, generator)
    torch.manual_seed(0)
    canvas = torch.empty(1, height, width)
    drawn = [RandomResizedCrop.get_params(canvas, list(scale), [3 / 4, 4 / 3]) for _ in range(4000)]
    top, left, h, w = torch.tensor(drawn, dtype=torch.float32).T
    ours = boxes.T
    found = {
        "width": (ours[2] - ours[0], w),
        "height": (ours[3] - ours[1], h),
        "left": (ours[0], left),
        "top": (ours[1], top),
        "aspect": ((ours[2] - ours[0]) / (ours[3] - ours[1]), w / h),
        "area": ((ours[2] - ours[0]) * (ours[3] - ours[1]), w * h),
    }
    for name, (mine, expected) in found.items():
        assert ks_2samp(mine.numpy(), expected.numpy()).statistic < 0.045, name


@pytest.mark.parametrize("size", [(96, 96), (7, 200), (1, 1)])
def test_boxes_lie_within_the_image_on_whole_pixels(size: tuple[int, int], generator: torch.Generator) -> None:
    boxes = sample_boxes(500, *size, (0.05, 1.0), generator)
    left, top, right, bottom = boxes.T
    assert bool((boxes == boxes.round()).all())
    assert bool(((left >= 0) & (top >= 0) & (right <= size[1]) & (bottom <= size[0])).all())
    assert bool(((right > left) & (bottom > top)).all())


@pytest.mark.parametrize(("size", "expected"), [((40, 200), (53, 40)), ((200, 40), (40, 53))])
def test_when_no_try_fits_the_largest_central_box_is_taken(size: tuple[int, int], expected: tuple[int, int]) -> None:
    boxes = sample_boxes(5, *size, (1.0, 1.0), torch.Generator().manual_seed(0))
    assert (boxes[:, 2] - boxes[:, 0]).tolist() == [expected[0]] * 5
    assert (boxes[:, 3] - boxes[:, 1]).tolist() == [expected[1]] * 5
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2
    assert (middle - torch.tensor([size[1], size[0]]) / 2).abs().max() <= 0.5


def ramps(height: int, width: int) -> Tensor:
    """uint8 [3 H W]: red rises with the column, green with the row, blue is 100."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([columns, rows, torch.full_like(rows, 100)]).to(torch.uint8)


def test_a_crop_at_full_size_is_the_image() -> None:
    image = ramps(32, 32)
    assert torch.equal(crop(image[None], torch.tensor([[0.0, 0, 32, 32]]), 32)[0], image)
    assert torch.equal(crop(image[None], torch.tensor([[5.0, 9, 21, 25]]), 16)[0], image[:, 9:25, 5:21])


def test_a_shrunken_crop_is_averaged() -> None:
    checkers = ((torch.arange(32)[:, None] + torch.arange(32)) % 2 * 255).to(torch.uint8).expand(1, 3, -1, -1)
    shrunk = crop(checkers, torch.tensor([[0.0, 0, 32, 32]]), 8)
    assert (shrunk.float() - 127.5).abs().max() <= 1


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{name}.png" for name in "abc"]
    for number, path in enumerate(paths):
        Image.fromarray((ramps(48, 64) + number).permute(1, 2, 0).numpy()).save(path)
    return paths


def settings(**changes: Any) -> ViewsConfig:
    return ViewsConfig(global_size=16, local_size=8, local_count=3, **changes)


def sources(pictures: Sequence[Path], **changes: Any) -> dict[str, MemoryViews | FolderViews]:
    images = torch.stack([torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) for path in pictures])
    return {
        "memory": MemoryViews(images, settings(**changes)),
        "folder": FolderViews(list(pictures), settings(**changes)),
    }


both = pytest.mark.parametrize("kind", ["memory", "folder"])


@both
def test_shapes_and_types(pictures: list[Path], kind: str) -> None:
    source = sources(pictures)[kind]
    large, small = source.batch([2, 0], key=5)
    assert (large.shape, large.dtype) == ((2, 2, 3, 16, 16), torch.uint8)
    assert (small.shape, small.dtype) == ((3, 2, 3, 8, 8), torch.uint8)
    assert len(source) == 3


@both
def test_no_local_views(pictures: list[Path], kind: str) -> None:
    source = sources(pictures)[kind]
    source.settings.local_count = 0
    large, small = source.batch([2, 0], key=5)
    assert large.shape == (2, 2, 3, 16, 16)
    assert small.shape == (0, 2, 3, 8, 8)
    views = augment(large, small, source.settings, 0, "learner", 0)
    assert [group.shape for group in views] == [(4, 3, 16, 16), (0, 3, 8, 8)]


@both
def test_views_follow_from_the_key(pictures: list[Path], kind: str) -> None:
    source = sources(pictures)[kind]
    first, again, other = (source.batch([0, 1], key) for key in (5, 5, 6))
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))
    assert not torch.equal(first[0][0], first[0][1])  # the two global views differ


@both
def test_a_view_shows_its_own_image(pictures: list[Path], kind: str) -> None:
    """Blue is 100, 101, 102 in the three images: view-major, image by image."""
    large, small = sources(pictures)[kind].batch([2, 0, 1], key=1)
    for group in (large, small):
        blue = group[:, :, 2].float()
        assert blue.mean((2, 3)).round().tolist() == [[102, 100, 101]] * len(group)


@both
def test_global_views_are_larger_than_local_ones(pictures: list[Path], kind: str) -> None:
    """Red rises by one a column of the image: the range within a view tells the width of its box."""
    large, small = sources(pictures)[kind].batch([0] * 40, key=1)

    def widths(group: Tensor, size: int) -> Tensor:
        red = group[:, :, 0].float().mean(2)
        return (red[..., -1] - red[..., 0]).flatten() * size / (size - 1)

    area = 48 * 64
    assert widths(large, 16).mean().item() == pytest.approx((0.7 * area) ** 0.5, rel=0.08)
    assert widths(small, 8).mean().item() == pytest.approx((0.225 * area) ** 0.5, rel=0.12)
    assert widths(large, 16).min() > widths(small, 8).mean()


def test_the_folder_cuts_where_torchvision_would(pictures: list[Path]) -> None:
    """A view is the resized crop of its box, bicubic and antialiased as in main_dino.py."""
    source = FolderViews(pictures, settings())
    large, _ = source.batch([1], key=3)
    image = torch.from_numpy(np.array(Image.open(pictures[1]))).permute(2, 0, 1)
    generator = torch.Generator().manual_seed(derive(3, 0))
    for view, box in zip(large[:, 0], sample_boxes(2, 48, 64, (0.4, 1.0), generator).int().tolist(), strict=True):
        left, top, right, bottom = box
        expected = TF.resized_crop(
            image, top, left, bottom - top, right - left, [16, 16], TF.InterpolationMode.BICUBIC, antialias=True
        )
        assert (view.int() - expected.int()).abs().max() <= 1


OFF: dict[str, Any] = {"jitter": 0.0, "grayscale": 0.0}
COUNT = 64


def views(size: int = 12) -> Tensor:
    return torch.randint(0, 256, (COUNT, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(9))


def run(batch: Tensor, blur: float = 0.0, solar: float = 0.0, seed: int = 0, **changes: Any) -> Tensor:
    blurred, inverted = (torch.full((len(batch),), p) for p in (blur, solar))
    return photometric(batch, blurred, inverted, settings(**{**OFF, **changes}), torch.Generator().manual_seed(seed))


def unflipped(batch: Tensor, found: Tensor) -> Tensor:
    """`found` with the rows that were mirrored turned back, told by their first-row correlation with the input."""
    plain = batch.float() / 255
    mirrored = (found - plain.flip(-1)).abs().mean((1, 2, 3)) < (found - plain).abs().mean((1, 2, 3))
    return torch.where(mirrored[:, None, None, None], found.flip(-1), found)


def test_half_of_the_views_are_mirrored_and_nothing_else() -> None:
    batch = views()
    plain = batch.float() / 255
    found = run(batch)
    kept = (found == plain).all(-1).all(-1).all(-1)
    assert torch.equal(found[~kept], plain[~kept].flip(-1))
    assert 0.25 * COUNT < kept.sum() < 0.75 * COUNT
    assert torch.equal(run(batch, flip=0.0), plain)
    assert torch.equal(run(batch, flip=1.0), plain.flip(-1))


def test_greyscale() -> None:
    batch = views()
    found = unflipped(batch, run(batch, grayscale=1.0))
    expected = TF.rgb_to_grayscale(batch.float() / 255, 3)
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)
    coloured = (run(batch, grayscale=0.25).std(1) > 1e-3).flatten(1).any(1)
    assert 0.55 * COUNT < coloured.sum() < 0.95 * COUNT


def test_solarisation_inverts_the_bright_half() -> None:
    batch = views()
    plain = batch.float() / 255
    found = unflipped(batch, run(batch, solar=1.0))
    # near one half both sides are the same but for rounding
    torch.testing.assert_close(found, torch.where(plain >= 0.5, 1 - plain, plain), atol=5e-3, rtol=0)


def test_blur_is_a_gaussian_of_the_drawn_width() -> None:
    batch = views(24)
    found = unflipped(batch, run(batch, blur=1.0, blur_sigma=(1.5, 1.5)))
    expected = TF.gaussian_blur(batch.float() / 255, [11, 11], [1.5, 1.5])
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
    widths = run(batch, blur=1.0, blur_sigma=(0.1, 3.0)).std((1, 2, 3))
    assert widths.max() > 2 * widths.min()


def test_blur_of_a_view_smaller_than_its_kernel() -> None:
    assert bool(run(views(4), blur=1.0, blur_sigma=(5.0, 5.0)).isfinite().all())


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_one_kind_of_jitter(name: str) -> None:
    """Each image equals torchvision's result for some factor of the allowed range; the factors cover it."""
    only: dict[str, Any] = dict.fromkeys(("brightness", "contrast", "saturation", "hue"), 0.0)
    reach = 0.1 if name == "hue" else 0.4
    batch = views(6)
    found = unflipped(batch, run(batch, jitter=1.0, **{**only, name: reach}))
    plain = batch.float() / 255
    factors = torch.linspace(-reach, reach, 161) + (0 if name == "hue" else 1)
    change = getattr(TF, f"adjust_{name}")
    options = torch.stack([change(plain, float(factor)) for factor in factors])
    errors = (options - found).abs().amax((2, 3, 4))
    best, which = errors.min(0)
    assert best.max() < 1.5e-2
    chosen = factors[which]
    assert chosen.min() < factors[0] + 0.2 * reach
    assert chosen.max() > factors[-1] - 0.2 * reach


def test_jitter_keeps_to_its_probability_and_range() -> None:
    batch = views()
    found = run(batch, jitter=0.5)
    plain = batch.float() / 255
    same = (unflipped(batch, found) - plain).abs().flatten(1).amax(1) < 1e-6
    assert 0.3 * COUNT < same.sum() < 0.7 * COUNT
    assert bool(((found >= 0) & (found <= 1)).all())


def test_the_two_global_views_are_treated_differently() -> None:
    """main_dino.py: blur 1.0, 0.1 and 0.5; solarisation of the second global view alone."""
    large = views(16).unflatten(0, (2, -1))
    small = views(16).unflatten(0, (2, -1))
    plain = settings(**OFF, blur=(1.0, 0.0, 0.0), blur_sigma=(2.0, 2.0), solarize=1.0)
    first, second = (part.std((1, 2, 3)) for part in augment(large, small, plain, 0, "x", 0)[0].chunk(2))
    assert first.max() < second.min()
    locals_ = augment(large, small, plain, 0, "x", 0)[1]
    found = unflipped(small.flatten(0, 1), locals_)
    assert torch.equal(found, small.flatten(0, 1).float() / 255)


def test_augmentation_follows_from_its_keys_alone() -> None:
    large, small = views().unflatten(0, (2, -1)), views(8).unflatten(0, (2, -1))
    torch.manual_seed(0)
    first = augment(large, small, settings(), 0, "learner", 3)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    again = augment(large, small, settings(), 0, "learner", 3)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, first, again))
    for other in ((1, "learner", 3), (0, "meta", 3), (0, "learner", 4)):
        assert not torch.equal(first[0], augment(large, small, settings(), *other)[0])


def test_the_input_is_not_written_to() -> None:
    batch = views()
    copy = batch.clone()
    run(batch, blur=1.0, solar=1.0, jitter=1.0, grayscale=0.5)
    assert torch.equal(batch, copy)


def test_in_memory_needs_one_size(tmp_path: Path) -> None:
    for name, width in (("a", 20), ("b", 22)):
        Image.new("RGB", (width, 20)).save(tmp_path / f"{name}.png")
    with pytest.raises(UserError, match=r"b\.png: \(20, 22\) pixels where .*a\.png has \(20, 20\)"):
        open_views(str(tmp_path), settings(), in_memory=True)
    assert len(open_views(str(tmp_path), settings())) == 2


@pytest.mark.parametrize("in_memory", [False, True])
def test_open_views_finds_nested_images(tmp_path: Path, in_memory: bool) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    Image.new("RGB", (20, 20)).save(tmp_path / "deep" / "er" / "a.png")
    Image.new("RGB", (20, 20)).save(tmp_path / "b.jpg")
    (tmp_path / "notes.txt").write_text("no image")
    assert len(open_views(str(tmp_path), settings(), in_memory)) == 2


# --- the backends of views.augment

UNCHANGED: dict[str, Tensor] = {
    "flip": torch.tensor([False]),
    "jitter": torch.tensor([False]),
    "grey": torch.tensor([False]),
    "blur": torch.tensor([False]),
    "solarize": torch.tensor([False]),
    "sigma": torch.tensor([1.0]),
}
FIXED: dict[str, dict[str, Any]] = {
    "nothing": {},
    "flip": {"flip": torch.tensor([True])},
    "brightness": {"jitter": torch.tensor([True]), "order": ("brightness",)},
    "contrast": {"jitter": torch.tensor([True]), "order": ("contrast",)},
    "saturation": {"jitter": torch.tensor([True]), "order": ("saturation",)},
    "hue": {"jitter": torch.tensor([True]), "order": ("hue",)},
    "grey": {"grey": torch.tensor([True])},
    "blur": {"blur": torch.tensor([True])},
    "solarize": {"solarize": torch.tensor([True])},
}
FACTORS = {"brightness": 1.3, "contrast": 0.7, "saturation": 1.15, "hue": -0.07}
PIXEL = 1e-3  # luma weights are given to three digits here, to four there


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled backend without its compiler, which takes minutes."""
    monkeypatch.setattr(module, "_compiled", module._ON_ALL.__getitem__)


def smooth(count: int, size: int = 24) -> Tensor:
    """float [count 3 s s] in [0, 1], with structure at several scales."""
    noise = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(4))
    return torch.nn.functional.interpolate(noise, size, mode="bilinear")


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("changes", FIXED.values(), ids=FIXED.keys())
def test_each_operation_is_torchvisions(backend: str, changes: dict[str, Any]) -> None:
    image = smooth(1)
    factors = {name: torch.tensor([value]) for name, value in FACTORS.items()}
    draws = Draws(**{**UNCHANGED, "order": (), "factors": factors, **changes})
    expected = image
    if draws.flip:
        expected = TF.hflip(expected)
    for name in draws.order:
        expected = getattr(TF, f"adjust_{name}")(expected, FACTORS[name])
    if draws.grey:
        expected = TF.rgb_to_grayscale(expected, 3)
    if draws.blur:
        expected = TF.gaussian_blur(expected, [7, 7], [1.0, 1.0])
    if draws.solarize:
        expected = TF.solarize(expected, 0.5)
    assert torch.equal(expected, image) == (not changes)  # each of them changes something
    found = BACKENDS[backend](image.clone(), draws, 7)
    torch.testing.assert_close(found, expected, atol=PIXEL, rtol=0)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "kornia"])
def test_backends_make_the_same_views(backend: str) -> None:
    """Of the same draws, all operations on: solarisation of what lies at its threshold may go either way."""
    batch = (smooth(COUNT) * 255).to(torch.uint8)
    each = torch.full((COUNT,), 0.5)
    made = [
        photometric(batch, each, each, settings(augment=name), torch.Generator().manual_seed(6))
        for name in ("kornia", backend)
    ]
    apart = (made[0] - made[1]).abs()
    assert (apart > 2 * PIXEL).float().mean() < 1e-3
    assert (made[0] - batch / 255).abs().mean() > 0.05


@pytest.mark.slow
def test_the_compiled_backend_compiles() -> None:
    batch = (smooth(8) * 255).to(torch.uint8)
    each = torch.full((8,), 0.5)
    made = [
        photometric(batch, each, each, settings(augment=name), torch.Generator().manual_seed(6))
        for name in ("kornia", "kornia_compiled")
    ]
    torch.testing.assert_close(made[1], made[0], atol=1e-5, rtol=0)


def published(count: int) -> dict[str, Tensor]:
    """`count` draws of main_dino.py's augmentation by torchvision's own classes."""
    torch.manual_seed(0)
    defaults = ViewsConfig()
    jitter = v2.ColorJitter(defaults.brightness, defaults.contrast, defaults.saturation, defaults.hue)
    blur = v2.GaussianBlur(13, defaults.blur_sigma)
    drawn = [jitter.make_params([]) for _ in range(count)]
    return {
        "brightness": torch.tensor([one["brightness_factor"] for one in drawn]),
        "contrast": torch.tensor([one["contrast_factor"] for one in drawn]),
        "saturation": torch.tensor([one["saturation_factor"] for one in drawn]),
        "hue": torch.tensor([one["hue_factor"] for one in drawn]),
        "sigma": torch.tensor([blur.make_params([])["sigma"][0] for _ in range(count)]),
    }


def test_draws_are_distributed_as_torchvisions() -> None:
    """As for the boxes: 0.045 is exceeded once in 1,500."""
    count = 4000
    zeros = torch.zeros(count)
    found = draw(zeros, zeros, settings(), torch.Generator().manual_seed(0))
    mine = {**found.factors, "sigma": found.sigma}
    for name, expected in published(count).items():
        assert ks_2samp(mine[name].numpy(), expected.numpy()).statistic < 0.045, name


def test_draws_happen_as_often_as_published() -> None:
    """main_dino.py's probabilities, by row; an interval that holds 999 times in 1,000."""
    count = 2000
    blur = torch.tensor([1.0, 0.1, 0.5]).repeat_interleave(count)
    solar = torch.tensor([0.0, 0.2, 0.0]).repeat_interleave(count)
    found = draw(blur, solar, settings(), torch.Generator().manual_seed(0))
    assert bool(found.blur[:count].all())
    assert not bool(found.solarize.unflatten(0, (3, count))[::2].any())
    shares = {
        0.5: [found.flip, found.blur[2 * count :]],
        0.8: [found.jitter],
        0.2: [found.grey, found.solarize[count : 2 * count]],
        0.1: [found.blur[count : 2 * count]],
    }
    for share, draws in shares.items():
        for happened in draws:
            assert binomtest(int(happened.sum()), len(happened), share).pvalue > 1e-3, share


def test_draws_are_independent_of_each_other() -> None:
    count = 4000
    half = torch.full((count,), 0.5)
    found = draw(half, half, settings(), torch.Generator().manual_seed(0))
    columns = [found.flip, found.jitter, found.grey, found.blur, found.solarize, found.sigma, *found.factors.values()]
    correlations = torch.corrcoef(torch.stack([column.double() for column in columns]))
    assert (correlations - torch.eye(len(columns))).abs().max() < 0.065  # four standard deviations


def test_every_order_of_the_jitter_is_as_likely() -> None:
    one = torch.zeros(1)
    drawn = [draw(one, one, settings(jitter=1.0), torch.Generator().manual_seed(seed)).order for seed in range(2400)]
    counts = np.unique([" ".join(order) for order in drawn], return_counts=True)[1]
    assert len(counts) == 24
    assert counts.min() > 60
    assert counts.max() < 145


@both
def test_torchvision_augments_where_it_cuts(pictures: list[Path], kind: str) -> None:
    """The views come with the batch; `augment` leaves them as they are, and they are those of the device's backend."""
    ours = sources(pictures, augment="torchvision")[kind]
    large, small = ours.batch([0, 2], key=5)
    assert (large.dtype, large.shape, small.shape) == (torch.uint8, (2, 2, 3, 16, 16), (3, 2, 3, 8, 8))
    views = augment(large, small, ours.settings, 0, "learner", 0)
    assert torch.equal(views[0], large.flatten(0, 1).float() / 255)
    crops = sources(pictures)[kind].batch([0, 2], key=5)
    expected = augment(*crops, settings(), 5)
    for found, wanted in zip(views, expected, strict=True):
        assert ((found - wanted).abs() > 0.5 / 255 + 2 * PIXEL).float().mean() < 1e-2
    assert not torch.equal(large, crops[0])


@both
def test_torchvisions_views_follow_from_the_step(pictures: list[Path], kind: str) -> None:
    """Resumed at any step, by any process, whatever was drawn before; and another stream draws others."""
    source = sources(pictures, augment="torchvision")[kind]
    whole = list(Stream(source, 2, 0, "unlabeled").iterate(0, 4))
    torch.manual_seed(1)
    for resumed, expected in zip(Stream(source, 2, 0, "unlabeled").iterate(2, 4), whole[2:], strict=True):
        assert all(map(torch.equal, resumed, expected))
    assert not torch.equal(whole[0][0], Stream(source, 2, 0, "meta").batch(0)[0])
    assert not torch.equal(whole[0][0], Stream(source, 2, 1, "unlabeled").batch(0)[0])


def test_torchvision_without_local_views(pictures: list[Path]) -> None:
    source = sources(pictures, augment="torchvision")["memory"]
    source.settings.local_count = 0
    large, small = source.batch([2, 0], key=5)
    assert [group.shape for group in augment(large, small, source.settings, 0)] == [(4, 3, 16, 16), (0, 3, 8, 8)]
