"""Reports: the numbers of every figure against other ways to them, the page, the files."""

from __future__ import annotations

import json
import re
import shutil
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import fmean

import matplotlib.image
import numpy as np
import optuna
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from dfmerge_studies import InputError, StudySpec, merge, open_study
from dfmerge_studies.report.figures import FIGURES, figures, plotly_figures
from dfmerge_studies.report.figures.base import Drawing, Missing
from dfmerge_studies.report.figures.landscape import Landscape
from dfmerge_studies.report.page import render, study_page
from dfmerge_studies.report.standings import Cell
from dfmerge_studies.report.view import StudyView
from dfmerge_studies.study import provenance
from dfmerge_studies.study.landscape import landscape, plane_of
from dfmerge_studies.study.probes import interpolate, nested_rows, reselect, row_scores
from dfmerge_studies.study.scores import keep_multi_task_row
from dfmerge_studies.study.session import Session, stored_study
from tests.project import EXPERTS, Project, make_project

HOSTILE = ("<img src=x onerror=alert(1)>", "</script><script>alert(2)</script>", "$x^{$", "_hidden & \"quoted\" 'too'")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A classifier's project with a finished study and one baseline; tests that change it take a copy."""
    project = make_project(tmp_path_factory.mktemp("report") / "project", "bert", rows=12, trials=5)
    project.write(baselines=["averaging"])
    project.cli("run", "spec.yaml")
    return project


@pytest.fixture
def copied(done: Project, tmp_path: Path) -> Project:
    shutil.copytree(done.folder, tmp_path / "copy")
    return Project(tmp_path / "copy", done.family, dict(done.spec))


@pytest.fixture
def session(copied: Project) -> Session:
    return open_study(StudySpec.from_yaml(copied.file))


@pytest.mark.parametrize("count", [1, 101])
def test_a_landscape_takes_from_python_what_the_command_line_takes(session: Session, count: int) -> None:
    with pytest.raises(InputError, match=f"a grid of {count} cannot be drawn. Give 2 to 100"):
        landscape(session, count)


def view_of(project: Project, name: str = "colours") -> StudyView:
    url = f"sqlite:///{project.folder}/colours.db"
    return StudyView.of(optuna.load_study(study_name=name, storage=url))


def by_name(view: StudyView) -> dict[str, Drawing | Missing]:
    return {figure.name: figure for figure in figures(view)}


@pytest.mark.slow
def test_the_trajectory_is_that_of_the_trials(done):
    view = view_of(done)
    drawn = by_name(view)["trajectory"]
    trials = sorted(view.study.trials, key=lambda trial: trial.number)
    scores = [sum(trial.user_attrs["tasks"].values()) / 2 for trial in trials]
    assert drawn.scores == pytest.approx(scores)
    assert drawn.best == pytest.approx(list(accumulate(scores, max)))
    assert drawn.coefficients == {name: [trial.params[name] for trial in trials] for name in EXPERTS}
    assert drawn.kinds == ["known", "startup", "search", "search", "search"]
    averaging = view_of(done, "colours.averaging").study.best_value
    assert drawn.levels["averaging"] == pytest.approx(averaging)


def test_the_bars_are_the_scores_that_the_commands_print(done):
    drawn = by_name(view_of(done))["scores"]
    printed = {row["name"]: row for row in done.json("run", "spec.yaml")["rows"]}
    assert set(drawn.rows) == set(printed)
    for name, row in printed.items():
        for split in ("validation", "test"):
            assert drawn.rows[name][split] == row[split]["tasks"]
            assert drawn.value(name, split, "mean") == pytest.approx(row[split]["mean"])


@pytest.mark.slow
def test_run_the_page_and_the_card_show_the_same_scores(copied):
    lines = [line.split() for line in copied.cli("run", "spec.yaml").stdout.splitlines()]
    copied.cli("export", "spec.yaml", "--out", "out")
    card = (copied.folder / "out" / "README.md").read_text(encoding="utf-8").splitlines()
    _, *tables = study_page(view_of(copied), "").tables
    assert [table.title.split()[0] for table in tables] == ["Validation", "Test"]
    for table in tables:
        assert [row.cells[0].text for row in table.rows[4:]] == ["± standard error", "rows"]
        for row in table.rows:
            assert " ".join(cell.text for cell in row.cells).split() in lines
    for place, task in enumerate(EXPERTS, start=1):
        cells = [table.rows[row].cells[place].text for table in tables for row in (3, 1)]  # the merge, its expert
        assert [line for line in card if line.startswith(f"| {task} | {' | '.join(cells)} |")]


def test_importance_favours_the_coefficient_that_decides(tmp_path):
    study = study_of(
        {"science": {"experts": [["deaf", None], ["loud", None]]}}, lambda p: -((p["loud"] - 0.7) ** 2), 40
    )
    shares = by_name(StudyView.of(study))["importance"].shares
    assert shares["loud"] > 0.8
    assert sum(shares.values()) == pytest.approx(1)


def test_interpolation_runs_from_the_base_to_the_expert(session, copied):
    found = interpolate(session, 3)
    base, experts = (session.reference_scores(row, "validation") for row in ("base", "experts"))
    assert found.lambdas == [0, 0.5, 1]
    for expert in EXPERTS:
        assert found.scores[expert][0] == base
        assert found.scores[expert][-1][expert] == experts[expert]
    copied.cli("merge", "spec.yaml", "--method", "gta", "--coefficients", "red=0.5,blue=0", "--out", "half")
    half = copied.json("evaluate", "spec.yaml", "--model", copied.folder / "half")["tasks"]
    assert found.scores["red"][1] == {task: scored["score"] for task, scored in half.items()}
    drawn = by_name(StudyView.of(session.study))["interpolation"]
    assert drawn.own["red"][1] == half["red"]["score"]
    assert drawn.others["red"][1] == half["blue"]["score"]


def weights(folder: Path) -> torch.Tensor:
    """All shared weights of a model directory as one vector."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).base_model
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def test_the_plane_is_orthonormal_and_holds_base_and_experts(session):
    plane = plane_of(session.problem.resident)
    u, v = (torch.cat([axis[name].flatten() for name in plane.u]) for axis in (plane.u, plane.v))
    assert [float(u @ u), float(v @ v), float(u @ v)] == pytest.approx([1, 1, 0], abs=1e-12)
    root = session.spec.root
    base = weights(root / "base")
    for (x, y), expert in zip(plane.corners, EXPERTS, strict=True):
        tau = weights(root / expert) - base
        assert float(tau @ tau) ** 0.5 == pytest.approx((x**2 + y**2) ** 0.5, rel=1e-5)


@pytest.mark.slow
def test_a_point_of_the_landscape_is_the_merge_at_its_coefficients(session, copied):
    found = landscape(session, 3)
    point = dict.fromkeys(EXPERTS, 0.5)
    base = weights(copied.folder / "base")
    taus = torch.stack([weights(copied.folder / expert) - base for expert in EXPERTS], dim=1)
    corners = torch.tensor(found.corners, dtype=torch.float64).T
    for method in ("gta", "df-merge"):
        x, y, score = found.methods[method][1, 1]
        assert score == pytest.approx(fmean(merge(session.problem, point, method=method).tasks.values()))
        copied.cli("merge", "spec.yaml", "--method", method, "--coefficients", "0.5", "--out", method)
        # The projection onto the span of both task vectors, by least squares, in the coordinates of their corners.
        step = (weights(copied.folder / method) - base).unsqueeze(1)
        shares = torch.linalg.lstsq(taus, step).solution
        assert [x, y] == pytest.approx((corners @ shares).flatten().tolist(), rel=1e-3, abs=1e-4)
    assert found.methods["gta"][0, 0][:2] == pytest.approx([0, 0], abs=1e-6)
    assert found.methods["gta"][2, 0][:2] == pytest.approx(found.corners[0], rel=1e-4, abs=1e-4)
    assert found.best.number == session.best().number
    drawn = by_name(StudyView.of(session.study))["landscape-1-2"]
    assert drawn.scores["df-merge"][1][1] == found.methods["df-merge"][1, 1][2]
    _, _, surface = drawn.surface("gta")
    assert np.nanmin(surface) >= drawn.range[0] - 1e-9
    assert np.nanmax(surface) <= drawn.range[1] + 1e-9


def test_what_lies_outside_the_merges_of_a_landscape_is_not_drawn():
    lambdas = [0.0, 0.5, 1.0]
    x = [[a * (1 - 0.6 * b) for b in lambdas] for a in lambdas]  # the border bends inwards on both sides
    y = [[b * (1 - 0.6 * a) for b in lambdas] for a in lambdas]
    table = {"gta": [[a + b for b in lambdas] for a in lambdas]}
    drawn = Landscape("n", "t", "c", "accuracy", "%", ("a", "b"), lambdas, {"gta": x}, {"gta": y}, table, {"gta": {}})
    across, up, surface = drawn.surface("gta")
    middle = np.add.outer(np.abs(up - 0.46), np.abs(across - 0.46)) < 0.02  # inside the convex hull, outside the merges
    assert np.isnan(surface[middle]).all()
    assert np.isfinite(surface[np.searchsorted(up, 0.2), np.searchsorted(across, 0.2)])


@pytest.mark.slow
def test_two_of_three_experts_are_merged_alone(copied):
    shutil.copytree(copied.folder / "blue", copied.folder / "green")
    copied.write(name="three", experts={"red": "red", "green": {"model": "green", "task": "red"}, "blue": "blue"})
    three = open_study(StudySpec.from_yaml(copied.file, ["storage=sqlite:///three.db"]))
    found = landscape(three, 2, pair=("red", "blue"))
    copied.write(name="two")
    two = open_study(StudySpec.from_yaml(copied.file, ["storage=sqlite:///two.db"]))
    assert found.methods == landscape(two, 2).methods
    assert found.best is None


def test_a_choice_on_all_rows_is_the_study_s_own(session):
    found = reselect(session, [0.25, 1.0], draws=6)
    best = session.best()
    assert {choices[-1] for choices in found.chosen} == {best.number}
    assert found.scores[best.number] == pytest.approx(fmean(session.trial_scores(best, "test").values()))
    for trial in session.study.trials:
        right = row_scores(session, trial)
        assert {task: sum(row) / len(row) for task, row in right.items()} == trial.user_attrs["tasks"]
    drawn = by_name(StudyView.of(session.study))["ratio"]
    assert [drawn.means[-1], drawn.lows[-1], drawn.highs[-1]] == pytest.approx([found.scores[best.number]] * 3)
    assert found == reselect(session, [0.25, 1.0], draws=6)


def test_larger_subsets_contain_the_smaller_ones():
    subsets = nested_rows(50, [0.001, 0.1, 0.5, 1.0], np.random.default_rng(0))
    assert [len(rows) for rows in subsets] == [1, 5, 25, 50]
    assert all(set(small) < set(large) for small, large in pairwise(subsets))
    assert sorted(subsets[-1]) == list(range(50))


def test_what_was_computed_once_is_not_computed_again(session):
    def work(progress):
        return [
            interpolate(session, 3, progress=progress),
            landscape(session, 2, progress=progress),
            reselect(session, [1.0], draws=2),
        ]

    first, again = [], []
    found = work(lambda what, done, total: first.append(what))
    assert first
    assert work(lambda what, done, total: again.append(what)) == found
    assert again == []


class Loads(HTMLParser):
    """Every address that a page would load, and the texts of its scripts of data."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: set[str] = set()
        self.policy = ""

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        values = dict(attrs)
        self.found += [values[name] for name in ("src", "href", "srcset", "data", "action") if values.get(name)]
        if values.get("http-equiv") == "Content-Security-Policy":
            self.policy = values["content"]


@pytest.mark.slow
def test_the_page_needs_nothing_but_itself(copied):
    written = copied.json("report", "spec.yaml", "--out", "report")
    page = Path(copied.folder / written["page"]).read_text(encoding="utf-8")
    loads = Loads()
    loads.feed(page)
    assert loads.found == []
    assert "link" not in loads.tags
    assert "default-src 'none'" in loads.policy
    assert "http" not in loads.policy
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert page.count("Plotly.newPlot(`") == 1


@pytest.mark.slow
def test_every_figure_is_a_picture(copied):
    written = copied.json("report", "spec.yaml", "--out", "report", "--figures", "all", "--grid", "2", "--points", "2")
    assert set(written["missing"]) == {"comparison"}
    names = {Path(file).stem for file in written["figures"]}
    assert names == {*FIGURES, "landscape-1-2"} - {"landscape", "comparison"}
    for file in map(copied.folder.joinpath, written["figures"]):
        if file.suffix == ".png":
            image = matplotlib.image.imread(file)
            assert min(image.shape[:2]) > 100
            assert image.std() > 0.01
        elif file.suffix == ".svg":
            root = ET.parse(file).getroot()
            assert root.tag.endswith("svg")
            assert len(list(root.iter("{http://www.w3.org/2000/svg}path"))) > 5
        else:
            assert json.loads(file.read_text())["caption"]
    assert not list(copied.folder.rglob("*.tmp"))


@pytest.mark.slow
def test_a_report_needs_the_storage_only(copied):
    for name in ("base", *EXPERTS):
        shutil.rmtree(copied.folder / name)
    for file in copied.folder.glob("*.jsonl"):
        file.unlink()
    written = copied.json("report", "spec.yaml", "--out", "report")
    assert set(written["missing"]) == {"comparison", "interpolation", "ratio", "landscape"}
    assert "add landscape to --figures" in written["missing"]["landscape"]
    assert set(plotly_figures(view_of(copied).study)) == {"scores", "trajectory", "importance", "slices"}
    failed = copied.cli("report", "spec.yaml", "--out", "other", "--figures", "landscape", check=2)
    assert failed.stderr.count("\n") == 1
    assert not (copied.folder / "other").exists()


@pytest.mark.slow
def test_bad_requests_are_refused_in_one_line(copied):
    def refused(*arguments: str) -> str:
        message = copied.cli("report", "spec.yaml", *arguments, check=2).stderr
        assert message.count("\n") == 1
        return message

    (copied.folder / "site").mkdir()
    (copied.folder / "site" / "index.html").write_text("mine")
    assert "Did you mean 'landscape'" in refused("--figures", "landscap")
    assert "not a report of this program" in refused("--out", "site")
    assert (copied.folder / "site" / "index.html").read_text() == "mine"
    assert "is a file" in refused("--out", "site/index.html")
    assert "is the spec" in refused("--out", "spec.yaml")
    assert "is no list of numbers" in refused("--ratios", "a")
    assert "at most 1" in refused("--figures", "ratio", "--ratios", "2")
    assert "Did you mean 'blue'" in refused("--figures", "landscape", "--pair", "red,blu")
    assert "no such storage" in refused("--set", "name=other")
    assert "not a report of this program" in refused("--out", "site", "--force")


@pytest.mark.slow
def test_a_second_report_replaces_the_first(copied):
    first = copied.json("report", "spec.yaml", "--out", "report")
    image = (copied.folder / first["figures"][1]).read_bytes()
    assert copied.json("report", "spec.yaml", "--out", "report") == first
    assert (copied.folder / first["figures"][1]).read_bytes() == image  # an SVG of the same data is the same file


def study_of(changes: dict, value, trials: int) -> optuna.Study:
    """A study in memory as another program run would have stored it, its scores a function of its coefficients."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="maximize", study_name=changes.get("name"), storage=changes.get("storage"))
    fingerprint = {
        "method": "df-merge",
        "experts": [["a", "a"], ["b", "b"]],
        "tasks": ["a", "b"],
        "search.sampler": "gp",
        "search.startup_trials": 3,
        "objective": {"kind": "mean"},
        **changes.get("science", {}),
    }
    study.set_user_attr(provenance.FINGERPRINT, fingerprint)
    study.set_user_attr(provenance.SPEC, changes.get("spec", {}))
    names = [name for name, _ in fingerprint["experts"]]
    space = {name: optuna.distributions.FloatDistribution(0, 1) for name in names}
    for place, row in enumerate(np.random.default_rng(0).random((trials, len(names)))):
        point = dict(zip(names, map(float, row), strict=True))
        score = 0.5 + 0.5 * value(point)
        attributes = {
            "place": place,
            "coefficients": point,
            "tasks": dict.fromkeys(fingerprint["tasks"], score),
            "seconds": {"merge": 0.5},
            "fishers": {"computed": 2, "cached": 0},
        }
        study.add_trial(
            optuna.trial.create_trial(params=point, distributions=space, value=score, user_attrs=attributes)
        )
    return study


def test_methods_over_seeds_are_means_with_their_spread_beside_whole_models():
    storage = optuna.storages.InMemoryStorage()

    def add(name: str, method: str, seed: int, height: float, **digests: str) -> optuna.Study:
        fingerprint = {
            "method": method,
            "search.seed": seed,
            "base digest": "b",
            "data digest of a": f"{seed}",
            **digests,
        }
        changes = {"name": name, "science": fingerprint, "storage": storage}
        return study_of(changes, lambda point: height * point["a"] ** 0, 3)

    own = add("s", "df-merge", 0, 0.6)
    later = [add(f"s.df-merge.seed{seed}", "df-merge", seed, height) for seed, height in ((1, 0.7), (2, 0.2))]
    gta = add("s.gta", "gta", 0, 0.4)
    add("s.ties", "ties", 0, 0.3)
    add("s.fisher", "fisher", 0, 0.4, **{"base digest": "another"})
    add("s.other", "gta", 0, 0.4)
    for study, score in zip((gta, *later), (0.5, 0.6, 0.7), strict=True):  # any study at a seed may keep them
        for row, tasks in (("base", ("a", "b")), ("experts", ("a",)), ("model 1", ("a", "b")), ("model 2", ("a", "b"))):
            scores = dict.fromkeys(tasks, score + (row == "model 1") / 10)
            study.set_user_attr(f"dfmerge:scores:{row}:validation", {"data": {}, "scores": scores})
    view = StudyView.of(own)
    found = by_name(view)["comparison"]
    assert {method: list(seeds) for method, seeds in found.methods.items()} == {
        "gta": [0],
        "ties": [0],
        "df-merge": [0, 1, 2],
    }
    assert found.cell("df-merge", "a") == Cell(
        pytest.approx(0.75), pytest.approx(float(np.std([0.8, 0.85, 0.6], ddof=1)))
    )
    assert found.cell("gta", "mean") == Cell(pytest.approx(0.7), None)
    assert (found.split, found.metric) == ("validation", "accuracy")
    assert list(view.baselines) == ["gta", "ties"]
    assert list(found.references) == ["zero-shot", "fine-tuned"]  # nobody says which model is the multi-task one
    assert found.cell("zero-shot", "mean") == Cell(pytest.approx(0.6), pytest.approx(0.1))
    assert found.cell("fine-tuned", "mean") is None
    assert len(found.static().axes[0].patches) == (len(found.methods) + 1) * 3 + 1
    keep_multi_task_row(gta, "model 2")
    keep_multi_task_row(own, "model 1")
    found = by_name(view)["comparison"]
    assert found.cell("multi-task", "b") == Cell(pytest.approx(0.7), pytest.approx(0.1))
    bars = {bar.name: bar for bar in found.plotly().data}
    assert list(bars) == [
        "zero-shot",
        "fine-tuned",
        "multi-task",
        "gta (1 seed)",
        "ties (1 seed)",
        "df-merge (3 seeds)",
    ]
    starts = [bar.offset for bar in bars.values()]
    assert all(before.offset + before.width <= after.offset for before, after in pairwise(bars.values()))
    assert starts[3] - starts[2] > starts[4] - starts[3]  # the references stand apart
    page = study_page(view, "")
    table = page.tables[-1]
    assert table.columns == ["", "a", "b", "mean", "largest drop", "trials", "seconds"]
    rows = {row.cells[0].text: row for row in table.rows}
    assert list(rows) == [
        "zero-shot",
        "fine-tuned",
        "multi-task",
        "gta (1 of 3 seeds)",
        "ties (1 of 3 seeds)",
        "df-merge",
    ]
    assert [cell.text for cell in rows["df-merge"].cells[3:]] == ["75.0 ± 13.2", "-15.0 a", "3", "1.5"]
    assert [cell.bold for cell in rows["df-merge"].cells[1:4]] == [True] * 3
    assert [cell.underline for cell in rows["gta (1 of 3 seeds)"].cells[1:4]] == [True] * 3
    assert "3 methods over 3 seeds" in page.summary


def test_scores_of_another_kind_do_not_stand_beside_a_study_s_own():
    storage = optuna.storages.InMemoryStorage()

    def add(name: str, method: str, **fingerprint) -> optuna.Study:
        fingerprint = {"method": method, "search.seed": 0, **fingerprint}
        return study_of({"name": name, "science": fingerprint, "storage": storage}, lambda point: point["a"], 3)

    own, agreeing = add("s", "df-merge"), {"objective": {"kind": "agreement"}}
    other = add("s.df-merge-agreement", "df-merge", **agreeing)
    add("s.df-merge-agreement.seed1", "df-merge", **agreeing, **{"search.seed": 1})
    for view, words in ((StudyView.of(own), "accuracy"), (StudyView.of(other), "agreement")):
        drawn = by_name(view)
        assert drawn["scores"].metrics == {"validation": words}
        assert drawn["scores"].caption.startswith(words.capitalize())
        assert f"{words}, %" in drawn["scores"].static().axes[0].get_ylabel()
    drawn = by_name(StudyView.of(own))
    assert list(drawn["scores"].rows) == ["df-merge (trial 2)"]
    assert drawn["trajectory"].levels == {}
    assert list(drawn["comparison"].methods) == ["df-merge"]


@pytest.mark.slow
def test_hostile_names_do_no_harm():
    fingerprint = {"experts": [[name, name] for name in HOSTILE], "tasks": list(HOSTILE)}
    study = study_of(
        {"name": HOSTILE[1], "science": fingerprint, "spec": {"base": HOSTILE[0]}}, lambda p: sum(p.values()) / 4, 6
    )
    for row in ("base", "experts"):
        scores = {"data": {}, "scores": dict.fromkeys(HOSTILE, 0.5)}
        study.set_user_attr(f"dfmerge:scores:{row}:validation", scores)
    line = [dict.fromkeys(HOSTILE, 0.5)] * 2
    study.set_user_attr("dfmerge:probe:interpolation", {"lambdas": [0, 1], "scores": dict.fromkeys(HOSTILE, line)})
    cells = {f"{i} {j}": [float(i), float(j), 0.1 * (i + j)] for i in range(2) for j in range(2)}
    pair = {
        "experts": list(HOSTILE[:2]),
        "tasks": list(HOSTILE[:2]),
        "lambdas": [0.0, 1.0],
        "corners": [[1, 0], [0, 1]],
    }
    study.set_user_attr("dfmerge:probe:landscape:0:1", {**pair, "methods": {"gta": cells, "df-merge": cells}})
    view = StudyView.of(study)
    found = figures(view)
    drawn = [figure for figure in found if isinstance(figure, Drawing)]
    assert len(drawn) == 6
    for figure in drawn:
        figure.static().savefig(Path("/dev/null"), format="svg")
        text = json.dumps(json.loads(figure.plotly().to_json())["layout"]) + str(figure.plotly().data)
        assert "<img" not in text.replace("&lt;", "")
    page = render(study_page(view, f"dfmerge run {HOSTILE[0]}"), found)
    assert not any(name in page for name in HOSTILE[:2])
    assert "&lt;img src=x onerror=alert(1)&gt;" in page
    data = re.search(r'<script id="figures" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert len(json.loads(data[1])) == 6


@pytest.mark.parametrize(
    ("fingerprint", "trials", "missing"),
    [
        ({"method": "averaging"}, 1, {"trajectory", "importance", "slices", "ratio"}),
        ({"method": "task-arithmetic"}, 4, {"importance"}),
        ({}, 0, {"scores", "trajectory", "importance", "slices", "ratio"}),
        ({}, 1, {"trajectory", "importance", "slices", "ratio"}),
        ({"search.max_drop": 3}, 4, {"ratio"}),
        ({"experts": [["a", "a"]], "tasks": ["a"]}, 4, {"landscape"}),
    ],
)
def test_a_figure_that_a_study_cannot_have_is_a_sentence(fingerprint, trials, missing):
    view = StudyView.of(study_of({"science": fingerprint}, lambda point: point["a"], trials))
    reasons = {f.name: f.reason for f in figures(view) if isinstance(f, Missing) and "Not computed" not in f.reason}
    assert set(reasons) == {*missing, "comparison"}
    assert all(reason[0].isupper() or reason.startswith(("averaging", "1", "0")) for reason in reasons.values())
    assert all(reason.endswith(".") for reason in reasons.values())
    assert "<h1>" in render(study_page(view, ""), figures(view))


@pytest.mark.slow
def test_a_dare_study_is_drawn_over_coefficient_and_drop_rate(copied):
    copied.write(name="dropped", method="dare", baselines=["averaging"])
    copied.cli("run", "spec.yaml")
    written = copied.json("report", "spec.yaml", "--out", "report", "--figures", "trajectory,importance,slices")
    assert written["missing"] == {}
    study = stored_study(StudySpec.from_yaml(copied.file))
    view = StudyView.of(study)
    found, names = by_name(view), ["λ of all experts", "drop rate"]
    drawn = found["slices"]
    assert list(drawn.coefficients) == names
    points = set(zip(*drawn.coefficients.values(), strict=True))
    assert len(points) == len(drawn.scores) == 55
    by_point = {
        (t.user_attrs["coefficients"]["red"], t.user_attrs["drop_rate"]): sum(t.user_attrs["tasks"].values()) / 2
        for t in study.trials
    }
    for point, score in zip(zip(*drawn.coefficients.values(), strict=True), drawn.scores, strict=True):
        assert by_point[point] == pytest.approx(score)
    assert drawn.scores[drawn.best] == pytest.approx(max(drawn.scores))
    assert set(found["importance"].shares) == set(names)
    assert sum(found["importance"].shares.values()) == pytest.approx(1)
    assert list(found["trajectory"].coefficients) == names
    assert set(found["trajectory"].kinds) == {"grid"}
    best = view.best.user_attrs["drop_rate"]
    assert f"Best drop rate: {best:g}" in study_page(view, "").tables[0].text


@pytest.mark.slow
def test_a_pareto_study_is_drawn_by_its_mean(copied):
    copied.write(name="front", objective="pareto")
    copied.cli("run", "spec.yaml")
    study = stored_study(StudySpec.from_yaml(copied.file))
    found = by_name(StudyView.of(study))
    assert found["trajectory"].scores == pytest.approx([sum(trial.values) / 2 for trial in study.trials])
    assert isinstance(found["importance"], Drawing)
    written = copied.json("report", "spec.yaml", "--out", "report", "--figures", "scores,ratio", "--ratios", "0.5,1")
    assert written["missing"] == {}
