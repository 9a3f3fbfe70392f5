"""An exported folder has one dtype: plain loading and a plain call work, whatever the teacher is stored and held in."""

from __future__ import annotations

import json

import pytest
import several
import tiny
import torch
from console import stepdistill
from diffusers import DiffusionPipeline
from safetensors import safe_open

from stepdistill.eval.stock_pipeline import StockPipeline
from stepdistill.families import load_family
from stepdistill.pipelines import MSDPipeline, export_student, export_students, merge_students
from stepdistill.roles.roles import Roles
from stepdistill.roles.settings import LoRASettings, RolesSettings
from stepdistill.sampler import FewStepSampler, few_step_times

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
STORED = {
    "float32": {},
    "bfloat16": {"unet": BF16, "vae": BF16, "text_encoder": BF16},
    "float16": {"unet": F16, "vae": F16, "text_encoder": F16},
    "float16, config float32": {"unet": F16, "vae": F16, "text_encoder": F16, "text_encoder_config": "float32"},
    "mixed": {"unet": F16, "text_encoder": BF16},
}
"""Teachers' folders: the dtype of each part."""
PARTS = ("unet", "vae", "text_encoder")
LOADED = {"float32": F32, "bfloat16": BF16, "float16": F16}
WEIGHTS = ("full", "shared", "mixed")
CASES = [
    pytest.param(dtype, dtype, weights, export, marks=[pytest.mark.slow] if weights != "shared" else [])
    for dtype in LOADED
    for weights in WEIGHTS
    for export in LOADED
]
CASES += [(stored, "float32", "shared", "float32") for stored in STORED if stored != "float32"]
CASES += [("float32", "bfloat16", "shared", "float32"), ("mixed", "float16", "full", "bfloat16")]
CALL = {"num_inference_steps": 1, "guidance_scale": 0.0}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    root = tmp_path_factory.mktemp("stored")
    plain = tiny.save_stable_diffusion(root / "plain")
    return {name: tiny.save_in_dtypes(plain, root / name, **dtypes) for name, dtypes in STORED.items()}


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    return tiny.save_pixels(tmp_path_factory.mktemp("pixels") / "teacher", "v", labels=3, null=True)


def student_of(folder, loaded: str, weights: str):
    """A teacher's family, a student that is not its teacher, and a one-step sampler."""
    family = load_family(str(folder), dtype=LOADED[loaded])
    student = Roles(family, RolesSettings(weights=weights, lora=LoRASettings(rank=4, alpha=6.0))).student
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in student.parameters().values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return family, student, FewStepSampler(family.schedule, few_step_times(family.schedule, 1), "renoise")


def dtypes_of(folder) -> dict[str, set[str]]:
    """What is stored, by the part's name."""
    dtypes: dict[str, set[str]] = {}
    for file in folder.rglob("*.safetensors"):
        if file.parent.name != "lora":
            with safe_open(file, "pt") as opened:
                tensors = [opened.get_tensor(key) for key in opened.keys()]  # noqa: SIM118
            dtypes[file.parent.name] = {str(t.dtype).removeprefix("torch.") for t in tensors if t.is_floating_point()}
    return dtypes


def loaded_dtypes(pipeline) -> set[torch.dtype]:
    parts = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    return {parameter.dtype for part in parts for parameter in part.parameters()}


def draw(pipeline, output_type: str = "pt"):
    pipeline.set_progress_bar_config(disable=True)
    prompts, generator = ["a cat", "two dogs"], torch.Generator().manual_seed(7)
    return pipeline(prompts, generator=generator, output_type=output_type, **CALL).images


@pytest.mark.parametrize(("kind", "loaded", "weights", "exported"), CASES)
def test_a_folder_loads_and_draws_plain(kind, loaded, weights, exported, stored, tmp_path):
    family, student, sampler = student_of(stored[kind], loaded, weights)
    parts = {name: part for name, part in vars(family).items() if isinstance(part, torch.nn.Module)}
    before = {name: [p.dtype for p in part.parameters()] for name, part in parts.items()}
    exact = {key: value.float() for key, value in student.plain_state_dict().items()}
    folder = export_student(family, student, sampler, tmp_path / "student", {}, LOADED[exported])
    assert dtypes_of(folder) == {part: {exported} for part in PARTS}
    assert {name: [p.dtype for p in part.parameters()] for name, part in parts.items()} == before  # the run goes on

    pipeline = DiffusionPipeline.from_pretrained(folder)
    assert loaded_dtypes(pipeline) == {F32}
    for key, value in pipeline.unet.state_dict().items():
        assert torch.equal(value, exact[key].to(LOADED[exported]).float()), key  # rounded once
    again = load_family(str(folder))
    noise = torch.randn(2, *family.sample_shape, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        ours = sampler.sample(again.denoiser(), noise, again.encode_conditions(["a cat", "two dogs"]), torch.zeros_like)
    torch.testing.assert_close(draw(pipeline, "latent"), ours, rtol=0, atol=1e-5 * ours.abs().max().item())

    half = DiffusionPipeline.from_pretrained(folder, dtype=BF16)
    assert loaded_dtypes(half) == {BF16}
    assert (draw(half).float() - draw(pipeline)).abs().mean() < 0.05


@pytest.mark.parametrize("exported", LOADED)
@pytest.mark.parametrize("loaded", LOADED)
def test_a_pixel_folder_loads_and_draws_plain(loaded, exported, pixels, tmp_path):
    family, student, sampler = student_of(pixels, loaded, "mixed")
    exact = {key: value.float() for key, value in student.plain_state_dict().items()}
    folder = export_student(family, student, sampler, tmp_path / "student", {}, LOADED[exported])
    assert dtypes_of(folder) == {"unet": {exported}}
    pipeline = DiffusionPipeline.from_pretrained(folder)
    for key, value in pipeline.unet.state_dict().items():
        assert torch.equal(value, exact[key].to(LOADED[exported]).float()[: len(value)]), key
    pipeline.set_progress_bar_config(disable=True)
    assert torch.isfinite(pipeline(class_labels=[0], num_inference_steps=1, output_type="pt").images).all()


# -- loading folders of any dtype --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", LOADED)
@pytest.mark.parametrize("kind", STORED)
def test_evaluation_loads_any_folder_in_one_dtype(kind, dtype, stored):
    stock = StockPipeline.load(stored[kind], dtype=LOADED[dtype])
    assert loaded_dtypes(stock.pipeline) == {LOADED[dtype]}
    noise = torch.randn(2, *stock.noise_shape, generator=torch.Generator().manual_seed(0))
    pictures = stock.generate(["a cat", "a dog"], noise, 2, guidance_scale=3.0)
    exact = StockPipeline.load(stored["float32"]).generate(["a cat", "a dog"], noise, 2, guidance_scale=3.0)
    assert pictures.dtype == F32
    assert (pictures - exact).abs().mean() < 0.05


def test_commands_take_a_half_precision_folder(stored, tmp_path):
    for kind in ("bfloat16", "mixed"):
        path, output = stored[kind], tmp_path / f"{kind}.png"
        done = stepdistill("sample", path, "--count", 2, "--steps", 2, "--prompt", "a cat", "--output", output)
        assert (done.code, output.is_file()) == (0, True), done.err
        cost = ["benchmark", "inference", path, "--teacher", path, "--teacher-steps", 2, "--repeats", 1]
        for dtype in LOADED:
            done = stepdistill(*cost, "--dtype", dtype)
            assert done.code == 0, done.err
            assert f"M, {dtype}, batch 1" in done.out


def test_students_in_half_precision_are_merged_in_float32(stored, tmp_path):
    """A's text encoder, stored in float32 under a config that names bfloat16, loses nothing."""
    folders = []
    for index, (weights, dtype) in enumerate((("full", F32), ("shared", BF16))):
        family, student, sampler = student_of(stored["float32"], "float32", weights)
        folders.append(str(export_student(family, student, sampler, tmp_path / str(index), {}, dtype)))
        file = tmp_path / str(index) / "text_encoder" / "config.json"  # as others save such a folder
        file.write_text(json.dumps({**json.loads(file.read_text()), "dtype": "bfloat16"}))
    merged = merge_students(*folders, 0.25, tmp_path / "merged")
    assert dtypes_of(merged) == {part: {"float32"} for part in PARTS}
    pipeline = DiffusionPipeline.from_pretrained(merged)
    a, b = (DiffusionPipeline.from_pretrained(folder, dtype=F32).unet.state_dict() for folder in folders)
    for key, value in pipeline.unet.state_dict().items():
        torch.testing.assert_close(value, 0.25 * a[key] + 0.75 * b[key])
    text = family.text_encoder.state_dict()
    assert all(torch.equal(value, text[key]) for key, value in pipeline.text_encoder.state_dict().items())
    assert draw(pipeline).isfinite().all()


# -- several students --------------------------------------------------------------------------------------


def test_students_of_prompts_in_half_precision_are_routed_as_before(tmp_path):
    """The router knows the text encoder by its hash, so that part stays in float32."""
    gathered = several.gathered(tmp_path, "prompts", "sd_ddim_eps", 1, 2)
    folders = []
    for k, student in enumerate(gathered.students):
        facts = {"method": "test", "teacher": "tiny", "msd": {"router": gathered.router.hash, "student": k}}
        folders.append(export_student(gathered.family, student, gathered.sampler, tmp_path / f"half-{k}", facts, F16))
        assert dtypes_of(folders[k]) == {"unet": {"float16"}, "vae": {"float16"}, "text_encoder": {"float32"}}
    half = MSDPipeline.from_pretrained(export_students(folders, gathered.router, tmp_path / "half"))
    whole = MSDPipeline.from_pretrained(gathered.folder)
    assert half.route(several.PROMPTS) == whole.route(several.PROMPTS)
    pictures = []
    for pipeline in (half, whole):
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        pictures.append(pipeline(several.PROMPTS[:4], generator=generator, output_type="pt").images)
    assert (pictures[0] - pictures[1]).abs().mean() < 0.02


def test_students_that_others_saved_in_half_precision_are_loaded_in_one_dtype(tmp_path):
    """A text encoder whose config names float16 serves routing and drawing as float32 ones do."""
    gathered = several.gathered(tmp_path, "prompts", "sd_ddim_eps", 1, 2)
    for k in range(2):
        file = gathered.folder / f"student-{k}" / "text_encoder" / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "dtype": "float16"}))
    pipeline = MSDPipeline.from_pretrained(gathered.folder)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(several.PROMPTS[:2], output_type="pt").images.isfinite().all()
