"""Files that would run code when they are read, in place of each kind of file that is loaded: refused, and not run."""

import pickle
import shutil

import pytest
import torch
from cub_runs import run
from safetensors import SafetensorError

import score
from apinet_head import APINet


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, ran):
        self.ran = ran

    def __reduce__(self):
        return exec, (f"open({str(self.ran)!r}, 'w')",)


@pytest.fixture
def evil(tmp_path):
    """Its file must not be there at the end."""
    ran = tmp_path / "ran"
    yield Evil(ran)
    assert not ran.exists()


def test_it_would_run(tmp_path):
    pickle.loads(pickle.dumps(Evil(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


@pytest.fixture(scope="module")
def trained(birds, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    run(birds, folder, "--epochs", "1")
    return folder


@pytest.mark.parametrize("name", ["state.pt", "process-0.pt"])
def test_a_checkpoint_of_a_run(birds, trained, tmp_path, evil, name):
    shutil.copytree(trained, tmp_path / "run")
    (checkpoint,) = (tmp_path / "run" / "state").iterdir()
    torch.save({"processes": 1, "net": evil, "random": evil}, checkpoint / name)
    with pytest.raises(SystemExit, match=r"no checkpoint in .* can be loaded"):
        run(birds, tmp_path / "run", "--epochs", "1")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_model_folder(trained, tmp_path, evil, name):
    """`pytorch_model.bin` is what the Hub's older models have: a pickle, which is not looked for."""
    folder = shutil.copytree(trained / "best", tmp_path / "best")
    (folder / "model.safetensors").unlink()
    torch.save(evil, folder / name)
    for load in (APINet.from_pretrained, lambda path: score.main([str(path), "--device", "cpu"])):
        with pytest.raises((SafetensorError, FileNotFoundError, SystemExit)):
            load(folder)
