"""Random input for the fuzz tests, good and spoiled, and what must come of what is spoiled."""

import math
import reprlib
from contextlib import nullcontext
from functools import partial, wraps

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
    classes = data.draw(st.integers(1, max(size, 1)))
    features, labels = make_batch(
        data.draw(st.integers(0, 2**31)), size, data.draw(st.integers(1, 9)), classes, dtype, kind
    )
    features = one_of(data, LAYOUTS)(features).requires_grad_(data.draw(st.booleans()))
    # A negative label would be a large number in an unsigned dtype, and a head of so many classes doesn't fit.
    dtypes = SIGNED if kind == "unlabelled" else INTEGERS
    return features, labels.to(one_of(data, dtypes)), kind


def be(value):
    """A way to spoil an argument: another value, whatever it was."""
    return lambda _: value


def more(tensor):
    return torch.cat([tensor, tensor.new_zeros(1, *tensor.shape[1:])])


def wider(rows):
    return torch.cat([rows, rows[:, :1]], 1)


NO_FEATURES = (
    be(None), lambda x: x.tolist(), lambda x: x.long(), lambda x: x > 0, lambda x: x.to(torch.complex64),
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
    be(None), more, lambda x: x.tolist(), lambda x: x[:1], lambda x: x[0], lambda x: x[..., :0], lambda x: x.long(),
    lambda x: x.half(), lambda x: x.to("meta"), lambda x: x.index_fill(2, torch.tensor(0), math.nan),
    lambda x: x.index_fill(1, torch.tensor(0), math.inf),
)  # fmt: skip
NO_COUNT = (be(0), be(-1), be(2.5), be(math.nan), be("3"), be(True), be([2]))
NO_NUMBER = (be(math.nan), be(math.inf), be(-math.inf), be("1"), be(False), be([1.0]))
NO_MODULE = (be(None), be(3), lambda net: [net], lambda net: (net, net), be(nn.Linear))

WAYS = {  # to spoil an argument of each name
    **dict.fromkeys(("dim", "hidden_dim", "size", "chunk_size", "n_samples", "n_batches"), NO_COUNT),
    **dict.fromkeys(("memory", "num_pairs"), NO_COUNT[1:]),
    **dict.fromkeys(("lr", "backbone_lr", "weight_decay"), (*NO_NUMBER, be(-0.1))),
    **dict.fromkeys(("margin", "rank_weight"), NO_NUMBER),
    **dict.fromkeys(("dropout", "label_smoothing"), (*NO_NUMBER, be(-0.1), be(1.1), be(None))),
    **dict.fromkeys(("intra", "inter"), (be("nearest"), be(1), be(["similar"]))),
    **dict.fromkeys(("features", "logits_self"), NO_FEATURES),
    **dict.fromkeys(("features of D", "logits_other"), (*NO_FEATURES, wider)),
    "keys": (*NO_FEATURES[1:], wider),
    "labels": (*NO_LABELS, be(None)),
    "labels, if any": NO_LABELS,
    "labels alone": NO_CLASSES,
    "key_labels": NO_LABELS,
    "key_offset": (be(-1), be(100), be(0.5), be(True), be("0")),
    "anchor": (be(None), more, lambda y: y.tolist(), lambda y: y.double(), lambda y: torch.full_like(y, -1)),
    "partner": (be(3), more, lambda y: y[:, None], lambda y: y.to("meta")),
    "valid": (be(None), more, lambda y: y.long(), lambda y: y.to("meta"), lambda y: y.tolist()),
    "num_rows": (be(3), be(torch.ones(2))),
    "generator": (be(0), be("cpu")),
    "num_classes": (*NO_COUNT[1:], be(None)),
    "mutual": (be("attention"), be(None), be(["mlp"]), be(nn.Linear)),
    "gate": (be("triple"), be(None), be(["pair"])),
    "dtype": (be(torch.int64), be(torch.bool), be(torch.complex64), be("float32")),
    "backbone": NO_MODULE,
    "net": (*NO_MODULE, lambda net: net.backbone),
    "images": NO_IMAGES,
    "top_k": (*NO_COUNT, be(5)),
    "n_classes": (*NO_COUNT, be(100)),
    "seed": (be(0.5), be(None), be(math.nan), be("0"), be(True)),
    "rank": (be(-1), be(3), be(0.0), be("0"), be(False)),
    "world_size": (*NO_COUNT, be(101)),
}


def check_all_refused(call, arguments, **ways):
    """Assert that the call refuses its arguments as soon as one of them is spoiled, in any of `ways`, or else WAYS."""
    ways = WAYS | ways
    for name, value in arguments.items():
        for way in ways[name]:
            spoiled = way(value)
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
