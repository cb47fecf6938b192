"""Files that would run code when they are read, in place of each kind of file that is loaded: refused, and not run."""

import ast
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from cub_runs import run
from safetensors import SafetensorError

import score as evaluate
from apinet_head import APINet
from workbench.checkpoint import MANIFEST, digest

ROOT = Path(__file__).parents[2]
FOLDERS = ("apinet_head", "examples", "benchmarks", "docs", "tests")
SOURCES = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]


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


@pytest.mark.parametrize("name", ["state.pt", "process-0.pt"])
def test_a_checkpoint_of_a_run(birds, tmp_path, evil, name):
    """With a checksum that fits, as who puts it there would see to."""
    run(birds, tmp_path / "run", "--epochs", "1")
    (checkpoint,) = (tmp_path / "run" / "state").iterdir()
    torch.save({"net": evil, "random": evil}, checkpoint / name)
    digests = json.loads((checkpoint / MANIFEST).read_text()) | {name: digest(checkpoint / name)}
    (checkpoint / MANIFEST).write_text(json.dumps(digests))
    with pytest.raises(SystemExit, match=f"{checkpoint / name} is refused, and nothing in it was run"):
        run(birds, tmp_path / "run", "--epochs", "1")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_model_folder(birds, tmp_path, evil, name):
    """`pytorch_model.bin` is what the Hub's older models have: a pickle, which is not looked for."""
    run(birds, tmp_path / "run", "--epochs", "1")
    folder = tmp_path / "best"
    shutil.copytree(tmp_path / "run" / "best", folder)
    (folder / "model.safetensors").unlink()
    torch.save(evil, folder / name)
    for load in (APINet.from_pretrained, lambda path: evaluate.main([str(path), "--device", "cpu"])):
        with pytest.raises((SafetensorError, FileNotFoundError)):
            load(folder)


def calls(path):
    """The calls of a file, by the name as it is written there."""
    nodes = ast.walk(ast.parse(path.read_text()))
    return [(ast.unparse(node.func), node) for node in nodes if isinstance(node, ast.Call)]


def test_nothing_else_unpickles():
    loads = [(path, node) for path in SOURCES for name, node in calls(path) if name == "torch.load"]
    assert {path.name for path, _ in loads} >= {"official.py", "checkpoints.py"}
    for path, node in loads:
        assert {word.arg: ast.unparse(word.value) for word in node.keywords}.get("weights_only") == "True", path
    unpickling = ("pickle.load", "pickle.loads", "pickle.Unpickler", "joblib.load", "shelve.open", "pandas.read_pickle")
    for path in SOURCES:
        if path.parent != ROOT / "tests":  # which copy nets by pickle
            names = {name for name, _ in calls(path)}
            assert not names & set(unpickling), path
            assert "allow_pickle" not in path.read_text(), path
