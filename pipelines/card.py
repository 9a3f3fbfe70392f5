"""Model cards: README.md of an exported folder.  Every snippet runs as printed, in the folder."""

from __future__ import annotations

import copy
import inspect
import json
from typing import Any

import torch
from diffusers import DiffusionPipeline

from stepdistill.data.router import Router
from stepdistill.errors import first_line
from stepdistill.families import calls_of
from stepdistill.families.calls import CONDITION_ARGUMENTS, EXAMPLE_PROMPTS

HEAD = """---
library_name: diffusers
tags: [stepdistill, distillation, few-step]
---
"""
LABELS, PROMPT = CONDITION_ARGUMENTS["label"], CONDITION_ARGUMENTS["prompt"]


def model_card(
    name: str, pipeline: DiffusionPipeline, facts: dict[str, Any], dtype: torch.dtype = torch.float32
) -> str:
    """What a student's folder is, the lines that use it, and what goes wrong without their arguments.

    Args:
        facts: must hold ``call``, ``steps`` and ``version``.
        dtype: of the stored weights.
    """
    also = ", ".join(map(str, facts.get("also_steps") or []))
    trained = "The number of steps" + (f" (this, or {also})" if also else "")
    trained += " and the guidance scale are" if "guidance_scale" in facts["call"] else " is"
    calls = calls_of(pipeline)
    notes = "".join(f"\n{note}\n" for note in calls.notes())
    settings = json.dumps({k: v for k, v in facts.items() if k != "call"}, indent=1, default=str)
    return f"""{HEAD}# {name}: {facts["steps"]}-step student by {facts.get("method", "distillation")}

Distilled from `{facts.get("teacher", "a teacher")}` with stepdistill {facts["version"]}. A stock
`{type(pipeline).__name__}`: diffusers alone loads it, stepdistill is not needed. In this folder:

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(".")  # or the path of this folder, or its hub id
image = pipe({arguments(calls.example() | facts["call"])}).images[0]
```

{trained} part of what was trained.
{defaults(pipeline, facts["call"])}
The teacher's licence applies.
{notes}{_dtype_line(dtype)}{_attention_line(facts)}
<details><summary>How it was made</summary>

```json
{settings}
```
</details>
"""


def arguments(call: dict[str, Any]) -> str:
    """A call's arguments as Python source; what is named ``prompt`` comes without its name."""
    parts = [f"{key}={json.dumps(value) if isinstance(value, str | list) else value}" for key, value in call.items()]
    return ", ".join(part.removeprefix("prompt=") for part in parts)


def defaults(pipeline: DiffusionPipeline, call: dict[str, Any]) -> str:
    """What a call without the arguments ``call`` does: the class's own defaults are tried on the scheduler."""
    name, parameters = type(pipeline).__name__, inspect.signature(type(pipeline).__call__).parameters
    by_default = {key: parameters[key].default for key in call if key in parameters}
    if by_default == call:
        return f"`{name}` has these arguments by default."
    end = "for which this student was not trained"
    try:
        copy.deepcopy(pipeline.scheduler).set_timesteps(by_default["num_inference_steps"])
    except Exception as error:  # what the scheduler says is what a user would see
        reason = first_line(error).replace("`", "'").partition(". ")[0]
        end = f"and fails with\n`{type(error).__name__}: {reason}`"
    return f"Without them `{name}` takes its own `{arguments(by_default)}`, {end}.\nWrite `{arguments(call)}`."


def _dtype_line(dtype: torch.dtype) -> str:
    if dtype == torch.float32:
        return ""
    name = str(dtype).removeprefix("torch.")
    return (
        f"\nThe weights are stored in {name}. Loaded as above they compute in float32; with "
        f'`import torch` and `from_pretrained(".", dtype=torch.{name})` in {name}.\n'
    )


def _attention_line(facts: dict[str, Any]) -> str:
    kernel = facts.get("attention")
    if kernel is None:
        return ""
    return (
        f"\nTrained with `{kernel}` attention (diffusers' name) in {facts.get('precision', 'float32')}. Exact kernels "
        "give the same pictures up to rounding, in float32 within 0.001 of a pixel's range.\n"
    )


def students_card(name: str, manifest: dict[str, Any], router: Router) -> str:
    """The same of a folder of several students (``msd.json``)."""
    several: dict[str, Any]
    one: dict[str, Any]
    if router.kind == "labels":
        labels = router.parameters["labels"]
        several, one = {LABELS: router.labels[:2]}, {LABELS: labels[0][:1]}
        parts = "".join(f"- `student-{k}`: {part}\n" for k, part in enumerate(labels))
    else:
        several, one, parts = {PROMPT: list(EXAMPLE_PROMPTS)}, {PROMPT: EXAMPLE_PROMPTS[0]}, ""
    largest = max(manifest["parameters"]) * torch.float32.itemsize / 2**20
    return f"""{HEAD}# {name}: {manifest["students"]} students of one teacher

Distilled from `{manifest["teacher"]}` by {manifest["method"]} with stepdistill {manifest["version"]}; each student
draws a part of the conditions. In this folder, all of them, routed:

```python
from stepdistill.pipelines import MSDPipeline

pipe = MSDPipeline.from_pretrained(".")  # or the path of this folder, or its hub id
images = pipe({arguments(several)}).images
```

One student's network takes {largest:.0f} MB in float32; `from_pretrained(".", memory="...GB")` holds no more of them at
once than fit there.

One of them, for its own conditions alone, with diffusers and nothing else:

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("./student-0")
image = pipe({arguments(one | manifest["call"])}).images[0]
```

{parts}
The teacher's licence applies.
"""
