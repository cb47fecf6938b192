"""Training on a folder of colours, from the command line to the model folder."""

import csv
import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from functools import partial
from pathlib import Path

import huggingface_hub.constants
import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from colours import COLOURS, FLAGS, SHORT, prepared, probabilities
from packaging.version import Version
from safetensors.torch import load_file, save_file

import train_own
from apinet_head import APINet
from workbench import run_folder
from workbench.model_folder import load


def test_learns_and_tells_right_from_wrong(own_model):
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
    printed = (own_model.parent / "printed.txt").read_text()
    assert "n_samples 9: images of each of these, the median class having 9" in printed
    assert "image_size 32: as asked" in printed
    assert "an epoch is 1 batch in which all classes occur equally often;" in printed
    assert "names rare ones too often" not in printed  # no class is rare


def test_files_of_a_model_have_the_mode_that_the_umask_says(own_model):
    (own_model.parent / "other").touch()
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (own_model.parent / "other", *own_model.iterdir())}
    assert len(modes) == 1


def test_damaged_model_is_named(own_model, tmp_path):
    for name in ("model.safetensors", "config.json", "classes.json"):
        shutil.copytree(own_model, tmp_path / name)
        (tmp_path / name / name).write_bytes((own_model / name).read_bytes()[:20])
        with pytest.raises(SystemExit, match="the model cannot be read"):
            load(tmp_path / name)
    shutil.copytree(own_model, tmp_path / "model")
    about = json.loads((own_model / "classes.json").read_text())
    (tmp_path / "model/classes.json").write_text(json.dumps(about | {"classes": ["blue", "green"]}))
    with pytest.raises(SystemExit, match=r"the net has 3 classes, classes\.json 2"):
        load(tmp_path / "model")


def test_a_model_is_not_overwritten_unless_asked(own_model, tmp_path):
    shutil.copytree(own_model, tmp_path / "model")
    command = [str(own_model.parent), "--out", str(tmp_path / "model"), *SHORT, "--baseline", "balanced"]
    with pytest.raises(SystemExit, match=r"holds a model: .*--overwrite"):
        train_own.main(command)
    with pytest.raises(SystemExit, match="something other than a model"):
        train_own.main([*command, "--out", str(own_model.parent), "--overwrite"])
    assert (tmp_path / "model/README.md").read_text() == (own_model / "README.md").read_text()
    train_own.main([*command, "--overwrite"])
    assert "a baseline of API-Net" in (tmp_path / "model/README.md").read_text()  # the card is the new model's
    assert "cross-entropy on balanced batches" in (tmp_path / "model/report.html").read_text()
    first, second = (load_file(each / "model.safetensors") for each in (own_model, tmp_path / "model"))
    assert not torch.equal(first["head.classifier.weight"], second["head.classifier.weight"])


def test_pretrained_weights_are_taken_and_learn_slower(own_model, tmp_path, monkeypatch):
    # As a download leaves them: the Hub's cache, without the network.
    config = timm.get_pretrained_cfg("test_resnet")
    cached = tmp_path / "cache" / f"models--{config.hf_hub_id.replace('/', '--')}"
    net = timm.create_model("test_resnet")
    (cached / "refs").mkdir(parents=True)
    (cached / "refs/main").write_text("0" * 40)
    (cached / "snapshots" / ("0" * 40)).mkdir(parents=True)
    save_file(net.state_dict(), cached / "snapshots" / ("0" * 40) / "model.safetensors")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    command = [str(own_model.parent), "--out", str(tmp_path / "model"), *FLAGS, "--epochs", "1"]
    train_own.main([*command, "--backbone-lr", "1e-9"])
    found = load_file(tmp_path / "model/model.safetensors")
    for name, weights in net.named_parameters():
        if not name.startswith("fc."):
            torch.testing.assert_close(found[f"backbone.{name}"], weights.detach(), atol=1e-5, rtol=1e-5)
    settings = json.loads((tmp_path / "model/metrics.json").read_text())["settings"]
    assert (settings["lr"], settings["backbone_lr"]) == (3e-4, 1e-9)
    assert "from timm's pretrained weights" in (tmp_path / "model/README.md").read_text()

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(SystemExit, match=r"weights of test_resnet are not available(.|\n)*--no-pretrained"):
        train_own.main([*command, "--overwrite"])


@pytest.mark.skipif(Version(timm.__version__) < Version("1.0.27"), reason="of a newer timm")
def test_backbone_of_a_fixed_size_is_made_for_the_images(own_model, tmp_path):
    train_own.main([str(own_model.parent), "--out", str(tmp_path / "m"), *SHORT, "--backbone", "test_vit_relpos"])
    net, _, settings = load(tmp_path / "m")
    assert settings["input_size"] == [3, 32, 32]
    assert net(torch.zeros(1, 3, 32, 32)).shape == (1, 3)


@pytest.mark.usefixtures("own_accelerate")
def test_precision_chunks_and_shuffled_baseline_are_taken_and_noted(own_model, tmp_path, monkeypatch):
    dtypes, forward = [], APINet.forward

    def noted(self, images, *args, **kwargs):
        dtypes.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        return forward(self, images, *args, **kwargs)

    monkeypatch.setattr(APINet, "forward", noted)
    AcceleratorState._reset_state()
    out, flags = tmp_path / "model", ["--amp", "bf16", "--chunk-size", "5", "--baseline", "shuffled"]
    train_own.main([str(own_model.parent), "--out", str(out), *SHORT, "--device", "cpu", *flags])
    assert (True, torch.bfloat16) in dtypes
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["settings"] | {"amp": "bf16", "chunk_size": 5, "baseline": "shuffled"} == metrics["settings"]
    assert json.loads((out / "config.json").read_text())["chunk_size"] == 5
    assert "none of which occurs twice" in " ".join(metrics["data"]["notes"])
    assert len((out / "predictions.csv").read_text().splitlines()) == 11


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--device", "nowhere"], "nowhere is not available"),
        (["--backbone", "resnet18000"], "timm has no such model; near"),
        (["--backbone", "local-dir:/some/where"], "the folder as --weights"),
        (["--n-classes", "4"], "--n-classes 4: the data has 3 classes"),
        (["--out", __file__], "is a file"),
        (["--weights", "here"], "go without --no-pretrained"),
        (["--frozen"], "--frozen needs a pretrained backbone"),
        (["--prior", "images", "--baseline", "shuffled"], "have that prior already"),
        (["--epochs", "0"], "--epochs: must be at least 1, got 0"),
        (["--lr", "nan"], "--lr: must be at least 0, got nan"),
        (["--image-size", "8"], "--image-size: must be at least 32, got 8"),
        (["--test-share", "1"], "--test-share must be between 0 and 1"),
    ],
)
def test_mistakes_end_with_one_line_before_any_image_is_decoded(
    own_model, tmp_path, monkeypatch, capsys, flags, message
):
    monkeypatch.setattr(train_own, "sound", lambda *_: pytest.fail("the images were decoded"))
    with pytest.raises(SystemExit) as ended:
        train_own.main([str(own_model.parent), "--out", str(tmp_path / "model"), *SHORT, *flags])
    said = capsys.readouterr().err.splitlines()[-1] if ended.value.code == 2 else str(ended.value)
    assert message in said
    assert "\n" not in said
    assert not (tmp_path / "model").exists()


def test_names_of_the_hub_are_not_looked_up_before():
    assert train_own.check_backbone("hf-hub:timm/resnet18.a1_in1k") is None


def test_several_processes_are_refused(own_model, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # as torchrun does it: each would train the same net into the same folder
    with pytest.raises(SystemExit, match="for one process"):
        train_own.main([str(own_model.parent), "--out", str(tmp_path / "model"), *SHORT])
    assert not (tmp_path / "model").exists()


HOLDER = """
import os, pathlib, sys, time
from workbench.run_folder import lock
held = lock(pathlib.Path(sys.argv[1]))
if os.fork():  # as for the processes that load images
    print(flush=True)
time.sleep(600)
"""


def test_two_trainings_do_not_share_a_folder(own_model, tmp_path):
    command = [str(own_model.parent), "--out", str(tmp_path / "model"), *SHORT]
    (tmp_path / "model/run").mkdir(parents=True)
    environment = os.environ | {"PYTHONPATH": str(Path(train_own.__file__).parent)}
    holder = [sys.executable, "-c", HOLDER, str(tmp_path / "model/run")]
    with subprocess.Popen(holder, stdout=subprocess.PIPE, env=environment, start_new_session=True) as other:
        try:
            assert other.stdout.readline()
            # At once, and where both have decoded the images before either had the lock.
            begin = run_folder.RunFolder(tmp_path / "model/run", {}).begin
            for start in (lambda: train_own.main(command), begin):
                with pytest.raises(SystemExit, match=r"another training is writing into \S+run: ") as ended:
                    start()
                assert "\n" not in str(ended.value)
            assert {path.name for path in (tmp_path / "model").rglob("*")} == {"run", "lock"}
            other.kill()
            other.wait()
            train_own.main(command)  # the lock ended with its process, though that one's child is still there
            assert (tmp_path / "model/classes.json").exists()
        finally:
            os.killpg(other.pid, signal.SIGKILL)


def test_a_file_system_without_locks_is_trained_on(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_folder.fcntl, "lockf", refuse)
    run_folder.RunFolder(tmp_path / "run", {}).begin()
    assert (tmp_path / "run/settings.json").exists()


def test_a_training_that_ended_meanwhile_is_not_overwritten(own_model, tmp_path, monkeypatch):
    read_data = train_own.read_data

    def read_slowly(options):
        shutil.copytree(own_model, tmp_path / "model")
        return read_data(options)

    monkeypatch.setattr(train_own, "read_data", read_slowly)
    with pytest.raises(SystemExit, match="holds a model"):
        train_own.main([str(own_model.parent), "--out", str(tmp_path / "model"), *SHORT])


def test_ctrl_c_during_the_imports_ends_it_with_a_line(tmp_path):
    command = [sys.executable, train_own.__file__, str(tmp_path)]
    loading = (tmp_path / "torch").with_suffix(".py")
    loading.write_text("print('loading', flush=True)\nimport time\ntime.sleep(60)")  # in place of torch
    settings = {"env": os.environ | {"PYTHONPATH": str(tmp_path)}, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # A shell's background jobs, of which the tests may be one, ignore it.
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, text=True, preexec_fn=listen, **settings) as started:
        assert started.stdout.readline() == "loading\n"
        started.send_signal(signal.SIGINT)
        assert started.communicate(timeout=60)[1] == "\ninterrupted\n"
    assert started.returncode == 130
