"""An exported student, loaded by stock diffusers in a process that cannot import stepdistill, is our sampler."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from teacher_table import FAMILIES

from stepdistill.families import claiming_family, load_family
from stepdistill.pipelines import export_student
from stepdistill.roles.roles import Roles
from stepdistill.roles.settings import LoRASettings, RolesSettings
from stepdistill.sampler import FewStepSampler, SignalSampler, few_step_times

# family, scheduler, conditions, steps, start, transition, weights
CASES = {
    "unet2d-eps-1": ("unet2d", "eps", None, 1, None, "renoise", "full"),
    "unet2d-eps-4": ("unet2d", "eps", 3, 4, None, "renoise", "full"),
    "unet2d-v-1": ("unet2d", "v", 3, 1, None, "renoise", "full"),
    "unet2d-v-4": ("unet2d", "v", None, 4, None, "renoise", "full"),
    "unet2d-v-1-shared": ("unet2d", "v", 3, 1, None, "renoise", "shared"),
    "unet2d-v-4-ode": ("unet2d", "v", 3, 4, None, "ode", "full"),
    "unet2d-eps-3-ode": ("unet2d", "eps", None, 3, None, "ode", "full"),
    "unet2d-eps-4-tcd": ("unet2d", "eps", 3, 4, None, "tcd", "full"),
    "unet2d-v-signal": ("unet2d", "v", 3, 1, None, "signal", "full"),
    "unet2d-eps-signal": ("unet2d", "eps", None, 1, 40, "signal", "shared"),
    "unet2d-x0-signal": ("unet2d", "x0", 3, 1, None, "signal", "full"),
    "unet2d-flow-signal": ("unet2d", "flow", 3, 1, None, "signal", "full"),
    "unet2d-flow_shift-signal": ("unet2d", "flow_shift", None, 1, 20, "signal", "full"),
    "unet2d-x0-1": ("unet2d", "x0", 3, 1, 399, "renoise", "mixed"),
    "unet2d-x0-4": ("unet2d", "x0", 3, 4, None, "renoise", "full"),
    "unet2d-cosine_eps-1": ("unet2d", "cosine_eps", 3, 1, None, "renoise", "full"),
    "unet2d-cosine_eps-4": ("unet2d", "cosine_eps", None, 4, None, "renoise", "full"),
    "unet2d-cosine_eps-4-ode": ("unet2d", "cosine_eps", None, 4, None, "ode", "full"),
    "unet2d-cosine_eps-4-ancestral": ("unet2d", "cosine_eps", 3, 4, None, "ancestral", "full"),
    "unet2d-cosine_eps-1-at-899": ("unet2d", "cosine_eps", 3, 1, 899, "renoise", "full"),
    "unet2d-cosine_eps-signal": ("unet2d", "cosine_eps", 3, 1, None, "signal", "full"),
    "unet2d-cosine_ddpm-1": ("unet2d", "cosine_ddpm", 3, 1, None, "renoise", "full"),
    "unet2d-cosine_ddpm-4": ("unet2d", "cosine_ddpm", None, 4, None, "renoise", "full"),
    "unet2d-unclip-1": ("unet2d", "unclip", None, 1, None, "renoise", "full"),
    "unet2d-unclip-4": ("unet2d", "unclip", 3, 4, None, "renoise", "full"),
    "unet2d-sigmoid-1": ("unet2d", "sigmoid", 3, 1, None, "renoise", "full"),
    "unet2d-sigmoid-4-tcd": ("unet2d", "sigmoid", 3, 4, None, "tcd", "full"),
    "unet2d-eps_4000-1": ("unet2d", "eps_4000", 3, 1, None, "renoise", "full"),
    "unet2d-eps_4000-4": ("unet2d", "eps_4000", 3, 4, None, "renoise", "full"),
    "unet2d-v_100-1": ("unet2d", "v_100", 3, 1, None, "renoise", "full"),
    "unet2d-v_100-5-ode": ("unet2d", "v_100", None, 5, None, "ode", "full"),
    "unet2d-v_100-signal": ("unet2d", "v_100", 3, 1, None, "signal", "full"),
    "unet2d-flow-1": ("unet2d", "flow", 3, 1, None, "renoise", "full"),
    "unet2d-flow-4": ("unet2d", "flow", 3, 4, None, "ode", "full"),
    "unet2d-flow_100-4": ("unet2d", "flow_100", None, 4, None, "ode", "full"),
    "unet2d-flow_100-signal": ("unet2d", "flow_100", 3, 1, None, "signal", "full"),
    "unet2d-flow_shift-4": ("unet2d", "flow_shift", None, 4, None, "ode", "full"),
    "unet2d-edm-1": ("unet2d", "edm", 3, 1, None, "renoise", "full"),
    "unet2d-edm-4": ("unet2d", "edm", None, 4, None, "renoise", "full"),
    "sd-ddim_eps-1": ("stable_diffusion", "sd_ddim_eps", "prompt", 1, None, "renoise", "full"),
    "sd-ddim_eps-4": ("stable_diffusion", "sd_ddim_eps", "prompt", 4, None, "renoise", "full"),
    "sd-ddim_eps-1-at-399": ("stable_diffusion", "sd_ddim_eps", "prompt", 1, 399, "renoise", "full"),
    "sd-pndm_eps-1-shared": ("stable_diffusion", "sd_pndm_eps", "prompt", 1, None, "renoise", "shared"),
    "sd-euler_v-1": ("stable_diffusion", "sd_euler_v", "prompt", 1, None, "renoise", "full"),
    "sd-dpm_v-4": ("stable_diffusion", "sd_dpm_v", "prompt", 4, None, "renoise", "full"),
    "sd-zero_snr_v-1": ("stable_diffusion", "sd_zero_snr_v", "prompt", 1, None, "renoise", "mixed"),
    "sd-zero_snr_v-4": ("stable_diffusion", "sd_zero_snr_v", "prompt", 4, None, "renoise", "full"),
    "sd-ddim_eps-4-ode": ("stable_diffusion", "sd_ddim_eps", "prompt", 4, None, "ode", "full"),
    "sd-ddim_eps-4-ode-to-timestep-0": ("stable_diffusion", "sd_ddim_eps", "prompt", 4, None, "ode_to_0", "full"),
    "unet2d-v-2-ode-to-timestep-0": ("unet2d", "v", 3, 2, None, "ode_to_0", "full"),
    "sd-zero_snr_v-2-ode": ("stable_diffusion", "sd_zero_snr_v", "prompt", 2, None, "ode", "full"),
    "sd-pndm_eps-4-tcd": ("stable_diffusion", "sd_pndm_eps", "prompt", 4, None, "tcd", "shared"),
    "sd-zero_snr_v-2-tcd": ("stable_diffusion", "sd_zero_snr_v", "prompt", 2, None, "tcd", "full"),
    "sd-ddim_eps-signal": ("stable_diffusion", "sd_ddim_eps", "prompt", 1, None, "signal", "full"),
    "sd-zero_snr_v-signal": ("stable_diffusion", "sd_zero_snr_v", "prompt", 1, None, "signal", "full"),
    "sd-x0-1": ("stable_diffusion", "sd_x0", "prompt", 1, None, "renoise", "full"),
    "sd-x0-4": ("stable_diffusion", "sd_x0", "prompt", 4, None, "renoise", "full"),
}

CHILD = """
import json, sys
sys.modules["stepdistill"] = None  # any import of it fails
import torch
from diffusers import DiffusionPipeline
torch.set_num_threads(1)
cases, out = json.loads(open(sys.argv[1]).read()), sys.argv[2]
result = {}
for name, case in cases.items():
    pipe = DiffusionPipeline.from_pretrained(case["folder"])
    pipe.set_progress_bar_config(disable=True)
    kept = []
    arguments = dict(case["call"], generator=torch.Generator().manual_seed(7))
    if case["kind"] == "prompt":
        images = pipe(prompt=case["items"], output_type="latent", **arguments).images
        kept.append(images)
        again = dict(arguments, generator=torch.Generator().manual_seed(7))
        decoded = pipe(prompt=case["items"], output_type="pt", **again).images
    else:
        if case["kind"] == "label":
            arguments["class_labels"] = case["items"]
        pipe(batch_size=2, output_type="pt", callback=lambda i, t, x: kept.append(x), **arguments)
        again = dict(arguments, generator=torch.Generator().manual_seed(7))
        decoded = pipe(batch_size=2, output_type="pt", **again).images
    result[name] = {"latents": kept[-1], "pixels": decoded}
    result[name]["provenance"] = dict(pipe.scheduler.config["_stepdistill"])
    result[name]["class"] = type(pipe).__name__
torch.save(result, out)
"""


def build(case, folder):
    """The teacher's family, roles with weights of their own, and the student's sampler."""
    family_name, kind, conditions, steps, start, transition, weights = case
    FAMILIES[family_name](folder, kind, conditions)
    family = load_family(str(folder))
    assert family.name == family_name
    roles = Roles(family, RolesSettings(weights=weights, lora=LoRASettings(rank=4, alpha=6.0)))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():  # so that a student is not its teacher, nor an adapter empty
        for parameter in roles.student.parameters().values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    if transition == "signal":  # start: the label that BOOT's student is read at
        level = family.schedule.level(torch.tensor(start or 1))
        return family, roles, SignalSampler(family.schedule, (float(level),))
    eta = 0.7 if family.passes_eta else 0.3
    final = "timestep_0" if transition == "ode_to_0" else "clean"
    transition = transition.removesuffix("_to_0")
    sampler = FewStepSampler(family.schedule, few_step_times(family.schedule, steps, start), transition, eta, final)
    return family, roles, sampler


def our_samples(family, roles, sampler, items):
    """From one generator, in the order stock pipelines draw: the start, then one draw a step."""
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(2, *family.sample_shape, generator=generator)
    condition = family.encode_conditions(items)
    with torch.no_grad():
        return sampler.sample(
            roles.student, noise, condition, lambda like: torch.randn(like.shape, generator=generator)
        )


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Every case exported here and sampled there, by one child process."""
    root = tmp_path_factory.mktemp("exports")
    cases, ours = {}, {}
    for name, case in CASES.items():
        family, roles, sampler = build(case, root / f"{name}-teacher")
        folder = export_student(family, roles.student, sampler, root / name, {"method": "test", "teacher": "tiny"})
        kind = family.condition_kind
        items = {"none": [], "label": [2, 0], "prompt": ["a cat", "two dogs"]}[kind]
        samples = our_samples(family, roles, sampler, items)
        ours[name] = {"latents": samples, "pixels": (family.decode(samples) + 1) / 2, "folder": folder}
        facts = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["_stepdistill"]
        call = facts["call"]
        assert call["num_inference_steps"] == sampler.steps
        assert call.items() >= family.guidance_off.items()
        cases[name] = {"folder": str(folder), "kind": kind, "items": items, "call": call}
    (root / "cases.json").write_text(json.dumps(cases))
    (root / "child.py").write_text(CHILD)
    done = subprocess.run(
        [sys.executable, str(root / "child.py"), str(root / "cases.json"), str(root / "out.pt")],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return ours, torch.load(root / "out.pt", weights_only=True)


@pytest.mark.parametrize("name", CASES)
def test_latents_are_our_samplers(exports, name):
    ours, stock = exports[0][name], exports[1][name]
    scale = ours["latents"].abs().max().clamp(min=1)
    error = ((ours["latents"] - stock["latents"]).abs().max() / scale).item()
    assert error <= 1e-5, f"relative error {error:.2e}"


@pytest.mark.parametrize("name", CASES)
def test_pictures_are_ours(exports, name):
    ours, stock = exports[0][name], exports[1][name]
    torch.testing.assert_close(ours["pixels"], stock["pixels"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_folder_says_how_to_call_it(exports, name):
    steps = CASES[name][3]
    assert exports[1][name]["provenance"]["steps"] == steps
    folder = exports[0][name]["folder"]
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == claiming_family(index).pipelines[0]
    assert "stepdistill" not in json.dumps({k: v for k, v in index.items() if k != "_name_or_path"})
    assert f"num_inference_steps={steps}" in (folder / "README.md").read_text()


def test_more_steps_than_trained_fail_loudly(exports):
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(exports[0]["sd-ddim_eps-4"]["folder"])
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match="original_steps"):
        pipe("a cat", num_inference_steps=50, guidance_scale=0)


def test_saving_again_keeps_provenance(exports, tmp_path):
    from diffusers import DiffusionPipeline

    DiffusionPipeline.from_pretrained(exports[0]["unet2d-v-1"]["folder"]).save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    assert again.scheduler.config["_stepdistill"]["method"] == "test"
    assert again.unet.config["_stepdistill"]["method"] == "test"


def test_null_label_is_not_exported(exports):
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(exports[0]["unet2d-v-1"]["folder"])
    assert pipe.unet.config.num_class_embeds == 3
    assert "null_label" not in pipe.unet.config["_stepdistill"]


def test_lora_file_loads_in_the_stock_pipeline_with_its_alpha(exports):
    """Base pipeline plus the LoRA file equals the merged folder; alpha 6 at rank 4 is not read as 4."""
    from diffusers import DiffusionPipeline, LCMScheduler

    folder = exports[0]["sd-pndm_eps-1-shared"]["folder"]
    base = DiffusionPipeline.from_pretrained(folder.with_name(f"{folder.name}-teacher"), safety_checker=None)
    base.scheduler = LCMScheduler.from_pretrained(folder, subfolder="scheduler")
    base.set_progress_bar_config(disable=True)
    base.load_lora_weights(folder / "lora")

    def draw():
        generator = torch.Generator().manual_seed(7)
        prompts = ["a cat", "two dogs"]
        return base(prompts, num_inference_steps=1, guidance_scale=0, generator=generator, output_type="latent").images

    expected = exports[0]["sd-pndm_eps-1-shared"]["latents"]
    scale = expected.abs().max()
    assert ((draw() - expected).abs().max() / scale).item() < 1e-5
    base.unload_lora_weights()
    assert ((draw() - expected).abs().max() / scale).item() > 1e-3
