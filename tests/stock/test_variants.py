"""``teacher.variant``: which weights are loaded, by everything that loads the teacher, and what a wrong one says."""

from __future__ import annotations

import shutil
from unittest.mock import Mock

import pytest
import tiny
import torch
import yaml
from console import stepdistill
from diffusers import ConsistencyModelPipeline, DiffusionPipeline

from stepdistill.errors import UserError
from stepdistill.eval.measure.targets import Target
from stepdistill.eval.run_evaluation import MeasuredRun
from stepdistill.eval.show.grid import draw_grid
from stepdistill.eval.speed import inference
from stepdistill.eval.stock_pipeline import StockPipeline
from stepdistill.families import load_family
from stepdistill.pipelines import export_student
from stepdistill.roles.roles import Roles
from stepdistill.roles.settings import RolesSettings
from stepdistill.stock.loading import load_network, load_pipeline
from stepdistill.stock.variants import WEIGHTS, find_variants
from stepdistill.trainers.plans import comparison_report as report
from stepdistill.trainers.plans.build import build_trainer, provenance
from stepdistill.trainers.plans.job import make_job
from stepdistill.trainers.plans.resolve import resolve


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A teacher whose ema weights are others than its plain ones, the same without plain ones, and one with neither."""
    root = tmp_path_factory.mktemp("variants")
    both = tiny.save_pixels(root / "both", "v", labels=3, null=True, seed=0)
    other = ConsistencyModelPipeline(tiny.unet(labels=3, null=True, seed=1), tiny.scheduler("v"))
    other.save_pretrained(both, variant="ema")
    alone = root / "alone"
    shutil.copytree(both, alone)
    (alone / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    return {"both": both, "alone": alone, "plain": tiny.save_pixels(root / "plain", "v", labels=3, null=True)}


PSO = {
    "method": "pso",
    "sampler": {"steps": 4},
    "pso": {"rewards": [{"reward": "stepdistill.judges.rewards:Brightness"}]},
}
PLAIN, EMA = (tiny.unet(labels=3, null=True, seed=seed).conv_in.weight.detach() for seed in (0, 1))


def weight_of(network) -> torch.Tensor:
    return network.conv_in.weight.detach()


def raw_config(folder, output, **changes):
    return {
        "method": "dmd2",
        "output": str(output),
        "teacher": {"path": str(folder), "steps": 2, "variant": "ema"},
        "optimizer": {"student": {"lr": 1e-3}, "fake_score": {"lr": 1e-3}},
        "train": {"updates": 1, "batch_size": 2, "sample_count": 2, "trackers": []},
        **changes,
    }


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("diffusion_pytorch_model.safetensors", None),
        ("diffusion_pytorch_model.fp16.safetensors", "fp16"),
        ("model.fp16.safetensors", "fp16"),
        ("pytorch_model.non_ema.bin", "non_ema"),
        ("model-00001-of-00002.safetensors", None),
        ("diffusion_pytorch_model.fp16-00001-of-00002.safetensors", "fp16"),
        ("diffusion_pytorch_model-00001-of-00002.fp16.safetensors", "fp16"),
    ],
)
def test_a_weight_files_name_says_its_variant(name, variant):
    assert WEIGHTS.fullmatch(name)[1] == variant


def test_other_files_are_no_weights():
    for name in ("config.json", "diffusion_pytorch_model.safetensors.index.json", "flax_model.msgpack", "merges.txt"):
        assert WEIGHTS.fullmatch(name) is None


def test_a_part_without_the_variant_is_loaded_plain(folders, tmp_path):
    assert find_variants(folders["both"] / "unet") == {None, "ema"}
    assert find_variants(folders["alone"] / "unet") == {"ema"}
    assert find_variants(tmp_path / "nowhere") == set()
    mixed = tiny.save_stable_diffusion(tmp_path / "mixed")
    DiffusionPipeline.from_pretrained(mixed).unet.save_pretrained(mixed / "unet", variant="fp16")
    (mixed / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    for pipeline in (load_pipeline(mixed, "it"), load_pipeline(mixed, "it", variant="fp16", variant_key="key")):
        assert torch.equal(pipeline.unet.conv_in.weight, tiny.condition_unet().conv_in.weight)


def test_weights_in_several_files_are_of_their_variant(tmp_path):
    network = tiny.condition_unet()
    network.save_pretrained(tmp_path, max_shard_size="40KB")
    with torch.no_grad():
        network.conv_in.weight.add_(1)
    network.save_pretrained(tmp_path, variant="ema", max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert find_variants(tmp_path) == {None, "ema"}
    for variant, offset in ((None, 0), ("ema", 1)):
        loaded = load_network(type(network), tmp_path, "it", variant=variant)
        torch.testing.assert_close(loaded.conv_in.weight, tiny.condition_unet().conv_in.weight + offset)


def test_the_teacher_is_the_variant_that_is_named(folders):
    assert torch.equal(weight_of(load_family(str(folders["both"])).network), PLAIN)
    for name in ("both", "alone"):
        assert torch.equal(weight_of(load_family(str(folders[name]), variant="ema").network), EMA)


@pytest.mark.parametrize(
    ("name", "variant", "says"),
    [
        ("alone", None, "{path}: its unet has weights of variant ema alone; set teacher.variant to such a variant"),
        ("both", "fp16", "teacher.variant = fp16: teacher {path} has no weights of that variant, those there are: ema"),
        ("plain", "fp16", "no weights of that variant, they are plain; remove teacher.variant"),
    ],
)
def test_a_variant_that_is_not_there_is_one_line_that_names_those_that_are(folders, name, variant, says, tmp_path):
    raw = raw_config(folders[name], tmp_path / "run")
    raw["teacher"]["variant"] = variant
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
    for more in ([], ["--dry-run"]):
        done = stepdistill("distill", tmp_path / "run.yaml", *more)
        assert (done.code, says.format(path=folders[name]) in done.error) == (2, True), done.error
    assert not (tmp_path / "run").exists()


def test_a_part_that_has_neither_the_variant_nor_plain_weights_is_named(tmp_path):
    folder = tiny.save_stable_diffusion(tmp_path / "teacher")
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.unet.save_pretrained(folder / "unet", variant="bf16")
    pipeline.vae.save_pretrained(folder / "vae", variant="fp16")
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"its vae has weights of variant fp16 alone; set teacher\.variant"):
        load_family(str(folder), variant="bf16")


def test_a_hub_id_in_the_cache_names_its_variants_too(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    cached, commit = tmp_path / "models--someone--tiny", "0" * 40
    shutil.copytree(folders["alone"], cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    with pytest.raises(UserError, match=r"teacher someone/tiny: its unet has weights of variant ema alone"):
        load_family("someone/tiny")


# -- everything that loads the teacher again ---------------------------------------------------------------


def test_evaluation_takes_the_variant(folders, tmp_path):
    def targets_of(**changes):
        job = make_job(raw_config(folders["both"], tmp_path / "run", **changes))
        return MeasuredRun.from_config(job.config, job.method.make_record(job.config)).list_targets(tmp_path / "run")

    targets = targets_of(evaluation={"teacher_steps": [1]})
    assert [(t.name, t.steps, t.variant) for t in targets] == [
        ("teacher", 2, "ema"),
        ("teacher", 1, "ema"),
        ("student", None, None),
    ]
    untuned = Target("untuned", str(folders["both"]), 4, variant="ema")
    assert targets_of(**PSO)[0] == untuned
    assert torch.equal(weight_of(StockPipeline.load(folders["both"], variant="ema").denoiser), EMA)
    assert torch.equal(weight_of(StockPipeline.load(folders["both"]).denoiser), PLAIN)
    assert torch.equal(weight_of(StockPipeline.load(folders["alone"]).denoiser), EMA)  # the only weights there are
    with pytest.raises(UserError, match=r"variant = fp16: pipeline .* those there are: ema"):
        StockPipeline.load(folders["both"], variant="fp16")


def test_sample_takes_the_variant(folders, tmp_path):
    pictures = []
    for name, more in (("both", []), ("both", ["--variant", "ema"]), ("alone", [])):
        path = tmp_path / f"{name}{len(more)}.png"
        done = stepdistill("sample", folders[name], "--count", 2, "--steps", 1, "--output", path, *more)
        assert done.code == 0, done.err
        pictures.append(path.read_bytes())
    assert pictures[0] != pictures[1] == pictures[2]
    done = stepdistill("sample", folders["both"], "--variant", "fp16")
    assert (done.code, "those there are: ema" in done.error) == (2, True)


def test_a_grid_takes_the_variant(folders, tmp_path):
    pictures = []
    for index, (name, variant) in enumerate((("both", None), ("both", "ema"), ("alone", None))):
        path = draw_grid([Target("teacher", folders[name], 1, variant=variant)], tmp_path / f"{index}.png", 1, 3)
        pictures.append(path.read_bytes())
    assert pictures[0] != pictures[1] == pictures[2]


def test_a_student_that_starts_from_the_teachers_folder_starts_from_its_variant(folders):
    for name, variant, expected in (("both", "ema", EMA), ("both", None, PLAIN), ("alone", "ema", EMA)):
        family = load_family(str(folders[name]), variant=variant)
        student = Roles(family, RolesSettings(student_from=str(folders[name]))).student
        assert torch.equal(weight_of(student.network), expected)
    plain = load_family(str(folders["plain"]))
    assert torch.equal(weight_of(Roles(plain, RolesSettings(student_from=str(folders["alone"]))).student.network), EMA)
    assert torch.equal(weight_of(Roles(plain, RolesSettings(student_from=str(folders["both"]))).student.network), PLAIN)


def test_an_exported_student_says_the_variant_and_the_benchmark_takes_it(folders, tmp_path, monkeypatch):
    raw = raw_config(folders["both"], tmp_path / "run")
    raw["teacher"]["revision"] = "v2"
    job = make_job(raw)
    trainer = build_trainer(job, None)
    facts = provenance(job, trainer)
    assert (facts["teacher_variant"], facts["teacher_revision"]) == ("ema", "v2")
    plain = make_job(raw_config(folders["plain"], tmp_path / "other", teacher={"path": str(folders["plain"])}))
    assert not {"teacher_variant", "teacher_revision"} & provenance(plain, build_trainer(plain, None)).keys()
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump(raw))
    student = export_student(trainer.family, trainer.roles.student, trainer.sampler, run / "student", facts)
    lookups, hub_folder = [], inference.hub_folder
    monkeypatch.setattr(inference, "hub_folder", lambda *place: lookups.append(place) or hub_folder(*place))
    case = inference.load_inference(str(student), None, "cpu", torch.float32, teacher_steps=2)
    assert torch.equal(weight_of(case.teacher.denoiser), EMA)
    assert lookups == [(str(folders["both"]), "v2")]
    (run / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"was distilled from both, which is no folder here .*; name it by --teacher"):
        inference.load_inference(str(student), None, "cpu", torch.float32)
    named = inference.load_inference(str(student), str(folders["both"]), "cpu", torch.float32, teacher_steps=2)
    assert torch.equal(weight_of(named.teacher.denoiser), PLAIN)  # another teacher than the run's, as far as one knows


def test_a_comparison_takes_the_variant_and_what_tunes_a_student_none(folders, tmp_path, monkeypatch):
    for name, method in (("base", {}), ("tune", PSO)):
        raw = raw_config(folders["both"], "unused", **method)
        raw["teacher"] |= {"revision": "v2", "null_label": 3}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(raw))
    shared = ["evaluation.extractor=fashion_mnist", "evaluation.reference=asset:fashion_mnist/reference.safetensors"]
    runs = {"base": "base.yaml", "tuned": {"config": "tune.yaml", "tunes": "base"}}
    raw = {"output": str(tmp_path / "out"), "runs": runs, "overrides": shared, "passes": 1000}
    comparison = resolve(raw, str(tmp_path / "compare.yaml"))
    assert comparison.runs["base"].job.config.teacher.variant == "ema"
    tuned = comparison.runs["tuned"].job.config.teacher
    assert (tuned.variant, tuned.revision, tuned.null_label) == (None, None, None)
    monkeypatch.setattr(report, "evaluate", Mock(side_effect=InterruptedError))
    with pytest.raises(InterruptedError):
        report.measure(comparison.settings, comparison.runs, "cpu")
    (teacher,) = report.evaluate.call_args.args[0]
    assert (teacher.name, teacher.variant) == ("teacher", "ema")


@pytest.mark.slow
def test_a_run_from_a_variant_is_evaluated_to_its_end(folders, tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw_config(folders["alone"], tmp_path / "run")))
    done = stepdistill("distill", tmp_path / "run.yaml")
    assert done.code == 0, done.err[-2000:]
    assert (tmp_path / "run/grid.png").is_file()
    assert stepdistill("evaluate", tmp_path / "run").code == 0
