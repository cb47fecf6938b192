"""Random input for the fuzz tests, good and spoiled, and what must come of what is spoiled."""

import reprlib
import traceback
from contextlib import nullcontext
from functools import partial, wraps
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import DENORMAL, DTYPES, KINDS, make_batch
from torch import Tensor

import apinet_head

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


NO_FEATURES = (
    be(None),
    lambda x: x.tolist(),
    lambda x: x.long(),
    lambda x: x > 0,
    lambda x: x.to(torch.complex64),
    lambda x: x[:, :0],
    lambda x: x[:, :, None],
    lambda x: x.flatten(),
    lambda x: x.sum(),
    lambda x: x.detach().to_sparse(),
    lambda x: x.to("meta"),
)
NO_CLASSES = (
    lambda y: y.tolist(),
    lambda y: y.double(),
    lambda y: torch.full(y.shape, torch.nan),
    lambda y: torch.ones(y.shape, dtype=torch.bool),
    lambda y: y.long()[:, None],
    lambda y: y.long().sum(),
    lambda y: y.long().to_sparse(),
)
NO_LABELS = (*NO_CLASSES, lambda y: more(y.long()), lambda y: y.to("meta"))
NO_COUNT = (be(0), be(-1), be(2.5), be(float("nan")), be("3"), be(True), be([2]))
NO_NUMBER = (be(float("nan")), be(float("inf")), be(-float("inf")), be("1"), be(False), be([1.0]))
NO_SHARE = (*NO_NUMBER, be(-0.1), be(1.1), be(None))


def check_all_refused(call, arguments, ways):
    """Assert that the call refuses its arguments as soon as one of them is spoiled, in any of its `ways`."""
    for name in [name for name in ways if name in arguments]:
        for way in ways[name]:
            value = way(arguments[name])
            check_refused(partial(call, **arguments | {name: value}), value)


def check_refused(call, *spoiled):
    """Assert that the call raises an error of the package's own, which shows one of what was spoiled."""
    caught = None
    try:
        call()
    except (ValueError, TypeError) as error:
        caught = error
    assert caught is not None, f"{call} took what is one of {spoiled}"
    *_, (frame, _) = traceback.walk_tb(caught.__traceback__)
    source = Path(frame.f_code.co_filename)
    assert Path(apinet_head.__file__).parent in source.parents, f"not the package's own error: {caught!r}"
    looks = [look for value in spoiled for look in _looks(value)]
    assert any(look in str(caught) for look in looks), f"none of {looks} in: {caught}"


def _looks(value):
    if isinstance(value, (Tensor, np.ndarray)):
        is_readable = isinstance(value, Tensor) and value.device.type == "cpu" and not value.is_sparse
        numbers = value.ravel()[:1] if is_readable else []
        return [str(list(value.shape)), *(f"got {number}" for number in numbers)]
    if isinstance(value, list):  # of which the package has made a tensor
        return [reprlib.repr(value), "list", f"[{len(value)}"]
    return [repr(value), str(value), type(value).__name__]
