"""The settings of one reward, and which files each kind needs."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from stepdistill.config import Section, UserPath
from stepdistill.judges.clip import ClipSettings

NEEDS = {
    "aesthetic": {
        "weights": "the predictor's file, sac+logos+ava1-l14-linearMSE.pth",
        "clip": "the CLIP model that the predictor was trained on, OpenAI's ViT-L-14-quickgelu",
    },
    "image_reward": {
        "weights": "the file ImageReward.pt",
        "config": "the file med_config.json from the same place as the weights",
    },
    "pick_score": {"weights": "the folder of PickScore_v1, with config.json and model.safetensors"},
    "hps": {"weights": "the file HPS_v2.1_compressed.pt, or HPS_v2_compressed.pt"},
    "clip": {"clip": "a CLIP model"},
}
"""What each kind of reward needs of the settings, and what that is."""

OPTIONAL = {"pick_score": ("config",), "hps": ("clip",)}
"""What a kind of reward may take besides."""

HPS_MODEL = "ViT-H-14"
"""open_clip's name of the model that HPS v2 is."""


class RewardSettings(Section):
    """One reward: which, how much of it, from which files."""

    reward: str = Field(
        description="aesthetic, image_reward, pick_score, hps, clip, or module:attribute: an nn.Module or another "
        "callable of pixels and items, or a class or function without arguments that gives one"
    )
    weight: float = Field(1.0, gt=0)
    hinge: float | None = Field(
        None, description="a picture whose reward is this or more is left alone; without it the reward is maximised"
    )
    weights: UserPath | None = Field(
        None, description="a local file: aesthetic's predictor, image_reward's or hps's .pt; pick_score's folder"
    )
    config: UserPath | None = Field(
        None,
        description="image_reward's med_config.json; pick_score's tokenizer folder, that of "
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K, where the weights' folder has none",
    )
    clip: ClipSettings | None = Field(
        None,
        description="the model of clip, and of aesthetic's embeddings; hps's is ViT-H-14 unless clip.model names "
        "another of open_clip's, its file is weights and its prefix is empty",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_in_hps_model(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and raw.get("reward") == "hps" and isinstance(raw.get("clip"), dict):
            return {
                **raw,
                "clip": {"model": HPS_MODEL, "pretrained": raw.get("weights") or "missing", "prefix": ""} | raw["clip"],
            }
        return raw

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> RewardSettings:
        if self.reward not in NEEDS and ":" not in self.reward:
            raise ValueError(f"reward = {self.reward}: write {', '.join(NEEDS)} or module:attribute")
        needs = NEEDS.get(self.reward, {})
        for key in ("weights", "config", "clip"):
            is_set = getattr(self, key) is not None
            if key in needs and not is_set:
                raise ValueError(f"{key} is missing: reward = {self.reward} needs {needs[key]}")
            if is_set and key not in (*needs, *OPTIONAL.get(self.reward, ())):
                raise ValueError(f"{key} has no use with reward = {self.reward}; remove it")
        if self.reward == "hps" and self.clip is not None:
            if ":" in self.clip.model or self.clip.hub:
                raise ValueError(
                    f"clip.model = {self.clip.model}: reward = hps loads its weights into one of open_clip's model "
                    "names, without hub"
                )
            if self.clip.pretrained != self.weights:
                raise ValueError("clip.pretrained has no use with reward = hps, whose file is weights; remove it")
        return self

    def require_clip(self) -> ClipSettings:
        """The CLIP model's settings.

        Raises:
            ValueError: this reward has none.
        """
        if self.clip is None:
            raise ValueError(f"reward = {self.reward} has no clip model")
        return self.clip
