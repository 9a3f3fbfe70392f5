"""A number's protocol in one line, and numbers of different protocols kept apart."""

import json

import pytest
from console import stepdistill

from stepdistill.errors import UserError
from stepdistill.eval.measure.protocols import comparable_part, format_protocol, require_same

PROTOCOL = {
    "metric": "FID",
    "extractor": "inception",
    "extractor_fingerprint": "a" * 64,
    "resize": "clean-fid clean",
    "crop": "centre",
    "size": "PIL lanczos to 256x256",
    "clip_size": "PIL lanczos to 256x256",
    "seeds": [1, 2],
    "reference": {"source": "val2014", "n": 40504, "features": 10000, "fingerprint": "b" * 64},
    "clip": "ViT-g-14 weights.bin, prefix 'A photo depicts '",
    "prompts_fingerprint": "c" * 64,
    "settings": {
        "samples": 30000,
        "batch_size": 16,
        "labels": [0, 1],
        "dtype": "float32",
        "quantise": "round",
        "precision_recall": True,
        "neighbours": 3,
        "kid": True,
        "kid_subsets": 100,
        "kid_subset_size": 1000,
        "preset": "coco30k",
    },
    "device": "cpu",
}


def changed(key, value):
    """The protocol with one value at ``a.b`` changed."""
    head, _, tail = key.partition(".")
    return {**PROTOCOL, head: {**PROTOCOL[head], tail: value} if tail else value}


def test_the_line_says_everything_that_a_number_needs():
    assert format_protocol(PROTOCOL) == (
        "preset coco30k; FID: extractor inception aaaaaaaaaaaa; n 30000 a seed, 16 at a time; crop centre; "
        "resize PIL lanczos to 256x256, the extractor's clean-fid clean; reference val2014 bbbbbbbbbbbb, 40504 "
        "pictures; precision and recall of 10000 and 10000 features, k 3; CLIP ViT-g-14 weights.bin, prefix 'A photo "
        "depicts ', picture PIL lanczos to 256x256; seeds 1, 2"
    )
    assert format_protocol({"metric": "FID"}).startswith("FID: extractor ?")  # of an older file, what there is


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("metric", "FD-DINOv2", r"metric \('FID' there, 'FD-DINOv2' now\)"),
        ("extractor_fingerprint", "d" * 64, r"extractor's hash"),
        ("crop", "none", "crop"),
        ("size", "none", "size"),
        ("seeds", [1], r"seeds \(\[1, 2\] there, \[1\] now\)"),
        ("reference.fingerprint", "d" * 64, "reference"),
        ("prompts_fingerprint", "d" * 64, "prompts"),
        ("clip", "ViT-L-14", "CLIP"),
        ("clip_size", "none", "CLIP"),
        ("settings.samples", 5000, r"samples \(30000 there, 5000 now\)"),
        ("settings.batch_size", 8, "batch_size"),
        ("settings.labels", [0], r"labels"),
        ("settings.dtype", "bfloat16", r"dtype \('float32' there, 'bfloat16' now\)"),
        ("settings.quantise", "floor", r"quantise \('round' there, 'floor' now\)"),
        ("extractor", "dinov2", "extractor"),
        ("resize", "none", "resize"),
        ("reference.source", "val2017", "reference"),
        ("settings.neighbours", 5, "neighbours"),
        ("settings.kid_subset_size", 500, "kid"),
    ],
)
def test_what_differs_is_named(key, value, message):
    with pytest.raises(UserError, match=message) as error:
        require_same(PROTOCOL, changed(key, value), "x.json", "give another --output")
    message = str(error.value)
    assert message.startswith("x.json: measured under another protocol: ")
    assert message.endswith("; give another --output")
    assert "\n" not in message
    assert message.count(" there, ") == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [("device", "cuda"), ("clip", None), ("settings.kid", False), ("settings.precision_recall", False)],
)
def test_another_machine_or_a_metric_less_is_the_same_protocol(key, value):
    require_same(PROTOCOL, changed(key, value), "x.json", "")
    require_same(changed(key, value), PROTOCOL, "x.json", "")
    assert comparable_part(PROTOCOL) == comparable_part({**PROTOCOL, "versions": {"torch": "9"}})


@pytest.fixture
def command(label_folder, network_file, reference_file, tmp_path):
    def run(*options):
        arguments = [
            "--extractor",
            network_file,
            "--samples",
            12,
            "--set",
            "kid_subset_size=8",
            "--set",
            "kid_subsets=2",
        ]
        return stepdistill("evaluate", f"a={label_folder}@1", *arguments, "--output", tmp_path / "x.json", *options)

    return run


def test_an_output_of_another_protocol_is_refused_and_left(command, tmp_path):
    first = command()
    assert first.code == 0, first.err
    stored = (tmp_path / "x.json").read_text()
    assert json.loads(stored)["protocol"]["line"] in first.out
    refused = command("--seed", 7)
    assert refused.code == 2
    assert "x.json: measured under another protocol: seeds ([1234] there, [7] now); give another" in refused.error
    assert (tmp_path / "x.json").read_text() == stored
    assert "unchanged, its numbers are taken" in command().out
    (tmp_path / "x.json").unlink()
    assert command("--seed", 7).code == 0


def test_another_metric_goes_into_the_same_output(command, tmp_path):
    assert command().code == 0
    again = command("--precision-recall")
    assert again.code == 0, again.err
    assert json.loads((tmp_path / "x.json").read_text())["rows"][0]["precision"] is not None
