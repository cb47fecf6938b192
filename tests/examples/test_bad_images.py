"""Bad images: the opener refuses them, check_images.py lists them, training stops with the path or leaves them out."""

import io
import os
import re
import shutil
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from commands import ROOT, finish
from cub_runs import TINY, rows
from dataset_folders import noise

import check_images
import score
import train_cub
from workbench import images, shown
from workbench.datasets import READERS, bad_images
from workbench.datasets.bad_images import read_list, why_bad
from workbench.image_files import BadImageError, load_image

# One batch has every training image, so that the first step meets a bad one.
FLAGS = [*TINY, "--n-classes", "6", "--n-samples", "3", "--epochs", "1"]

PIXELS = noise(40, 48, 3)
PHOTO, GREY = PIL.Image.fromarray(PIXELS), PIL.Image.fromarray(PIXELS[..., 0])
FROM_GREY = PIXELS[..., [0, 0, 0]]
GREY16 = PIL.Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257)
PALETTE = PHOTO.convert("P", palette=PIL.Image.Palette.ADAPTIVE)
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\nshowpage\n%%EOF\n"


def saved(kind, image=PHOTO, share=1, **settings):
    """An image in a format, under whatever name: the content decides. Of the file, a share from its beginning."""
    image.save(data := io.BytesIO(), kind, **settings)
    return data.getvalue()[: int(share * data.tell())]


def exif(orientation):
    tags = PIL.Image.Exif()
    tags[0x0112] = orientation
    return tags


def damage(path, kind):
    """Have one of BAD in the place of an image."""
    path.unlink()
    what, _ = BAD[kind]
    if isinstance(what, bytes):
        path.write_bytes(what)
    else:
        what(path)


# By EXIF's orientation, turned and mirrored as the standard words it, by where row 0 and column 0 are to be shown.
TURNED = PIXELS.transpose(1, 0, 2)
UPRIGHT = {2: PIXELS[:, ::-1], 3: PIXELS[::-1, ::-1], 4: PIXELS[::-1]}
UPRIGHT |= {5: TURNED, 6: TURNED[:, ::-1], 7: TURNED[::-1, ::-1], 8: TURNED[::-1]}
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP")
# {kind: (its bytes, or what makes it, and a part of the reason)}
BAD = {
    **{f"truncated {kind}": (saved(kind, share=0.5), "cannot be decoded") for kind in FORMATS},
    "JPEG without its last bytes": (saved("JPEG", share=0.98), "cannot be decoded: image file is truncated"),
    "zero bytes": (b"", "(0 bytes) is not an image"),
    "text": (b"404 Not found\n", "(14 bytes) is not an image"),
    "a program for Ghostscript": (EPS, "is not an image in a supported format"),
    "1 pixel wide": (saved("PNG", PIL.Image.new("RGB", (1, 50))), "is 1 x 50 pixels: a placeholder"),
    # Headers of PGM, which tell of more pixels than there are.
    "as large as may be": (b"P5 16384 4096 255\n", "cannot be decoded: image file is truncated"),
    "too many pixels": (b"P5 16384 4097 255\n", "is 16384 x 4097 pixels, the limits are 16384 a side"),
    "too wide": (b"P5 16385 2 255\n", "is 16385 x 2 pixels, the limits are"),
    "too high": (b"P5 2 16385 255\n", "is 2 x 16385 pixels, the limits are"),
    "so large that Pillow warns": (b"P5 12000 12000 255\n", "is 12000 x 12000 pixels, the limits are"),
    "so large that Pillow refuses": (b"P5 20000 20000 255\n", "decompression bomb"),
    "32-bit grey": (saved("TIFF", GREY.convert("I")), "has no defined white level"),
    "floating point": (saved("TIFF", GREY.convert("F")), "has no defined white level"),
    "missing": (lambda path: None, "cannot be read: No such file"),
    "link to itself": (lambda path: path.symlink_to(path.name), "cannot be read: Too many levels of symbolic links"),
    "folder": (Path.mkdir, "is not a regular file"),
    "pipe": (os.mkfifo, "is not a regular file"),
    "unreadable": (partial(Path.touch, mode=0), "cannot be read: Permission denied"),
}
# {kind: (its bytes, the picture that is to come out)}
GOOD = {
    "PNG": (saved("PNG"), PIXELS),
    "grey": (saved("PNG", GREY), FROM_GREY),
    "16-bit grey PNG": (saved("PNG", GREY16), FROM_GREY),
    "16-bit grey TIFF": (saved("TIFF", GREY16), FROM_GREY),
    "a transparent colour": (saved("PNG", PALETTE, transparency=7), np.asarray(PALETTE.convert("RGB"))),
    "half-transparent": (saved("PNG", PALETTE, transparency=bytes(range(256))), np.asarray(PALETTE.convert("RGB"))),
    "transparent": (saved("PNG", PIL.Image.fromarray(np.dstack([PIXELS, PIXELS[..., 0]]))), PIXELS),
    # By formula: 255 less the ink, times the share not black.
    "CMYK": (saved("TIFF", PIL.Image.new("CMYK", (48, 40), (255, 0, 0, 51))), np.uint8([[[0, 204, 204]] * 48] * 40)),
    **{f"EXIF {number}": (saved("PNG", exif=exif(number)), pixels) for number, pixels in UPRIGHT.items()},
}


@pytest.fixture
def folder(birds, tmp_path):
    """Six classes with three images for training and three for testing each, to damage."""
    return shutil.copytree(birds, tmp_path / "birds")


def run(folder, *flags):
    return train_cub.main([*FLAGS, "--data", str(folder), "--output", str(folder.parent / "run"), *flags])


@pytest.mark.parametrize("kind", BAD)
def test_bad_file_is_refused_with_path_and_reason(kind, tmp_path):
    path = tmp_path / "x.jpg"
    PHOTO.save(path)
    damage(path, kind)
    if kind == "unreadable" and os.access(path, os.R_OK):
        pytest.skip("this user, root perhaps, reads every file")
    with pytest.raises(BadImageError) as caught:
        load_image(path)
    assert BAD[kind][1] in str(caught.value)
    assert str(caught.value) == f"{path} {why_bad(path)}; replace the file"


@pytest.mark.parametrize("kind", GOOD)
def test_odd_file_is_taken_for_what_it_shows(kind, tmp_path):
    content, expected = GOOD[kind]
    (tmp_path / "x.jpg").write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = load_image(tmp_path / "x.jpg")
    assert image.mode == "RGB"
    assert np.array_equal(image, expected)
    assert why_bad(tmp_path / "x.jpg") is None


def name_in_bytes(folder, path):
    """The image, called what is not UTF-8, in the list too."""
    listing, name = folder / "images.txt", b"\xe9-" + os.fsencode(path.name)
    listing.write_bytes(listing.read_bytes().replace(os.fsencode(f"/{path.name}"), b"/" + name))
    return path.rename(path.with_name(os.fsdecode(name)))


@pytest.mark.parametrize("kind", ["missing", "text", "truncated JPEG", "pipe", "zero bytes"])
def test_training_and_testing_stop_with_the_path_or_leave_it_out(kind, folder, capsys, monkeypatch):
    assert images.load_image is bad_images.load_image is load_image  # so all of BAD is judged alike
    monkeypatch.chdir(folder.parent)
    data = READERS["cub"](folder)
    good, path, tested = data.train[0].path, data.train[4].path, data.test[7].path
    if kind == "zero bytes":
        try:
            good, path = (name_in_bytes(folder, each) for each in (good, path))
        except OSError:
            pytest.skip("this file system takes no such names")
    damage(path, kind)
    reason = why_bad(path)
    with pytest.raises(SystemExit) as caught:
        run(folder)
    # The reader sees at once that one is missing.
    assert (path.name if kind == "missing" else f"bad image: {path} {reason}") in str(caught.value)
    assert check_images.main([str(folder), "--workers", "0"]) == [(path, reason)]
    said = f"{path}: {reason}\n36 images of CUB-200-2011, 1 bad; the list is bad_images.txt\n"
    assert capsys.readouterr().out.endswith(shown(said))
    assert Path("bad_images.txt").read_bytes() == os.fsencode(f"{os.path.relpath(path, folder)}\t{reason}\n")
    shutil.rmtree("run", ignore_errors=True)
    result = run(folder, "--skip-bad")
    out = capsys.readouterr().out
    assert "1 bad images left out: 1 of training, 0 of testing (bad_images.txt)" in out
    assert "17 training and 18 test images" in out
    assert (result["left_out"], rows(folder.parent / "run")[0]["left_out"]) == (1, "1")
    tested.write_bytes(b"")
    message = rf"^\nbad image: {tested} \(0 bytes\) is not an image .*; replace the file\.\ncheck"
    with pytest.raises(SystemExit, match=message):
        score.main(["run/last", "--device", "cpu"])


def test_process_with_workers_ends_at_a_bad_image(folder, tmp_path):
    """Its workers, which ignore SIGTERM, must not keep it from ending."""
    bad = READERS["cub"](folder).train[3].path
    bad.write_bytes(b"")
    flags = [*FLAGS, "--data", folder, "--output", tmp_path / "run", "--workers", "2"]
    code, _, err = finish(ROOT / "examples/train_cub.py", *flags)
    assert code == 1
    assert f"\nbad image: {bad} (0 bytes) is not an image" in err
    assert "Traceback" not in err


def test_check_as_a_command(folder, tmp_path):
    without_torch = finish("-c", "import check_images, sys; print('torch' in sys.modules)")
    assert without_torch[:2] == (0, "False\n"), without_torch
    flags = [str(folder), "--output", str(tmp_path / "list")]
    code, out, err = finish(ROOT / "examples/check_images.py", *flags, "--workers", 0)
    assert code == 0, err
    assert "36 images of CUB-200-2011, 0 bad" in out
    assert (tmp_path / "list").read_text() == ""
    assert run(folder, "--skip-bad", str(tmp_path / "list"))["left_out"] == 0
    data = READERS["cub"](folder)
    bad = [data.train[1].path, data.train[5].path, data.test[2].path]
    bad[0].unlink()
    bad[1].write_text("no image")
    bad[2].write_bytes(b"")
    code, out, err = finish(ROOT / "examples/check_images.py", *flags, "--workers", 2)
    assert code == 1
    assert [line.split(": ")[0] for line in out.splitlines()[:-1]] == [str(path) for path in bad]
    assert "36/36" in err  # the bar
    assert set(read_list(tmp_path / "list", folder)) == {str(path) for path in bad}
    with pytest.raises(SystemExit, match=r"--output .*none/list cannot be written: No such file or directory"):
        check_images.main([str(folder), "--workers", "0", "--output", str(tmp_path / "none/list")])


def test_process_that_dies_is_told_of(monkeypatch):
    monkeypatch.setattr(bad_images, "why_bad", os._exit)  # as if a decoder crashed; it takes numbers, not paths
    with pytest.raises(SystemExit, match=r"a process died while decoding one of the 8 images from 0 to 7:"):
        bad_images.find_bad(range(40), workers=1)


def skip(folder, *images):
    listing = folder.parent / "list"
    listing.write_text("".join(f"{os.path.relpath(image, folder)}\treason\n" for image in images))
    return run(folder, "--skip-bad", str(listing))


def test_lists_that_do_not_fit(folder, tmp_path, capsys):
    data, listing, other = READERS["cub"](folder), tmp_path / "list", folder / "images/other.jpg"
    good, of_class = data.train[0].path, [image.path for image in data.train if image.label == 2]
    (missing := of_class[0]).unlink()
    lacking = f"{folder} has no training images for 1 class ({data.classes[2]}): replace"
    for images_of_list, message in (
        ([good, other], f"{listing}, line 2: {other} is not an image of {folder}; recreate the list with check_images"),
        ([good], f"1 image ({missing}) missing and not in {listing}; recreate it with check_images.py"),
        (of_class, f"without the bad images of {listing}, {lacking}"),
        ([missing, *(image.path for image in data.test)], "has no test images: replace"),
    ):
        with pytest.raises(SystemExit, match=re.escape(message)):
            skip(folder, *images_of_list)
    with pytest.raises(SystemExit, match=r"list .*nowhere cannot be read: .*No such file.*; check_images\.py"):
        run(folder, "--skip-bad", str(tmp_path / "nowhere"))
    assert not (tmp_path / "run").exists()
    with pytest.raises(SystemExit):
        train_cub.main(["--skip-bad"])
    assert "--skip-bad needs --data" in capsys.readouterr().err


@pytest.mark.parametrize(("bad", "what"), [(1, "repeats images"), (2, "pairs the image with itself")])
def test_classes_that_are_short_of_images(bad, what, folder, capsys):
    data = READERS["cub"](folder)
    skip(folder, *[image.path for image in data.train if image.label == 2][:bad])
    out = capsys.readouterr().out
    assert f"{data.classes[2]} has {3 - bad} of 3 training images left: a batch, with 3 of it, {what}" in out
    assert out.count("warning: ") == 1
