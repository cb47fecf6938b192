"""Bad images: the opener refuses them, check_images.py lists them, training stops with the path or leaves them out."""

import csv
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from bad_files import BAD, GOOD, PIXELS, bomb
from commands import ROOT, finish
from cub_runs import TINY

import check_images
import score
import train_cub
from workbench import image_files, images
from workbench.datasets import READERS, bad_images
from workbench.datasets.bad_images import read_list, why_bad
from workbench.image_files import BadImageError, load_image

# One batch has every training image, so that the first step meets a bad one.
FLAGS = [*TINY, "--n-classes", "6", "--n-samples", "3", "--epochs", "1"]


def make_bad(kind: str, path: Path) -> str:
    """Make an image a bad file; a part of the reason."""
    make, reason = BAD[kind]
    make(path)
    if kind == "unreadable" and os.access(path, os.R_OK):
        pytest.skip("this user, root perhaps, reads every file")
    return reason


@pytest.fixture
def folder(birds: Path, tmp_path: Path) -> Path:
    """Six classes with three images for training and three for testing each, to damage."""
    return shutil.copytree(birds, tmp_path / "birds")


def run(folder: Path, *flags: str) -> dict:
    return train_cub.main([*FLAGS, "--data", str(folder), "--output", str(folder.parent / "run"), *flags])


@pytest.mark.parametrize("kind", BAD)
def test_bad_file_is_refused_with_path_and_reason(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    PIL.Image.fromarray(PIXELS).save(path)
    reason = make_bad(kind, path)
    with pytest.raises(BadImageError) as caught:
        load_image(path)
    assert str(caught.value).startswith(f"{path} ")
    assert reason in str(caught.value)
    assert str(caught.value) == f"{path} {why_bad(path)}; replace the file"


@pytest.mark.parametrize("kind", GOOD)
def test_odd_file_is_taken_for_what_it_shows(kind: str, tmp_path: Path) -> None:
    make, expected = GOOD[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(tmp_path / "x.jpg")
        image = load_image(tmp_path / "x.jpg")
    assert image.mode == "RGB"
    assert np.asarray(image).shape == expected.shape
    assert abs(np.asarray(image).astype(int) - expected).max() <= (2 if kind == "CMYK" else 0)
    assert why_bad(tmp_path / "x.jpg") is None


def test_limits_of_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files, "MAX_SIDE", 64)
    monkeypatch.setattr(image_files, "MAX_PIXELS", 64 * 32)
    for size, taken in {(64, 32): True, (32, 64): True, (65, 2): False, (2, 65): False, (64, 33): False}.items():
        bomb(tmp_path / "x.png", *size)
        assert (why_bad(tmp_path / "x.png") is None) == taken
    assert image_files.load_image is load_image


@pytest.mark.parametrize("kind", ["missing", "text", "truncated JPEG", "pipe"])  # one function judges all of BAD
def test_training_stops_with_the_path_or_leaves_it_out(kind: str, folder: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(folder.parent)
    image = READERS["cub"](folder).train[4]
    reason = make_bad(kind, image.path)
    with pytest.raises(SystemExit) as caught:  # the reader sees at once that one is missing
        run(folder)
    assert image.path.name in str(caught.value)
    if kind != "missing":
        assert f"bad image: {image.path} " in str(caught.value)
        assert reason in str(caught.value)
    assert check_images.main([str(folder), "--workers", "0"]) == [(image.path, why_bad(image.path))]
    out = capsys.readouterr().out
    assert reason in out
    assert "36 images of CUB-200-2011, 1 bad; the list is bad_images.txt" in out
    (row,) = csv.reader(Path("bad_images.txt").read_text().splitlines(), delimiter="\t")
    assert row == [os.path.relpath(image.path, folder), why_bad(image.path)]
    shutil.rmtree("run", ignore_errors=True)
    result = run(folder, "--skip-bad")
    out = capsys.readouterr().out
    assert "1 bad images left out: 1 of training, 0 of testing (bad_images.txt)" in out
    assert "17 training and 18 test images" in out
    assert result["left_out"] == 1
    (row,) = csv.DictReader(Path("run/log.csv").read_text().splitlines())
    assert row["left_out"] == "1"


def test_training_takes_the_odd_ones(folder: Path, capsys) -> None:
    data = READERS["cub"](folder)
    for image, (make, _) in zip(data.train, GOOD.values(), strict=False):
        make(image.path)
    assert check_images.main([str(folder), "--workers", "0", "--output", str(folder.parent / "list")]) == []
    assert run(folder, "--skip-bad", str(folder.parent / "list"))["left_out"] == 0
    assert "0 bad images left out" in capsys.readouterr().out


def test_bad_image_in_testing(folder: Path) -> None:
    run(folder)
    bad = READERS["cub"](folder).test[7].path
    bad.write_bytes(b"")
    with pytest.raises(
        SystemExit, match=rf"^\nbad image: {bad} \(0 bytes\) is not an image .*; replace the file\.\ncheck"
    ):
        score.main([str(folder.parent / "run/last"), "--device", "cpu"])


def test_process_with_workers_ends_at_a_bad_image(folder: Path, tmp_path: Path) -> None:
    """Its workers, which ignore SIGTERM, must not keep it from ending."""
    bad = READERS["cub"](folder).train[3].path
    bad.write_bytes(b"")
    flags = [*FLAGS, "--data", folder, "--output", tmp_path / "run", "--workers", "2"]
    code, _, err = finish(ROOT / "examples/train_cub.py", *flags)
    assert code == 1
    assert f"\nbad image: {bad} (0 bytes) is not an image" in err
    assert "Traceback" not in err


def test_names_that_are_not_utf8(folder: Path, tmp_path: Path, capsys) -> None:
    data = READERS["cub"](folder)
    renamed = []
    for image in (data.train[0], data.train[4]):
        name = os.fsdecode(b"\xe9-" + os.fsencode(image.path.name))
        try:
            image.path.rename(image.path.with_name(name))
        except OSError:
            pytest.skip("this file system takes no such names")
        renamed.append(image.path.with_name(name))
        text = (folder / "images.txt").read_bytes()
        (folder / "images.txt").write_bytes(text.replace(os.fsencode(f"/{image.path.name}"), os.fsencode(f"/{name}")))
    renamed[1].write_bytes(b"")
    assert [path for path, _ in check_images.main([str(folder), "--output", str(tmp_path / "list")])] == [renamed[1]]
    out = capsys.readouterr().out
    out.encode()  # a terminal could not print half a character
    assert "\\udce9-" in out
    assert b"/\xe9-" in (tmp_path / "list").read_bytes()
    with pytest.raises(SystemExit, match=r"bad image: .*\(0 bytes\) is not an image"):
        run(folder)
    shutil.rmtree(tmp_path / "run")
    assert run(folder, "--skip-bad", str(tmp_path / "list"))["left_out"] == 1
    found = score.main([str(tmp_path / "run/last"), "--device", "cpu"])
    assert found["images"] == 18


def test_a_check_starts_without_torch() -> None:
    code, out, err = finish("-c", "import check_images, sys; print('torch' in sys.modules)")
    assert (code, out) == (0, "False\n"), err


def test_check_as_a_command(folder: Path, tmp_path: Path) -> None:
    def command(workers: int, output: str = "list") -> tuple[int, str, str]:
        script = ROOT / "examples/check_images.py"
        return finish(script, folder, "--workers", workers, "--output", tmp_path / output)

    code, out, err = command(0)
    assert code == 0, err
    assert "36 images of CUB-200-2011, 0 bad" in out
    assert (tmp_path / "list").read_text() == ""
    data = READERS["cub"](folder)
    bad = [data.test[2].path, data.train[5].path, data.train[1].path]
    bad[0].write_bytes(b"")
    bad[1].write_text("no image")
    bad[2].unlink()
    code, out, err = command(2)
    assert code == 1
    assert [line.split(": ")[0] for line in out.splitlines()[:-1]] == [str(path) for path in bad[::-1]]
    assert "36/36" in err  # the bar
    assert set(read_list(tmp_path / "list", folder)) == {str(path) for path in bad}
    code, _, err = command(0, output="none/list")
    assert code == 1
    assert f"--output {tmp_path / 'none/list'} cannot be written: No such file or directory" in err
    assert "Traceback" not in err
    (folder / "classes.txt").unlink()
    code, _, err = command(2)
    assert code == 1
    assert "has no classes.txt" in err
    assert "Traceback" not in err


def kill(path: Path) -> str | None:
    """A decoder that crashes on one file."""
    if path.name == "13":
        os._exit(1)
    return None


def test_process_that_dies_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bad_images, "why_bad", kill)
    with pytest.raises(SystemExit, match=r"a process died while decoding one of the \d+ images from .* to .*"):
        bad_images.find_bad([Path(str(number)) for number in range(40)], workers=1)


def test_lists_that_do_not_fit(folder: Path, tmp_path: Path, capsys) -> None:
    data, listing = READERS["cub"](folder), tmp_path / "list"

    def skip(*images: str) -> str:
        listing.write_text("".join(f"{os.path.relpath(image, folder)}\treason\n" for image in images))
        with pytest.raises(SystemExit) as caught:
            run(folder, "--skip-bad", str(listing))
        assert not (tmp_path / "run").exists()
        return str(caught.value)

    good, other = str(data.train[0].path), str(folder / "images/other.jpg")
    assert f"{listing}, line 2: {other} is not an image of {folder}; recreate the list with check_images.py" in skip(
        good, other
    )
    of_class = [str(image.path) for image in data.train if image.label == 2]
    message = f"without the bad images of {listing}, {folder} has no training images for 1 class ({data.classes[2]})"
    assert message in skip(*of_class)
    assert "has no test images: replace" in skip(*[str(image.path) for image in data.test])
    data.train[1].path.unlink()
    missing = f"1 image ({data.train[1].path}) missing and not in {listing}; recreate it with check_images.py"
    assert missing in skip(good)
    listing.unlink()
    with pytest.raises(SystemExit, match=r"list .*nowhere cannot be read: .*No such file.*; check_images\.py"):
        run(folder, "--skip-bad", str(tmp_path / "nowhere"))
    with pytest.raises(SystemExit):
        train_cub.main(["--skip-bad"])
    assert "--skip-bad needs --data" in capsys.readouterr().err


@pytest.mark.parametrize(("bad", "what"), [(1, "repeats images"), (2, "pairs the image with itself")])
def test_classes_that_are_short_of_images(bad: int, what: str, folder: Path, tmp_path: Path, capsys) -> None:
    data = READERS["cub"](folder)
    for image in [image for image in data.train if image.label == 2][:bad]:
        image.path.write_bytes(b"")
    check_images.main([str(folder), "--workers", "0", "--output", str(tmp_path / "list")])
    run(folder, "--skip-bad", str(tmp_path / "list"))
    short = f"warning: {data.classes[2]} has {3 - bad} of 3 training images left: a batch, with 3 of it, {what}"
    out = capsys.readouterr().out
    assert short in out
    assert out.count("warning") == 1


def test_checked_and_trained_alike() -> None:
    assert images.load_image is bad_images.load_image is load_image
