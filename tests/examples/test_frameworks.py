"""The examples of training in other frameworks: they learn, from the very batches that the sampler makes."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import cached_features
import lightning
import lightning_module
import plain
import pytest
import timm_finetune
import torch
from frameworks_on_ranks import watch
from ranks import under_torchrun
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from torchvision.transforms.functional import to_pil_image
from toy import CLASSES, Shapes

from apinet_head import APINet, BalancedBatchSampler

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "frameworks"
TARGETS = Shapes(train=True).targets
SHORT = ["--epochs", "12"]


def batches(epochs, **settings):
    """Rows of the training images in the order of the sampler, set to each epoch."""
    sampler = BalancedBatchSampler(TARGETS, n_classes=6, n_samples=4, **settings)
    rows = []
    for epoch in epochs:
        sampler.set_epoch(epoch)
        rows += [row for batch in sampler for row in batch]
    return rows


@pytest.fixture
def drawn(monkeypatch):
    return watch(monkeypatch.setattr)


def test_shapes_are_the_same_each_time_and_others_for_testing():
    train, again, test = Shapes(True), Shapes(True), Shapes(False)
    assert train.digest() == again.digest() != test.digest()
    assert not {picture.tobytes() for picture in train.pictures} & {picture.tobytes() for picture in test.pictures}
    assert len(CLASSES) == len(set(TARGETS)) == 6
    again.targets[0] = 1
    assert again.digest() != train.digest()


def test_plain_loop(drawn):
    assert plain.main(SHORT) > 0.6
    assert drawn == batches(range(12))


def test_timm(drawn):
    found = timm_finetune.main(SHORT)
    assert found["net"] > 0.5
    assert found["average"] > 0.4
    assert drawn == batches(range(12))


def test_lightning(drawn):
    assert lightning_module.main([*SHORT, "--accelerator", "cpu"]) > 0.6
    assert drawn == batches(range(12))


@pytest.mark.parametrize(("precision", "epochs", "least"), [("no", 12, 0.6), ("bf16", 3, 0)])
def test_accelerate(drawn, own_accelerate, precision, epochs, least):
    accelerate_loop = importlib.import_module("accelerate_loop")
    assert accelerate_loop.main(["--epochs", str(epochs), "--cpu", "--mixed-precision", precision]) > least
    assert drawn == batches(range(epochs))


def test_trainer_of_transformers(drawn, own_accelerate, tmp_path):
    hf_trainer = importlib.import_module("hf_trainer")
    accuracy = hf_trainer.main([*SHORT, "--cpu", "--out", str(tmp_path)])
    assert accuracy > 0.6
    assert drawn == batches(range(12), seed=42)  # that of TrainingArguments
    assert plain.accuracy_on(Shapes(train=False), APINet.from_pretrained(tmp_path), "cpu") == pytest.approx(accuracy)


def test_trainer_of_transformers_resumes_within_an_epoch(drawn, own_accelerate, tmp_path):
    hf_trainer, transformers = map(importlib.import_module, ("hf_trainer", "transformers"))
    settings = transformers.TrainingArguments(
        str(tmp_path), num_train_epochs=3, save_strategy="steps", save_steps=7, logging_strategy="no", report_to="none",
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip

    def train(**how):
        torch.manual_seed(0)
        net = APINet("test_resnet", len(CLASSES))
        trainer = hf_trainer.BalancedTrainer(
            hf_trainer.ForTrainer(net), settings, train_dataset=Shapes(True), data_collator=hf_trainer.collate
        )
        trainer.train(**how)
        return net.state_dict()

    whole = train()
    drawn.clear()
    resumed = train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    assert drawn == batches(range(3), seed=42)[7 * 24 :]
    assert all(torch.equal(value, whole[name]) for name, value in resumed.items())


class Rows(lightning_module.ShapesData):
    """The example's batches, of the rows themselves, by worker processes."""

    def train_dataloader(self):
        return DataLoader(range(len(TARGETS)), batch_sampler=super().train_dataloader().batch_sampler, num_workers=1)


class Listener(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight, self.rows = torch.nn.Parameter(torch.ones(())), []

    def training_step(self, batch, index):
        self.rows += batch.tolist()
        return self.weight * 1

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_lightning_resumes_with_the_next_epochs_batches(tmp_path):
    quiet = {
        "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
        "default_root_dir": tmp_path, "limit_val_batches": 0,
    }  # fmt: skip
    first = lightning.Trainer(max_epochs=2, **quiet)
    first.fit(Listener(), datamodule=Rows())
    assert first.lightning_module.rows == batches(range(2))
    then = lightning.Trainer(max_epochs=4, **quiet)
    then.fit(Listener(), datamodule=Rows(), ckpt_path=first.checkpoint_callback.best_model_path)
    assert then.lightning_module.rows == batches([2, 3])


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def on_two_ranks(example, folder, *flags, launcher=TORCHRUN):
    """What each rank was given, and its accuracy."""
    command = [
        sys.executable,
        *launcher,
        str(ROOT / "tests" / "helpers" / "frameworks_on_ranks.py"),
        example,
        str(folder),
        *flags,
    ]
    path = os.pathsep.join([str(ROOT), str(FOLDER), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("test accuracy") == 1
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@under_torchrun
@pytest.mark.parametrize(
    ("example", "flags", "settings"),
    [
        ("accelerate_loop", ["--cpu"], {}),
        pytest.param("hf_trainer", ["--cpu"], {"seed": 42}, marks=pytest.mark.slow),
        pytest.param("lightning_module", ["--accelerator", "cpu", "--devices", "2"], {}, marks=pytest.mark.slow),
    ],
)
def test_two_ranks_share_each_batch_by_its_classes(tmp_path, example, flags, settings):
    if example == "hf_trainer":
        flags = [*flags, "--out", str(tmp_path / "out")]
    launcher = {"launcher": ()} if example == "lightning_module" else {}
    found = on_two_ranks(example, tmp_path, *flags, "--epochs", "4", **launcher)
    for rank in range(2):
        assert found[rank]["drawn"] == batches(range(4), rank=rank, world_size=2, **settings)
    assert found[0]["accuracy"] == found[1]["accuracy"]


def head_is_right(net, features):
    """How often, by the one who trained on such features; Shapes has as many and the same labels in both parts."""
    with torch.no_grad():
        return (net.head(features).argmax(1) == torch.tensor(TARGETS)).float().mean().item()


LEARN = ["--epochs", "30", "--lr", "0.1"]


def run_cached(tmp_path, *flags):
    return cached_features.main(["--cache", str(tmp_path / "features.safetensors"), *flags])


def test_features_are_computed_once(tmp_path, monkeypatch):
    accuracy = run_cached(tmp_path, *LEARN, "--out", str(tmp_path / "net"))
    monkeypatch.setattr(cached_features, "features_of", None)
    assert run_cached(tmp_path, *LEARN) == accuracy
    features = load_file(tmp_path / "features.safetensors")
    assert {name: tuple(rows.shape) for name, rows in features.items()} == {"train": (120, 96), "test": (120, 96)}
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["features.safetensors"]

    net = APINet.from_pretrained(tmp_path / "net").eval()
    right = {name: head_is_right(net, features[name]) for name in features}
    assert accuracy == pytest.approx(right["test"])
    assert right["train"] > 0.35  # chance is 0.17, and the features are of random weights

    # Backbone and head together say of the pictures what the head says of their features.
    test = Shapes(False, cached_features.create_transform(
        **cached_features.resolve_model_data_config(net.backbone) | {"input_size": (3, 48, 48), "crop_pct": 1.0}
    ))  # fmt: skip
    images = torch.stack([test[row][0] for row in range(0, 120, 10)])
    with torch.no_grad():
        torch.testing.assert_close(net(images), net.head(features["test"][::10]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--backbone", "test_vit"], "backbone test_resnet there, test_vit here; weights .* there"),
        (["--image-size", "32"], r"transform .*48.* there, .*32.* here; delete it"),
        ("weights", "something else: weights"),
        ("images", "something else: test images"),
    ],
)
def test_features_of_something_else_are_refused(tmp_path, monkeypatch, change, message):
    run_cached(tmp_path, "--epochs", "1")
    if change == "weights":
        monkeypatch.setattr(torch, "manual_seed", lambda seed: torch.random.default_generator.manual_seed(seed + 1))
    if change == "images":
        first, digest = Shapes(train=False).pictures[0].tobytes(), Shapes.digest
        monkeypatch.setattr(Shapes, "digest", lambda self: "" if self.pictures[0].tobytes() == first else digest(self))
    with pytest.raises(SystemExit, match=message):
        run_cached(tmp_path, "--epochs", "1", *(change if isinstance(change, list) else []))


@pytest.mark.parametrize("content", ["", "no features", "a file without a word on what it is of"])
def test_files_that_are_no_cache_are_refused(tmp_path, content):
    path = tmp_path / "features.safetensors"
    if content.startswith("a file"):
        save_file({"train": torch.zeros(2, 3)}, path)
    else:
        path.write_text(content)
    with pytest.raises(SystemExit, match=r"features.safetensors: (not a cache of features|features of something else)"):
        run_cached(tmp_path)


def test_features_of_a_folder_of_class_folders(tmp_path):
    for part in ("train", "test"):
        shapes = Shapes(part == "train")
        for row, picture in enumerate(shapes.pictures[: 3 * 20]):
            name = tmp_path / "data" / part / CLASSES[shapes.targets[row]] / f"{row}.png"
            name.parent.mkdir(parents=True, exist_ok=True)
            picture.save(name)
    flags = ["--data", str(tmp_path / "data"), "--image-size", "48", "--epochs", "1"]
    run_cached(tmp_path, *flags)
    assert load_file(tmp_path / "features.safetensors")["test"].shape == (60, 96)
    changed = tmp_path / "data" / "test" / "red disc" / "0.png"
    to_pil_image(torch.zeros(3, 48, 48)).save(changed)
    with pytest.raises(SystemExit, match="something else: test images"):
        run_cached(tmp_path, *flags)
    changed.parent.rename(tmp_path / "data" / "test" / "red line")
    with pytest.raises(SystemExit, match=r"differ in classes \['red disc', 'red line'\]"):
        run_cached(tmp_path, *flags)
    with pytest.raises(SystemExit, match="nowhere"):
        run_cached(tmp_path, "--data", str(tmp_path / "nowhere"))


EXAMPLES = ["plain", "timm_finetune", "lightning_module", "accelerate_loop", "hf_trainer", "cached_features"]


@pytest.mark.parametrize("example", EXAMPLES)
def test_mistakes_in_flags_are_one_line(example, capsys, own_accelerate):
    main = importlib.import_module(example).main
    for flags, message in (
        (["--backbone", "resnet18x"], "error: argument --backbone: timm has no model resnet18x; near: resnet18"),
        (["--epochs", "0"], "error: argument --epochs: must be a whole number from 1, got 0"),
    ):
        with pytest.raises(SystemExit):
            main(flags)
        assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_devices_and_weights_that_are_not_available_are_one_line(own_accelerate, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for example, flags, message in (
        ("lightning_module", ["--accelerator", "gpu"], "--accelerator gpu, --devices 1: "),
        ("cached_features", ["--pretrained", "--cache", str(tmp_path / "cache")], "^test_resnet: "),
    ):
        with pytest.raises(SystemExit, match=message) as ended:
            importlib.import_module(example).main(flags)
        assert "\n" not in str(ended.value)


def test_timm_with_a_backbone_made_for_one_size_of_images(drawn):
    assert timm_finetune.main(["--backbone", "test_vit", "--epochs", "2"])["net"] >= 0
    assert drawn == batches(range(2))
