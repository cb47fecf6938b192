"""Random batches for property tests: sizes, dtypes, class counts and what makes distances go wrong."""

import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
KINDS = (
    "normal", "offset", "duplicates", "one class", "singletons", "non-finite", "ties", "huge", "tiny",
    "outlier", "outliers", "offset and outliers", "clusters", "unlabelled",
)  # fmt: skip
DENORMAL = "denormal"  # one more, for what computes in all of its dtype's range


def make_batch(seed: int, size: int, dim: int, classes: int, dtype: torch.dtype, kind: str) -> tuple[Tensor, Tensor]:
    """Features [size,dim] and labels [size] of `kind`; classes are uneven, and not numbered from 0."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(size, dim, generator=generator, dtype=torch.float64)
    labels = (torch.rand(size, generator=generator) ** 2 * classes).long() * 3 + 5
    if kind == "offset":
        features += 1000
    elif kind == "outlier":
        features[size // 2] *= torch.finfo(dtype).max / 64
    elif kind in ("outliers", "offset and outliers"):
        features += 1000 if kind == "offset and outliers" else 0
        features[::10] *= torch.finfo(dtype).max ** 0.4
    elif kind == "clusters":
        centres = torch.randn(size // 4 + 1, dim, generator=generator, dtype=torch.float64)
        features = centres[torch.arange(size) // 4] + 1e-3 * features
    elif kind == "unlabelled":
        labels[torch.rand(size, generator=generator) < 0.2] = -1
    elif kind == "duplicates":
        features = features[torch.randint(max(1, size // 3), (size,), generator=generator)]
    elif kind == "one class":
        labels = torch.full_like(labels, 2)
    elif kind == "singletons":
        labels = torch.arange(size)
    elif kind == "ties":
        features = features.round().clamp(-1, 1)
    scales = {"huge": torch.finfo(dtype).max / 8, "tiny": torch.finfo(dtype).tiny * 64}
    scales[DENORMAL] = torch.finfo(dtype).tiny / 64
    features = (features * scales.get(kind, 1)).to(dtype)
    if kind == "non-finite":
        bad = torch.randint(size, (1 + size // 10,), generator=generator)
        features[bad, torch.randint(dim, bad.shape, generator=generator)] = float("nan")
        features[bad[0]] = float("inf")
    return features, labels


@st.composite
def batches(draw: st.DrawFn, max_size: int = 200, max_dim: int = 300) -> tuple[Tensor, Tensor]:
    size = draw(st.integers(1, max_size))
    seed, dim, classes = draw(st.integers(0, 2**31)), draw(st.integers(1, max_dim)), draw(st.integers(1, size))
    return make_batch(seed, size, dim, classes, draw(st.sampled_from(DTYPES)), draw(st.sampled_from(KINDS)))
