"""Functions of the package are compiled as a whole."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def _whole_functions(whole_functions):
    """For every module of this directory and below it, unless a conftest.py there says otherwise."""
