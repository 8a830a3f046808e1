import pytest

from onepass.ops.softmax import kernels
from onepass.testing import parametrize


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parametrize.backends_and_dtypes(metafunc, kernels.FORWARD)
