"""Objects named as module:attribute."""

import sys

import pytest

from stepdistill.errors import UserError
from stepdistill.plugins import import_attribute


def test_a_module_of_the_current_folder_is_found(tmp_path, monkeypatch):
    (tmp_path / "my_own_rewards.py").write_text("def redness(pixels, items): ...\n")
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(UserError, match="module 'my_own_rewards' cannot be imported"):
        import_attribute("my_own_rewards:redness", "reward")
    monkeypatch.chdir(tmp_path)
    assert import_attribute("my_own_rewards:redness", "reward").__name__ == "redness"
    with pytest.raises(UserError, match="module 'my_own_rewards' has no 'blueness'"):
        import_attribute("my_own_rewards:blueness", "reward")
