"""Training on a folder of colours: the model folder, mistakes, and that it resumes where it was killed, bit for bit."""

import csv
import errno
import json
import os
import shutil
import signal
import stat
import subprocess
from argparse import Namespace
from collections import Counter
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import timm
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from colours import COLOURS, FLAGS, SHORT, prepared, probabilities
from commands import start
from cub_runs import KilledError, at_call, same
from packaging.version import Version
from safetensors.torch import load_file, save_file

import train_own
from apinet_head import APINet, BalancedBatchSampler, api_loss
from workbench import run_folder
from workbench.datasets.lists import Image, ImageSet
from workbench.model_folder import load

# Three steps an epoch, of 8 of the 27 images.
STEPS = ["--device", "cpu", "--epochs", "3", "--n-classes", "2", "--n-samples", "4", "--lr", "0.01"]


def train(own_model, out, *flags):
    """The folder of a model trained on the same images."""
    train_own.main([str(own_model.parent), "--out", str(out), *SHORT, *flags])
    return out


def test_learns_tells_right_from_wrong_and_writes_files_as_the_umask_says(own_model):
    counts, names = [[0] * 3 for _ in COLOURS], sorted(COLOURS)
    with (own_model / "predictions.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert sorted(row["path"] for row in rows) == sorted(map(str, (own_model.parent / "test").rglob("*.png")))
    for row in rows:
        probability, label = probabilities(own_model, prepared(own_model, row["path"])).max(0)
        assert (row["label"], row["predicted"]) == (Path(row["path"]).parent.name, names[label])
        assert float(row["probability"]) == pytest.approx(float(probability), abs=1e-3)
        counts[names.index(row["label"])][label] += 1
    metrics = json.loads((own_model / "metrics.json").read_text())
    assert metrics["confusion"] == counts == [[3, 0, 0], [0, 3, 1], [0, 0, 3]]
    assert metrics["accuracy"] == metrics["history"][-1]["test_accuracy"] == 9 / 10
    assert metrics["history"][0]["loss"] > metrics["history"][-1]["loss"]
    (note,) = metrics["data"]["notes"]
    assert "an epoch is 1 batch in which all classes occur equally often;" in note
    assert "predicts rare classes too often" not in note  # no class is rare
    (own_model.parent / "other").touch()
    assert len({stat.S_IMODE(path.stat().st_mode) for path in (own_model.parent / "other", *own_model.iterdir())}) == 1


def test_damaged_model_is_named(own_model, tmp_path):
    about = json.loads((own_model / "classes.json").read_text()) | {"classes": ["blue", "green"]}
    names = ("model.safetensors", "config.json", "classes.json")
    cut = [(name, (own_model / name).read_bytes()[:20], "the model cannot be read") for name in names]
    other = "classes.json", json.dumps(about).encode(), r"the net has 3 classes, classes\.json 2"
    for number, (name, content, message) in enumerate([*cut, other]):
        folder = shutil.copytree(own_model, tmp_path / str(number))
        (folder / name).write_bytes(content)
        with pytest.raises(SystemExit, match=message):
            load(folder)


def test_a_model_is_not_overwritten_unless_asked(own_model, tmp_path, monkeypatch):
    at_call(monkeypatch, 1, train_own, "read_data", lambda: shutil.copytree(own_model, tmp_path / "meanwhile"))
    with pytest.raises(SystemExit, match="meanwhile holds a model"):  # of another training, which began earlier
        train(own_model, tmp_path / "meanwhile")
    folder = shutil.copytree(own_model, tmp_path / "model")
    with pytest.raises(SystemExit, match=r"holds a model: .*--overwrite"):
        train(own_model, folder)
    with pytest.raises(SystemExit, match="something other than a model"):
        train(own_model, own_model.parent, "--overwrite")
    assert (folder / "README.md").read_text() == (own_model / "README.md").read_text()
    train(own_model, folder, "--overwrite", "--baseline", "balanced")
    assert "a baseline of API-Net" in (folder / "README.md").read_text()  # the card is the new model's
    assert "cross-entropy on balanced batches" in (folder / "report.html").read_text()
    assert not same(*(load_file(each / "model.safetensors") for each in (own_model, folder)))


def test_pretrained_weights_are_taken_and_learn_slower(own_model, tmp_path, monkeypatch):
    net = timm.create_model("test_resnet")
    save_file(net.state_dict(), tmp_path / "cached.safetensors")
    download = Mock(return_value=str(tmp_path / "cached.safetensors"))
    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    command = [str(own_model.parent), "--out", str(tmp_path / "model"), *FLAGS, "--epochs", "1"]
    train_own.main([*command, "--backbone-lr", "1e-9"])
    found = load_file(tmp_path / "model/model.safetensors")
    expected = {f"backbone.{name}": weights for name, weights in net.named_parameters() if not name.startswith("fc.")}
    torch.testing.assert_close({name: found[name] for name in expected}, expected, atol=1e-5, rtol=1e-5)
    settings = json.loads((tmp_path / "model/metrics.json").read_text())["settings"]
    assert (settings["lr"], settings["backbone_lr"]) == (3e-4, 1e-9)
    assert "from timm's pretrained weights" in (tmp_path / "model/README.md").read_text()

    download.side_effect = OSError("no network")
    with pytest.raises(SystemExit, match=r"weights of test_resnet are not available(.|\n)*--no-pretrained"):
        train_own.main([*command, "--overwrite"])


@pytest.mark.skipif(Version(timm.__version__) < Version("1.0.27"), reason="of a newer timm")
def test_backbone_of_a_fixed_size_is_made_for_the_images(own_model, tmp_path):
    net, _, settings = load(train(own_model, tmp_path / "m", "--backbone", "test_vit_relpos"))
    assert settings["input_size"] == [3, 32, 32]
    assert net(torch.zeros(1, 3, 32, 32)).shape == (1, 3)


@pytest.mark.usefixtures("own_accelerate")
def test_precision_chunks_and_shuffled_baseline_are_taken_and_noted(own_model, tmp_path, monkeypatch):
    def check_autocast():
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") is torch.bfloat16

    at_call(monkeypatch, 1, train_own, "compute_loss", check_autocast)
    AcceleratorState._reset_state()
    flags = ["--amp", "bf16", "--chunk-size", "5", "--baseline", "shuffled"]
    out = train(own_model, tmp_path / "model", "--device", "cpu", *flags)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["settings"] | {"amp": "bf16", "chunk_size": 5, "baseline": "shuffled"} == metrics["settings"]
    assert json.loads((out / "config.json").read_text())["chunk_size"] == 5
    assert "none of which occurs twice" in " ".join(metrics["data"]["notes"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--device", "nowhere"], "nowhere is not available"),
        (["--backbone", "resnet18000"], "timm has no such model; near"),
        (["--backbone", "local-dir:/some/where"], "the folder as --weights"),
        (["--n-classes", "4"], "--n-classes 4: the data has 3 classes"),
        (["--out", __file__], "is a file"),
        (["--weights", "here"], "go without --no-pretrained"),
        (["--frozen", "--backbone", "hf-hub:not/asked"], "--frozen needs a pretrained backbone"),
        (["--prior", "images", "--baseline", "shuffled"], "have that prior already"),
        (["--epochs", "0"], "--epochs: must be at least 1, got 0"),
        (["--lr", "nan"], "--lr: must be at least 0, got nan"),
        (["--image-size", "8"], "--image-size: must be at least 32, got 8"),
        (["--test-share", "1"], "--test-share must be between 0 and 1"),
        (["as torchrun"], "for one process"),
    ],
)
def test_mistakes_end_with_one_line_before_any_image_is_decoded(
    own_model, tmp_path, monkeypatch, capsys, flags, message
):
    monkeypatch.setattr(train_own, "sound", lambda *_: pytest.fail("the images were decoded"))
    if flags == ["as torchrun"]:
        monkeypatch.setenv("WORLD_SIZE", "2")  # each process would train the same net into the same folder
        flags = []
    with pytest.raises(SystemExit) as ended:
        train(own_model, tmp_path / "model", *flags)
    said = capsys.readouterr().err.splitlines()[-1] if ended.value.code == 2 else str(ended.value)
    assert message in said
    assert "\n" not in said
    assert not (tmp_path / "model").exists()


HOLDER = """
import os, pathlib, sys
from workbench.run_folder import lock
held = lock(pathlib.Path(sys.argv[1]))
if os.fork():  # as for the processes that load images
    print(flush=True)
sys.stdin.read()
"""


def test_two_trainings_do_not_share_a_folder(own_model, tmp_path):
    folder = tmp_path / "model"
    (folder / "run").mkdir(parents=True)
    with start("-c", HOLDER, folder / "run", stdin=subprocess.PIPE) as other:
        assert other.stdout.readline()
        # At once, and where both have decoded the images before either had the lock.
        for begin in (partial(train_own.check_free, folder, True), run_folder.RunFolder(folder / "run", {}).begin):
            with pytest.raises(SystemExit, match=r"^another training is writing into \S+run: .*\Z"):
                begin()
        assert {path.name for path in folder.rglob("*")} == {"run", "lock"}
        other.kill()
        other.wait()
        train(own_model, folder)  # the lock ended with its process, though that one's child is still there
        assert (folder / "classes.json").exists()


def test_a_file_system_without_locks_is_trained_on(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder.fcntl, "lockf", Mock(side_effect=OSError(errno.ENOLCK, "No locks available")))
    run_folder.RunFolder(tmp_path / "run", {}).begin()
    assert (tmp_path / "run/settings.json").exists()


def test_ctrl_c_during_the_imports_ends_it_with_a_line(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("print('loading', flush=True)\nimport time\ntime.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    # A shell's background jobs, of which the tests may be one, ignore it.
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with start(train_own.__file__, tmp_path, preexec_fn=listen) as started:
        assert started.stdout.readline() == "loading\n"
        started.send_signal(signal.SIGINT)
        assert started.communicate(timeout=60)[1] == "\ninterrupted\n"
    assert started.returncode == 130


@pytest.mark.parametrize("baseline", ["", "balanced"])
def test_the_loss_is_that_of_the_method(baseline):
    net = APINet("test_resnet", 2).eval()  # without dropout
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 0, 1, 1])
    loss = F.cross_entropy(net(images), labels) if baseline else api_loss(net(images, labels))
    found = train_own.compute_loss(net, images, labels, baseline)
    assert found["loss"].item() == pytest.approx(loss.item())
    assert 0 <= found["train_accuracy"] <= 1


@pytest.fixture(scope="module")
def whole(own_model, tmp_path_factory):
    """A training never interrupted."""
    return train(own_model, tmp_path_factory.mktemp("whole") / "model", *STEPS)


def assert_ends_alike(*folders):
    assert same(*(load_file(folder / "model.safetensors") for folder in folders))
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in folders]
    for each in metrics:
        each |= dict.fromkeys(("minutes", "machine", "settings"))
        each["history"] = [row | {"seconds": 0} for row in each["history"]]
    assert metrics[0] == metrics[1]


@pytest.mark.parametrize("step", [1, 4, 5, 9])
def test_killed_in_any_step_it_ends_as_if_never_killed(own_model, whole, tmp_path, monkeypatch, step):
    out = tmp_path / "model"
    at_call(monkeypatch, step, train_own, "compute_loss", Mock(side_effect=KilledError))
    epochs, set_epoch = [], BalancedBatchSampler.set_epoch
    monkeypatch.setattr(BalancedBatchSampler, "set_epoch", lambda *args: (epochs.append(args[1]), set_epoch(*args)))
    with pytest.raises(KilledError):
        train(own_model, out, *STEPS, "--checkpoint-minutes", "1e-9")
    assert not (out / "classes.json").exists()
    torch.manual_seed(123)  # nothing may depend on what the new process happens to have
    assert_ends_alike(train(own_model, out, *STEPS, "--workers", "2" if step == 5 else "0"), whole)
    assert not (out / "run").exists()
    assert {*epochs} == {0, 1, 2}  # each has batches and crops of its own


def test_sigterm_saves_and_stops_and_other_settings_do_not_go_on(own_model, whole, tmp_path, monkeypatch, capsys):
    flags = [*STEPS, "--checkpoint-minutes", "0"]
    at_call(monkeypatch, 5, train_own, "compute_loss", lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as stopped:
        train(own_model, tmp_path / "model", *flags)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert "saved as" in (said := capsys.readouterr().err)
    assert "the same command resumes from there" in said
    with pytest.raises(SystemExit, match=r"holds another run:\n.*\n  lr: 0.01 there, 0.5 here"):
        train(own_model, tmp_path / "model", *flags, "--lr", "0.5", "--overwrite")
    assert_ends_alike(train(own_model, tmp_path / "model", *flags), whole)


def test_loss_that_is_not_finite_ends_it_with_the_images(own_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_own, "api_loss", lambda output: api_loss(output) * float("nan"))
    with pytest.raises(SystemExit) as ended:
        train(own_model, tmp_path / "model", *STEPS)
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert "step 1 is not finite: loss nan" in said
    assert "try a lower --lr than 0.01" in said
    assert said.count(".png") == 8


def test_memory_that_runs_out_ends_with_a_chunk_size(own_model, tmp_path, monkeypatch):
    monkeypatch.setattr(train_own, "compute_loss", Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(SystemExit, match=r"8 images of 32 x 32 pixels, .* all at once: --chunk-size 4"):
        train(own_model, tmp_path / "model", *STEPS)


@pytest.mark.parametrize("baseline", ["shuffled", "balanced", ""])
def test_shuffled_batches_have_no_image_twice_and_others_all_classes_alike(recwarn, baseline):
    labels = [0] * 3 + [1] * 4 + [2] * 6
    images = [Image(Path(str(row)), label, "") for row, label in enumerate(labels)]
    data = ImageSet("shades", ["a", "b", "c"], images, [])
    options = Namespace(n_classes=2, n_samples=2, baseline=baseline, seed=0)
    sampler, note = train_own.make_sampler(options, data)
    drawn = [row for batch in sampler for row in batch]
    if baseline == "shuffled":
        assert len(set(drawn)) == len(drawn) == 12  # of 13, in whole batches
        assert {len(batch) for batch in sampler} == {4}
        assert "none of which occurs twice" in note
    else:
        for batch in sampler:
            assert sorted(Counter(labels[row] for row in batch).values()) == [2, 2]
        assert f"the first one has {len(set(drawn))} of the 13 training images" in note
        assert "predicts rare classes too often" in note
    options.n_samples = 1
    assert ("Use --n-samples 2 or more" in train_own.make_sampler(options, data)[1]) == (not baseline)  # makes pairs
    # The sampler's advice is an argument of the head, which no flag sets. Garbage of other tests may warn meanwhile.
    assert not [warning for warning in recwarn if warning.category is UserWarning]
