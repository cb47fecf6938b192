"""Random input for the fuzz tests, good and spoiled, and what must come of what is spoiled."""

import math
import reprlib
from contextlib import nullcontext
from functools import partial, wraps
from types import FunctionType

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import DENORMAL, DTYPES, KINDS, make_batch
from torch import Tensor, nn

FEW, MANY = 20, 200  # cases of each fuzz test in `make test`, and in `make test-slow`

INTEGERS = [getattr(torch, f"{sign}int{bits}") for bits in (8, 16, 32, 64) for sign in ("", "u")]
SIGNED = [dtype for dtype in INTEGERS if dtype.is_signed]
LAYOUTS = (
    lambda x: x,
    lambda x: x.mT.contiguous().mT,
    lambda x: x.repeat_interleave(2, 0)[::2],
    lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
)
MODES = (nullcontext, torch.no_grad, torch.inference_mode)


def fuzzed(body):
    """The test of a body on FEW cases, and on MANY; the body draws all it needs from hypothesis' `data`."""

    @wraps(body)
    def seeded(data):
        torch.manual_seed(data.draw(st.integers(0, 2**31)))
        body(data)

    @pytest.mark.parametrize("cases", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
    def test(cases):
        with_settings = settings(max_examples=cases, deadline=None, suppress_health_check=[HealthCheck.too_slow])
        with_settings(given(st.data())(seeded))()

    return test


def one_of(data, choices):
    return data.draw(st.sampled_from(choices))


def draw_batch(data, dtypes=DTYPES, kinds=(*KINDS, DENORMAL), least=0):
    """Features [B,D], B from `least` on, in any layout, with or without gradient; labels [B]; and of which kind."""
    size, dtype = data.draw(st.integers(least, 12)), one_of(data, dtypes)
    kind = one_of(data, kinds) if size else "normal"
    classes, seed, dim = (data.draw(st.integers(*ends)) for ends in ((1, max(size, 1)), (0, 2**31), (1, 9)))
    features, labels = make_batch(seed, size, dim, classes, dtype, kind)
    features = one_of(data, LAYOUTS)(features).requires_grad_(data.draw(st.booleans()))
    # A negative label would be a large number in an unsigned dtype, and a head of so many classes doesn't fit.
    dtypes = SIGNED if kind == "unlabelled" else INTEGERS
    return features, labels.to(one_of(data, dtypes)), kind


def more(tensor):
    return torch.cat([tensor, tensor.new_zeros(1, *tensor.shape[1:])])


def wider(rows):
    return torch.cat([rows, rows[:, :1]], 1)


NO_FEATURES = (
    None, lambda x: x.tolist(), lambda x: x.long(), lambda x: x > 0, lambda x: x.to(torch.complex64),
    lambda x: x[:, :0], lambda x: x[:, :, None], lambda x: x.flatten(), lambda x: x.sum(),
    lambda x: x.detach().to_sparse(), lambda x: x.to("meta"),
)  # fmt: skip
NO_CLASSES = (
    lambda y: y.tolist(), lambda y: y.double(), lambda y: torch.full(y.shape, torch.nan),
    lambda y: torch.ones(y.shape, dtype=torch.bool), lambda y: y.long()[:, None], lambda y: y.long().sum(),
    lambda y: y.long().to_sparse(),
)  # fmt: skip
NO_LABELS = (*NO_CLASSES, lambda y: more(y.long()), lambda y: y.to("meta"))
NO_IMAGES = (
    None, more, lambda x: x.tolist(), lambda x: x[:1], lambda x: x[0], lambda x: x[..., :0], lambda x: x.long(),
    lambda x: x.half(), lambda x: x.to("meta"), lambda x: x.index_fill(2, torch.tensor(0), math.nan),
    lambda x: x.index_fill(1, torch.tensor(0), math.inf),
)  # fmt: skip
NO_COUNT = (0, -1, 2.5, math.nan, "3", True, [2])
NO_NUMBER = (math.nan, math.inf, -math.inf, "1", False, [1.0])
NO_MODULE = (None, 3, lambda net: [net], lambda net: (net, net), nn.Linear)

WAYS = {  # to spoil an argument of each name: other values, and functions of the good one
    **dict.fromkeys(("dim", "hidden_dim", "size", "chunk_size", "n_samples", "n_batches"), NO_COUNT),
    **dict.fromkeys(("memory", "num_pairs"), NO_COUNT[1:]),
    **dict.fromkeys(("lr", "backbone_lr", "weight_decay"), (*NO_NUMBER, -0.1)),
    **dict.fromkeys(("margin", "rank_weight"), NO_NUMBER),
    **dict.fromkeys(("dropout", "label_smoothing"), (*NO_NUMBER, -0.1, 1.1, None)),
    **dict.fromkeys(("intra", "inter"), ("nearest", 1, ["similar"])),
    **dict.fromkeys(("features", "logits_self"), NO_FEATURES),
    **dict.fromkeys(("features of D", "logits_other"), (*NO_FEATURES, wider)),
    "keys": (*NO_FEATURES[1:], wider),
    "labels": (*NO_LABELS, None),
    "labels, if any": NO_LABELS,
    "labels alone": NO_CLASSES,
    "key_labels": NO_LABELS,
    "key_offset": (-1, 100, 0.5, True, "0"),
    "anchor": (None, more, lambda y: y.tolist(), lambda y: y.double(), lambda y: torch.full_like(y, -1)),
    "partner": (3, more, lambda y: y[:, None], lambda y: y.to("meta")),
    "valid": (None, more, lambda y: y.long(), lambda y: y.to("meta"), lambda y: y.tolist()),
    "num_rows": (3, torch.ones(2)),
    "generator": (0, "cpu"),
    "num_classes": (*NO_COUNT[1:], None),
    "mutual": ("attention", None, ["mlp"], nn.Linear),
    "gate": ("triple", None, ["pair"]),
    "dtype": (torch.int64, torch.bool, torch.complex64, "float32"),
    "backbone": NO_MODULE,
    "net": (*NO_MODULE, lambda net: net.backbone),
    "images": NO_IMAGES,
    "top_k": (*NO_COUNT, 5),
    "n_classes": (*NO_COUNT, 100),
    "seed": (0.5, None, math.nan, "0", True),
    "rank": (-1, 3, 0.0, "0", False),
    "world_size": (*NO_COUNT, 101),
}


def check_all_refused(call, arguments, **ways):
    """Assert that the call refuses its arguments as soon as one of them is spoiled, in any of `ways`, or else WAYS."""
    ways = WAYS | ways
    for name, value in arguments.items():
        for way in ways[name]:
            spoiled = way(value) if isinstance(way, FunctionType) else way
            check_refused(partial(call, **arguments | {name: spoiled}), spoiled)


def check_refused(call, *spoiled):
    """Assert that the call raises an error of the package's own, which shows one of what was spoiled."""
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    assert "apinet_head" in caught.traceback[-1].path.parts[-3:], f"not the package's own error: {caught!r}"
    looks = [look for value in spoiled for look in _looks(value)]
    assert any(look in str(caught.value) for look in looks), f"none of {looks} in: {caught.value}"


def _looks(value):
    if isinstance(value, (Tensor, np.ndarray)):
        is_readable = isinstance(value, Tensor) and value.device.type == "cpu" and not value.is_sparse
        numbers = value.ravel()[:1] if is_readable else []
        return [str(list(value.shape)), *(f"got {number}" for number in numbers)]
    if isinstance(value, list):  # of which the package has made a tensor
        return [reprlib.repr(value), "list", f"[{len(value)}"]
    return [repr(value), str(value), type(value).__name__]
