"""Anything at all into `load_official_checkpoint`, as in test_fuzz.py: files first, then what may be in them."""

import io
import pickle
import tempfile
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
import torch
from fuzzing import check_refused, fuzzed, one_of
from hypothesis import strategies as st

from apinet_head import APINet, load_official_checkpoint
from apinet_head.official import COUNTER, HEAD, STAGES

make_net = cache(APINet)  # of a ResNet-101, which takes its time to make


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


FILES = (
    b"",
    b"PK\x03\x04",
    b"weights",
    pickle.dumps({"fc.bias": 1}),
    pickle.dumps(Code()),
    saved({"state_dict": Code()}),
    saved({"state_dict": Code()}, _use_new_zipfile_serialization=False),
)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@fuzzed
def test_files(data):
    good = saved({"state_dict": {"fc.bias": torch.zeros(3)}}, _use_new_zipfile_serialization=data.draw(st.booleans()))
    cut = st.integers(0, len(good) - 1).map(lambda size: good[:size])
    noise = st.tuples(st.integers(0, len(good) - 1), st.binary(min_size=1, max_size=8)).map(
        lambda change: good[: change[0]] + change[1] + good[change[0] + len(change[1]) :]
    )
    content = data.draw(st.sampled_from(FILES) | st.binary(max_size=99) | cut | noise)
    with tempfile.TemporaryDirectory() as folder, mock.patch("apinet_head.model.APINet", make_net):
        path = Path(folder) / "model_best.pth.tar"
        path.write_bytes(content)
        # Noise that does no harm leaves a dict, only not a whole one, and of that its keys are told.
        check_refused(lambda: load_official_checkpoint(path), path, "published", "checkpoint is a dict")
        path.unlink()
        with pytest.raises(FileNotFoundError):
            load_official_checkpoint(path)


def published_state(classes):
    """A state dict as the published code stores it, all 0."""
    names = {ours: f"conv.{number}" for number, ours in STAGES.items()}
    state = {}
    for name, value in make_net("resnet101", num_classes=classes).state_dict().items():
        of_head = next((key for key, ours in HEAD.items() if name.startswith(ours)), None)
        if of_head:
            name = name.replace(HEAD[of_head], of_head)
        else:
            _, stage, rest = name.split(".", 2)
            name = f"{names[stage]}.{rest}"
        state[name] = torch.zeros(()).expand(value.shape)
    return state


@fuzzed
def test_states(data):
    with torch.device("meta"):
        state = published_state(data.draw(st.integers(1, 3)))
    key = one_of(data, sorted(name for name in state if not name.endswith(COUNTER)))
    place = key.rpartition(".")[2]  # the rest has other names here
    spoils = {
        "no": lambda: (state, []),
        "counters": lambda: ({name: value for name, value in state.items() if not name.endswith(COUNTER)}, []),
        "parallel": lambda: ({f"module.{name}": value for name, value in state.items()}, []),
        "missing": lambda: ({name: value for name, value in state.items() if name != key}, [place]),
        "shape": lambda: (state | {key: torch.zeros(2, 7)}, [key, "fc.bias"]),
        "twice": lambda: (state | {f"module.{key}": state[key]}, [place]),
        "no tensor": lambda: (state | {key: one_of(data, [None, [1.0], 0.5, "0"])}, [key]),
        "unknown": lambda: (
            state | {one_of(data, [3, None, "conv.9.weight", ("fc",), "", "fc"]): state[key]},
            ["not keys", "not expected"],
        ),
    }
    found, spoiled = spoils[one_of(data, sorted(spoils))]()
    source = one_of(data, [lambda: found, lambda: {"state_dict": found, "epoch": 3}])()
    with mock.patch("apinet_head.model.APINet", make_net):
        if spoiled:
            check_refused(lambda: load_official_checkpoint(source), *spoiled)
        else:
            expected = make_net("resnet101", num_classes=len(state["fc.bias"])).state_dict()
            loaded = load_official_checkpoint(source)
            assert {name: value.shape for name, value in loaded.items()} == {
                name: value.shape for name, value in expected.items()
            }
        for wrong in (None, 3, [("fc.bias", 1)], {"state_dict": [1]}):
            check_refused(lambda wrong=wrong: load_official_checkpoint(wrong), wrong, "list")
