"""What a plan writes down for the evaluation and the report of its folder."""

import pytest

from stepdistill.run_record import PartRecord, RunRecord
from stepdistill.trainers.plans.resolve import resolve

RUN = {
    "method": "dmd2",
    "output": "out",
    "teacher": {"path": "teacher", "steps": 4},
    "data": {"images": {"npz": "images.npz"}},
    "train": {"updates": 1000, "batch_size": 2},
}
REWARD = {"reward": "judges:Brightness"}


@pytest.mark.parametrize(
    ("changes", "scale"),
    [
        ({}, 1.0),
        ({"dmd2": {"guidance_scale": 4.0}}, 4.0),
        ({"method": "swiftbrush", "swiftbrush": {"guidance_scale": 4.0, "fake_score_guidance": "shared"}}, 1.0),
        ({"method": "swiftbrush", "swiftbrush": {"guidance_scale": 4.0, "fake_score_guidance": "none"}}, 4.0),
        ({"method": "disback", "disback": {"base": "sim"}, "sim": {"guidance_scale": 3.0}}, 3.0),
        ({"method": "tsm", "tsm": {"guidance_scale": 0.0}}, 1.0),
        ({"method": "feedback", "feedback": {"rewards": [REWARD]}, "roles": {"student_from": "x"}}, 1.0),
    ],
)
def test_the_guidance_of_the_distillation(changes, scale):
    assert resolve({**RUN, **changes}).make_record() == RunRecord(guidance_scale=scale)


def test_a_tuned_model_is_compared_with_what_it_was_and_judged_by_its_rewards():
    raw = {**RUN, "method": "pso", "pso": {"rewards": [REWARD]}, "sampler": {"steps": 4}}
    record = resolve({key: value for key, value in raw.items() if key != "data"}).make_record()
    assert (record.baseline, [reward.reward for reward in record.rewards]) == ("untuned", ["judges:Brightness"])


STAGES = [{"name": "a", "method": "tsm", "shared": True}, {"name": "b"}]


def test_stages_and_students_are_parts_below_the_whole():
    stages = [{key: value for key, value in stage.items() if key != "shared"} for stage in STAGES]
    assert resolve({**RUN, "stages": stages}).make_record().parts == [
        PartRecord(name="a", folder="01-a", method="tsm"),
        PartRecord(name="b", folder="02-b", method="dmd2"),
    ]
    students = {"msd": {"students": 2, "partition": "order"}}
    assert [(part.name, part.folder) for part in resolve({**RUN, **students}).make_record().parts] == [
        ("student 0", "student-0"),
        ("student 1", "student-1"),
    ]
    parts = resolve({**RUN, **students, "stages": STAGES}).make_record().parts
    assert [(part.name, part.folder, part.method) for part in parts] == [
        ("shared, a", "shared/01-a", "tsm"),
        ("student 0, b", "student-0/01-b", "dmd2"),
        ("student 1, b", "student-1/01-b", "dmd2"),
    ]
    assert not any(part.undivided for part in parts)
