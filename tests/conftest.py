import pytest
import torch as th

th.set_num_threads(1)  # the networks in the tests are so small that more threads would mostly wait for each other


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test draws the same random numbers in every run, whichever tests ran before it."""
    th.manual_seed(0)
