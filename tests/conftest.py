"""One thread for every test and every program a test starts: sums then come out bit for bit the same."""

import logging
import os
import sys

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import pytest

pytest.register_assert_rewrite("tests.backbone_contract")  # tests that are not in a file of tests


@pytest.fixture(autouse=True)
def plain_linears(monkeypatch):
    """ZeRO-3, once started in this process, replaces this function by its own for good. That one saves other tensors
    and cannot be compiled, so no later test may see it."""
    if torch := sys.modules.get("torch"):
        monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)


@pytest.fixture(autouse=True)
def project_log():
    """A program sets up the project's log for its process; after the test it is as it was, whatever runs next."""
    log = logging.getLogger("assistant")
    before = log.handlers[:], log.propagate, log.level
    yield
    log.handlers, log.propagate = before[0], before[1]
    log.setLevel(before[2])
