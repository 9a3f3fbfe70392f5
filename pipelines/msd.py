"""Several students as one pipeline (MSD, 2410.23274): each sample is routed to its student and drawn by it alone.

    pipe = MSDPipeline.from_pretrained("runs/msd/student", memory="2GB")
    images = pipe(class_labels=[3, 7]).images            # or pipe(["a cat", "a bus"]).images

The folder holds ``msd.json``, ``router.json`` and a stock diffusers folder for each student, which loads by itself
too; this class is needed for routing alone.  Students are loaded when they are first asked for; what exceeds ``memory``
is dropped, the longest unused first.  What all have in common (text encoder, tokenizer, VAE) is loaded once.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections import OrderedDict
from collections.abc import Callable
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from safetensors import safe_open
from torch import Tensor, nn

from stepdistill import __version__, files
from stepdistill.data.router import FILE, Router
from stepdistill.digests import check_folder, write_record
from stepdistill.errors import UserError, reading
from stepdistill.families import Family, calls_of, claiming_family
from stepdistill.plain_files import read_json, regular
from stepdistill.seeds import SEEDS
from stepdistill.seeds import generator as seeded
from stepdistill.stock.folders import MANIFEST, check_replaceable, find_missing, is_whole
from stepdistill.stock.loading import load_pipeline, read_index

from .card import students_card


def is_msd_folder(path: str | Path) -> bool:
    return (Path(path) / MANIFEST).is_file()


class MSDPipeline:
    """K students behind one call; see the module."""

    def __init__(
        self,
        folder: Path,
        manifest: dict[str, Any],
        router: Router,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        memory: int | None = None,
    ):
        self.folder, self.manifest, self.router = folder, manifest, router
        self.dtype, self.device, self.memory = dtype, torch.device(device), memory
        self.loaded: OrderedDict[int, DiffusionPipeline] = OrderedDict()
        self._common: dict[str, Any] = {}
        self._encoder: Callable[[list[str]], tuple[Tensor, Tensor]] | None = None
        self._bar: dict[str, Any] = {}

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        memory: int | str | None = None,
        revision: str | None = None,
    ) -> MSDPipeline:
        """Check a folder (or hub id) of several students; no student is loaded yet.

        Args:
            dtype: of the students' networks.  Prompts are routed in float32 whatever it is.
            memory: the most that students' networks may take, bytes or "2GB"; None keeps all that were asked for.

        Raises:
            UserError: no such folder, a student is missing, the router is not the one that they were trained with, or
                one student alone is larger than ``memory``.
        """
        folder = Path(path)
        if not folder.is_dir():
            folder = _from_hub(str(path), revision)
        manifest = read_manifest(folder)
        router = Router.load(folder / FILE)
        if router.hash != manifest["router"]:
            raise UserError(
                f"{folder}: its students were trained with router {manifest['router'][:12]}, and {FILE} is "
                f"{router.hash[:12]}; take the router that they were trained with"
            )
        for k in range(manifest["students"]):
            check_student(folder / f"student-{k}", router, k)
        budget = _bytes(memory)
        size = max(manifest["parameters"]) * torch.empty((), dtype=dtype).element_size()
        if budget is not None and size > budget:
            raise UserError(f"memory = {memory}: one student alone takes {size:,} bytes; give at least that")
        return cls(folder, manifest, router, dtype, device, budget)

    # -- students ------------------------------------------------------------------------------------------

    @property
    def students(self) -> int:
        """K."""
        return self.manifest["students"]

    def student(self, k: int) -> DiffusionPipeline:
        """Student k's stock pipeline, loaded if it is not."""
        if k not in self.loaded:
            self._make_room(k)
            path = self.folder / f"student-{k}"
            pipeline = load_pipeline(path, f"student {path}", "export it again", self.dtype, **self._shared())
            pipeline = calls_of(pipeline).with_noise().pipeline.to(self.device)
            pipeline.set_progress_bar_config(**self._bar)
            self.loaded[k] = pipeline
        self.loaded.move_to_end(k)
        return self.loaded[k]

    def _make_room(self, k: int) -> None:
        """Drop the students that were not used for longest until student k fits."""
        if self.memory is None:
            return
        width = torch.empty((), dtype=self.dtype).element_size()
        sizes = [count * width for count in self.manifest["parameters"]]
        while self.loaded and sum(sizes[j] for j in self.loaded) + sizes[k] > self.memory:
            self.loaded.popitem(last=False)

    @cached_property
    def family(self) -> type[Family]:
        """The family of the students' pipelines.

        Raises:
            UserError: no family claims them.
        """
        return family_of_student(self.folder / "student-0")

    @property
    def common(self) -> dict[str, Any]:
        """The parts that all students share, loaded once, {} for pixels: what encodes prompts, in float32, which
        serves routing and drawing, and the rest (the VAE) in ``dtype``."""
        calls = self.family.calls
        if self.router.kind != "labels" and not self._common:
            path = self.folder / "student-0"
            without: dict[str, Any] = {self.family.component: None}
            first = load_pipeline(path, f"student {path}", "export it again", **without)
            self._common = {name: first.components[name] for name in calls.shared_parts}
            for name, network in self._common_networks().items():
                network.to(self.device, torch.float32 if name in calls.encoder_parts else self.dtype)
        return self._common

    def _common_networks(self) -> dict[str, nn.Module]:
        return {name: part for name, part in self._common.items() if isinstance(part, nn.Module)}

    @property
    def text_encoders(self) -> list[nn.Module]:
        """The networks that encode prompts, for all students."""
        encoders = self.family.calls.encoder_parts
        return [part for name, part in self._common_networks().items() if name in encoders] if self.common else []

    def _shared(self) -> dict[str, Any]:
        """The parts that a student's pipeline is loaded with: prompts come to it encoded."""
        encoders = self.family.calls.encoder_parts
        return {name: None if name in encoders else part for name, part in self.common.items()}

    @property
    def encoder(self) -> Any:
        """The text encoder that routes.

        Raises:
            UserError: it is not the one that the router was made with.
        """
        if self._encoder is None:
            encoder: Any = self.family.calls.prompt_encoder(self.common)
            if encoder.fingerprint != self.router.encoder:
                raise UserError(
                    f"{self.folder}: its text encoder or tokenizer is not the one that the router was made with, so "
                    "prompts would go to other students; put the teacher's back"
                )
            self._encoder = encoder
        return self._encoder

    def to(self, device: str | torch.device) -> MSDPipeline:
        self.device = torch.device(device)
        for pipeline in self.loaded.values():
            pipeline.to(device)
        for network in self._common_networks().values():
            network.to(device)
        return self

    def set_progress_bar_config(self, **arguments: Any) -> None:
        self._bar = arguments
        for pipeline in self.loaded.values():
            pipeline.set_progress_bar_config(**arguments)

    # -- drawing -------------------------------------------------------------------------------------------

    def route(self, items: list) -> list[int]:
        """The student of each label or prompt.

        Raises:
            UserError: a label that no student draws.
        """
        return self.router.route(items, lambda prompts: self.encoder(prompts)[1])

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        class_labels: int | list[int] | Tensor | None = None,
        latents: Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        num_images_per_prompt: int = 1,
        output_type: str = "pil",
        return_dict: bool = True,
        **arguments: Any,
    ) -> ImagePipelineOutput | tuple:
        """Draw pictures, one student's call for each student that is needed; in the order of the conditions.

        Args:
            prompt, class_labels: what to draw, as the students take it.
            latents: (B, C, H, W) unit normal; drawn for the whole batch otherwise, so that a sample's noise does not
                depend on which others are drawn with it.
            generator: one, or one a sample.  Noise between an N-step student's steps comes from one of each sample's.
            arguments: passed on to the students' own class; the number of steps and guidance are theirs by default.

        Raises:
            UserError: a label that no student draws, conditions of the wrong kind, or noise of another shape.
        """
        items = self._items(prompt, class_labels, num_images_per_prompt)
        if isinstance(generator, list) and len(generator) != len(items):
            raise UserError(f"generator: {len(generator)} of them for {len(items)} samples; give one, or one each")
        steps = num_inference_steps or self.manifest["call"]["num_inference_steps"]
        call = {**self.manifest["call"], **arguments, "num_inference_steps": steps, "output_type": output_type}
        hidden, embeddings = self.encoder(items) if self.router.kind != "labels" else (None, None)
        routes = self.router.route_labels(items) if embeddings is None else self.router.route_embeddings(embeddings)
        noise = self._noise(latents, generator, len(items))
        generators = self._generators(generator, len(items)) if steps > 1 else None
        images: list[Any] = [None] * len(items)
        loaded_first = sorted(set(routes), key=lambda k: (k not in self.loaded, k))
        for k in loaded_first:
            index = [i for i, route in enumerate(routes) if route == k]
            pipeline = self.student(k)
            calls = calls_of(pipeline)
            student_call = {"latents": noise[index], **call}
            if generators is not None:
                student_call["generator"] = [generators[i] for i in index]
            if hidden is not None:
                student_call |= calls.embedded(hidden[index].to(self.device, self.dtype))
            else:
                student_call |= calls.conditioned([items[i] for i in index]) | {"batch_size": len(index)}
            for i, image in zip(index, pipeline(**student_call).images, strict=True):
                images[i] = image
        drawn = _together(images)
        return ImagePipelineOutput(images=drawn) if return_dict else (drawn,)

    def _items(self, prompt: Any, class_labels: Any, repeats: int) -> list[Any]:
        labels = self.router.kind == "labels"
        items, other = (class_labels, prompt) if labels else (prompt, class_labels)
        if items is None or other is not None:
            right, wrong = ("class_labels", "prompt") if labels else ("prompt", "class_labels")
            raise UserError(f"{self.folder}: these students draw from {right}; give {right} and no {wrong}")
        if isinstance(items, Tensor):
            items = items.tolist()
        items = [items] if isinstance(items, str | Integral) else list(items)
        if not items:
            raise UserError(f"{self.folder}: nothing to draw; name at least one of {'labels' if labels else 'prompts'}")
        return [item for item in items for _ in range(repeats)]

    def _noise(self, latents: Tensor | None, generator: Any, count: int) -> Tensor:
        shape = (count, *self.manifest["noise_shape"])
        if latents is None:
            return randn_tensor(shape, generator=generator, device=self.device, dtype=self.dtype)
        if tuple(latents.shape) != shape:
            raise UserError(f"latents: {tuple(latents.shape)} for {count} samples of {shape[1:]}")
        return latents.to(self.device, self.dtype)

    @staticmethod
    def _generators(generator: Any, count: int) -> list[torch.Generator]:
        """One generator a sample, no two alike, seeded by the one that was given."""
        if isinstance(generator, list):
            return generator
        device = "cpu" if generator is None else generator.device
        first = int(torch.randint(SEEDS, (), generator=generator, device=device))
        return [seeded((first + index) % SEEDS, device) for index in range(count)]


def _together(images: list) -> Any:
    """One tensor or array where the pictures are such, else their list."""
    if isinstance(images[0], Tensor):
        return torch.stack(images)
    return np.stack(images) if isinstance(images[0], np.ndarray) else images


def _bytes(memory: int | str | None) -> int | None:
    if memory is None or isinstance(memory, int):
        return memory
    size = re.fullmatch(r"\s*([\d.]+)\s*([KMGT]?)i?B?\s*", memory, re.I)
    with contextlib.suppress(ValueError):
        if size is not None:
            return int(float(size[1]) * 1024 ** " KMGT".index(size[2].upper() or " "))
    raise UserError(f"memory = {memory!r}: write bytes, or such as 500MB or 2GB")


def _from_hub(path: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    with reading(path, "look at its name", "no such folder here, and the hub did not give it"):
        return Path(snapshot_download(path, revision=revision))


# -- the folder --------------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> dict[str, Any]:
    """``msd.json``.

    Raises:
        UserError: not there, or damaged.
    """
    if not (folder / MANIFEST).exists():
        raise UserError(f"{folder}: no {MANIFEST} in it, so it is not a folder of several students")
    with reading(folder / MANIFEST, "gather the students again", "damaged"):
        manifest = read_json(folder / MANIFEST)
        _check_manifest(manifest)
    return manifest


def _check_manifest(manifest: dict[str, Any]) -> None:
    """
    Raises:
        ValueError, KeyError: a key is missing, or of another type.
    """
    counts = [manifest["students"], *manifest["parameters"], *manifest["noise_shape"]]
    whole = all(isinstance(count, int) and not isinstance(count, bool) and count > 0 for count in counts)
    if not whole or not manifest["noise_shape"]:
        raise ValueError("students, parameters and noise_shape are not all counts")
    if len(manifest["parameters"]) != manifest["students"]:
        raise ValueError(f"{len(manifest['parameters'])} parameters of {manifest['students']} students")
    if not isinstance(manifest["router"], str) or not isinstance(manifest["call"], dict):
        raise ValueError("router is no text, or call no mapping")
    if not isinstance(manifest["call"]["num_inference_steps"], int):
        raise ValueError("call.num_inference_steps is no number")


def family_of_student(folder: Path) -> type[Family]:
    """The family of a student's folder.

    Raises:
        UserError: the folder is not a pipeline, or no family claims it.
    """
    family = claiming_family(read_index(folder, f"student {folder}"))
    if family is None:
        raise UserError(f"{folder}: no family of teachers knows this pipeline; export the student again")
    return family


def check_student(folder: Path, router: Router, k: int) -> dict[str, Any]:
    """What student k's folder says of itself, once it is known to be there and of this router.

    Raises:
        UserError: it is missing, or another's.
    """
    if not (folder / "model_index.json").is_file():
        raise UserError(f"{folder}: student {k} of {router.students} is missing; train it with --student {k}")
    with reading(folder, "put back the student that was trained", "says nothing of a router, or not in the right form"):
        provenance = read_json(folder / "scheduler" / "scheduler_config.json")["_stepdistill"]
        hash_of_router, number = (provenance["msd"][key] for key in ("router", "student"))
    if hash_of_router != router.hash or number != k:
        raise UserError(
            f"{folder}: is student {number} of router {str(hash_of_router)[:12]}, not {k} of "
            f"{router.hash[:12]}; put back the student and the router that belong together"
        )
    return provenance


def export_students(folders: list[Path], router: Router, path: Path) -> Path:
    """Copy the students' exported folders and the router to ``path``, whole or not at all.

    Raises:
        UserError: a student is missing, not whole or of another router, or the folder cannot be written.
    """
    for k, folder in enumerate(folders):
        if folder.is_dir() and not is_whole(folder):
            raise UserError(
                f"{folder}: student {k} is not whole ({find_missing(folder)} is missing or cut short); train it with "
                f"--student {k}, which exports it again"
            )
    provenances = [check_student(folder, router, k) for k, folder in enumerate(folders)]
    for folder in folders:
        check_folder(folder, f"student {folder}")
    check_replaceable(path)
    with reading(folders[0], "export it again", "not a whole student"):
        family = family_of_student(folders[0])
        network = family.component
        noise_shape = family.calls.noise_shape_of(read_json(folders[0] / network / "config.json"))
        first = provenances[0]
        steps, call = first["steps"], dict(first["call"])
    manifest = {
        "version": __version__,
        "students": len(folders),
        "router": router.hash,
        "teacher": first.get("teacher"),
        "method": first.get("method"),
        "steps": steps,
        "call": call,
        "noise_shape": list(noise_shape),
        "parameters": [_parameters(folder / network) for folder in folders],
    }
    with files.replacing_folder(path) as temporary:
        for k, folder in enumerate(folders):
            write_record(Path(shutil.copytree(folder, temporary / f"student-{k}")))
        router.save(temporary / FILE)
        files.write_json(temporary / MANIFEST, manifest)
        files.write_text(temporary / "README.md", students_card(path.name, manifest, router))
    return path


def _parameters(folder: Path) -> int:
    """Numbers in a network's weight files."""
    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        with reading(file, "export the student again"), safe_open(regular(file), "pt") as opened:
            total += sum(int(np.prod(opened.get_slice(k).get_shape())) for k in opened.keys())  # noqa: SIM118
    return total
