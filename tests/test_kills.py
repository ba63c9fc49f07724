"""Twenty kills at random moments, of fixed seed: nothing is lost beyond the last save (tests/kill_trial.py)."""

import pytest

from tests.kill_trial import WAYS, trial

KILLS, SEED = 20, 0


@pytest.mark.slow
def test_killed_runs_end_as_uninterrupted_ones(tmp_path):
    lines = trial(tmp_path, KILLS, SEED)
    assert len(lines) == KILLS and {line["way"] for line in lines} == {way.name for way in WAYS}
    assert [line for line in lines if line["verdict"] != "as uninterrupted"] == []
    assert sum(line["over"] for line in lines) <= 2  # kills that came after the end
    assert any(line["stopped"] for line in lines) and any(line["kept"] for line in lines if not line["stopped"])
