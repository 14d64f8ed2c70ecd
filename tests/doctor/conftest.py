import pytest
import torch

from doctor import patients
from doctor.patients import data


@pytest.fixture(scope="session")
def digits():
    train, test = data()
    return train[:12], test


@pytest.fixture(scope="session")
def good():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield patients.good(data()[0])
    torch.set_num_threads(before)
