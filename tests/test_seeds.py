"""Two seeds that look different give different numbers: no seed beyond 32 bits, no derived seeds that meet."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import tiny
import torch
import yaml
from console import stepdistill
from test_cli import write_config
from toys import toy_config

from stepdistill.data.partition import PartitionSettings
from stepdistill.data.teacher_pairs import shard_seeds
from stepdistill.errors import UserError
from stepdistill.eval.measure.draws import step_generator, unit_noise
from stepdistill.eval.measure.settings import Protocol
from stepdistill.noise import Noise
from stepdistill.pipelines.msd import MSDPipeline
from stepdistill.seeds import LARGEST, OFFSETS, SEEDS, DistinctSeeds, generator
from stepdistill.settings import JudgeSettings
from stepdistill.trainers.methods.regression import RegressionSettings
from stepdistill.trainers.plans.comparison_settings import ComparisonSettings
from stepdistill.trainers.plans.job import make_job
from stepdistill.trainers.plans.resolve import resolve
from stepdistill.trainers.plans.student_configs import SEED_STEP
from stepdistill.trainers.teachers.class_conditional import TeacherConfig
from stepdistill.trainers.teachers.judge_captions import MatchingConfig
from stepdistill.trainers.teachers.judge_labels import FeatureConfig
from stepdistill.trainers.teachers.text_to_image import TextTeacherConfig

LAST = SEEDS - 1


def test_torch_itself_takes_32_bits_of_a_seed_for_all():
    """Why there is a range at all."""
    draws = [torch.randn(3, generator=torch.Generator().manual_seed(seed)) for seed in (7, 7 + SEEDS, 8)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("seed", [-1, SEEDS, SEEDS + 7])
def test_a_generator_of_another_seeds_numbers_is_refused(seed):
    with pytest.raises(ValueError, match=r"outside 0\.\.4,294,967,295"):
        generator(seed)
    with pytest.raises(ValueError, match="outside"):
        Noise(seed)
    assert generator(LAST).initial_seed() == LAST


SECTIONS = [
    (JudgeSettings, LAST),
    (Protocol, LAST),
    (PartitionSettings, LAST),
    (RegressionSettings, LARGEST),
    (FeatureConfig, LARGEST),
    (MatchingConfig, LARGEST),
    (TeacherConfig, LARGEST),
    (TextTeacherConfig, LARGEST),
]


@pytest.mark.parametrize(("section", "largest"), SECTIONS, ids=lambda value: getattr(value, "__name__", ""))
def test_every_configs_seed_has_a_range(section, largest):
    def says(seed):
        try:
            section.model_validate({"seed": seed})
        except ValueError as error:
            return any(part["loc"] == ("seed",) for part in error.errors())
        return False

    assert [says(seed) for seed in (-1, 0, largest, largest + 1)] == [True, False, False, True]


def test_a_comparisons_seeds_have_it_too():
    with pytest.raises(ValueError, match="seeds"):
        ComparisonSettings.model_validate({"output": "a", "runs": {"a": "b"}, "passes": 1, "seeds": [0, SEEDS]})


def test_a_runs_seed_leaves_room_for_those_that_are_derived_from_it():
    assert make_job(toy_config(seed=LARGEST)).config.seed + OFFSETS - 1 == LAST
    with pytest.raises(UserError, match=f"seed = {LARGEST + 1}: should be less than or equal to {LARGEST}"):
        make_job(toy_config(seed=LARGEST + 1))


def test_the_last_of_several_seeds_is_in_the_range():
    assert Protocol(seed=LAST, seeds=1).seed == LAST
    with pytest.raises(ValueError, match="the last of 2 seeds is above 4,294,967,295"):
        Protocol(seed=LAST, seeds=2)


@pytest.mark.parametrize("command", [["sample", "here"], ["evaluate", "here"]])
@pytest.mark.parametrize("seed", [-1, SEEDS])
def test_the_commands_refuse_it_too(command, seed):
    result = stepdistill(*command, "--seed", seed)
    assert result.code == 2
    assert "--seed" in result.error
    assert ("4294967295" if seed > 0 else "0") in result.error


def test_students_seeds_step_up_and_stay_in_the_range(tmp_path):
    config = write_config(tmp_path, tiny.save_pixels(tmp_path / "teacher", "v", labels=3, null=True))
    raw = {**yaml.safe_load(config.read_text()), "msd": {"students": 3}}
    highest = LARGEST - 2 * SEED_STEP
    several = resolve({**raw, "seed": highest})
    assert [job.config.seed for job in several.jobs] == [highest, highest + SEED_STEP, LARGEST]
    with pytest.raises(UserError, match=f"seed = {highest + 1}: student 2's would be .* take a lower seed"):
        resolve({**raw, "seed": highest + 1})


def test_a_stages_seed_steps_up_with_the_student_too(tmp_path):
    config = write_config(tmp_path, tiny.save_pixels(tmp_path / "teacher", "v", labels=3, null=True))
    raw = {**yaml.safe_load(config.read_text()), "msd": {"students": 2}}
    several = resolve({**raw, "stages": [{"name": "a"}, {"name": "b", "seed": 5}]})
    seeds = [[stage.job.config.seed for stage in student.stages] for student in several.students]
    assert seeds == [[2, 5], [2 + SEED_STEP, 5 + SEED_STEP]]


# -- derived seeds -----------------------------------------------------------------------------------------


def test_hashes_that_meet_are_told_apart_and_the_others_stay():
    seeds = DistinctSeeds(lambda index: [5, 9, 5, 6, SEEDS + 9, LAST, -1][index])
    assert [seeds[6], *(seeds[i] for i in range(6))] == [0, 5, 9, 6, 7, 10, LAST]


def test_a_batchs_noise_is_the_one_that_it_was():
    """By numpy's hash of (seed, batch, stream), as in every evaluation before."""
    for stream in (0, 1):
        hashed = int(np.random.SeedSequence((1234, 3, stream)).generate_state(1, np.uint64)[0]) >> 1
        old = torch.randn(4, generator=torch.Generator().manual_seed(hashed))
        assert torch.equal(torch.randn(4, generator=step_generator(1234, 3, stream)), old)
    assert torch.equal(unit_noise(1234, 3, 1, (4,))[0], torch.randn(4, generator=step_generator(1234, 3, 0)))


def test_no_two_batches_of_a_seed_start_alike():
    drawn = [step_generator(1, batch, stream).initial_seed() for batch in range(3000) for stream in (0, 1)]
    assert len(set(drawn)) == len(drawn)
    assert all(0 <= seed < SEEDS for seed in drawn)


def test_no_two_shards_of_pairs_start_alike_and_their_noise_is_the_one_that_it_was():
    seeds = [shard_seeds(5)[index] for index in range(5000)]
    assert len(set(seeds)) == len(seeds)
    first = int.from_bytes(hashlib.sha256(b"pairs 5 0").digest()[:8], "big") >> 1
    old, new = (torch.randn(4, generator=torch.Generator().manual_seed(seed)) for seed in (first, seeds[0]))
    assert torch.equal(old, new)


def test_no_two_samples_of_several_students_have_the_same_noise_between_steps():
    generators = MSDPipeline._generators(torch.Generator().manual_seed(3), 20_000)
    assert len({generator.initial_seed() for generator in generators}) == 20_000
    again = MSDPipeline._generators(torch.Generator().manual_seed(3), 2)
    assert [generator.initial_seed() for generator in again] == [
        generator.initial_seed() for generator in generators[:2]
    ]
