"""Small stock networks with fresh weights: the parts of a Stable Diffusion folder that is trained from scratch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from stepdistill.errors import reading
from stepdistill.stock.loading import load_network


def build_tokenizer(texts: list[str], vocabulary: int, max_tokens: int) -> CLIPTokenizer:
    """A CLIPTokenizer whose merges are learned on ``texts``; every byte is a token, so nothing is unknown."""
    clip = CLIPTokenizer().backend_tokenizer
    learned = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learned.normalizer, learned.pre_tokenizer = clip.normalizer, clip.pre_tokenizer
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 2, initial_alphabet=letters, end_of_word_suffix="</w>", show_progress=False
    )
    learned.train_from_iterator(texts, trainer)
    merges: Any = [tuple(pair) for pair in json.loads(learned.to_str())["model"]["merges"]][: vocabulary - 514]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({token: i for i, token in enumerate(tokens)}, merges, model_max_length=max_tokens)


def build_vae(block_channels: list[int], layers_per_block: int, latent_channels: int, size: int) -> AutoencoderKL:
    """A VAE of RGB pictures (3, size, size), which it halves between each two of ``block_channels``."""
    return AutoencoderKL(
        sample_size=size,
        latent_channels=latent_channels,
        block_out_channels=tuple(block_channels),
        down_block_types=("DownEncoderBlock2D",) * len(block_channels),
        up_block_types=("UpDecoderBlock2D",) * len(block_channels),
        layers_per_block=layers_per_block,
        norm_num_groups=8,
    )


def build_text_encoder(tokenizer: CLIPTokenizer, width: int, layers: int, heads: int) -> CLIPTextModel:
    """An encoder of ``tokenizer``'s tokens, of as many as its ``model_max_length``."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet(
    block_channels: list[int],
    attention: list[bool],
    layers_per_block: int,
    heads: int,
    shape: tuple[int, int, int],
    text_width: int,
) -> UNet2DConditionModel:
    """A UNet on ``shape`` (C, size, size) that attends to text where ``attention`` says so, one value for each
    resolution; diffusers' ``attention_head_dim`` is the number of heads."""
    return UNet2DConditionModel(
        sample_size=shape[-1],
        in_channels=shape[0],
        out_channels=shape[0],
        block_out_channels=tuple(block_channels),
        down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention),
        up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)),
        layers_per_block=layers_per_block,
        cross_attention_dim=text_width,
        attention_head_dim=heads,
        norm_num_groups=16,
    )


def load_vae(folder: str | Path) -> AutoencoderKL:
    """The frozen VAE in ``folder``."""
    with reading(folder, "remove it, and it is made again", "cannot be loaded"):
        return load_network(AutoencoderKL, folder, str(folder)).requires_grad_(False).eval()


def load_tokenizer(folder: str | Path) -> CLIPTokenizer:
    """The tokenizer in ``folder``, with its ``model_max_length``."""
    with reading(folder, "remove it, and it is made again", "cannot be loaded"):
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
