"""examples/cub/data.py: the official folder is read right, and every damage to it is named."""

import os
import re
import warnings
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from data import (
    Image,
    ImageDataset,
    family,
    load_image,
    read_boxes,
    read_cub,
    read_parts,
    test_transform,
    train_transform,
)
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from torch.utils.data import DataLoader

# Ids neither contiguous nor sorted; class ids sort as numbers (3 < 20), not as text; a file name has a space.
LISTS = {
    "images.txt": "30 003.Sooty_Albatross/b.jpg\n2 003.Sooty_Albatross/a.jpg\n7 020.Great_Auk/Auk 2.jpg\n"
    "4 020.Great_Auk/Auk_1.jpg\n",
    "image_class_labels.txt": "2 3\n7 20\n4 20\n30 3\n",
    "train_test_split.txt": "30 1\n4 0\n2 0\n7 1\n",
    "classes.txt": "20 020.Great_Auk\n3 003.Sooty_Albatross\n",
    "bounding_boxes.txt": "4 1.0 2.0 3.5 4.0\n2 10.0 0.0 5.0 6.0\n7 0.0 0.0 9.0 9.0\n30 1.0 1.0 2.0 2.0\n",
    "parts/parts.txt": "2 left leg\n1 back\n",
    "parts/part_locs.txt": "2 1 5.5 6.0 1\n2 2 1.0 2.0 0\n4 1 0.0 0.0 0\n4 2 0.0 0.0 0\n"
    "7 2 3.0 4.0 1\n7 1 1.0 2.0 1\n30 1 8.0 9.0 1\n30 2 0.0 0.0 0\n",
}
PATHS = {line.split(" ", 1)[0]: line.split(" ", 1)[1] for line in LISTS["images.txt"].splitlines()}


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


@pytest.fixture
def cub(tmp_path: Path) -> Path:
    """A folder in the official format: two classes with two images each."""
    root = tmp_path / "CUB_200_2011"
    (root / "parts").mkdir(parents=True)
    for name, text in LISTS.items():
        (root / name).write_text(text)
    for seed, name in enumerate(PATHS.values()):
        (root / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(noise(20 + seed, 30, 3, seed=seed)).save(root / "images" / name)
    return root


def read_all(root: Path) -> None:
    for read in (read_cub, read_boxes, read_parts):
        read(root)


@pytest.mark.parametrize("at", ["folder", "parent", "text", "relative"])
def test_read_cub(cub: Path, at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(cub)
    given = {"folder": cub, "parent": cub.parent, "text": str(cub), "relative": Path(".")}[at]
    images = (Path("images") if at == "relative" else cub / "images").joinpath
    dataset = read_cub(given)
    assert dataset.name == "CUB-200-2011"
    assert dataset.classes == ["003.Sooty_Albatross", "020.Great_Auk"]
    assert dataset.train == [(images(PATHS["7"]), 1, 7), (images(PATHS["30"]), 0, 30)]
    assert dataset.test == [(images(PATHS["2"]), 0, 2), (images(PATHS["4"]), 1, 4)]
    assert all(image.path.is_file() for image in dataset.train + dataset.test)


def test_read_boxes_and_parts(cub: Path) -> None:
    assert read_boxes(cub.parent) == {4: (1, 2, 3.5, 4), 2: (10, 0, 5, 6), 7: (0, 0, 9, 9), 30: (1, 1, 2, 2)}
    names, visible = read_parts(cub)
    assert names == ["back", "left leg"]
    assert visible == {2: {"back": (5.5, 6)}, 4: {}, 7: {"back": (1, 2), "left leg": (3, 4)}, 30: {"back": (8, 9)}}


def test_lists_from_other_systems(cub: Path) -> None:
    expected = read_cub(cub)
    for name in LISTS:  # byte order mark, Windows' line ends, blank lines at the end, spaces around
        text = LISTS[name].replace("\n", " \n") + "\n\n"
        (cub / name).write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert read_cub(cub) == expected
    read_all(cub)


def test_file_name_that_is_not_utf8(cub: Path) -> None:
    name = os.fsdecode(b"003.Sooty_Albatross/\xe9.jpg")
    try:
        (cub / "images" / PATHS["2"]).rename(cub / "images" / name)
    except OSError:
        pytest.skip("this file system takes no such names")
    (cub / "images.txt").write_bytes(LISTS["images.txt"].encode().replace(b"s/a.jpg", b"s/\xe9.jpg"))
    assert read_cub(cub).test[0].path == cub / "images" / name


def test_class_folder_may_be_a_link(cub: Path) -> None:
    (cub / "images/020.Great_Auk").rename(cub / "elsewhere")
    (cub / "images/020.Great_Auk").symlink_to(cub / "elsewhere")
    assert len(read_cub(cub).train) == 2


@pytest.mark.parametrize("name", LISTS)
def test_missing_list(cub: Path, name: str) -> None:
    (cub / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"CUB_200_2011 has no {name}; expected .*vision\.caltech\.edu"):
        read_all(cub)


def test_missing_root(tmp_path: Path) -> None:
    for read in (read_cub, read_boxes, read_parts):
        with pytest.raises(FileNotFoundError, match=r"nowhere is no folder; expected .*vision\.caltech\.edu"):
            read(tmp_path / "nowhere")
        with pytest.raises(FileNotFoundError, match=r"has no images\.txt, .* with images\.txt, .*vision\.caltech\.edu"):
            read(tmp_path)


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("text", ["", "\n \n"])
def test_empty_list(cub: Path, name: str, text: str) -> None:
    (cub / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{name} is empty, expected lines '<.* anew"):
        read_all(cub)


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        # Columns.
        (
            "images.txt",
            "4 020.Great_Auk/Auk_1.jpg",
            "4",
            "images.txt, line 4, '4': 1 of 2 columns; expected '<image_id>",
        ),
        ("images.txt", "30 003", "x 003", "images.txt, line 1, 'x 003.Sooty_Albatross/b.jpg': invalid literal"),
        ("image_class_labels.txt", "7 20", "7 20 1", "image_class_labels.txt, line 2, '7 20 1': invalid literal"),
        ("image_class_labels.txt", "7 20", "7 Auk", "image_class_labels.txt, line 2, '7 Auk': invalid literal"),
        ("classes.txt", "3 003.Sooty_Albatross", "3", "classes.txt, line 2, '3': 1 of 2 columns"),
        ("bounding_boxes.txt", "5.0 6.0", "5.0", "bounding_boxes.txt, line 2, '2 10.0 0.0 5.0': 4 of 5 columns"),
        ("bounding_boxes.txt", "5.0 6.0", "5.0 6.0 7.0", "bounding_boxes.txt, line 2, '2 10.0 0.0 5.0 6.0 7.0': could"),
        (
            "bounding_boxes.txt",
            "3.5",
            "wide",
            "line 1, '4 1.0 2.0 wide 4.0': could not convert string to float: 'wide'",
        ),
        ("parts/parts.txt", "1 back", "back", "parts.txt, line 2, 'back': 1 of 2 columns; expected '<part_id>"),
        ("parts/part_locs.txt", "2 1 5.5 6.0 1", "2 1 5.5 6.0", "part_locs.txt, line 1, '2 1 5.5 6.0': 4 of 5 columns"),
        # Values.
        ("train_test_split.txt", "4 0", "4 2", "train_test_split.txt, line 2, '4 2': must be 0 or 1, not '2'"),
        ("train_test_split.txt", "4 0", "4 01", "train_test_split.txt, line 2, '4 01': must be 0 or 1, not '01'"),
        (
            "parts/part_locs.txt",
            "8.0 9.0 1",
            "8.0 9.0 yes",
            "must be 0 or 1, not 'yes'; expected '<image_id> <part_id>",
        ),
        ("images.txt", "003.Sooty_Albatross/a", "../a", "images.txt, line 2, '2 ../a.jpg': the path leaves images/"),
        (
            "images.txt",
            "Sooty_Albatross/a",
            "Sooty/../../../a",
            "line 2, '2 003.Sooty/../../../a.jpg': the path leaves",
        ),
        ("images.txt", "003.Sooty_Albatross/a", "/tmp/a", "line 2, '2 /tmp/a.jpg': the path leaves images/"),
        ("images.txt", "003.Sooty_Albatross/a", "..\\a", "line 2, '2 ..\\\\a.jpg': the path leaves images/"),
        ("images.txt", "003.Sooty_Albatross/a", "C:\\a", "line 2, '2 C:\\\\a.jpg': the path leaves images/"),
        # Ids twice.
        (
            "images.txt",
            "30 003",
            "7 003",
            "images.txt, line 3, '7 020.Great_Auk/Auk 2.jpg': id 7 was in an earlier line",
        ),
        ("image_class_labels.txt", "30 3", "7 3", "image_class_labels.txt, line 4, '7 3': id 7 was"),
        ("train_test_split.txt", "2 0", "30 0", "train_test_split.txt, line 3, '30 0': id 30 was"),
        ("classes.txt", "3 003", "20 003", "classes.txt, line 2, '20 003.Sooty_Albatross': id 20 was"),
        ("bounding_boxes.txt", "30 1.0", "2 1.0", "bounding_boxes.txt, line 4, '2 1.0 1.0 2.0 2.0': id 2 was"),
        ("parts/parts.txt", "1 back", "2 back", "parts.txt, line 2, '2 back': id 2 was"),
        ("parts/part_locs.txt", "2 2 1.0", "2 1 1.0", "part_locs.txt, line 2, '2 1 1.0 2.0 0': id (2, 1) was"),
        # Ids in one list only.
        (
            "image_class_labels.txt",
            "7 20\n4 20\n",
            "",
            "2 image ids (4, 7) of {}/images.txt not in {}/image_class_labels",
        ),
        (
            "image_class_labels.txt",
            "7 20",
            "7 20\n8 20",
            "1 image id (8) of {}/image_class_labels.txt not in {}/images",
        ),
        ("train_test_split.txt", "4 0\n", "", "1 image id (4) of {}/images.txt not in {}/train_test_split.txt"),
        ("train_test_split.txt", "4 0", "4 0\n5 0", "1 image id (5) of {}/train_test_split.txt not in {}/images.txt"),
        (
            "images.txt",
            "4 020.Great_Auk/Auk_1.jpg\n",
            "",
            "1 image id (4) of {}/image_class_labels.txt not in {}/images",
        ),
        (
            "bounding_boxes.txt",
            "4 1.0 2.0 3.5 4.0\n",
            "",
            "1 image id (4) of {}/images.txt not in {}/bounding_boxes.txt",
        ),
        ("bounding_boxes.txt", "4 1.0", "40 1.0", "1 image id (4) of {}/images.txt not in {}/bounding_boxes.txt"),
        (
            "parts/part_locs.txt",
            "4 1 0.0 0.0 0\n4 2 0.0 0.0 0\n",
            "",
            "1 image id (4) of {}/images.txt not in {}/parts",
        ),
        (
            "parts/part_locs.txt",
            "7 2 3.0",
            "7 5 3.0",
            "1 part id (5) of {}/parts/part_locs.txt not in {}/parts/parts.txt",
        ),
        (
            "image_class_labels.txt",
            "7 20",
            "7 21",
            "1 class id (21) of {}/image_class_labels.txt not in {}/classes.txt",
        ),
        (
            "classes.txt",
            "3 003",
            "3 003.Auk\n9 003",
            "1 class id (9) of {}/classes.txt not in {}/image_class_labels.txt",
        ),
        # Classes and files.
        ("train_test_split.txt", "7 1", "7 0", "{}/train_test_split.txt has no training images for 1 class id (20)"),
        (
            "images.txt",
            "s/a.jpg",
            "s/c.jpg",
            "{}/images lacks 1 image (003.Sooty_Albatross/c.jpg) of the 4 in {}/images",
        ),
        (
            "images.txt",
            "s/a.jpg",
            "s/A.jpg",
            "{}/images lacks 1 image (003.Sooty_Albatross/A.jpg) of the 4 in {}/images",
        ),
        ("images.txt", "Sooty_Albatross/a", "sooty_albatross/a", "{}/images lacks 1 image (003.sooty_albatross/a.jpg)"),
        ("images.txt", "020.Great_Auk/", "021/", "{}/images lacks 2 images (021/Auk 2.jpg, 021/Auk_1.jpg) of the 4"),
    ],
)
def test_damaged_list(cub: Path, name: str, old: str, new: str, message: str) -> None:
    assert old in LISTS[name]
    (cub / name).write_text(LISTS[name].replace(old, new))
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message.replace("{}", str(cub)))):
        read_all(cub)


def test_missing_images_folder_shows_the_first_few(cub: Path) -> None:
    more = range(100, 110)
    (cub / "images.txt").write_text("".join(f"{i} {i}/x.jpg\n" for i in more))
    (cub / "image_class_labels.txt").write_text("".join(f"{i} 3\n" for i in more))
    (cub / "train_test_split.txt").write_text("".join(f"{i} 1\n" for i in more))
    (cub / "classes.txt").write_text("3 003.Sooty_Albatross\n")
    (cub / "images").rename(cub / "pictures")
    shown = "lacks 10 images (100/x.jpg, 101/x.jpg, 102/x.jpg, 103/x.jpg, 104/x.jpg, ...) of the 10 in"
    with pytest.raises(FileNotFoundError, match=re.escape(shown)):
        read_cub(cub)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("001.Black_footed_Albatross", "Albatross"),
        ("105.Whip_poor_Will", "Will"),
        ("091.Mockingbird", "Mockingbird"),
        ("Sparrow", "Sparrow"),
    ],
)
def test_family(name: str, expected: str) -> None:
    assert family(name) == expected


RAMP = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (64, 1))  # dark to bright, from left to right


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "P", "RGBA", "LA", "1", "I;16"])
def test_load_image_converts_to_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("x.jpg" if mode in ("RGB", "L", "CMYK") else "x.png")
    grey = PIL.Image.fromarray(RAMP)
    if mode == "I;16":
        PIL.Image.fromarray(RAMP.astype(np.uint16) * 257).save(path)
    elif mode == "P":
        grey.convert("P").save(path, transparency=bytes(range(256)))
    elif mode == "CMYK":
        grey.convert("RGB").convert("CMYK").save(path, quality=100)
    else:
        grey.convert(mode).save(path)
    with PIL.Image.open(path) as written:
        assert written.mode == mode
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = load_image(path)
    assert image.mode == "RGB"
    pixels = np.asarray(image).astype(int)
    expected = pixels[..., :1] if mode == "1" else RAMP[..., None]
    assert abs(pixels - expected).max() <= 3
    assert pixels[:, :8].mean() < 20
    assert pixels[:, -8:].mean() > 200


def test_load_image_turns_as_exif_says(tmp_path: Path) -> None:
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, :16, 0] = 255  # red on the left
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise by a quarter, which puts the left on top
    PIL.Image.fromarray(pixels).save(tmp_path / "x.jpg", exif=exif)
    image = np.asarray(load_image(tmp_path / "x.jpg"))
    assert image.shape == (32, 16, 3)
    assert image[:14, :, 0].min() > 200
    assert image[18:, :, 0].max() < 50


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: data[: len(data) // 2], "truncated"),
        (lambda data: data[:100], "cannot be decoded"),
        (lambda data: b"", r"\(0 bytes\) is no image"),
        (lambda data: b"Not found\n", r"\(10 bytes\) is no image"),
        (lambda data: bytes(len(data)), "is no image"),
    ],
)
@pytest.mark.parametrize("name", ["x.jpg", "x.png"])
def test_load_image_refuses_broken_files(tmp_path: Path, name: str, damage, reason: str) -> None:
    path = tmp_path / name
    PIL.Image.fromarray(noise(64, 64, 3)).save(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))} .*{reason}.*replace the file"):
        load_image(path)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        ImageDataset([Image(path, 0, 1)], lambda image: image)[0]


def test_load_image_refuses_what_has_no_white(tmp_path: Path) -> None:
    PIL.Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "x.tiff")
    with pytest.raises(ValueError, match=r"x\.tiff .*mode F, 0\.5 to 0\.5, does not say what is white"):
        load_image(tmp_path / "x.tiff")


def test_load_image_names_missing_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jpg"):
        load_image(tmp_path / "nowhere.jpg")


def test_dataset(cub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = read_cub(cub).train + read_cub(cub).test
    loads: list[Path] = []
    monkeypatch.setattr("data.load_image", lambda path: loads.append(path) or load_image(path))
    transform = test_transform(24, 16)
    plain = ImageDataset(images, transform)
    assert len(plain) == 4
    assert plain.labels == [image.label for image in images] == [1, 0, 0, 1]
    first = list(map(plain.__getitem__, range(4)))
    for settings in ({"resize": 24}, {"cache": True}, {"resize": 24, "cache": True}):
        loads.clear()
        dataset = ImageDataset(images, transform, **settings)
        assert loads == []
        for _ in range(2):
            for index, (picture, label, own_index) in enumerate(map(dataset.__getitem__, range(4))):
                assert torch.equal(picture, first[index][0])
                assert (label, own_index) == (images[index].label, index) == first[index][1:]
        assert loads == [image.path for image in images] * (1 if "cache" in settings else 2)
        sizes = [picture.size for picture in dataset._pictures.values()]
        expected = [(24, 24)] * 4 if "resize" in settings else [load_image(image.path).size for image in images]
        assert sizes == (expected if "cache" in settings else [])


@pytest.mark.parametrize("cache", [False, True])
def test_dataset_in_a_loader_with_workers(cub: Path, cache: bool) -> None:
    images = read_cub(cub).train + read_cub(cub).test
    dataset = ImageDataset(images, test_transform(24, 16), resize=24, cache=cache)
    loader = DataLoader(dataset, batch_size=3, num_workers=2, persistent_workers=True)
    for _ in range(2):
        pictures, labels, indices = map(torch.cat, zip(*loader, strict=True))
        assert labels.tolist() == dataset.labels
        assert indices.tolist() == [0, 1, 2, 3]
        assert torch.equal(pictures, torch.stack([dataset[index][0] for index in range(4)]))


def test_broken_image_comes_out_of_a_worker(cub: Path) -> None:
    images = read_cub(cub).train
    images[1].path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"b\.jpg \(0 bytes\) is no image"):
        list(DataLoader(ImageDataset(images, test_transform(24, 16)), num_workers=1))


def test_test_transform_is_timms() -> None:
    picture = PIL.Image.fromarray(noise(50, 90, 3))
    theirs = create_transform(
        112, is_training=False, crop_mode="squash", crop_pct=112 / 128, interpolation="bilinear"
    )  # fmt: skip
    assert torch.equal(test_transform(128, 112)(picture), theirs(picture))


def test_train_transform() -> None:
    """What comes out is a crop of the squashed picture, mirrored or not; all of both come up."""
    picture = PIL.Image.fromarray(noise(50, 90, 3))
    whole = test_transform(8, 8)(picture)
    crops = {}
    for top in range(3):
        for left in range(3):
            crop = whole[:, top : top + 6, left : left + 6]
            crops |= {crop.numpy().tobytes(): (top, left, False), crop.flip(2).numpy().tobytes(): (top, left, True)}
    transform = train_transform(8, 6)
    torch.manual_seed(0)
    seen = {crops[transform(picture).contiguous().numpy().tobytes()] for _ in range(300)}
    assert len(seen) == len(crops) == 18


@pytest.mark.parametrize("transform", [train_transform, test_transform])
def test_transforms_normalise(transform) -> None:
    picture = PIL.Image.new("RGB", (10, 10), (255, 0, 51))
    values = torch.tensor([1, 0, 0.2])
    mean, std = torch.tensor(IMAGENET_DEFAULT_MEAN), torch.tensor(IMAGENET_DEFAULT_STD)
    torch.testing.assert_close(transform(8, 6)(picture)[:, 3, 3], (values - mean) / std)
    own = transform(8, 6, mean=(0.5, 0.5, 0.5), std=(2, 2, 2))
    torch.testing.assert_close(own(picture)[:, 3, 3], (values - 0.5) / 2)
    for resize, crop in ((8, 9), (8, 0)):
        with pytest.raises(ValueError, match=f"crop={crop} and resize=8"):
            transform(resize, crop)
