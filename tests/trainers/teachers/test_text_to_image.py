"""A text-to-image teacher of one's own: the data, the vocabulary, a VAE that is standardised, training that resumes to
the same bits, and a folder that stock diffusers loads."""

import io
import json
import random
import shutil
import sys
import tarfile
import types

import numpy as np
import pytest
import torch
from console import stepdistill
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from stepdistill.config import check
from stepdistill.data.arrays import read_npz
from stepdistill.errors import UserError
from stepdistill.eval.stock_pipeline import StockPipeline
from stepdistill.families import load_family
from stepdistill.objectives.denoising import capped_snr_weight
from stepdistill.schedule import from_scheduler
from stepdistill.trainers.teachers import autoencoder, captioned, emoji, loop
from stepdistill.trainers.teachers.captioned import Entry, caption_of, training_caption
from stepdistill.trainers.teachers.networks import build_tokenizer, build_vae, load_vae
from stepdistill.trainers.teachers.text_to_image import TextTeacherConfig, text_teacher_scheduler, train_text_teacher

NAMES = ["red heart", "blue heart", "grinning face", "cat face", "up arrow", "clock"]


def entries():
    result = [Entry(caption_of(n, s), n, s, ["round", "small"]) for n in NAMES for s in ("noto", "flat")]
    result[-1].split, result[0].split = "held-out-name", "held-out-pair"
    return result


@pytest.fixture
def data(tmp_path):
    words = entries()
    images = np.random.default_rng(0).integers(0, 255, (len(words), 16, 16, 3), dtype=np.uint8)
    captioned.write_pictures(tmp_path / "data", images, words, [])
    return tmp_path / "data"


def raw(data, output, **changes):
    loop = {"steps": 2, "batch_size": 4, "warmup": 1, "save_every": 1}
    return {
        "kind": "text_to_image",
        "output": str(output),
        "data": str(data),
        "vae": {**loop, "block_channels": [8, 8]},
        "text": {"vocabulary": 530, "max_tokens": 12, "width": 8, "layers": 1, "heads": 2},
        "denoiser": {**loop, "block_channels": [16, 16], "attention": [False, True], "heads": 2},
        "samples": {"prompts": ["red heart, noto style", "clock"], "steps": 2},
        **changes,
    }


def config(data, output, **changes):
    return check(TextTeacherConfig, raw(data, output, **changes), "test")


# -- the data ----------------------------------------------------------------------------------------------


def icon_sets():
    """Iconify's documents in small: a hidden icon, a skin tone, a name written together, an unknown one."""
    icons = {name.replace(" ", "-"): {"body": f"<{name}/>"} for name in NAMES}
    sets = {prefix: {"icons": dict(icons), "width": 32, "height": 32} for prefix in emoji.STYLES}
    sets["noto"]["icons"] |= {"secret": {"body": "", "hidden": True}, "hand-dark-skin-tone": {"body": ""}}
    sets["noto"]["info"] = {"name": "Noto", "author": {"name": "G", "url": "u"}, "license": {"spdx": "Apache-2.0"}}
    sets["noto"]["icons"]["traffic-light"] = {"body": "<t/>", "left": 2, "width": 16}
    sets["fluent-emoji"]["icons"]["hand-medium-light"] = {"body": ""}
    sets["fxemoji"]["icons"] = {"redheart": {"body": "<r/>"}, "hocho": {"body": ""}}
    return {f"json/{prefix}.json": document for prefix, document in sets.items()}


def tarball(path, documents):
    with tarfile.open(path, "w:gz") as archive:
        for name, document in documents.items():
            content = json.dumps(document).encode()
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def sources(tmp_path):
    tags = [{"label": "Red Heart", "tags": ["love", "red heart"]}]
    return tarball(tmp_path / "icons.tgz", icon_sets()), tarball(tmp_path / "tags.tgz", {"en/data.json": tags})


@pytest.fixture
def drawn(monkeypatch):
    """A stand-in for resvg_py that draws one grey square."""

    def svg_to_bytes(svg_string, width, height, **_):
        file = io.BytesIO()
        Image.new("RGBA", (width, height), (90, 90, 90, 128)).save(file, "PNG")
        return file.getvalue()

    monkeypatch.setitem(sys.modules, "resvg_py", types.SimpleNamespace(svg_to_bytes=svg_to_bytes))


def test_icons_are_read_from_a_tarball_or_a_folder(sources, tmp_path):
    icons = emoji.collect_icons(emoji.read_sets(sources[0]))
    assert {style for _, style in icons} == {"noto", "blob", "firefox", "fluent", "flat"}
    assert ("red heart", "firefox") in icons
    assert not {"secret", "hocho"} & {name for name, _ in icons}
    assert not [name for name, _ in icons if name.startswith("hand")]
    assert 'viewBox="2 0 16 32"' in icons["traffic light", "noto"]
    for name, document in icon_sets().items():
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_text(json.dumps(document))
    assert emoji.collect_icons(emoji.read_sets(tmp_path / "folder")) == icons


def test_the_command_writes_pictures_captions_and_prompts(sources, drawn, tmp_path):
    sizes = emoji.make_emoji(*sources, tmp_path / "data", size=8)
    images, words = captioned.read_pictures(tmp_path / "data")
    assert images.shape == (len(words), 8, 8, 3)
    assert images.min() == images.max() == 172  # grey, half over white
    assert sum(sizes.values()) == len(words) == 4 * 6 + 1 + 1
    heart = next(e for e in words if e.caption == "red heart, noto style")
    assert heart.keywords == ["love"]
    owed = json.loads((tmp_path / "data/captions.json").read_text())["credits"]
    assert owed[0] == {"style": "noto", "set": "Noto", "author": "G", "url": "u", "licence": "Apache-2.0"}
    prompts = (tmp_path / "data/prompts.txt").read_text().splitlines()
    assert prompts == [e.caption for e in words if e.split == "train"]
    packed = read_npz(tmp_path / "data/training.npz", (3, 8, 8))
    assert packed.labels == prompts


def test_styles_and_words_may_be_left_out(sources, drawn, tmp_path):
    emoji.make_emoji(*sources, tmp_path / "all", size=8)
    whole = {e.caption: e for e in captioned.read_pictures(tmp_path / "all")[1]}
    arguments = ("--icons", sources[0], "--keywords", sources[1], "--output", tmp_path / "some")
    answer = stepdistill("teacher", "emoji", *arguments, "--styles", "noto, flat", "--without", "heart")
    assert answer.code == 0, answer.err
    some = {e.caption: e for e in captioned.read_pictures(tmp_path / "some")[1]}
    assert {c for c, e in whole.items() if e.style in ("noto", "flat") and "heart" not in e.name} == set(some)
    assert "red heart, noto style" in whole
    assert "red heart, noto style" not in some
    owed = json.loads((tmp_path / "some/captions.json").read_text())["credits"]
    assert [line["style"] for line in owed] == ["noto", "flat"]
    assert "the styles are noto, blob," in stepdistill("teacher", "emoji", *arguments, "--styles", "noto,nota").error
    words = ",".join({w for e in whole.values() for w in e.name.split()})
    assert "no picture is left" in stepdistill("teacher", "emoji", *arguments, "--without", words).error


def test_held_out_names_and_pairs_are_stable_and_of_the_wanted_kind():
    pairs = [(f"name {i}", style) for i in range(400) for style in emoji.STYLES.values()]
    parts = emoji.split_pairs(pairs)
    assert parts[:1000] == emoji.split_pairs(pairs[:1000])
    of_names = {}
    for (name, _), part in zip(pairs, parts, strict=True):
        of_names.setdefault(name, set()).add(part)
    whole = [n for n, splits in of_names.items() if "held-out-name" in splits]
    assert all(of_names[n] == {"held-out-name"} for n in whole)
    assert all("train" in splits for splits in of_names.values() if "held-out-pair" in splits)
    assert 8 <= len(whole) <= 35
    assert 0.03 < parts.count("held-out-pair") / len(parts) < 0.07
    assert set(emoji.split_pairs([("alone", "noto")], share=0.999)) <= {"train", "held-out-name"}


def test_training_captions_are_varied_and_seeded():
    entry = Entry("cat, noto style", "cat", "noto", ["pet", "whiskers"])
    draw = random.Random(0)
    drawn = [training_caption(entry, draw) for _ in range(2000)]
    assert 0.7 < drawn.count("cat, noto style") / 2000 < 0.8
    assert 0.06 < drawn.count("cat") / 2000 < 0.1
    assert {"cat, pet, noto style", "pet, whiskers, noto style"} <= set(drawn)
    draw = random.Random(0)
    assert drawn == [training_caption(entry, draw) for _ in range(2000)]
    bare = Entry("cat, noto style", "cat", "noto")
    assert {training_caption(bare, draw) for _ in range(100)} == {"cat, noto style", "cat"}


def test_bad_sources_are_answered_in_one_line(sources, tmp_path, monkeypatch):
    icons, _ = sources
    with pytest.raises(UserError, match=r"--icons .*absent.tgz: no such file or folder; .*npm pack @iconify/json@"):
        emoji.make_emoji(tmp_path / "absent.tgz", None, tmp_path / "data")
    with pytest.raises(UserError, match=r"--keywords .*icons.tgz: no en/data.json in it; .*npm pack emojibase-data@"):
        emoji.make_emoji(icons, icons, tmp_path / "data")
    (tmp_path / "no.tgz").write_text("text")
    with pytest.raises(UserError, match=r"--icons .*no.tgz: cannot be read"):
        emoji.make_emoji(tmp_path / "no.tgz", None, tmp_path / "data")
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(UserError, match=r"resvg-py: pip install 'stepdistill\[emoji\]'"):
        emoji.make_emoji(icons, None, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_the_commands_say_what_is_wrong_in_one_line(tmp_path):
    answer = stepdistill("teacher", "emoji", "--icons", tmp_path / "absent.tgz", "--output", tmp_path / "data")
    assert answer.code == 2
    assert "npm pack @iconify/json@" in answer.error
    (tmp_path / "c.yaml").write_text("kind: poems\n")
    answer = stepdistill("teacher", "train", tmp_path / "c.yaml")
    assert answer.code == 2
    assert "kind = 'poems': use one of class_conditional, text_to_image" in answer.error
    (tmp_path / "c.yaml").write_text("kind: text_to_image\noutput: x\n")
    assert "key 'data' is missing" in stepdistill("teacher", "train", tmp_path / "c.yaml").error


# -- the parts ---------------------------------------------------------------------------------------------


def test_the_tokenizer_learns_words_and_survives_saving(tmp_path):
    texts = [entry.caption for entry in entries()] * 3
    result = build_tokenizer(texts, 600, 12)
    assert result.tokenize("heart") == ["heart</w>"]
    assert result("Red  heart, noto style").input_ids == result("red heart, noto style").input_ids
    assert result.unk_token_id not in result("zebra ☃ 42", add_special_tokens=False).input_ids
    assert result.decode(result("zebra ☃!").input_ids, skip_special_tokens=True) == "zebra ☃!"
    assert len(result) <= 600
    result.save_pretrained(tmp_path / "saved")
    loaded = CLIPTokenizer.from_pretrained(tmp_path / "saved")
    assert loaded.get_vocab() == result.get_vocab()
    for text in [*texts, "", "Zebra ☃, no style", "x" * 50]:
        options = {"padding": "max_length", "truncation": True, "max_length": loaded.model_max_length}
        assert loaded(text, **options).input_ids == result(text, **options).input_ids
        assert len(loaded(text, **options).input_ids) == 12
    assert loaded("").input_ids == [len(result) - 2, len(result) - 1]


def test_standardised_latents_decode_to_the_same_pictures():
    torch.manual_seed(0)
    vae = build_vae([8, 8], 1, 4, 16).eval().requires_grad_(False)
    vae.quant_conv.bias += torch.linspace(-2, 2, 8)
    pixels = torch.rand(12, 3, 16, 16) * 2 - 1
    before, scale = vae.encode(pixels).latent_dist, vae.config.scaling_factor
    decoded = vae.decode(before.mean).sample
    autoencoder.standardise_latents(vae, pixels)
    after = vae.encode(pixels).latent_dist
    assert scale != vae.config.scaling_factor == 1.0
    torch.testing.assert_close(after.mean.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(after.mean.std(dim=(0, 2, 3)), torch.ones(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(vae.decode(after.mean).sample, decoded, atol=1e-4, rtol=1e-4)
    ratio = (before.std / after.std)[:, :, 0, 0]  # the posterior's width shrinks by the same factor
    torch.testing.assert_close(ratio, before.mean.std(dim=(0, 2, 3)).expand_as(ratio), atol=1e-4, rtol=1e-3)


# -- training ----------------------------------------------------------------------------------------------


def weights(path):
    family = load_family(str(path))
    assert family.name == "stable_diffusion"
    parts = {"unet": family.network, "text": family.text_encoder, "vae": family.vae}
    return family, {f"{part}.{k}": v for part, m in parts.items() for k, v in m.state_dict().items()}


def test_a_stopped_training_goes_on_to_the_same_weights(data, tmp_path, monkeypatch):
    whole = train_text_teacher(config(data, tmp_path / "whole"))
    saved = loop._save_partial

    def save_and_die(path, step, *state):
        saved(path, step, *state)
        if step == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "_save_partial", save_and_die)
    for stopped in ("vae.partial", "denoiser.partial"):
        with pytest.raises(KeyboardInterrupt):
            train_text_teacher(config(data, tmp_path / "halves"))
        assert (tmp_path / "halves.work" / stopped).is_file()
        assert not (tmp_path / "halves").exists()
    monkeypatch.setattr(loop, "_save_partial", saved)
    halves = train_text_teacher(config(data, tmp_path / "halves"))
    family, one = weights(whole)
    for key, value in weights(halves)[1].items():
        assert torch.equal(value, one[key]), key
    assert family.kind == "v"
    assert family.schedule.alphas_cumprod[-1] == 0
    assert family.sample_shape == (4, 8, 8)
    assert family.image_shape == (3, 16, 16)
    facts = family.network.config["_stepdistill"]
    assert facts["trained_steps"] == 2
    called = config(data, whole).samples
    arguments = StockPipeline.load(whole)
    assert (arguments.default_steps, arguments.default_guidance) == (called.steps, called.guidance_scale)
    assert facts["config"]["denoiser"]["block_channels"] == [16, 16]
    pictures = {path.name for path in (tmp_path / "whole.work/pictures").iterdir()}
    assert pictures == {"vae-1.png", "vae.png", "samples-1.png", "samples.png"}


def test_fewer_steps_than_done_write_what_there_is_in_half_precision(data, tmp_path):
    path = train_text_teacher(config(data, tmp_path / "t"))
    _, full = weights(path)
    short = raw(data, tmp_path / "t", dtype="float16")
    short["denoiser"]["steps"] = 1
    again = train_text_teacher(check(TextTeacherConfig, short, "test"))
    family, half = weights(again)
    assert family.network.config["_stepdistill"]["trained_steps"] == 2
    for key, value in half.items():
        assert value.dtype == full[key].dtype, key
        if value.is_floating_point():
            assert torch.equal(value, full[key].half().float()), key


def test_work_of_another_training_is_refused(data, tmp_path):
    train_text_teacher(config(data, tmp_path / "t"))
    other = raw(data, tmp_path / "t")
    other["denoiser"]["block_channels"] = [16, 32]
    with pytest.raises(UserError, match=r"denoiser.partial: saved by a training of another network; remove it"):
        train_text_teacher(check(TextTeacherConfig, other, "test"))
    other = raw(data, tmp_path / "t")
    other["vae"]["latent_channels"] = 8
    with pytest.raises(
        UserError, match=r"t.work/vae: trained with other settings: vae.latent_channels \(4 there, 8 now"
    ):
        train_text_teacher(check(TextTeacherConfig, other, "test"))


def test_latents_are_of_this_vae_and_these_pictures(data, tmp_path, capsys):
    work = tmp_path / "t.work"
    train_text_teacher(config(data, tmp_path / "t"))
    first = load_file(work / "latents.safetensors")["latents"]
    train_text_teacher(config(data, tmp_path / "t"))
    assert "made anew" not in capsys.readouterr().out
    for gone in ("vae", "vae.partial"):
        shutil.rmtree(work / gone, ignore_errors=True)
        (work / gone).unlink(missing_ok=True)
    other = raw(data, tmp_path / "t", seed=1)
    train_text_teacher(check(TextTeacherConfig, other, "test"))
    assert "latents.safetensors: damaged, or of another VAE or other pictures; made anew" in capsys.readouterr().out
    second = load_file(work / "latents.safetensors")["latents"]
    assert second.shape == first.shape
    assert not torch.allclose(first, second, atol=0.1)
    vae = load_vae(work / "vae")
    images, words = captioned.read_pictures(data)
    training = [i for i, entry in enumerate(words) if entry.split == "train"]
    pixels = torch.from_numpy(images[training]).permute(0, 3, 1, 2).float() / 127.5 - 1
    torch.testing.assert_close(autoencoder.encode_all(vae, pixels), second)
    captioned.write_pictures(data, images[:-2], words[:-2], [])
    train_text_teacher(check(TextTeacherConfig, other, "test"))
    assert len(load_file(work / "latents.safetensors")["latents"]) == len(first) - 1


def test_the_loss_weight_is_one_at_pure_noise_and_capped_below():
    schedule = from_scheduler(text_teacher_scheduler())[0]
    t = torch.arange(1000)
    alpha, sigma = schedule.alpha_sigma(t)
    splits = capped_snr_weight(schedule, t, 5.0).double()
    snr = alpha**2 / sigma**2
    torch.testing.assert_close(splits, torch.minimum(torch.ones(1000).double(), 6 / (snr + 1)), atol=1e-6, rtol=1e-5)
    assert splits[-1] == 1
    assert splits[0] < 0.01


def test_the_loss_is_weighted_by_the_cap(data, tmp_path):
    def unet(cap):
        settings = raw(data, tmp_path / str(cap))
        settings["denoiser"]["snr_cap"] = cap
        path = train_text_teacher(check(TextTeacherConfig, settings, "test"))
        return load_file(path / "unet/diffusion_pytorch_model.safetensors")

    low, high = unet(0.5), unet(1e6)
    assert any(not torch.allclose(low[key], high[key], atol=1e-6) for key in low)


def test_the_folder_is_a_stock_pipeline(data, tmp_path):
    path = train_text_teacher(config(data, tmp_path / "t", dtype="float16"))
    assert load_file(path / "text_encoder/model.safetensors").popitem()[1].dtype == torch.float16
    pipeline = DiffusionPipeline.from_pretrained(path)
    assert type(pipeline) is StableDiffusionPipeline
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        assert {p.dtype for p in part.parameters()} == {torch.float32}
    assert pipeline.scheduler.config.steps_offset == 1
    assert not pipeline.scheduler.config.clip_sample
    assert pipeline.scheduler.config.set_alpha_to_one
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a red heart", num_inference_steps=2, guidance_scale=3).images[0]
    assert image.size == (16, 16)
    assert pipeline.tokenizer.model_max_length == 12


def test_bad_configs_and_data_are_answered_in_one_line(data, tmp_path):
    with pytest.raises(UserError, match=r"denoiser: attention: one value for each of block_channels"):
        config(data, tmp_path / "t", denoiser={"block_channels": [16], "attention": [True, False]})
    with pytest.raises(UserError, match=r"vae: block_channels: 12 is not a multiple of 8"):
        config(data, tmp_path / "t", vae={"block_channels": [12]})
    with pytest.raises(UserError, match=r"text: width 16 is not a multiple of heads 3"):
        config(data, tmp_path / "t", text={"width": 16, "heads": 3})
    with pytest.raises(UserError, match=r"images.npz is not there; make it with: stepdistill teacher emoji"):
        train_text_teacher(config(tmp_path / "absent", tmp_path / "t"))
    with pytest.raises(UserError, match=r"pictures of 16x16; .* multiple of 32"):
        train_text_teacher(config(data, tmp_path / "t", vae={"block_channels": [8] * 5}))
    (data / "captions.json").write_text("{}")
    with pytest.raises(UserError, match=r"cannot be read .* make it with: stepdistill teacher emoji"):
        train_text_teacher(config(data, tmp_path / "t"))
    assert not (tmp_path / "t.work").exists()
