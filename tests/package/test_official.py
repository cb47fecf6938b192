"""`load_official_checkpoint` on state dicts of the published layout, made with torchvision, and on anything at all."""

import io
import pickle
import tempfile
from functools import cache, partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import torchvision
from fuzzing import check_refused, fuzzed, one_of
from hypothesis import strategies as st
from torch import nn

from apinet_head import APINet, load_official_checkpoint, mine_pairs
from apinet_head.official import COUNTER


def make_published(classes):
    """The published modules, as their constructor lays them out."""
    net = nn.Module()
    net.conv = nn.Sequential(*list(torchvision.models.resnet101().children())[:-2])
    net.map1, net.map2, net.fc = nn.Linear(4096, 512), nn.Linear(512, 2048), nn.Linear(2048, classes)
    return net.eval()


def test_logits_are_those_of_plain_torch(tmp_path):
    torch.manual_seed(0)
    published = make_published(11)
    for module in published.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.8, 1.2)
    state = published.state_dict()
    data_parallel = {key.replace("conv.", "conv.module.", 1): value for key, value in state.items()}
    torch.save({"epoch": 3, "state_dict": data_parallel, "best_prec1": 88.6}, tmp_path / "checkpoint.pth.tar")
    loaded = load_official_checkpoint(tmp_path / "checkpoint.pth.tar")
    torch.testing.assert_close(load_official_checkpoint(state), loaded, rtol=0, atol=0)
    net = APINet("resnet101", num_classes=11)
    net.load_state_dict(loaded)
    net, published = net.double().eval(), published.double()
    images, labels = torch.randn(3, 3, 64, 64, dtype=torch.float64), torch.tensor([0, 0, 1])
    with torch.no_grad():
        x = published.conv(images).mean((2, 3))
        torch.testing.assert_close(net(images), published.fc(x), rtol=0, atol=1e-6)
        pairs = mine_pairs(x, labels)
        a, b = x[pairs.anchor], x[pairs.partner]
        gate = torch.sigmoid(published.map2(published.map1(torch.cat([a, b], 1))) * b)
        expected = F.linear(a + a * gate, published.fc.weight, published.fc.bias)
        torch.testing.assert_close(net(images, labels, pairs=pairs).logits_other[:6], expected, rtol=0, atol=1e-6)


def ran():
    pytest.fail("the file ran code")


class Code:
    """What runs when it is unpickled."""

    def __reduce__(self):
        return ran, ()


def saved(value, **how):
    buffer = io.BytesIO()
    torch.save(value, buffer, **how)
    return buffer.getvalue()


def test_torch_load_is_asked_for_tensors_alone_everywhere():
    root = Path(__file__).parents[2]
    for folder in ("apinet_head", "examples", "benchmarks"):
        for path in (root / folder).rglob("*.py"):
            calls = [line.strip() for line in path.read_text().splitlines() if "torch.load(" in line]
            assert all("weights_only=True" in line or line.startswith('"') for line in calls), path


FILES = (
    b"",
    b"PK\x03\x04",
    b"weights",
    pickle.dumps({"fc.bias": 1}),
    pickle.dumps(Code()),
    saved({"state_dict": Code()}),
    saved({"state_dict": Code()}, _use_new_zipfile_serialization=False),
)
make_net = cache(APINet)  # of a ResNet-101, which takes its time to make


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@fuzzed
def test_any_file_is_read_or_refused(data):
    good = saved({"state_dict": {"fc.bias": torch.zeros(3)}}, _use_new_zipfile_serialization=data.draw(st.booleans()))
    cut = st.integers(0, len(good) - 1).map(lambda size: good[:size])
    noise = st.tuples(st.integers(0, len(good) - 1), st.binary(min_size=1, max_size=8)).map(
        lambda change: good[: change[0]] + change[1] + good[change[0] + len(change[1]) :]
    )
    drawn = data.draw(st.binary(max_size=99) | cut | noise)
    with tempfile.TemporaryDirectory() as folder, mock.patch("apinet_head.model.APINet", make_net):
        path = Path(folder) / "model_best.pth.tar"
        unreadable = f"{path} cannot be read as a checkpoint: it is damaged, or holds more than tensors"
        for content in (*FILES, drawn):
            path.write_bytes(content)
            # Noise that does no harm leaves a dict, only not a whole one, and of that its keys are told.
            check_refused(partial(load_official_checkpoint, path), unreadable, "published", "checkpoint is a dict")
        path.unlink()
        with pytest.raises(FileNotFoundError):
            load_official_checkpoint(path)


@cache
def state_on_meta(classes):
    with torch.device("meta"):
        return make_published(classes).state_dict()


@fuzzed
def test_any_state_is_taken_or_refused(data):
    state = {**state_on_meta(data.draw(st.integers(1, 3)))}
    without_counters = {name: value for name, value in state.items() if not name.endswith(COUNTER)}
    key = one_of(data, sorted(without_counters))
    place = key.rpartition(".")[2]  # the rest has other names here
    unknown = one_of(data, [3, None, "conv.9.weight", ("fc",), "", "fc", "conv.4.7.conv1.weight"])
    is_named = unknown in ("fc", "conv.4.7.conv1.weight")  # as something published would be
    problem = "not expected in the published ResNet-101" if is_named else "not keys of the published API-Net"
    good = (state, without_counters, {f"module.{name}": value for name, value in state.items()})
    spoiled = (
        ({name: value for name, value in state.items() if name != key}, place),
        (state | {key: torch.zeros(2, 7)}, "no fc.bias" if key == "fc.bias" else f"{key} is [2, 7] instead of ["),
        (state | {f"module.{key}": state[key]}, place),
        (state | {key: one_of(data, [None, [1.0], 0.5, "0"])}, f"not tensors: {key} is "),
        (state | {unknown: state[key]}, f"{problem}: {unknown}"),
    )

    def load(found):
        return load_official_checkpoint(one_of(data, [found, {"state_dict": found, "epoch": 3}]))

    with mock.patch("apinet_head.model.APINet", make_net):
        expected = make_net("resnet101", num_classes=len(state["fc.bias"])).state_dict()
        for found in good:
            shapes = {name: value.shape for name, value in load(found).items()}
            assert shapes == {name: value.shape for name, value in expected.items()}
        for found, words in spoiled:
            check_refused(partial(load, found), words)
        for wrong in (None, 3, [("fc.bias", 1)], {"state_dict": [1]}):
            check_refused(partial(load_official_checkpoint, wrong), wrong, "list")
