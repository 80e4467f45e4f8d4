"""Functions of the package are called as they are."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def _whole_functions():
    """Dozens of generators share their few operations, so these compile faster one by one than as whole functions."""
