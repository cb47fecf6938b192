"""workbench/images.py: images decoded, never replaced, and handed to a DataLoader."""

import PIL.Image
import pytest
import torch
from dataset_folders import noise, write
from timm.data import create_transform

from workbench.datasets.bird_lists import read_cub
from workbench.image_files import load_image
from workbench.images import ImageDataset, eval_transform, train_transform, unnormalized

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


@pytest.mark.parametrize("settings", [{}, {"resize": 24}, {"cache": True}, {"resize": 24, "cache": True}])
def test_resized_and_cached_images_are_the_same_and_cached_ones_are_loaded_once(tmp_path, monkeypatch, settings):
    data, loads = read_cub(write("cub", tmp_path)), []
    images = data.train + data.test
    monkeypatch.setattr("workbench.images.load_image", lambda path: loads.append(path) or load_image(path))
    transform = eval_transform({"squash": 24, "crop": 16, **IMAGENET})
    dataset = ImageDataset(images, transform, **settings)
    assert len(dataset) == 4
    assert dataset.labels == [1, 0, 0, 1]
    for _ in range(2):
        for index, image in enumerate(images):
            picture, *rest = dataset[index]
            assert torch.equal(picture, transform(load_image(image.path)))
            assert rest == [image.label, index]
    cached = "cache" in settings
    assert loads == [image.path for image in images] * (1 if cached else 2)
    size = (24, 24) if "resize" in settings else load_image(images[0].path).size
    assert [picture.size for picture in dataset._pictures.values()] == ([size] * 4 if cached else [])


def test_transform_for_testing_is_timms_and_its_normalisation_can_be_undone():
    picture = PIL.Image.fromarray(noise(50, 90, 3))
    arguments = {"input_size": [3, 112, 112], "interpolation": "bilinear", "crop_pct": 112 / 128, **IMAGENET}
    theirs = create_transform(**arguments, is_training=False, crop_mode="squash")
    pixels = eval_transform({"squash": 128, "crop": 112, **IMAGENET})(picture)
    assert torch.equal(pixels, theirs(picture))
    raw = eval_transform({"squash": 128, "crop": 112, "mean": [0] * 3, "std": [1] * 3})(picture)
    torch.testing.assert_close(unnormalized(pixels, IMAGENET), raw)


def test_train_transform():
    """What comes out is a crop of the squashed picture, mirrored or not; all of both come up."""
    picture = PIL.Image.fromarray(noise(50, 90, 3))
    whole = eval_transform({"squash": 8, "crop": 8, **IMAGENET})(picture)
    crops = {}
    for top in range(3):
        for left in range(3):
            crop = whole[:, top : top + 6, left : left + 6]
            crops |= {crop.numpy().tobytes(): (top, left, False), crop.flip(2).numpy().tobytes(): (top, left, True)}
    transform = train_transform({"squash": 8, "crop": 6, **IMAGENET})
    torch.manual_seed(0)
    seen = {crops[transform(picture).contiguous().numpy().tobytes()] for _ in range(300)}
    assert len(seen) == len(crops) == 18


@pytest.mark.parametrize("transform", [train_transform, eval_transform])
@pytest.mark.parametrize("crop", [9, 0])
def test_crop_must_fit(transform, crop):
    with pytest.raises(ValueError, match=f"crop={crop} and squash=8"):
        transform({"squash": 8, "crop": crop, **IMAGENET})
