"""What older releases of other packages can't do, for the oldest that setup.cfg allows."""

import pytest
import timm
import torch
from packaging.version import Version

on_meta = pytest.mark.skipif(
    Version(timm.__version__) < Version("1.0.31"), reason="older timm reads values of tensors on the meta device"
)
with_fake_cuda = pytest.mark.skipif(
    torch.__version__ < "2.10", reason="fake CUDA tensors need the driver in older torch"
)
