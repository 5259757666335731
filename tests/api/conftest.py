"""What the tests of the API share."""

from __future__ import annotations

import pytest

from lib_lora_train.run import runner as runner_module
from tests.fake_host import FakeJob


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> FakeJob:
    fake = FakeJob()
    monkeypatch.setattr(runner_module, "run_job", fake)
    return fake
