import sys

import pytest
import torch
from rewards import CLIP, SMALL, FakeImageReward, Tower, head_state

from stepdistill.config import check
from stepdistill.judges.clip import ClipScorer
from stepdistill.judges.rewards import RewardSettings


@pytest.fixture
def tower(monkeypatch):
    tower = Tower()
    module = type(sys)("own_clip")
    module.make = lambda: ClipScorer(
        tower, None, lambda texts: torch.tensor([ord(t) - ord("a") for t in texts]), "tower", size=(4, 4)
    )
    monkeypatch.setitem(sys.modules, "own_clip", module)
    return tower


@pytest.fixture
def aesthetic(tower, tmp_path):
    torch.save(head_state(), tmp_path / "head.pth")
    return RewardSettings(reward="aesthetic", weights=str(tmp_path / "head.pth"), clip=CLIP)


@pytest.fixture
def library(monkeypatch, tmp_path):
    """A stand-in for the package, with files; ``asked`` keeps what it loaded, as ``RM.load`` does, and not strictly."""
    module = type(sys)("ImageReward")
    module.calls = []

    def load(name="ImageReward-v1.0", device="cpu", download_root=None, med_config=None):
        model = FakeImageReward(med_config, device)
        model.load_state_dict(torch.load(name), strict=False)
        module.calls.append((name, device, med_config, model))
        return model

    module.load = load
    torch.manual_seed(0)
    torch.save(FakeImageReward("").state_dict(), tmp_path / "ImageReward.pt")
    (tmp_path / "med_config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "ImageReward", module)
    return module


@pytest.fixture
def image_reward(tmp_path):
    files = {"weights": str(tmp_path / "ImageReward.pt"), "config": str(tmp_path / "med_config.json")}
    return RewardSettings(reward="image_reward", hinge=1000.0, **files)


@pytest.fixture
def small(monkeypatch):
    """A tiny model with random weights, under the name small of open_clip's models."""
    import open_clip
    from open_clip import factory

    monkeypatch.setitem(factory._MODEL_CONFIGS, "small", SMALL)
    torch.manual_seed(0)
    return open_clip.CLIP(**SMALL).eval()


@pytest.fixture
def hps(small, tmp_path):
    """The file's layout is HPS v2's, with more beside the tensors and at half precision."""
    state = {name: value.half() for name, value in small.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state, "optimizer": {"step": 1}}, tmp_path / "hps.pt")
    small.load_state_dict(state)
    return check(
        RewardSettings, {"reward": "hps", "weights": str(tmp_path / "hps.pt"), "clip": {"model": "small"}}, "rewards"
    )
