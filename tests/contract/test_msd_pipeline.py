"""Several students served as one: routed, grouped and put back, each sample drawn by one student alone."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import several
import torch
from console import stepdistill
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from stepdistill.data.arrays import read_array_images
from stepdistill.data.partition import PartitionSettings, make_router
from stepdistill.data.pixels import unit_to_bytes
from stepdistill.errors import UserError
from stepdistill.eval.extractors.load import as_extractor, load_extractor
from stepdistill.eval.extractors.small import FeatureNetwork
from stepdistill.eval.measure.draws import step_generator, unit_noise
from stepdistill.eval.measure.evaluate import evaluate
from stepdistill.eval.measure.reference_statistics import ReferenceStatistics, make_reference
from stepdistill.eval.measure.settings import Protocol
from stepdistill.eval.measure.targets import Target
from stepdistill.eval.stock_pipeline import StockPipeline
from stepdistill.pipelines import MSDPipeline, export_students

# scheduler, steps, students, transition
CASES = {
    "label-1": ("v", 1, 2, "renoise"),
    "label-4": ("v", 4, 2, "renoise"),
    "label-4-ode": ("v", 4, 2, "ode"),
    "edm-4": ("edm", 4, 2, "renoise"),
    "prompt-1": ("sd_ddim_eps", 1, 2, "renoise"),
    "prompt-4": ("sd_ddim_eps", 4, 2, "renoise"),
}
ITEMS = {
    "label": [4, 0, 5, 1, 1, 3],
    "prompt": ["an owl at sea", "", "a cat in fog", "big dogs by night", "a cat in fog"],
}
CLOSE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="module")
def groups(tmp_path_factory) -> dict[str, several.Several]:
    root = tmp_path_factory.mktemp("several")
    return {name: several.gathered(root, name, *case) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> several.Several:
    return several.gathered(tmp_path_factory.mktemp("three"), "three", "v", 1, 3)


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> several.Several:
    return several.gathered(tmp_path_factory.mktemp("one"), "one", "v", 1, 1)


def load(group: several.Several | Path, **arguments) -> MSDPipeline:
    pipe = MSDPipeline.from_pretrained(group if isinstance(group, Path) else group.folder, **arguments)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def inputs(group: several.Several) -> tuple[list, torch.Tensor, list[int]]:
    """Conditions of both students, noise and a seed for each."""
    items = ITEMS[group.family.condition_kind]
    noise = torch.randn(len(items), *group.family.sample_shape, generator=torch.Generator().manual_seed(9))
    return items, noise, [50 + i for i in range(len(items))]


def draw(pipe: MSDPipeline, items: list, noise: torch.Tensor | None, seeds: list[int], **arguments) -> torch.Tensor:
    kind = "class_labels" if pipe.router.kind == "labels" else "prompt"
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipe(**{kind: items}, latents=noise, generator=generators, output_type="pt", **arguments).images


# -- one call ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_every_sample_is_our_sampler_with_its_own_student_in_order(name, groups):
    group = groups[name]
    items, noise, seeds = inputs(group)
    assert set(group.route(items)) == {0, 1}
    assert group.route(items) != sorted(group.route(items))
    torch.testing.assert_close(draw(load(group), items, noise, seeds), group.sample(items, noise, seeds), **CLOSE)


@pytest.mark.parametrize("name", CASES)
def test_a_sample_depends_neither_on_its_group_nor_on_its_place(name, groups):
    group = groups[name]
    items, noise, seeds = inputs(group)
    pipe = load(group)
    together = draw(pipe, items, noise, seeds)
    for i, item in enumerate(items):
        torch.testing.assert_close(draw(pipe, [item], noise[i : i + 1], seeds[i : i + 1])[0], together[i], **CLOSE)
    backwards = draw(pipe, items[::-1], noise.flip(0), seeds[::-1])
    torch.testing.assert_close(backwards.flip(0), together, **CLOSE)
    apart = (together[:, None] - together[None]).abs().amax((2, 3, 4))
    assert (apart + torch.eye(len(items))).min() > 1e-3  # no two are alike, so a swap would show


@pytest.mark.parametrize("name", CASES)
def test_exactly_one_student_runs_for_a_sample(name, groups):
    group = groups[name]
    items, noise, seeds = inputs(group)
    pipe, passed = load(group), [0, 0]

    def counted(k):
        def count(_module, args, kwargs):
            passed[k] += len(args[0] if args else kwargs["sample"])

        return count

    for k in range(2):
        pipe.student(k).unet.register_forward_pre_hook(counted(k), with_kwargs=True)
    draw(pipe, items, noise, seeds)
    routes = group.route(items)
    assert passed == [routes.count(k) * CASES[name][1] for k in range(2)]


@pytest.mark.parametrize("name", ["label-1", "prompt-1"])
def test_noise_is_drawn_for_the_batch_as_a_stock_pipeline_draws_it(name, groups):
    group = groups[name]
    items, _, seeds = inputs(group)
    kind = group.family.condition_kind
    noise = torch.randn(len(items), *group.family.sample_shape, generator=torch.Generator().manual_seed(7))
    arguments = {"class_labels" if kind == "label" else "prompt": items, "output_type": "pt"}
    images = load(group)(**arguments, generator=torch.Generator().manual_seed(7)).images
    torch.testing.assert_close(images, group.sample(items, noise, seeds), **CLOSE)
    again = load(group)(**arguments, generator=torch.Generator().manual_seed(7)).images
    assert torch.equal(images, again)


def seeds_by(generator: torch.Generator, count: int) -> list[int]:
    """What several students' samples are seeded with."""
    first = int(torch.randint(2**32, (), generator=generator))
    return [(first + index) % 2**32 for index in range(count)]


def test_one_generator_seeds_the_noise_between_steps_of_every_sample(groups):
    group = groups["label-4"]
    items, noise, _ = inputs(group)
    arguments = {"class_labels": items, "latents": noise, "output_type": "pt"}
    one, again, other = (load(group)(**arguments, generator=torch.Generator().manual_seed(s)).images for s in (7, 7, 8))
    assert torch.equal(one, again)
    assert (one - other).abs().flatten(1).amax(1).min() > 1e-3
    # a seed for each sample, counted up from a draw
    seeds = seeds_by(torch.Generator().manual_seed(7), len(items))
    torch.testing.assert_close(one, group.sample(items, noise, seeds), **CLOSE)


def test_one_student_is_the_stock_pipeline_with_the_same_generator(one):
    stock = DiffusionPipeline.from_pretrained(one.folder / "student-0")
    stock.set_progress_bar_config(disable=True)
    labels = [3, 0, 5, 2]
    ours, others = (
        pipe(class_labels=labels, generator=torch.Generator().manual_seed(4), output_type="pt", **more).images
        for pipe, more in ((load(one), {}), (stock, {"batch_size": 4, "num_inference_steps": 1}))
    )
    torch.testing.assert_close(ours, others, rtol=0, atol=1e-6)


def test_conditions_may_be_one_a_list_a_tensor_or_repeated(groups):
    group, pipe = groups["label-1"], load(groups["label-1"])
    _, noise, _ = inputs(group)
    call = {"latents": noise[:2], "output_type": "pt"}
    twice = pipe(class_labels=[4, 4], **call).images
    assert torch.equal(pipe(class_labels=4, num_images_per_prompt=2, **call).images, twice)
    assert torch.equal(pipe(class_labels=torch.tensor([4, 4]), **call).images, twice)
    assert torch.equal(pipe(class_labels=[4, 4], return_dict=False, **call)[0], twice)
    pairs = pipe(class_labels=[4, 0], latents=noise[:4], num_images_per_prompt=2, output_type="pt").images
    torch.testing.assert_close(pairs[:2], twice, **CLOSE)
    arrays = pipe(class_labels=[4, 4], latents=noise[:2], output_type="np").images
    np.testing.assert_allclose(arrays.transpose(0, 3, 1, 2), twice.numpy(), atol=1e-6)
    pictures = pipe(class_labels=[4, 0], latents=noise[:2]).images
    assert [picture.size for picture in pictures] == [(16, 16)] * 2
    prompt = load(groups["prompt-1"])("an owl at sea", latents=torch.zeros(1, 4, 8, 8), output_type="pt").images
    assert prompt.shape == (1, 3, 16, 16)


def test_the_manifest_says_what_is_there(groups):
    for name, (_, steps, students, _) in CASES.items():
        manifest = json.loads((groups[name].folder / "msd.json").read_text())
        assert (manifest["students"], manifest["steps"]) == (students, steps)
        assert manifest["router"] == groups[name].router.hash
        unet = DiffusionPipeline.from_pretrained(groups[name].folder / "student-1").unet
        assert manifest["parameters"] == [unet.num_parameters()] * 2
        assert f"{students} students" in (groups[name].folder / "README.md").read_text()


# -- another process ---------------------------------------------------------------------------------------

CHILD = """
import json, sys
sys.modules["stepdistill"] = None  # any import of it fails
import torch
from diffusers import DiffusionPipeline
torch.set_num_threads(1)
cases, result = json.loads(open(sys.argv[1]).read()), {}
for name, case in cases.items():
    for k, items in enumerate(case["parts"]):
        pipe = DiffusionPipeline.from_pretrained(f"{case['folder']}/student-{k}")
        pipe.set_progress_bar_config(disable=True)
        group = {"prompt": items} if case["kind"] == "prompt" else {"class_labels": items, "batch_size": len(items)}
        group |= case["call"] | {"generator": torch.Generator().manual_seed(7), "output_type": "pt"}
        result[f"{name} {k}"] = pipe(**group).images
del sys.modules["stepdistill"]
from stepdistill.pipelines import MSDPipeline
for name, case in cases.items():
    pipe = MSDPipeline.from_pretrained(case["folder"])
    pipe.set_progress_bar_config(disable=True)
    items = [item for part in case["parts"] for item in part]
    group = {"prompt" if case["kind"] == "prompt" else "class_labels": items}
    noise = torch.randn(len(items), *case["shape"], generator=torch.Generator().manual_seed(9))
    seeds = [torch.Generator().manual_seed(50 + i) for i in range(len(items))]
    result[name] = pipe(**group, latents=noise, generator=seeds, output_type="pt").images
torch.save(result, sys.argv[2])
"""


@pytest.mark.slow
def test_another_process_draws_the_same_and_each_student_without_us(groups, tmp_path):
    """Students by stock diffusers where stepdistill cannot be imported; all of them by MSDPipeline."""
    names, cases = ("label-1", "label-4", "prompt-1"), {}
    for name in names:
        group = groups[name]
        items, kind = ITEMS[group.family.condition_kind], group.family.condition_kind
        parts = [[item for item, route in zip(items, group.route(items), strict=True) if route == k] for k in range(2)]
        call = json.loads((group.folder / "msd.json").read_text())["call"]
        shape = list(group.family.sample_shape)
        cases[name] = {"folder": str(group.folder), "kind": kind, "parts": parts, "call": call, "shape": shape}
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "cases.json"), str(tmp_path / "out.pt")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    stock = torch.load(tmp_path / "out.pt", weights_only=True)
    for name, case in cases.items():
        group = groups[name]
        items = [item for part in case["parts"] for item in part]
        noise = torch.randn(len(items), *case["shape"], generator=torch.Generator().manual_seed(9))
        ours = group.sample(items, noise, [50 + i for i in range(len(items))])
        torch.testing.assert_close(stock[name], ours, **CLOSE)
        for k, part in enumerate(case["parts"]):
            generator = torch.Generator().manual_seed(7)
            noise = torch.randn(len(part), *case["shape"], generator=generator)
            draw_more = lambda like, group=generator: torch.randn(like.shape, generator=group)  # noqa: E731
            with torch.no_grad():
                x0 = group.sampler.sample(group.students[k], noise, group.family.encode_conditions(part), draw_more)
            torch.testing.assert_close(stock[f"{name} {k}"], (group.family.decode(x0) + 1) / 2, rtol=0, atol=2e-5)


# -- memory ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def loads(pipe: MSDPipeline):
    """The students that are read from disk within the block; never more at a time than fit."""
    loads_seen, load_pipeline = [], DiffusionPipeline.from_pretrained

    def from_pretrained(path, **arguments):
        size = sum(pipe.manifest["parameters"][k] for k in [*pipe.loaded, int(str(path)[-1])]) * 4
        loads_seen.append((Path(path).name, size))
        return load_pipeline(path, **arguments)

    with mock.patch.object(DiffusionPipeline, "from_pretrained", from_pretrained):
        yield loads_seen


def test_what_was_unused_for_longest_is_dropped_and_pictures_stay(three):
    size = json.loads((three.folder / "msd.json").read_text())["parameters"][0] * 4
    noise = torch.randn(6, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    free = load(three)
    assert not free.loaded
    expected = draw(free, [0, 1, 2, 3, 4, 5], noise, range(6))
    assert list(free.loaded) == [0, 1, 2]
    pipe = load(three, memory=3 * size - 1)  # two fit
    with loads(pipe) as loads_seen:
        for label, held in ((0, [0]), (2, [0, 1]), (1, [1, 0]), (4, [0, 2]), (5, [0, 2])):
            draw(pipe, [label], noise[:1], [0])
            assert list(pipe.loaded) == held
        assert loads_seen == [("student-0", size), ("student-1", 2 * size), ("student-2", 2 * size)]
        torch.testing.assert_close(draw(pipe, [0, 1, 2, 3, 4, 5], noise, range(6)), expected, **CLOSE)
        assert loads_seen[3:] == [("student-1", 2 * size)]  # those at hand came first
    single = load(three, memory=size)
    with loads(single) as loads_seen:
        torch.testing.assert_close(draw(single, [0, 1, 2, 3, 4, 5], noise, range(6)), expected, **CLOSE)
    assert loads_seen == [(f"student-{k}", size) for k in range(3)]
    assert list(single.loaded) == [2]


def test_memory_is_bytes_or_words(three):
    size = json.loads((three.folder / "msd.json").read_text())["parameters"][0] * 4
    assert load(three, memory="1MB").memory == 2**20
    assert load(three, memory=" 0.5 GiB ").memory == 2**29
    assert load(three, memory="2g").memory == 2**31
    assert load(three, memory=str(size)).memory == size
    for budget in (size - 1, "1KB"):
        with pytest.raises(UserError, match=f"one student alone takes {size:,} bytes; give at least that"):
            load(three, memory=budget)
    assert load(three, memory=size // 2, dtype=torch.bfloat16).memory == size // 2
    for word in ("much", "1.2.3GB", "GB", "", "-1GB"):
        with pytest.raises(UserError, match="write bytes, or such as 500MB or 2GB"):
            load(three, memory=word)


# -- what is refused ---------------------------------------------------------------------------------------


@pytest.fixture
def held(three, tmp_path) -> Path:
    """A copy of three students, to be spoilt."""
    shutil.copytree(three.folder, tmp_path / "students")
    return tmp_path / "students"


def other_router(folder: Path) -> None:
    router = make_router(PartitionSettings(students=3, partition="random"), list(range(several.LABELS)), "label")
    router.save(folder / "router.json")


def edited_router(folder: Path) -> None:
    content = json.loads((folder / "router.json").read_text())
    content["parameters"]["labels"] = [[1, 0, 2], [3], [4, 5]]
    (folder / "router.json").write_text(json.dumps(content))


def swapped(folder: Path) -> None:
    (folder / "student-0").rename(folder / "kept")
    (folder / "student-1").rename(folder / "student-0")
    (folder / "kept").rename(folder / "student-1")


def without_provenance(folder: Path) -> None:
    file = folder / "student-1" / "scheduler" / "scheduler_config.json"
    content = json.loads(file.read_text())
    del content["_stepdistill"]["msd"]
    file.write_text(json.dumps(content))


def fewer_parameters(folder: Path) -> None:
    content = json.loads((folder / "msd.json").read_text())
    (folder / "msd.json").write_text(json.dumps({**content, "parameters": content["parameters"][:2]}))


def less_manifest(folder: Path) -> None:
    content = json.loads((folder / "msd.json").read_text())
    del content["noise_shape"]
    (folder / "msd.json").write_text(json.dumps(content))


SPOILT = {
    "another router": (other_router, "its students were trained with router .* take the router that they were"),
    "an edited router": (edited_router, r"router\.json: its hash says .* it was changed, take the one"),
    "no router": (lambda folder: (folder / "router.json").unlink(), r"router\.json: no such router"),
    "a swapped pair": (swapped, "is student 1 of router .*, not 0 of .*; put back the student and the router"),
    "a missing student": (
        lambda folder: shutil.rmtree(folder / "student-2"),
        "student-2: student 2 of 3 is missing; train it with --student 2",
    ),
    "a student that says nothing": (without_provenance, "student-1: says nothing of a router"),
    "no manifest": (lambda folder: (folder / "msd.json").unlink(), r"no msd\.json in it, so it is not a folder of"),
    "a manifest cut short": (
        lambda folder: (folder / "msd.json").write_text('{"students": 3'),
        r"msd\.json: damaged .*; gather the students again",
    ),
    "a manifest of another kind": (lambda folder: (folder / "msd.json").write_text("[]"), "damaged .*; gather"),
    "a manifest without a key": (less_manifest, "damaged .*; gather"),
    "a manifest of fewer": (fewer_parameters, "damaged .*; gather"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_folder_is_refused_before_a_student_is_loaded(name, held):
    spoil, says = SPOILT[name]
    spoil(held)
    with pytest.raises(UserError, match=says) as caught:
        load(held)
    assert str(held) in str(caught.value)
    if name != "no manifest":  # it is then no such folder at all
        with pytest.raises(UserError, match=says):
            StockPipeline.load(held)


def test_a_broken_student_is_named_when_it_is_needed(held):
    weights = held / "student-1" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    pipe = load(held)
    assert draw(pipe, [0], torch.zeros(1, 1, 16, 16), [0]).isfinite().all()
    with pytest.raises(
        UserError, match=r"student-1: unet/diffusion_pytorch_model.safetensors: cannot be read .*; export it"
    ):
        draw(pipe, [2], torch.zeros(1, 1, 16, 16), [0])


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("label-1", {"class_labels": [0, 6]}, r"label 6: no student draws it; the students' labels are 0\.\.5"),
        ("label-1", {"class_labels": -1}, "label -1: no student draws it"),
        ("label-1", {"prompt": "a cat"}, "draw from class_labels; give class_labels and no prompt"),
        ("label-1", {"prompt": "a cat", "class_labels": 0}, "draw from class_labels; give class_labels and no prompt"),
        ("label-1", {}, "draw from class_labels; give class_labels and no prompt"),
        ("prompt-1", {"class_labels": [0]}, "draw from prompt; give prompt and no class_labels"),
        ("prompt-1", {}, "draw from prompt; give prompt and no class_labels"),
        ("label-1", {"class_labels": []}, "nothing to draw; name at least one of labels"),
        ("label-1", {"class_labels": [0, 1], "generator": [torch.Generator()]}, "1 of them for 2 samples"),
        (
            "label-1",
            {"class_labels": [0, 1], "latents": torch.zeros(3, 1, 16, 16)},
            r"latents: \(3, 1, 16, 16\) for 2 samples of \(1, 16, 16\)",
        ),
        (
            "label-1",
            {"class_labels": [0], "latents": torch.zeros(1, 1, 8, 8)},
            r"latents: \(1, 1, 8, 8\) for 1 samples of \(1, 16, 16\)",
        ),
    ],
)
def test_calls_that_do_not_fit_are_refused(name, arguments, says, groups):
    with pytest.raises(UserError, match=says):
        load(groups[name])(**arguments)


@pytest.mark.parametrize("what", ["weights", "vocabulary"])
def test_another_text_encoder_is_refused(what, groups, tmp_path):
    folder = tmp_path / "students"
    shutil.copytree(groups["prompt-1"].folder, folder)
    if what == "weights":
        file = next((folder / "student-0" / "text_encoder").glob("*.safetensors"))
        tensors = load_file(file)
        tensors[min(tensors)].flatten()[0] += 1e-4
        save_file(tensors, file, {"format": "pt"})
        (folder / "student-0" / "stepdistill.json").unlink()
    else:
        file = folder / "student-0" / "tokenizer" / "tokenizer.json"
        content = json.loads(file.read_text())
        vocabulary = content["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
        file.write_text(json.dumps(content))
    pipe = load(folder)
    with pytest.raises(UserError, match="its text encoder or tokenizer is not the one that the router was made with"):
        pipe("a cat")
    with pytest.raises(UserError, match="put the teacher's back"):
        pipe.route(["a cat"])


def test_gathering_refuses_what_does_not_belong_together(three, held, tmp_path):
    folders = [three.folder / f"student-{k}" for k in range(3)]
    for wrong, says in (
        ([folders[1], folders[0], folders[2]], "is student 1 of router"),
        ([folders[0], tmp_path / "gone", folders[2]], "student 1 of 3 is missing"),
    ):
        with pytest.raises(UserError, match=says):
            export_students(wrong, three.router, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "mine.txt").write_text("dear")
    with pytest.raises(UserError, match="holds no student that stepdistill exported; choose another"):
        export_students(folders, three.router, tmp_path / "letters")
    (held / "msd.json").write_text("{")
    assert export_students(folders, three.router, held) == held  # an older gathering is replaced
    assert load(held).students == 3


# -- commands and evaluation -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measure(tmp_path_factory) -> dict[str, str]:
    """A tiny feature network and statistics of made-up pictures."""
    folder = tmp_path_factory.mktemp("measure")
    torch.manual_seed(0)
    file = FeatureNetwork(1, 3, num_features=8, width=8, name="tiny").save(folder / "features.safetensors")
    pixels = np.random.default_rng(0).integers(0, 255, (100, 16, 16), dtype=np.uint8)
    pictures = read_array_images(pixels, np.arange(100) % 3, (1, 16, 16), False, "made up")
    reference = make_reference(pictures, as_extractor(FeatureNetwork.load(file)), kid_features=100)
    return {"extractor": str(file), "reference": str(reference.save(folder / "reference.safetensors"))}


def settings(measure, **more) -> Protocol:
    return Protocol(samples=20, batch_size=8, kid=False, **measure, **more)


@pytest.mark.parametrize("name", ["label-1", "label-4"])
def test_the_distance_is_of_all_samples_together(name, groups, measure, tmp_path):
    """Conditions in turn over the full set, each drawn by its student, pooled; no mean of the students' distances."""
    group, steps = groups[name], CASES[name][1]
    (row,) = evaluate([Target("students", group.folder)], settings(measure), tmp_path)
    assert (row["steps"], row["passes_per_image"], row["samples"]) == (steps, steps, 20)
    unet = DiffusionPipeline.from_pretrained(group.folder / "student-0").unet
    assert row["parameters"] == [unet.num_parameters()] * 2
    pixels, routes = [], []
    for batch, count in enumerate((8, 8, 4)):
        items = [(8 * batch + i) % several.LABELS for i in range(count)]
        noise = unit_noise(0, batch, count, group.family.sample_shape)
        seeds = seeds_by(step_generator(0, batch), count)
        pixels.append(group.sample(items, noise, seeds))
        routes += group.route(items)
    extractor, reference = load_extractor(measure["extractor"]), ReferenceStatistics.load(measure["reference"])
    features = extractor(unit_to_bytes(torch.cat(pixels)))
    assert row["frechet"] == pytest.approx(reference.frechet(features), rel=1e-3)
    chosen = torch.tensor(routes)
    apart = [reference.frechet(features[chosen == k]) for k in range(2)]
    assert abs(np.mean(apart) - row["frechet"]) > 0.05 * row["frechet"]


def test_a_pipeline_of_prompts_is_called_as_a_stock_one(groups):
    group = groups["prompt-1"]
    stock = StockPipeline.load(group.folder)
    assert (stock.condition_kind, stock.noise_shape, stock.default_steps) == ("prompt", (4, 8, 8), 1)
    assert stock.default_guidance == 0
    items, noise, seeds = inputs(group)
    images = stock.generate(items, noise, 1, torch.Generator(), stock.default_guidance)
    torch.testing.assert_close(images, group.sample(items, noise, seeds), **CLOSE)
    assert [sum(p.numel() for p in n.parameters()) for n in stock.denoisers] == stock.pipeline.manifest["parameters"]


def test_the_commands_take_the_gathered_folder(groups, measure, tmp_path):
    folder = groups["label-4"].folder
    result = stepdistill("sample", folder, "--count", 7, "--output", tmp_path / "grid.png")
    assert result.code == 0, result.err
    assert (tmp_path / "grid.png").stat().st_size > 0
    result = stepdistill("sample", folder, "--label", 6, "--output", tmp_path / "none.png")
    assert (result.code, result.error) == (2, "stepdistill: --label 6: outside 0..5")
    result = stepdistill(
        "sample", groups["prompt-1"].folder, "--count", 2, "--prompt", "an owl", "--output", tmp_path / "owl.png"
    )
    assert result.code == 0, result.err
    group = ["--extractor", measure["extractor"], "--reference", measure["reference"], "--samples", 12]
    result = stepdistill("evaluate", folder, *group, "--output", tmp_path / "numbers.json")
    assert result.code == 0, result.err
    (row,) = json.loads((tmp_path / "numbers.json").read_text())["rows"]
    assert row["passes_per_image"] == 4
    assert len(row["parameters"]) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["label-1", "prompt-1"])
def test_half_precision_routes_alike_and_draws_nearly_the_same(name, dtype, groups):
    group = groups[name]
    items, noise, seeds = inputs(group)
    whole, half = load(group), load(group, dtype=dtype)
    assert half.route(items) == whole.route(items)
    pictures = draw(half, items, noise, seeds)
    assert pictures.dtype == dtype
    networks = [pipeline.unet for pipeline in half.loaded.values()]
    assert all(parameter.dtype == dtype for network in networks for parameter in network.parameters())
    error = (pictures.float() - draw(whole, items, noise, seeds)).abs().max()
    assert 0 < error < 0.1


def test_a_number_of_numpy_is_a_label(groups):
    group = groups["label-1"]
    _, noise, seeds = inputs(group)
    drawn, expected = (draw(load(group), label, noise[:1], seeds[:1]) for label in (np.int64(3), 3))
    assert torch.equal(drawn, expected)
