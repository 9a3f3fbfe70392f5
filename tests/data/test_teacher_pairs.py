"""Noise-sample pairs: what they hold, going on, growing, shares, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import tiny
import torch
from diffusers import ConsistencyModelPipeline, DDIMScheduler
from safetensors.torch import load_file, save_file

from stepdistill.data.order import Order
from stepdistill.data.teacher_pairs import PairRecipe, PairSet, make_pairs
from stepdistill.denoiser import guided
from stepdistill.errors import UserError
from stepdistill.families import calls_of, load_family
from stepdistill.readers import read_tensors
from stepdistill.roles.roles import Roles
from stepdistill.roles.settings import LoRASettings, RolesSettings
from stepdistill.sampler import ddim_times

RECIPE = PairRecipe(count=10, shard=4, steps=3, guidance_scale=2.0, seed=5)
ITEMS = [0, 1, 2]


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return load_family(str(tiny.save_pixels(tmp_path_factory.mktemp("pairs") / "t", "v", labels=3, null=True)))


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def assert_same_tensors(a, b):
    assert {path.name for path in a.iterdir()} == {path.name for path in b.iterdir()}
    for path in a.iterdir():
        first, second = load_file(path), load_file(b / path.name)
        assert all(torch.equal(first[key], second[key]) for key in ("noise", "x0"))


def test_a_pair_is_noise_and_the_teachers_deterministic_sample_of_it(family, tmp_path):
    make_pairs(family, ITEMS, RECIPE, tmp_path, batch=3)
    pairs = PairSet(tmp_path, family, ITEMS, RECIPE)
    assert len(pairs) == 10 == len(pairs.items)
    assert {path.name for path in tmp_path.iterdir()} == {f"pairs-0000{i}.safetensors" for i in range(3)}
    assert pairs.noise.mean().abs() < 0.15
    assert 0.9 < pairs.noise.std() < 1.1
    x, schedule, condition = pairs.noise, family.schedule, family.encode_conditions(pairs.items)
    times = ddim_times(schedule, 3)
    with torch.no_grad():
        for index, time in enumerate(times):
            t = torch.full((10,), int(time))
            x0 = guided(family.denoiser(), x, t, condition, family.null_condition(10), 2.0).x0
            if index < 2:
                x = schedule.step(x0, x, t, torch.full((10,), int(times[index + 1])))
    torch.testing.assert_close(pairs.x0, x0, rtol=0, atol=1e-5)


BOUNDED = {
    "clipped": {"clip_sample": True},
    "clipped to a range": {"clip_sample": True, "clip_sample_range": 0.7},
    "thresholded": {"clip_sample": False, "thresholding": True, "sample_max_value": 1.5},
    "thresholded before clipped": {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 3.0},
    "neither": {"clip_sample": False},
}


@pytest.mark.parametrize("name", BOUNDED)
@pytest.mark.parametrize("kind", ["v_prediction", "epsilon"])
def test_pairs_are_the_stock_ddim_samples_of_a_teacher_that_bounds_x0(name, kind, tmp_path):
    """Unbounded, they were up to 0.06 of a shipped teacher's range away."""
    scheduler = DDIMScheduler(**tiny.SD_BETAS, prediction_type=kind, timestep_spacing="trailing", **BOUNDED[name])
    ConsistencyModelPipeline(tiny.unet(), scheduler).save_pretrained(tmp_path / "teacher")
    recipe = PairRecipe(count=4, shard=4, steps=8, guidance_scale=1.0, seed=5)
    family = load_family(str(tmp_path / "teacher"))
    make_pairs(family, [], recipe, tmp_path / "pairs", batch=4)
    pairs = PairSet(tmp_path / "pairs", family, [], recipe)
    pipe = calls_of(ConsistencyModelPipeline.from_pretrained(tmp_path / "teacher")).with_noise().pipeline
    latest = []
    pipe(4, num_inference_steps=8, latents=pairs.noise, callback=lambda i, t, x: latest.append(x))
    torch.testing.assert_close(pairs.x0, latest[-1], rtol=1e-6, atol=1e-4)
    largest = pairs.x0.abs().max().item()
    assert largest > 1 if name == "neither" else largest <= BOUNDED[name].get("clip_sample_range", 1) + 1e-6
    family.clipping = None
    if name == "neither":
        assert len(PairSet(tmp_path / "pairs", family, [], recipe)) == 4
        return
    with pytest.raises(UserError, match="another teacher or other settings"):
        PairSet(tmp_path / "pairs", family, [], recipe)


def test_a_latent_pipeline_does_not_clip_whatever_its_scheduler_says(tmp_path):
    """Stock Stable Diffusion turns clip_sample off, and so do pairs of such a teacher."""
    folder = tiny.save_stable_diffusion(tmp_path / "teacher")
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "clip_sample": True}))
    assert load_family(str(folder)).clipping is None


def test_what_is_there_is_kept_and_what_is_cut_short_is_made_again(family, tmp_path):
    make_pairs(family, ITEMS, RECIPE, tmp_path, batch=4)
    shutil.copytree(tmp_path, tmp_path.with_name("whole"))
    whole = bytes_of(tmp_path)
    (tmp_path / "pairs-00001.safetensors").write_bytes(whole["pairs-00001.safetensors"][:100])
    (tmp_path / "pairs-00002.safetensors").unlink()
    first = (tmp_path / "pairs-00000.safetensors").stat().st_mtime_ns
    with pytest.raises(UserError, match=r"pairs-00001\.safetensors is missing; make it with: stepdistill pairs"):
        PairSet(tmp_path, family, ITEMS, RECIPE)
    make_pairs(family, ITEMS, RECIPE, tmp_path, batch=4)
    assert_same_tensors(tmp_path, tmp_path.with_name("whole"))
    assert (tmp_path / "pairs-00000.safetensors").stat().st_mtime_ns == first


def test_machines_share_the_work_and_a_folder_may_grow(family, tmp_path):
    make_pairs(family, ITEMS, RECIPE, tmp_path / "one", batch=4)
    for index in range(2):
        make_pairs(family, ITEMS, RECIPE, tmp_path / "two", batch=4, part=(index, 2))
    assert_same_tensors(tmp_path / "one", tmp_path / "two")
    more = PairRecipe(count=16, shard=4, steps=3, guidance_scale=2.0, seed=5)
    make_pairs(family, ITEMS, more, tmp_path / "two", batch=4)
    grown = PairSet(tmp_path / "two", family, ITEMS, more)
    assert len(grown) == 16
    before = PairSet(tmp_path / "one", family, ITEMS, RECIPE)
    assert torch.equal(grown.noise[:10], before.noise)
    torch.testing.assert_close(grown.x0[:10], before.x0)
    assert grown.items[:10] == before.items


def test_every_shard_has_noise_of_its_own_and_goes_on_in_the_conditions_order(family, tmp_path):
    make_pairs(family, ITEMS, RECIPE, tmp_path, batch=4)
    pairs = PairSet(tmp_path, family, ITEMS, RECIPE)
    assert torch.pdist(pairs.noise.flatten(1)).min() > 5  # of two unit normals in 64 dimensions: 11.3
    assert pairs.items == [ITEMS[i] for i in Order(3, 5).indices(0, 10)]
    assert [pairs.items.count(item) for item in ITEMS] in ([4, 3, 3], [3, 4, 3], [3, 3, 4])


@pytest.mark.parametrize("change", [{"shard": 5}, {"steps": 4}, {"guidance_scale": 1.0}, {"seed": 6}])
def test_pairs_of_other_settings_are_refused(family, tmp_path, change):
    make_pairs(family, ITEMS, RECIPE, tmp_path, batch=4)
    with pytest.raises(UserError, match="another teacher or other settings"):
        make_pairs(family, ITEMS, replace(RECIPE, **change), tmp_path, batch=4)


def test_pairs_of_other_conditions_or_another_teacher_are_refused(family, tmp_path):
    make_pairs(family, ITEMS, RECIPE, tmp_path / "a", batch=4)
    with pytest.raises(UserError, match="another teacher or other settings"):
        PairSet(tmp_path / "a", family, [0, 2, 1], RECIPE)
    stranger = load_family(str(tiny.save_pixels(tmp_path / "t", "v", labels=3, null=True, seed=9)))
    with pytest.raises(UserError, match="another teacher or other settings"):
        PairSet(tmp_path / "a", stranger, ITEMS, RECIPE)


def test_adapters_on_the_teacher_are_not_the_teacher(family, tmp_path):
    """A run with LoRA roles reads the pairs that were made without."""
    make_pairs(family, ITEMS, RECIPE, tmp_path / "pairs", batch=4)
    again = load_family(str(tiny.save_pixels(tmp_path / "t", "v", labels=3, null=True)))
    Roles(again, RolesSettings(weights="shared", lora=LoRASettings(rank=2)))
    assert len(PairSet(tmp_path / "pairs", again, ITEMS, RECIPE)) == 10


def rewritten(file, change, keep_digest=True):
    """The shard after ``change(tensors, metadata)``."""
    tensors, metadata = read_tensors(file)
    if not keep_digest:
        del metadata["sha256"]
    change(tensors, metadata)
    save_file(tensors, file, metadata)


def test_a_changed_number_of_a_pair_is_noticed(family, tmp_path):
    make_pairs(family, ITEMS, RECIPE, tmp_path, batch=4)
    rewritten(tmp_path / "pairs-00001.safetensors", lambda t, m: t["x0"].view(-1)[5].add_(0.1))
    with pytest.raises(UserError, match=r"pairs-00001\.safetensors: not a whole shard .*digest differs.*; delete it"):
        PairSet(tmp_path, family, ITEMS, RECIPE)


@pytest.mark.parametrize(
    "change",
    [
        lambda t, m: t.pop("x0"),
        lambda t, m: t.update(x0=t["x0"][:, :, :2].contiguous()),
        lambda t, m: t.update(x0=t["x0"][:2].contiguous()),
        lambda t, m: m.pop("items"),
        lambda t, m: m.update(items="{"),
        lambda t, m: m.update(items="3"),
        lambda t, m: m.update(items="[0]"),
    ],
)
def test_a_shard_of_other_shapes_or_conditions_is_one_line(change, family, tmp_path):
    make_pairs(family, ITEMS, RECIPE, tmp_path, batch=4)
    rewritten(tmp_path / "pairs-00001.safetensors", change, keep_digest=False)
    with pytest.raises(UserError, match=r"pairs-00001\.safetensors: not a whole shard of pairs") as caught:
        PairSet(tmp_path, family, ITEMS, RECIPE)
    assert "\n" not in str(caught.value)
