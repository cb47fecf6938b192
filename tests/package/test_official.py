"""`load_official_checkpoint` on state dicts of the published layout, made here with torchvision."""

import copy
import pickle
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from apinet_head import APINet, load_official_checkpoint, mine_pairs


@pytest.fixture(scope="module")
def published():
    """The published modules with random weights and statistics, as its constructor lays them out."""
    torch.manual_seed(0)
    net = nn.Module()
    net.conv = nn.Sequential(*list(torchvision.models.resnet101().children())[:-2])
    net.map1, net.map2, net.fc = nn.Linear(4096, 512), nn.Linear(512, 2048), nn.Linear(2048, 11)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.8, 1.2)
    return net.eval()


def data_parallel(state):
    return {key.replace("conv.", "conv.module.", 1): value for key, value in state.items()}


@pytest.mark.parametrize("wrapped", [True, False])
def test_logits_are_those_of_plain_torch(published, wrapped, tmp_path):
    state = data_parallel(published.state_dict()) if wrapped else published.state_dict()
    torch.save({"epoch": 3, "state_dict": state, "best_prec1": 88.6}, tmp_path / "checkpoint.pth.tar")
    net = APINet("resnet101", num_classes=11)
    net.load_state_dict(load_official_checkpoint(tmp_path / "checkpoint.pth.tar"))
    net, published = net.double().eval(), copy.deepcopy(published).double()
    images, labels = torch.randn(3, 3, 64, 64, dtype=torch.float64), torch.tensor([0, 0, 1])
    with torch.no_grad():
        x = published.conv(images).mean((2, 3))
        torch.testing.assert_close(net(images), published.fc(x), rtol=0, atol=1e-6)
        pairs = mine_pairs(x, labels)
        a, b = x[pairs.anchor], x[pairs.partner]
        gate = torch.sigmoid(published.map2(published.map1(torch.cat([a, b], 1))) * b)
        expected = F.linear(a + a * gate, published.fc.weight, published.fc.bias)
        torch.testing.assert_close(net(images, labels, pairs=pairs).logits_other[:6], expected, rtol=0, atol=1e-6)


# test_fuzz_official.py has keys that are missing, unknown or there twice, and files that are damaged.
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fc.bias": 0}, r"not tensors: fc.bias is int"),
        ({"extra.weight": torch.zeros(1)}, r"not keys of the published API-Net: extra.weight"),
        ({"conv.4.7.conv1.weight": torch.zeros(1)}, r"not expected in .*: conv.4.7.conv1.weight"),
        ({"map1.weight": torch.zeros(256, 4096)}, r"map1.weight is \[256, 4096\] instead of \[512, 4096\]"),
    ],
)
def test_what_does_not_fit_is_named(published, change, message):
    with pytest.raises(ValueError, match=message):
        load_official_checkpoint({**published.state_dict(), **change})


def test_a_file_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"evil\.pth cannot be read .* more than tensors") as refused:
        load_official_checkpoint(tmp_path / "evil.pth")
    assert isinstance(refused.value.__cause__, pickle.UnpicklingError)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("folder", ["apinet_head", "examples", "benchmarks"])
def test_torch_load_is_asked_for_tensors_alone_everywhere(folder):
    for path in (Path(__file__).parents[2] / folder).rglob("*.py"):
        calls = [line.strip() for line in path.read_text().splitlines() if "torch.load(" in line]
        assert all("weights_only=True" in line or line.startswith('"') for line in calls), path


def test_a_file_that_is_no_checkpoint_is_named_with_its_cause(tmp_path):
    path = tmp_path / "model_best.pth.tar"
    path.write_bytes(b"no checkpoint\n")
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))} cannot be read .*Download it again") as refused:
        load_official_checkpoint(path)
    assert refused.value.__cause__ is not None
