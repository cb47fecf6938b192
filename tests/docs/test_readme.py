"""What the documents say can be done: every Python snippet runs, every command exists."""

import importlib
import io
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import zipfile
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from unittest import mock

import nbformat
import pytest
import torch
import yaml
from nbclient import NotebookClient
from ranks import script_on_ranks
from torch.distributed.run import get_args_parser as torchrun_flags

import apinet_head
from workbench.settings import parse

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / folder / "README.md" for folder in (".", "examples", "examples/frameworks", "benchmarks")]
PAGES = [*DOCUMENTS, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(document, language):
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(), flags=re.MULTILINE | re.DOTALL)


SNIPPETS = [(page, code) for page in PAGES for code in blocks(page, "python")]
LINES = [line for document in DOCUMENTS for block in blocks(document, "sh") for line in block.splitlines()]
COMMANDS = [line.split("#")[0].strip() for line in LINES]


def test_there_are_snippets_and_commands():
    assert len(SNIPPETS) >= 5
    assert {"make demo", "make test"} <= set(COMMANDS)


@pytest.mark.parametrize(("document", "code"), SNIPPETS, ids=lambda value: getattr(value, "name", "snippet"))
def test_snippet_runs(document, code, tmp_path, monkeypatch, own_accelerate):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(document), "exec"), {"__name__": "snippet"})


@pytest.mark.slow
def test_notebook_runs_with_pictures():
    notebook = nbformat.read(ROOT / "examples/walkthrough.ipynb", as_version=4)
    NotebookClient(notebook, timeout=180, resources={"metadata": {"path": str(ROOT / "examples")}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 6


@cache
def help_of(script):
    """What `script --help` prints, run in this process, because a new one spends seconds on importing torch."""
    printed = io.StringIO()
    with mock.patch.object(sys, "argv", [script, "--help"]), redirect_stdout(printed), pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert end.value.code == 0
    return printed.getvalue()


@pytest.mark.parametrize("command", [each for each in COMMANDS if each.startswith(("python", "torchrun", "make "))])
def test_command_has_its_script_and_flags(command):
    program, script, *flags = shlex.split(command)
    processes = 1
    if program == "make":
        assert re.search(rf"^{script}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        return
    if program == "torchrun":
        launch = torchrun_flags().parse_args([script, *flags])
        processes, script, flags = int(launch.nproc_per_node), launch.training_script, launch.training_script_args
    assert (ROOT / script).exists()
    if script.endswith("train_cub.py"):
        assert parse(flags).n_classes % processes == 0  # which the processes share
    else:
        assert all(flag in help_of(script) for flag in flags if flag.startswith("--"))


def test_the_loop_of_the_page_on_ranks_runs_on_two(tmp_path):
    (tmp_path / "train.py").write_text(blocks(ROOT / "docs/ranks.md", "python")[0])
    script_on_ranks(2, tmp_path / "train.py", tmp_path)
    assert "head.classifier.weight" in torch.load(tmp_path / "net.pt", weights_only=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_and_pictures_are_there(page):
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()) if "://" not in target]
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_api_page_shows_every_public_name_and_members_that_exist():
    page = (ROOT / "docs/api.md").read_text() + "\n"
    shown = {}
    for path, options in re.findall(r"^::: ([\w.]+)\n((?:    .*\n)*)", page, re.MULTILINE):
        module, _, name = path.rpartition(".")
        members = yaml.safe_load(options or "options: {}")["options"].get("members", [])
        assert {*members} <= {*dir(getattr(importlib.import_module(module), name))}, path
        shown[path] = {*members}
    assert {f"apinet_head.{name}" for name in apinet_head.__all__} <= {*shown}
    of_the_net = {name for name in vars(apinet_head.APINet) if not name.startswith("_")}
    assert of_the_net - shown["apinet_head.APINet"] == {"train"}


def test_wheel_holds_the_package_alone_and_works(tmp_path):
    shutil.rmtree(ROOT / "build" / "lib", ignore_errors=True)  # else modules that are gone by now come into the wheel
    build = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path, ROOT]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"apinet_head"}
    assert "apinet_head/py.typed" in names
    packaged = {name for name in names if name.endswith(".py")}
    assert packaged == {str(path.relative_to(ROOT)) for path in (ROOT / "apinet_head").rglob("*.py")}

    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = f"import apinet_head; print(apinet_head.__file__)\n{blocks(ROOT / 'README.md', 'python')[0]}"
    environment = {"PYTHONPATH": str(tmp_path / "site")}
    found = subprocess.check_output([sys.executable, "-c", code], cwd=tmp_path, env=environment, text=True)
    assert str(tmp_path / "site") in found
