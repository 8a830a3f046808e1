import pytest
import torch


@pytest.fixture
def seed(record_property) -> int:
    """A fresh seed, shown with a failure."""
    fresh = torch.seed() % 2**31
    record_property("seed", fresh)
    print(f"seed: {fresh}")
    return fresh
