"""An everyday slice of a campaign: what is wrong with recipes, files, folders, environments, limits or signals is one line.

All cases: `python -m tools.campaign.hostile`.
"""

from __future__ import annotations

from collections import Counter

import pytest

from tools.campaign.hostile import KINDS, verdicts

# Each kind at least once, by seed 0: about a minute on one core.
CASES = 110


@pytest.mark.timeout(600)
def test_what_is_wrong_is_one_line() -> None:
    kinds = [kind for kind in KINDS if kind != "disk"]  # which has its own slice, and needs mounts of its own
    found = list(verdicts(CASES, 0, kinds))
    assert [(verdict.number, verdict.case.what, verdict.fault) for verdict in found if verdict.fault] == []
    counted = Counter(verdict.kind for verdict in found)
    assert set(counted) == set(kinds)
    codes = {code for verdict in found for code in verdict.ended.codes}
    assert codes >= {0, 65, 75, 78}
