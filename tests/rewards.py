"""Small models of tests of rewards, and pictures for them."""

import torch
from torch import nn

F64 = torch.float64


WIDTH = 6


CLIP = {"model": "own_clip:make"}


class Tower(nn.Module):
    """Pictures of 4 x 4 and prompts of one letter to embeddings of length WIDTH, linearly."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.picture = nn.Parameter(torch.randn(WIDTH, 48, generator=generator))
        self.text = nn.Parameter(torch.randn(26, WIDTH, generator=generator))

    def encode_image(self, images):
        return images.flatten(1) @ self.picture.T

    def encode_text(self, tokens):
        return self.text[tokens]


def head_state(width=WIDTH):
    """Weights of the public file's names and shapes, large enough that a score says something."""
    generator = torch.Generator().manual_seed(0)
    widths = [width, 1024, 128, 64, 16, 1]
    state = {}
    for place, inside, outside in zip((0, 2, 4, 6, 7), widths, widths[1:], strict=False):
        state[f"layers.{place}.weight"] = torch.randn(outside, inside, generator=generator) / inside**0.5
        state[f"layers.{place}.bias"] = torch.randn(outside, generator=generator)
    return state


def some_pixels(count=3, size=4, channels=3, spread=0.5):
    pixels = spread * torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(1))
    return pixels.requires_grad_()


class Tokens(dict):
    __getattr__ = dict.__getitem__


class Blip(nn.Module):
    def __init__(self):
        super().__init__()
        self.visual_encoder, self.text_encoder = nn.Linear(3, 4), nn.Embedding(128, 4)
        self.vision_proj = nn.Linear(4, 4)  # in the model, and not used by a score

    def tokenizer(self, prompts, padding, truncation, max_length, return_tensors):
        assert (padding, truncation, return_tensors) == ("max_length", True, "pt")
        ids = torch.tensor([[ord(c) for c in p[:max_length].ljust(max_length, "\0")] for p in prompts])
        return Tokens(input_ids=ids, attention_mask=(ids > 0).long())


class FakeImageReward(nn.Module):
    """image-reward 1.5's class: ``blip`` with its tokenizer, ``mlp``, ``score_gard`` that gives (B, 1)."""

    def __init__(self, med_config, device="cpu"):
        super().__init__()
        self.device, self.blip, self.mlp = device, Blip(), nn.Linear(4, 1)

    def score_gard(self, prompt_ids, prompt_attention_mask, image):
        assert image.shape[1:] == (3, 224, 224)
        assert prompt_ids.shape == prompt_attention_mask.shape == (len(image), 35)
        words = (self.blip.text_encoder(prompt_ids) * prompt_attention_mask[..., None]).sum(1)
        return self.mlp(self.blip.visual_encoder(image.mean((2, 3))) * words)


def small_clip_config(size=32, **text):
    from transformers import CLIPConfig

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"vocab_size": 190, "max_position_embeddings": 16, "bos_token_id": 188, "eos_token_id": 189}
    vision = {"image_size": size, "patch_size": 16, **small}
    return CLIPConfig(projection_dim=8, text_config={**small, **ends, **text}, vision_config=vision)


def save_pick_score(folder, words=True, dtype=torch.float32, **text):
    """A tiny CLIPModel with random weights, and the tokenizer of its letters, as transformers' own folder."""
    from tiny import tokenizer
    from transformers import CLIPModel

    torch.manual_seed(0)
    model = CLIPModel(small_clip_config(**text))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder)
    if words:
        tokenizer(folder)
    return folder


SMALL = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
