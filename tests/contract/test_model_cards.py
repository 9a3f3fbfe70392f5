"""Model cards: every snippet runs as printed, in the folder, and what they say of defaults is so."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys

import pytest
import several
import tiny
import torch
from diffusers import DiffusionPipeline, LatentConsistencyModelPipeline, LCMScheduler, UNet2DConditionModel
from test_export import build

from stepdistill.families import load_family
from stepdistill.pipelines import export_student
from stepdistill.roles.roles import Roles
from stepdistill.roles.settings import RolesSettings
from stepdistill.sampler import FewStepSampler, few_step_times

CASES = {
    "labels": ("unet2d", "v", 3, 1, None, "renoise", "full"),
    "labels, 4 steps": ("unet2d", "v", 3, 4, None, "ode", "full"),
    "unconditional": ("unet2d", "eps", None, 1, None, "renoise", "full"),
    "flow": ("unet2d", "flow", 3, 1, None, "renoise", "full"),
    "edm": ("unet2d", "edm", None, 4, None, "renoise", "full"),
    "prompts": ("stable_diffusion", "sd_ddim_eps", "prompt", 1, None, "renoise", "shared"),
    "prompts, 4 steps": ("stable_diffusion", "sd_ddim_eps", "prompt", 4, None, "ode", "full"),
    "prompts, tcd": ("stable_diffusion", "sd_pndm_eps", "prompt", 4, None, "tcd", "full"),
}
"""As in test_export."""
FAILS, DEFAULT, UNTRAINED = "fails with", "has these arguments by default", "this student was not trained"
SAYS = {
    "labels": DEFAULT,
    "labels, 4 steps": UNTRAINED,
    "unconditional": DEFAULT,
    "flow": DEFAULT,
    "edm": UNTRAINED,
    "prompts": FAILS,
    "prompts, 4 steps": UNTRAINED,
    "prompts, tcd": FAILS,
    "latent consistency": DEFAULT,
    "latent consistency, 1 step": FAILS,
    "bfloat16": FAILS,
}
SEVERAL = ("several, labels", "several, prompts")
CHILD = """
import ast, json, os, re, sys
sys.modules["stepdistill"] = None  # any import of it fails
import torch
from diffusers.utils import logging
torch.set_num_threads(1)
logging.disable_progress_bar()
results = {}
for name, (folder, which) in json.loads(open(sys.argv[1]).read()).items():
    os.chdir(folder)
    names = {}
    snippet = re.findall(r"```python\\n(.*?)```", open("README.md").read(), re.S)[which]
    exec(snippet, names)
    pipe, image = names["pipe"], names["image"]
    call = next(node for node in ast.walk(ast.parse(snippet)) if getattr(getattr(node, "func", 0), "id", 0) == "pipe")
    condition = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    condition = {key: value for key, value in condition.items() if key in ("class_labels", "batch_size")}
    positional = [ast.literal_eval(node) for node in call.args]
    try:
        pipe(*positional, **condition)
        outcome = "runs"
    except ValueError as error:
        outcome = f"ValueError: {error}"
    results[name] = {"size": list(image.size), "class": type(pipe).__name__, "default": outcome}
print(json.dumps(results))
"""


def latent_consistency(root, steps: int):
    """A student with embedded guidance: LatentConsistencyModelPipeline."""
    base = DiffusionPipeline.from_pretrained(tiny.save_stable_diffusion(root / "base"), safety_checker=None)
    torch.manual_seed(0)
    LatentConsistencyModelPipeline(
        vae=base.vae,
        text_encoder=base.text_encoder,
        tokenizer=base.tokenizer,
        unet=UNet2DConditionModel.from_config({**base.unet.config, "time_cond_proj_dim": 8}),
        scheduler=LCMScheduler(**tiny.SD_BETAS, steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(root / "lcm")
    family = load_family(str(root / "lcm"))
    sampler = FewStepSampler(family.schedule, few_step_times(family.schedule, steps), "renoise")
    return family, Roles(family, RolesSettings(), fake_score=False), sampler


def exported(root, name):
    """The folder of a case."""
    if name.startswith("several"):
        kind, steps = ("v", 1) if name.endswith("labels") else ("sd_ddim_eps", 4)
        return several.gathered(root, name.replace(", ", "-"), kind, steps, 2).folder
    if name.startswith("latent consistency"):
        family, roles, sampler = latent_consistency(root / f"{name}-teacher", 1 if "1 step" in name else 4)
    else:
        family, roles, sampler = build(CASES.get(name, CASES["prompts"]), root / f"{name}-teacher")
    facts = {"method": "test", "teacher": "tiny", "attention": "native"}
    dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
    return export_student(family, roles.student, sampler, root / f"the {name}", facts, dtype)


def snippets(folder) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)


def run(snippet: str, folder) -> dict:
    """The names that a snippet leaves, run in the folder by this process."""
    names: dict = {}
    with contextlib.chdir(folder):
        exec(snippet, names)
    return names


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("cards")
    return {name: exported(root, name) for name in (*SAYS, *SEVERAL)}


@pytest.fixture(scope="module")
def results(folders, tmp_path_factory):
    """What a process that has stock diffusers alone made of all the snippets."""
    root = tmp_path_factory.mktemp("child")
    which = {name: (str(path), int(name in SEVERAL)) for name, path in folders.items()}  # a stock pipeline's snippet
    (root / "cases.json").write_text(json.dumps(which))
    (root / "child.py").write_text(CHILD)
    command = [sys.executable, str(root / "child.py"), str(root / "cases.json")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_every_snippet_draws_a_picture_with_stock_diffusers_alone(folders, results):
    assert results.keys() == folders.keys()
    for name, result in results.items():
        side = 8 if CASES.get(name, ("",))[0] == "unet2d" else 16
        assert result["size"] == [side, side], name
    classes = {name: result["class"] for name, result in results.items()}
    assert classes["latent consistency"] == "LatentConsistencyModelPipeline"
    assert classes["prompts"] == "StableDiffusionPipeline"
    assert classes["labels"] == "ConsistencyModelPipeline"


@pytest.mark.slow
@pytest.mark.parametrize("name", SAYS)
def test_a_call_without_the_arguments_does_what_the_card_says(name, folders, results):
    card = (folders[name] / "README.md").read_text()
    assert {says for says in (FAILS, DEFAULT, UNTRAINED) if says in card} == {SAYS[name]}
    outcome = results[name]["default"]
    if SAYS[name] == FAILS:
        reason = re.search(r"and fails with\n`(.*?)`", card)[1]
        assert outcome.replace("`", "'").startswith(reason)
        assert len(reason) > 40
    else:
        assert outcome == "runs"


@pytest.mark.parametrize("name", ["latent consistency", "bfloat16", "labels", *SEVERAL])
def test_a_cards_first_snippet_runs(name, tmp_path):
    folder = exported(tmp_path, name)
    names = run(snippets(folder)[0], folder)
    pictures = names["images"] if name in SEVERAL else [names["image"]]
    side = 8 if name == "labels" else 16
    assert [picture.size for picture in pictures] == [(side, side)] * (2 if name in SEVERAL else 1)
    card = (folder / "README.md").read_text()
    assert ("stored in bfloat16" in card) == (name == "bfloat16")
    assert ('from_pretrained(".", dtype=torch.bfloat16)' in card) == (name == "bfloat16")
