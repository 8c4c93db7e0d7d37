"""Every layout rule is proved: breaking it makes a kernel of an independent compiler wrong."""

import pytest

from .mutations import MUTATIONS, notices


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_broken_rule_is_noticed(mutation, tmp_path, monkeypatch):
    assert notices(mutation, tmp_path, monkeypatch)
