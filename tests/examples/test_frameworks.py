"""The examples of training in other frameworks: they learn, from the very batches that the sampler makes."""

import importlib
import json

import lightning
import lightning_module
import plain
import pytest
import torch
from commands import ROOT, finish
from frameworks_on_ranks import watch
from ranks import script_on_ranks
from torch.utils.data import DataLoader
from toy import CLASSES, Shapes

from apinet_head import APINet, BalancedBatchSampler

TARGETS = Shapes(train=True).targets


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
    train, again, test = ([picture.tobytes() for picture in Shapes(part).pictures] for part in (True, True, False))
    assert train == again
    assert not set(train) & set(test)
    assert len(CLASSES) == len(set(TARGETS)) == 6


@pytest.mark.parametrize(
    ("example", "flags", "epochs", "least", "settings"),
    [
        ("plain", [], 12, 0.6, {}),
        ("lightning_module", ["--accelerator", "cpu"], 12, 0.6, {}),
        ("accelerate_loop", ["--cpu"], 12, 0.6, {}),
        ("accelerate_loop", ["--cpu", "--mixed-precision", "bf16"], 3, 0, {}),
        ("timm_finetune", [], 12, 0.5, {}),
        ("timm_finetune", ["--backbone", "test_vit"], 2, 0, {}),  # made for one size of images
        ("hf_trainer", ["--cpu", "--out", "net"], 12, 0.6, {"seed": 42}),  # that of TrainingArguments
    ],
)
def test_loops_learn_from_the_sampler_s_batches(
    drawn, own_accelerate, tmp_path, monkeypatch, example, flags, epochs, least, settings
):
    monkeypatch.chdir(tmp_path)
    found = importlib.import_module(example).main([*flags, "--epochs", str(epochs)])
    assert drawn == batches(range(epochs), **settings)
    if example == "timm_finetune":
        assert found["average"] >= 0.8 * least
        found = found["net"]
    assert found >= least
    if example == "hf_trainer":
        assert plain.accuracy_on(Shapes(train=False), APINet.from_pretrained("net"), "cpu") == pytest.approx(found)


def test_trainer_of_transformers_resumes_within_an_epoch(drawn, own_accelerate, tmp_path):
    hf_trainer, transformers = map(importlib.import_module, ("hf_trainer", "transformers"))
    settings = transformers.TrainingArguments(
        str(tmp_path), num_train_epochs=3, save_strategy="steps", save_steps=7, logging_strategy="no", report_to="none",
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip

    def train(**how):
        torch.manual_seed(0)
        net = hf_trainer.ForTrainer(APINet("test_resnet", len(CLASSES)))
        images = {"train_dataset": Shapes(True), "data_collator": hf_trainer.collate}
        hf_trainer.BalancedTrainer(net, settings, **images).train(**how)
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


def test_lightning_resumes_with_the_next_epochs_batches(tmp_path, monkeypatch):
    rows, example = [], lightning_module.APIClassifier

    def note(self, batch, index):
        rows.extend(batch.tolist())
        return next(self.parameters()).sum()

    monkeypatch.setattr(example, "training_step", note)
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    quiet |= {"accelerator": "cpu", "default_root_dir": tmp_path, "limit_val_batches": 0}
    newest = None
    for epochs in ([0, 1], [2, 3]):
        rows.clear()
        trainer = lightning.Trainer(max_epochs=epochs[1] + 1, **quiet)
        trainer.fit(example("test_resnet", len(CLASSES)), datamodule=Rows(), ckpt_path=newest)
        assert rows == batches(epochs)
        newest = trainer.checkpoint_callback.best_model_path


@pytest.mark.parametrize(
    ("example", "flags", "settings"),
    [
        ("accelerate_loop", ["--cpu"], {}),
        pytest.param("hf_trainer", ["--cpu", "--out", "out"], {"seed": 42}, marks=pytest.mark.slow),
        pytest.param("lightning_module", ["--accelerator", "cpu", "--devices", "2"], {}, marks=pytest.mark.slow),
    ],
)
def test_two_ranks_share_each_batch_by_its_classes(tmp_path, example, flags, settings):
    command = [ROOT / "tests/helpers/frameworks_on_ranks.py", example, str(tmp_path), *flags, "--epochs", "4"]
    if example == "lightning_module":  # which starts the ranks itself
        code, out, err = finish(*command)
        assert code == 0, err
    else:
        out = "".join(script_on_ranks(2, command[0], tmp_path, *command[1:]))
    assert out.count("test accuracy") == 1
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for rank in range(2):
        assert found[rank]["drawn"] == batches(range(4), rank=rank, world_size=2, **settings)
    assert found[0]["accuracy"] == found[1]["accuracy"]


@pytest.mark.parametrize("example", ["plain", "timm_finetune", "lightning_module", "accelerate_loop", "hf_trainer"])
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
def test_a_device_that_is_not_available_is_one_line():
    with pytest.raises(SystemExit, match="--accelerator gpu, --devices 1: ") as ended:
        lightning_module.main(["--accelerator", "gpu"])
    assert "\n" not in str(ended.value)
