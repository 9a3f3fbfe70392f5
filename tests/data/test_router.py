"""Who draws what: partitions are whole, balanced and disjoint, and a route is the same wherever it is asked for."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from pydantic import ValidationError

from stepdistill.data.partition import PartitionSettings, make_router
from stepdistill.data.router import Router
from stepdistill.errors import UserError
from stepdistill.families import load_family
from stepdistill.families.clip_text import PromptEncoder

WORDS = {
    "kind": ["a cat", "two dogs", "the red bus", "an owl", "big ships", "my house"],
    "what": ["in fog", "at sea", "on a hill", "by night", "under snow", "of glass"],
    "how": ["painted", "drawn", "sharp"],
}
PROMPTS = [" ".join(parts) for parts in product(*WORDS.values())]


class Table:
    """Prompts ``p0``, ``p1``, ... with embeddings given as rows; called as a prompt encoder is."""

    fingerprint = "a table"

    def __init__(self, rows: torch.Tensor):
        self.rows, self.sizes = rows, []

    def __call__(self, prompts):
        self.sizes.append(len(prompts))
        return None, self.rows[[int(prompt[1:]) for prompt in prompts]]

    @property
    def prompts(self) -> list[str]:
        return [f"p{i}" for i in range(len(self.rows))]


def heavy_tailed(count=3000, topics=60, width=16, dtype=torch.float32, seed=0) -> Table:
    """Embeddings around topics whose sizes follow Zipf's law."""
    generator = np.random.default_rng(seed)
    share = 1 / np.arange(1, topics + 1)
    topic = generator.choice(topics, count, p=share / share.sum())
    centres = 3 * generator.standard_normal((topics, width))
    return Table(torch.from_numpy(centres[topic] + generator.standard_normal((count, width))).to(dtype))


def router_of(table: Table, prompts=None, **settings) -> Router:
    return make_router(PartitionSettings(**settings), prompts or table.prompts, "prompt", table)


def routes(router: Router, table: Table, prompts=None, batch=64) -> list[int]:
    return router.route(prompts or table.prompts, lambda texts: table(texts)[1], batch)


def label_parts(labels=range(10), **settings) -> list[list[int]]:
    return make_router(PartitionSettings(**settings), list(labels), "label").parameters["labels"]


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return load_family(str(tiny.save_stable_diffusion(tmp_path_factory.mktemp("partition") / "teacher")))


# -- labels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["order", "random"])
@pytest.mark.parametrize(("count", "students"), [(10, 1), (10, 2), (10, 3), (10, 10), (7, 4), (1000, 8), (1000, 7)])
def test_labels_are_divided_whole_disjoint_and_equal(how, count, students):
    parts = label_parts(range(count), students=students, partition=how)
    assert len(parts) == students
    assert sorted(label for part in parts for label in part) == list(range(count))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


def test_order_is_consecutive_and_what_a_division_gives():
    parts = label_parts(range(1000), students=4)
    assert parts == [list(range(250 * k, 250 * k + 250)) for k in range(4)]
    router = make_router(PartitionSettings(students=4), list(range(1000)), "label")
    assert router.route_labels([0, 249, 250, 999, 500]) == [0, 0, 1, 3, 2]
    assert label_parts([9, 2, 5, 4], students=2) == [[2, 4], [5, 9]]


def test_random_differs_from_order_and_is_a_function_of_its_seed():
    first = label_parts(range(20), students=4, partition="random", seed=3)
    assert first == label_parts(range(20), students=4, partition="random", seed=3)
    assert first != label_parts(range(20), students=4)
    assert first != label_parts(range(20), students=4, partition="random", seed=4)


def test_a_table_is_taken_as_it_is():
    router = make_router(
        PartitionSettings(students=2, partition="table", table=[[4, 0], [3, 1, 2]]), list(range(5)), "label"
    )
    assert router.route_labels([0, 1, 2, 3, 4]) == [0, 1, 1, 1, 0]


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ([[0, 1], [2]], "label 3 belongs to no student"),
        ([[0, 1], [2, 3, 1]], "label 1 stands twice"),
        ([[0, 0, 1], [2, 3]], "label 0 stands twice"),
        ([[0, 1], [2, 3, 4]], "label 4 is not one of the run's 0..3"),
        ([[0, 1], [2, 3, -1]], "label -1 is not one of the run's 0..3"),
    ],
)
def test_a_table_that_is_no_partition_is_refused(table, says):
    with pytest.raises(UserError, match=says):
        label_parts(range(4), students=2, partition="table", table=table)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"students": 2, "table": [[0], [1]]}, "table goes with partition = table"),
        ({"students": 2, "partition": "table"}, "table goes with partition = table"),
        ({"students": 3, "partition": "table", "table": [[0], [1]]}, "table has 2 lists for students = 3"),
        ({"students": 2, "partition": "table", "table": [[0], []]}, "a student without labels"),
        ({"students": 3, "partition": "medians"}, "medians makes 2, 4, 8"),
        ({"students": 6, "partition": "medians"}, "use kmeans"),
        ({"students": 0}, "greater than or equal to 1"),
    ],
)
def test_settings_that_contradict_themselves_are_refused(settings, says):
    with pytest.raises(ValidationError, match=says):
        PartitionSettings(**settings)


@pytest.mark.parametrize(
    ("how", "items", "kind", "says"),
    [
        ({"students": 2}, [], "none", "takes no conditions"),
        ({"students": 4}, [0, 1, 2], "label", "there are only 3 labels"),
        ({"students": 4}, [0, 1, 2, 2, 1], "label", "there are only 3 labels"),
        ({"students": 2, "partition": "medians"}, [0, 1, 2], "label", "for a teacher of labels use one of order"),
        ({"students": 2, "partition": "kmeans"}, [0, 1, 2], "label", "for a teacher of labels use one of order"),
        ({"students": 2}, ["p0", "p1"], "prompt", "for a teacher of prompts use one of medians, kmeans"),
        ({"students": 2, "partition": "random"}, ["p0", "p1"], "prompt", "msd.partition = random"),
        ({"students": 4, "partition": "medians"}, ["p0", "p1", "p1"], "prompt", "there are only 2 prompts"),
    ],
)
def test_partitions_that_do_not_fit_the_teacher_are_refused(how, items, kind, says):
    with pytest.raises(UserError, match=says):
        make_router(PartitionSettings(**how), items, kind, heavy_tailed(4))


@pytest.mark.parametrize("label", [-1, 4, 5, 10])
def test_a_label_out_of_range_is_an_error_and_no_remainder(label):
    router = make_router(PartitionSettings(students=2), [0, 1, 2, 3], "label")
    with pytest.raises(UserError, match=rf"label {label}: no student draws it; .* 0\.\.3$"):
        router.route_labels([0, label])
    gaps = make_router(PartitionSettings(students=2), [0, 1, 3, 6], "label")
    with pytest.raises(UserError, match=r"0\.\.6 with gaps"):
        gaps.route_labels([2])


def test_a_routers_hash_is_of_its_parts_and_not_of_the_labels_order():
    order = make_router(PartitionSettings(students=2), [3, 1, 0, 2], "label")
    assert order.hash == make_router(PartitionSettings(students=2), [0, 1, 2, 3], "label").hash
    hashes = {make_router(PartitionSettings(students=k), [0, 1, 2, 3], "label").hash for k in (1, 2, 3, 4)}
    assert len(hashes) == 4


# -- embeddings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("students", [2, 4, 8])
def test_medians_make_exactly_equal_parts(students, dtype):
    table = heavy_tailed(dtype=dtype)
    sizes = np.bincount(routes(router_of(table, students=students, partition="medians"), table))
    assert sizes.tolist() == [3000 // students] * students


@pytest.mark.parametrize("how", ["medians", "kmeans"])
def test_one_student_draws_everything(how, tmp_path):
    table = heavy_tailed(50)
    router = router_of(table, students=1, partition=how)
    assert routes(router, table) == [0] * 50
    router.save(tmp_path / "router.json")
    assert routes(Router.load(tmp_path / "router.json"), table) == [0] * 50


def test_medians_of_a_number_that_does_not_divide_are_within_one():
    table = heavy_tailed(1003)
    sizes = np.bincount(routes(router_of(table, students=4, partition="medians"), table))
    assert sorted(sizes.tolist()) == [250, 251, 251, 251]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("students", [2, 3, 4])
def test_kmeans_makes_parts_within_two_percent(students, seed):
    table = heavy_tailed(seed=seed)
    router = router_of(table, students=students, partition="kmeans", seed=seed)
    sizes = np.bincount(routes(router, table), minlength=students)
    assert abs(sizes - 3000 / students).max() <= 0.02 * 3000


def test_medians_cut_the_principal_axes_nested():
    """A box whose sides are 4, 2 and 1 long: the first cut is across the longest, the second in each half."""
    x = torch.tensor([[a, b, c] for a in (-2.0, 2.0) for b in (-1.0, 1.0) for c in (-0.5, 0.5)])
    router = router_of(Table(x), students=4, partition="medians")
    axes = torch.tensor(router.parameters["axes"]).abs()
    torch.testing.assert_close(axes, torch.eye(3)[:2])
    assert [len(level) for level in router.parameters["thresholds"]] == [1, 2]
    result = routes(router, Table(x))
    assert result == [0, 0, 1, 1, 2, 2, 3, 3]


def test_kmeans_keeps_clusters_of_equal_size_together():
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [20.0, 0.0], [0.0, 20.0]])
    table = Table(centres.repeat(50, 1) + torch.randn(150, 2, generator=generator))
    result = routes(router_of(table, students=3, partition="kmeans"), table)
    clusters = [set(result[k::3]) for k in range(3)]
    assert all(len(cluster) == 1 for cluster in clusters)
    assert set.union(*clusters) == {0, 1, 2}


@pytest.mark.parametrize(("how", "students"), [("medians", 4), ("kmeans", 3)])
def test_the_order_of_the_prompts_changes_nothing(how, students):
    table = heavy_tailed(600)
    router = router_of(table, students=students, partition=how)
    mixed = [table.prompts[i] for i in np.random.default_rng(1).permutation(600)]
    again = router_of(table, mixed + mixed[:50], students=students, partition=how)
    assert again.hash == router.hash
    assert dict(zip(mixed, routes(again, table, mixed), strict=True)) == dict(
        zip(table.prompts, routes(router, table), strict=True)
    )


@pytest.mark.parametrize(("how", "students"), [("medians", 4), ("kmeans", 3)])
def test_a_route_does_not_depend_on_those_beside_it(how, students):
    table = heavy_tailed(300)
    router = router_of(table, students=students, partition=how)
    table.sizes.clear()
    whole = routes(router, table)
    assert max(table.sizes) == 64
    assert routes(router, table, batch=7) == whole
    assert [routes(router, table, [prompt])[0] for prompt in table.prompts] == whole
    backwards = routes(router, table, table.prompts[::-1])
    assert backwards[::-1] == whole
    assert routes(router, table, ["p5", "p9", "p5"]) == [whole[5], whole[9], whole[5]]


@pytest.mark.parametrize(("how", "students"), [("medians", 8), ("kmeans", 3)])
def test_the_file_keeps_every_route_and_the_hash(how, students, tmp_path):
    table = heavy_tailed(dtype=torch.float64)
    router = router_of(table, students=students, partition=how)
    router.save(tmp_path / "deep" / "router.json")
    loaded = Router.load(tmp_path / "deep" / "router.json")
    assert loaded == router
    assert loaded.hash == router.hash
    assert routes(loaded, table) == routes(router, table)
    numbers = [n for key in router.parameters.values() for n in np.concatenate([np.ravel(row) for row in key])]
    assert all(n == float(np.float32(n)) for n in numbers)  # so another float32 writer keeps them too


def test_a_router_of_labels_comes_back_from_its_file(tmp_path):
    router = make_router(PartitionSettings(students=3, partition="random"), list(range(10)), "label")
    router.save(tmp_path / "router.json")
    assert Router.load(tmp_path / "router.json") == router
    assert not list(tmp_path.glob(".*"))


def saved(tmp_path) -> Path:
    file = tmp_path / "router.json"
    router_of(heavy_tailed(100), students=2, partition="medians").save(file)
    return file


def test_a_changed_file_is_refused_by_its_hash(tmp_path):
    file = saved(tmp_path)
    content = json.loads(file.read_text())
    content["parameters"]["thresholds"][0][0] += 1e-6
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"its hash says {content['hash'][:12]} and its content is .* it was changed"):
        Router.load(file)


@pytest.mark.parametrize("key", ["kind", "students", "parameters", "encoder", "hash"])
def test_every_part_of_the_file_is_needed(key, tmp_path):
    file = saved(tmp_path)
    content = json.loads(file.read_text())
    del content[key]
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"router\.json: damaged"):
        Router.load(file)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "null"])
def test_a_damaged_or_missing_file_is_one_line(content, tmp_path):
    file = tmp_path / "router.json"
    with pytest.raises(UserError, match="no such router; it is written when"):
        Router.load(file)
    file.write_text(content)
    with pytest.raises(UserError, match=r"router\.json: damaged .*; take the router"):
        Router.load(file)


def test_more_prompts_than_are_fitted_on_are_routed_all_the_same(monkeypatch):
    from stepdistill.data import partition

    table = heavy_tailed(2000)
    monkeypatch.setattr(partition, "FIT_MOST", 500)
    router = router_of(table, students=4, partition="medians")
    assert sum(table.sizes) == 500
    mixed = [table.prompts[i] for i in np.random.default_rng(2).permutation(2000)]
    assert router_of(table, mixed, students=4, partition="medians").hash == router.hash
    sizes = np.bincount(routes(router, table))
    assert abs(sizes - 500).max() <= 0.05 * 2000


# -- a text encoder ----------------------------------------------------------------------------------------


def test_an_embedding_is_the_mean_of_the_hidden_states_that_are_no_padding(family):
    encoder = family.prompt_encoder
    hidden, pooled = encoder(["a cat"])
    tokens = family.tokenizer(["a cat"])["input_ids"][0]
    assert len(tokens) < family.tokenizer.model_max_length == hidden.shape[1]
    with torch.no_grad():
        short = family.text_encoder(torch.tensor([tokens]))[0]
    torch.testing.assert_close(pooled[0], short[0].mean(0), rtol=0, atol=1e-6)
    torch.testing.assert_close(pooled[0], hidden[0, : len(tokens)].mean(0), rtol=0, atol=1e-6)
    assert (pooled[0] - hidden[0].mean(0)).abs().max() > 1e-2  # the padding would count


def test_padding_to_another_length_changes_no_embedding(family):
    shorter = copy.deepcopy(family.tokenizer)
    shorter.model_max_length = 12
    prompts = ["a cat", "", "an owl"]
    long, short = (PromptEncoder(t, family.text_encoder)(prompts) for t in (family.tokenizer, shorter))
    assert (long[0].shape[1], short[0].shape[1]) == (16, 12)
    torch.testing.assert_close(long[1], short[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("how", "students"), [("medians", 4), ("kmeans", 3)])
def test_prompts_of_a_text_encoder_are_divided_and_routed_alike_everywhere(how, students, family, tmp_path):
    """As training routes (a whole file, in batches), and as serving does (a batch, one by one, from the file)."""
    encoder = family.prompt_encoder
    router = make_router(PartitionSettings(students=students, partition=how), PROMPTS, "prompt", encoder)
    assert router.encoder == encoder.fingerprint
    train = router.route(PROMPTS, lambda prompts: encoder(prompts)[1])
    sizes = np.bincount(train, minlength=students)
    assert abs(sizes - len(PROMPTS) / students).max() <= max(1, 0.02 * len(PROMPTS))
    router.save(tmp_path / "router.json")
    served = Router.load(tmp_path / "router.json")
    again = load_family(str(tmp_path_of(family))).prompt_encoder
    assert served.route_embeddings(again(PROMPTS)[1]) == train
    assert [served.route_embeddings(again([prompt])[1])[0] for prompt in PROMPTS] == train
    mixed = PROMPTS[::-1]
    assert (
        make_router(PartitionSettings(students=students, partition=how), mixed, "prompt", encoder).hash == router.hash
    )


def tmp_path_of(family) -> Path:
    """The folder that the family's tokenizer was read from."""
    return Path(family.tokenizer.name_or_path).parent


def test_the_empty_prompt_has_a_route_of_its_own_that_stays(family):
    encoder = family.prompt_encoder
    router = make_router(PartitionSettings(students=4, partition="medians"), PROMPTS, "prompt", encoder)
    (alone,) = router.route([""], lambda prompts: encoder(prompts)[1])
    assert alone in range(4)
    among = router.route([*PROMPTS[:40], "", *PROMPTS[40:60], ""], lambda prompts: encoder(prompts)[1], 9)
    assert (among[40], among[-1]) == (alone, alone)


def test_an_encoder_kept_in_bfloat16_routes_as_its_float32_copy(family):
    rough = copy.deepcopy(family.text_encoder).to(torch.bfloat16)
    exact = copy.deepcopy(rough).float()
    assert PromptEncoder(family.tokenizer, exact).network is exact
    one, other = (PromptEncoder(family.tokenizer, network) for network in (rough, exact))
    assert one.fingerprint == other.fingerprint != family.prompt_encoder.fingerprint
    assert rough.dtype == torch.bfloat16
    embeddings = one(PROMPTS)[1]
    assert embeddings.dtype == torch.float32
    assert torch.equal(embeddings, other(PROMPTS)[1])


def test_another_encoder_or_vocabulary_has_another_fingerprint(family):
    before = family.prompt_encoder.fingerprint
    assert before == family.prompt_encoder.fingerprint
    changed = copy.deepcopy(family.text_encoder)
    with torch.no_grad():
        next(changed.parameters()).flatten()[0] += 1e-3
    words = copy.deepcopy(family.tokenizer)
    words.add_tokens(["cat"])
    assert PromptEncoder(family.tokenizer, changed).fingerprint != before
    assert PromptEncoder(words, family.text_encoder).fingerprint != before


CHILD = """
import json, sys, torch
from test_router import PROMPTS, heavy_tailed, router_of
from stepdistill.families import load_family
from stepdistill.data.partition import PartitionSettings, make_router
torch.set_num_threads(1)
encoder = load_family(sys.argv[1]).prompt_encoder
router = make_router(PartitionSettings(students=4, partition="medians"), PROMPTS, "prompt", encoder)
kmeans = router_of(heavy_tailed(600), students=3, partition="kmeans")
print(json.dumps([router.hash, kmeans.hash, router.route(PROMPTS, lambda own: encoder(own)[1])]))
"""


@pytest.mark.slow
def test_another_process_makes_the_same_router(family):
    encoder = family.prompt_encoder
    router = make_router(PartitionSettings(students=4, partition="medians"), PROMPTS, "prompt", encoder)
    kmeans = router_of(heavy_tailed(600), students=3, partition="kmeans")
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path_of(family))],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(str(p) for p in Path(__file__).parents[:2]),
            "PYTHONHASHSEED": "7",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == [
        router.hash,
        kmeans.hash,
        router.route(PROMPTS, lambda prompts: encoder(prompts)[1]),
    ]


@pytest.mark.parametrize("how", ["medians", "kmeans"])
@pytest.mark.parametrize("equal", [10, 9])
def test_prompts_that_the_encoder_does_not_tell_apart_are_no_students_alone(how, equal):
    """Ten prompts, so many with one embedding: too few different ones are refused, with their number."""
    rows = torch.cat([torch.zeros(equal, 3), torch.eye(3)[: 10 - equal]])

    def encoder(prompts):
        return None, torch.stack([rows[int(prompt)] for prompt in prompts])

    settings = PartitionSettings(students=4, partition=how)
    with pytest.raises(UserError, match=f"{1 + 10 - equal} different text embeddings cannot be divided"):
        make_router(settings, [str(i) for i in range(10)], "prompt", encoder)


def test_routes_are_kept_by_router_and_prompts(family, tmp_path):
    encoder = family.prompt_encoder
    router = make_router(PartitionSettings(students=2, partition="medians"), PROMPTS, "prompt", encoder)
    calls = []

    def embed(prompts):
        calls.append(len(prompts))
        return encoder(prompts)[1]

    routes = router.route_cached(PROMPTS, embed, tmp_path)
    calls_made = len(calls)
    assert routes == router.route(PROMPTS, lambda prompts: encoder(prompts)[1])
    assert router.route_cached(PROMPTS, embed, tmp_path) == routes
    assert len(calls) == calls_made > 0
    assert router.route_cached(PROMPTS[:5], embed, tmp_path) == routes[:5]
    assert len(calls) == calls_made + 1
    (file, _) = sorted(tmp_path.glob("routes-*.json"), key=lambda path: -path.stat().st_size)
    file.write_text("[0, 1")
    assert router.route_cached(PROMPTS, embed, tmp_path) == routes
