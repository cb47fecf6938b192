"""What holds for all tests of the package."""

import sys

import pytest


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    """What one test compiles does not count as a recompilation for the next."""
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
