"""What `--force` may replace: what this program wrote, and never what a study stands on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dfmerge_studies.importance.cache import open_cache
from tests.conftest import MakeCopy
from tests.project import Project, copied

AT = "red=0.3,blue=0.8"
MERGE = ("merge", "spec.yaml", "--method", "gta", "--coefficients", AT, "--force", "--out")
EXPORT = ("export", "spec.yaml", "--force", "--out")
FISHER = ("fisher", "spec.yaml", "--expert", "red", "--force", "--out")
REPORT = ("report", "spec.yaml", "--force", "--out")


def contents(folder: Path) -> dict[str, bytes | str]:
    """Every file, folder and link below a folder, with what it holds."""
    return {
        str(path.relative_to(folder)): str(path.readlink())
        if path.is_symlink()
        else ("database" if path.suffix == ".db" else path.read_bytes())
        if path.is_file()
        else "folder"
        for path in sorted(folder.rglob("*"))
        if not path.name.endswith(("-wal", "-shm"))  # SQLite's own, which come and go
    }


def refused(project: Project, *arguments: str | Path, **environment: str) -> str:
    """The one line that refuses a command which has touched nothing."""
    before = contents(project.folder.parent)
    message = project.cli(*arguments, check=2, **environment).stderr
    assert contents(project.folder.parent) == before
    assert message.count("\n") == 1
    assert "--out" in message
    return message


def looks_exported(folder: Path) -> None:
    """Give a folder the mark of an export, so that nothing but what the folder holds can protect it."""
    text = json.dumps({"format": 1, "coefficients": {"red": 1.0}, "files": ["dfmerge.json"]})
    (folder / "dfmerge.json").write_text(text)


@pytest.fixture(scope="module")
def studied_original(make_copy: MakeCopy, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with a study of one trial; tests get copies."""
    project = make_copy("t5", tmp_path_factory.mktemp("studied"))
    project.json("run", "spec.yaml", "--trials", "1", "--no-test")
    return project


@pytest.fixture
def studied(studied_original: Project, tmp_path: Path) -> Project:
    """A fresh copy of it."""
    return copied(studied_original, tmp_path / "t5")


@pytest.mark.parametrize("command", [MERGE, EXPORT, FISHER, REPORT], ids=lambda c: c[0])
def test_a_folder_that_is_or_holds_the_project_is_never_replaced(studied, tmp_path, command):
    (studied.folder / "link").symlink_to(studied.folder, target_is_directory=True)
    names = (".", "", "..", "base/..", "../t5", "link", "~", "~/t5")
    for out in names:
        assert "exists already" not in refused(studied, *command, out, HOME=str(tmp_path))
    looks_exported(studied.folder)
    looks_exported(tmp_path)
    for out in names:
        assert "exists already" not in refused(studied, *command, out, HOME=str(tmp_path))


@pytest.mark.parametrize("place", ["spec", "storage", "cache", "base", "expert", "data", "outbox", "indices", "multi"])
def test_a_folder_that_holds_a_part_of_the_study_is_never_replaced(project, place, tmp_path):
    """Each part alone lies in a folder that looks like an export, and the command runs somewhere else."""
    out = tmp_path / "out"
    out.mkdir()
    looks_exported(out)
    file = project.file
    if place == "spec":
        project.write(**{k: str(project.folder / k) for k in ("base",)})
        file = Path(shutil.copy(project.file, out))
        for name in ("red", "blue", *(f"{e}.{s}.jsonl" for e in ("red", "blue") for s in ("validation", "test"))):
            (out / name).symlink_to(project.folder / name)
    elif place == "storage":
        project.write(storage=f"sqlite:///{out}/s.db")
        project.cli("run", "spec.yaml", "--trials", "1", "--no-test")
    elif place == "cache":
        project.write(cache=str(out / "fishers"))
        (out / "fishers").mkdir()
    elif place in ("base", "expert"):
        name = {"base": "base", "expert": "red"}[place]
        shutil.move(project.folder / name, out / name)
        changes = (
            {"base": str(out / "base")} if place == "base" else {"experts": {"red": str(out / "red"), "blue": "blue"}}
        )
        project.write(**changes)
    elif place == "data":
        shutil.move(project.folder / "red.validation.jsonl", out)
        tasks = json.loads(json.dumps(project.spec["tasks"]))
        tasks["red"]["dataset"]["data_files"]["validation"] = "../out/red.*.jsonl"
        del tasks["red"]["dataset"]["data_files"]["test"], tasks["red"]["test_split"]
        project.write(tasks=tasks)
    elif place == "outbox":
        (out / ".dfmerge").mkdir()
        (project.folder / ".dfmerge").symlink_to(out / ".dfmerge")
    elif place == "indices":
        (out / "rows.json").write_text('{"red": [0, 1], "blue": [0, 1]}')
        project.write(importance={"samples": 2, "indices": str(out / "rows.json")})
    elif place == "multi":
        shutil.copytree(project.folder / "red", out / "multi")
        project.write(multi_task=str(out / "multi"))
    merge = ("merge", file, *MERGE[2:])
    message = refused(project, *merge, out)
    assert "dfmerge.json" not in message  # it is what the folder holds that is named, not a missing mark
    refused(project, *merge, out / "..")


def test_a_folder_without_our_mark_is_left_alone_whatever_the_command_says(studied):
    mine = studied.folder / "mine"
    mine.mkdir()
    (mine / "config.json").write_text("{}")
    for command in (MERGE, EXPORT):
        assert "not a model directory that this program wrote" in refused(studied, *command, "mine")
        (mine / "dfmerge.json").write_text("[]")
        assert "not a model directory that this program wrote" in refused(studied, *command, "mine")
        (mine / "dfmerge.json").unlink()


def test_an_export_is_replaced_whole_also_through_a_link_and_one_with_foreign_files_is_not(studied, tmp_path):
    far = tmp_path / "far"
    (studied.folder / "merged").symlink_to(far, target_is_directory=True)
    studied.cli("export", "spec.yaml", "--out", "merged", "--shard-size", "10KB")
    assert (studied.folder / "merged").is_symlink()
    assert len(list(far.glob("model-*"))) > 1
    studied.cli(*EXPORT, "merged")
    assert not list(far.glob("model-*"))
    assert (studied.folder / "merged").is_symlink()
    (far / "notes").mkdir()
    (far / "notes" / "mine.txt").write_text("precious")
    assert "notes/mine.txt" in refused(studied, *EXPORT, "merged")
    shutil.rmtree(far / "notes")
    # What an earlier version wrote says nothing of its files.
    content = json.loads((far / "dfmerge.json").read_text())
    del content["files"]
    (far / "dfmerge.json").write_text(json.dumps(content))
    studied.cli(*EXPORT, "merged")


def test_an_empty_folder_is_as_good_as_none(studied):
    (studied.folder / "empty").mkdir()
    assert "exists already" in refused(studied, *[a for a in MERGE if a != "--force"], "empty")
    studied.cli(*MERGE, "empty")
    assert (studied.folder / "empty/config.json").is_file()


def test_a_fisher_file_is_replaced_and_nothing_else_is(studied):
    for name in ("spec.yaml", "colours.db", "base/model.safetensors", "red.validation.jsonl", "base"):
        refused(studied, *FISHER, name)
    entry = next((studied.folder / ".dfmerge/fishers").glob("*.safetensors"))
    assert "cache" in refused(studied, *FISHER, entry)
    (studied.folder / "sub").mkdir()
    studied.cli(*FISHER, "sub/f.safetensors")
    (studied.folder / "link.safetensors").symlink_to("sub/f.safetensors")
    first = (studied.folder / "sub/f.safetensors").stat().st_ino
    studied.cli(*FISHER, "link.safetensors")
    assert (studied.folder / "link.safetensors").is_symlink()
    assert (studied.folder / "sub/f.safetensors").stat().st_ino != first


def test_a_report_replaces_its_own_files_and_no_other_page_or_picture(studied):
    site = studied.folder / "site"
    (site / "figures").mkdir(parents=True)
    (site / "index.html").write_text("<html><body>About dfmerge-studies</body></html>")
    assert "not a report of this program" in refused(studied, *REPORT, "site")
    assert "not a report of this program" in refused(studied, "report", "spec.yaml", "--out", "site")
    (site / "index.html").unlink()
    (site / "figures/scores.png").write_text("mine")
    assert "figures" in refused(studied, *REPORT, "site")
    assert "figures" in refused(studied, "report", "spec.yaml", "--out", "site")
    (site / "figures/scores.png").rename(site / "figures/mine.png")
    studied.cli("report", "spec.yaml", "--out", "site")
    studied.cli(*REPORT, "site")
    assert (site / "figures/mine.png").read_text() == "mine"


@pytest.mark.parametrize("force", [[], ["--force"]], ids=["", "force"])
def test_a_report_is_written_into_nothing_that_the_study_stands_on(studied, force):
    folder = studied.folder
    (folder / "data").mkdir()
    shutil.move(folder / "red.validation.jsonl", folder / "data")
    (folder / "red.validation.jsonl").symlink_to("data/red.validation.jsonl")
    (folder / "link").symlink_to("red", target_is_directory=True)
    parts = {
        "base": "is the base",
        "red": "is the expert red",
        "link": "is the expert red",
        ".dfmerge/fishers": "is the Fisher cache",
        ".dfmerge": "holds",
        "data": "holds data of the task red",
        ".": "is the working directory" if force else "holds the spec",
    }
    for out, said in parts.items():
        assert said in refused(studied, "report", "spec.yaml", *force, "--out", out)


def test_a_report_goes_into_a_working_directory_that_holds_nothing_of_the_study(studied, tmp_path):
    elsewhere = Project(tmp_path / "elsewhere", studied.family)
    elsewhere.folder.mkdir()
    elsewhere.cli("report", studied.file, "--out", ".")
    assert (elsewhere.folder / "index.html").is_file()


def test_a_cache_that_is_named_wrongly_deletes_and_renames_nothing(studied, tmp_path):
    before = contents(studied.folder / "base")
    for folder in (str(studied.folder / "base"), f"file://{studied.folder}/base"):
        cache = open_cache(folder, studied.folder)
        assert cache.prune(0) == []
        assert cache.verify() == []
    from dfmerge_studies.importance.cache import RemoteCache

    remote = RemoteCache(f"local://{studied.folder}/base")
    remote._grace = -1.0  # nothing counts as in use
    assert remote.prune(0) == []
    assert remote.verify() == []
    assert contents(studied.folder / "base") == before


@pytest.mark.parametrize("text", ["one line", "x", '{"a": 1}', "two\nlines"])
def test_a_file_that_is_no_journal_is_not_cut(project, text):
    (project.folder / "notes.txt").write_text(text)
    for command in ("run", "status"):
        project.cli(command, "spec.yaml", "--storage", f"journal:///{project.folder}/notes.txt", check=2)
        assert (project.folder / "notes.txt").read_text() == text


@pytest.mark.slow
def test_a_project_stays_in_its_folder_whatever_that_is_called(project, tmp_path):
    folder = tmp_path / "of" / "100%41 a:b@c=d&e [x]{y}* what? #1"
    folder.parent.mkdir()
    moved = Project(project.folder.rename(folder), project.family, project.spec)
    before = contents(tmp_path)
    for line in (
        "run --trials 2 --workers 2",
        "run --trials 3",
        "status",
        "list",
        "repair",
        "export --out merged",
        "report",
    ):
        command, *flags = line.split()
        (moved.process if "--workers" in flags else moved.cli)(command, "spec.yaml", *flags)
    assert moved.json("status", "spec.yaml")["trials"]["complete"] == 3
    new = contents(tmp_path).keys() - before.keys()
    assert {path.split("/")[2] for path in new} == {"colours.db", ".dfmerge", "merged", "report"}
