"""No test leaves the state of Accelerate to the next one."""

import pytest
from tests.support.accelerate_loop import fresh_accelerate


@pytest.fixture(autouse=True)
def clean_accelerate():
    fresh_accelerate()
    yield
    fresh_accelerate()
