"""A storage's file that is deleted, replaced or damaged in mid-run: noticed, told, and no result lost."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest

from dfmerge_studies.cli.bars import TrialBars
from dfmerge_studies.cli.workers import _Display
from dfmerge_studies.spec import StudySpec
from dfmerge_studies.storage import join_study, open_storage
from dfmerge_studies.study.pool import Notice
from dfmerge_studies.study.session import stored_study
from dfmerge_studies.trials.reading import results
from tests.loop_child import objective
from tests.place import Place, wait_for
from tests.processes import Forked
from tests.project import Project

STORAGES = {"sqlite": ("sqlite:///{}/s.db", "s.db"), "journal": ("journal:///{}/s.log", "s.log")}
DAMAGES: dict[str, Callable[[Path, Path], object]] = {
    "deleted": lambda file, other: file.unlink(),
    "deleted-with-its-log": lambda file, other: [each.unlink() for each in file.parent.glob(f"{file.name}*")],
    "moved": lambda file, other: file.rename(file.with_name("elsewhere")),
    "replaced": lambda file, other: other.replace(file),
    "replaced-by-text": lambda file, other: (other.write_text("a diary\n" * 999), other.replace(file)),
    "emptied": lambda file, other: file.write_bytes(b""),
    "cut-short": lambda file, other: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "written-over": lambda file, other: shutil.copyfile(other, file),
}


def close(study: optuna.Study) -> None:
    """Close the connections that a study's handle has open; a journal has none."""
    backend = getattr(study._storage, "_backend", study._storage)
    if isinstance(backend, optuna.storages.RDBStorage):
        backend.engine.dispose()


@pytest.fixture(scope="module", params=STORAGES)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def another(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole file of a kind with a study of the same name, about something else."""
    url, name = STORAGES[kind]
    folder = tmp_path_factory.mktemp("another")
    study = join_study(open_storage(url.format(folder)), "s", directions=["maximize"])
    study.add_trials([optuna.trial.create_trial(value=7.0) for _ in range(20)])
    close(study)
    return folder / name


def known(place: Place, file: Path) -> dict[int, float]:
    """Every result that can be found: in the storage's place, beside it, in the outbox; by place."""
    found: dict[int, float] = {}
    scheme = str(place.settings["url"]).partition(":")[0]
    for each in (file, *file.parent.glob(f"{file.stem}.rescued-*")):
        try:
            study = optuna.load_study(study_name="s", storage=open_storage(f"{scheme}:///{each}", create=False))
            found |= {t.user_attrs["place"]: t.values[0] for t in results(study) if "place" in t.user_attrs}
        except Exception:
            continue
    for kept in (place.folder / "outbox").glob("*.json"):
        found |= {-1 - int(kept.name.split("-")[1]): json.loads(kept.read_text())["values"][0]}
    return found


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "call",
    [pytest.param(1, marks=pytest.mark.slow), 4, pytest.param(6, marks=pytest.mark.slow)],
    ids=["at the first trial", "in the middle", "at the last trial"],
)
def test_a_file_that_is_lost_in_mid_run_is_told_and_every_result_is_kept(
    tmp_path: Path, kind: str, another: Path, damage: str, call: int
) -> None:
    url, name = STORAGES[kind]
    place = Place(tmp_path / "p", storage=url, target=6)
    other = shutil.copy(another, place.folder / "other")
    process = place.start(hang_at_call=call, tell_delays=[0.1])
    wait_for(process, "hanging")
    file = place.folder / name
    if damage == "cut-short" and file.stat().st_size < 2000:
        process.kill()
        pytest.skip("nothing to cut")
    DAMAGES[damage](file, other)
    place.release()
    output, errors = process.communicate(timeout=120)
    if process.returncode == 0 and damage == "written-over":
        place.check_whole()  # SQLite had all of it in its log, and has written it over what was there
        return
    assert process.returncode == 1, (output, errors)
    events = [json.loads(line) for line in output.splitlines() if line.startswith("[")]
    assert events[-1][0] == "error"
    assert str(file) in events[-1][1]
    assert any(word in events[-1][1] for word in ("deleted", "replaced", "written over"))
    values = [objective(point) for _, point in place.evaluations()]
    assert len(values) == call
    assert set(known(place, file).values()) >= set(values[: len([e for e in events if e[0] == "completed"])])
    assert not list(place.folder.glob(".*.tmp*"))
    if "have been written there again" in events[-1][1]:
        place.run()
        place.check_whole()
        assert len(place.evaluations()) == 6


def test_several_workers_of_one_lost_file_lose_nothing(tmp_path: Path) -> None:
    place = Place(tmp_path / "p", target=12)
    workers = [place.start(seconds=0.3) for _ in range(3)]
    for process in workers:
        wait_for(process, "completed")
    (place.folder / "s.db").unlink()
    for process in workers:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 1, (output, errors)
        assert "while it was in use" in output  # deleted, or replaced: the first to notice has written it again
    begun = len(place.evaluations())
    place.run()
    place.check_whole()
    assert len(place.evaluations()) == max(12, begun)


def failed(process: Forked) -> str:
    """What a worker said that ended because its file was lost."""
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 1, (output, errors)
    return output


def check_goes_on(place: Place, name: str, damage: str) -> None:
    """Run again, with the rescued copy where another file took the place, and look for every trial, once."""
    if damage == "replaced":
        for rescued in place.folder.glob(f"{Path(name).stem}.rescued-*"):
            rescued.replace(place.folder / name)
    place.run()
    place.check_whole()
    assert len(place.evaluations()) == 12


@pytest.mark.parametrize("damage", ["deleted", "replaced"])
def test_a_worker_evaluates_no_trial_that_the_copies_of_its_lost_file_do_not_have(
    tmp_path: Path, kind: str, another: Path, damage: str
) -> None:
    """It has looked at its file, another worker loses the file and writes it again, and now it begins its trial."""
    url, name = STORAGES[kind]
    place = Place(tmp_path / "p", storage=url, target=12, points=[], tell_delays=[0.1])
    other = place.start(hang_at_call=2)
    wait_for(other, "hanging")
    late = place.start(hang_at_claim=2, go=f"{place.folder}/later")
    wait_for(late, "hanging")
    DAMAGES[damage](place.folder / name, shutil.copy(another, place.folder / "other"))
    place.release()
    failed(other)
    evaluated = len(place.evaluations())
    (place.folder / "later").touch()
    output = failed(late)
    assert "while it was in use" in output
    assert len(place.evaluations()) == evaluated
    check_goes_on(place, name, damage)


@pytest.mark.parametrize("damage", ["deleted", "moved", "replaced"])
def test_whichever_worker_writes_a_lost_file_again_it_has_what_all_of_them_told(
    tmp_path: Path, kind: str, another: Path, damage: str
) -> None:
    url, name = STORAGES[kind]
    place = Place(tmp_path / "p", storage=url, target=12, points=[], tell_delays=[0.1])
    first = place.start(hang_at_call=2)  # it will not have seen any of what the second one does
    wait_for(first, "hanging")
    second = place.start(hang_at_call=4, go=f"{place.folder}/later")
    wait_for(second, "hanging")
    DAMAGES[damage](place.folder / name, shutil.copy(another, place.folder / "other"))
    place.release()
    failed(first)
    (place.folder / "later").touch()
    failed(second)
    check_goes_on(place, name, damage)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_whose_database_is_deleted_ends_with_code_1_and_the_next_one_goes_on(
    project: Project, workers: int
) -> None:
    project.write(search={**project.spec["search"], "trials": 8 * workers})
    process = project.start("run", "spec.yaml", "--workers", str(workers), "--no-test")
    waits_for = {"colours: 2/8"} if workers == 1 else {"worker 1: colours: ", "worker 2: colours: "}
    seen = ""
    while not all(each in seen for each in waits_for):
        line = process.stderr.readline()
        assert line, seen
        seen += line
    (project.folder / "colours.db").unlink()
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 1, (output, errors)
    # replaced: by the first worker that noticed, and wrote it again
    assert re.search(
        r"colours\.db: the study's file was (deleted|replaced by another file) while it was in use", errors
    )
    assert "Traceback" not in errors
    assert project.json("status", "spec.yaml")["trials"]["complete"] >= 2
    done = project.json("run", "spec.yaml", "--no-test")
    assert done["trials"]["complete"] == 8 * workers


@pytest.mark.slow
def test_progress_is_read_from_the_file_that_the_last_worker_has_joined(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    project.write(search={**project.spec["search"], "trials": 2})
    project.cli("run", "spec.yaml", "--no-test")
    spec = StudySpec.from_yaml(project.folder / "spec.yaml")
    event = {"event": "completed", "number": 2, "place": 3, "values": [0.5], "message": "", "study": "colours"}
    with TrialBars() as bars:
        show = _Display(bars, spec)
        show.notice(Notice(1, 1, "study", {"name": "colours", "total": 8}))
        for file in project.folder.glob("colours.db*"):
            file.rename(project.folder / f"kept-{file.name}")
        show.notice(Notice(1, 1, "trial", event))
        close(bars.studies[0])
        show.notice(Notice(3, 3, "trial", event))
        for file in project.folder.glob("kept-colours.db*"):
            shutil.copy(file, project.folder / file.name.removeprefix("kept-"))
        stored_study(spec).add_trial(optuna.trial.create_trial(value=0.5))
        show.notice(Notice(2, 2, "study", {"name": "colours", "total": 8}))
        show.notice(Notice(2, 2, "trial", event))
    printed = capsys.readouterr().err
    assert "worker 1: colours: 2/8" in printed  # of the file that is gone, which is all that it can know
    assert "worker 3: colours: 2/8" in printed  # of nothing: what was seen last stands
    assert "worker 2: colours: 3/8" in printed
