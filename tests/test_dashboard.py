"""The dashboard: what it says of a study, what it refuses, and its pages in a real browser."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import threading
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.artifacts import FileSystemArtifactStore, upload_artifact
from optuna_dashboard import get_note, save_note

from dfmerge_studies.errors import InputError
from dfmerge_studies.report.notes import artifact_folder, escape, publish
from dfmerge_studies.report.serving import dashboard_server
from dfmerge_studies.spec import ObjectiveSettings
from dfmerge_studies.storage import open_storage
from dfmerge_studies.study.scores import stored_scores
from dfmerge_studies.study.value import best_trial
from dfmerge_studies.trials.reading import results
from tests.project import Project, make_project

HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project whose study is complete and whose best model has been exported; beside it, a study of somebody else."""
    project = make_project(tmp_path_factory.mktemp("dashboard"), trials=4)
    project.write(search={**project.spec["search"], "max_drop": 1})
    project.cli("run", "spec.yaml", "--no-test")
    project.cli("export", "spec.yaml", "--out", "merged")
    stranger = optuna.create_study(storage=storage_of(project), study_name=HOSTILE)
    stranger.optimize(lambda trial: trial.suggest_float(HOSTILE, 0, 1), n_trials=2)
    save_note(stranger, HOSTILE)
    page = project.folder / "page.html"
    page.write_text(f"<html><body>{HOSTILE}</body></html>")
    store = FileSystemArtifactStore(artifact_folder(project.folder))
    upload_artifact(artifact_store=store, file_path=str(page), study_or_trial=stranger)
    return project


def storage_of(project: Project) -> optuna.storages.BaseStorage:
    return open_storage(f"sqlite:///{project.folder}/colours.db")


def study_of(project: Project) -> optuna.Study:
    return optuna.load_study(study_name="colours", storage=storage_of(project))


class Site:
    """A running dashboard, asked over HTTP."""

    def __init__(self, port: int) -> None:
        self.port = port

    def ask(
        self, path: str, method: str = "GET", body: Any = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        data = None if body is None else json.dumps(body)
        connection.request(method, path, data, {"Content-Type": "application/json", "Accept-Encoding": "", **given})
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, content

    def studies(self) -> dict[str, int]:
        _, _, body = self.ask("/api/studies")
        return {study["study_name"]: study["study_id"] for study in json.loads(body)["study_summaries"]}


@contextmanager
def served(project: Project, **settings: Any) -> Iterator[Site]:
    server = dashboard_server(storage_of(project), artifact_folder(project.folder), port=0, **settings)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield Site(server.server_port)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def site(finished: Project) -> Iterator[Site]:
    publish(study_of(finished))
    with served(finished) as site:
        yield site


@pytest.mark.slow
def test_notes_say_what_the_study_merges_and_how_to_export_it(finished: Project) -> None:
    study = study_of(finished)
    publish(study)
    note = get_note(study)
    best = best_trial(results(study), ObjectiveSettings())
    assert best is not None
    assert "| red | red | red |" in note
    assert f"trial {best.number}" in note
    assert "dfmerge export" in note
    trial_note = get_note(optuna.Trial(study, best._trial_id))
    experts = stored_scores(study, "experts", "validation")
    assert experts is not None
    for task, score in best.user_attrs["tasks"].items():
        difference = escape(f"{100 * (score - experts[task]):+.1f}")
        cells = [task, "accuracy, %", f"{100 * score:.1f}", f"{100 * experts[task]:.1f}", difference]
        assert f"| {' | '.join(cells)} |" in trial_note
    drop = max(best.user_attrs["drops"].values())
    assert (
        f"Constraint {'kept' if drop <= 1 else 'violated'}: largest drop {drop:.1f} points, allowed 1 (" in trial_note
    )
    assert "within 1 points of its own expert" in note


def test_notes_follow_the_study_and_a_note_of_somebody_else_stays(finished: Project) -> None:
    study = study_of(finished)
    publish(study)
    assert publish(study) is False
    save_note(study, "mine")
    study.set_user_attr("dfmerge:published", 0)
    assert publish(study) is True
    assert get_note(study) == "mine"
    save_note(study, "")
    study.set_user_attr("dfmerge:published", 0)
    publish(study)
    assert "dfmerge export" in get_note(study)


def test_a_study_that_this_program_did_not_make_is_left_alone(finished: Project) -> None:
    stranger = optuna.load_study(study_name=HOSTILE, storage=storage_of(finished))
    assert publish(stranger) is False
    assert get_note(stranger) == HOSTILE


def test_names_from_outside_are_text_in_a_note() -> None:
    assert escape("the experts' mean") == "the experts' mean"  # an entity would be broken by what Markdown needs
    assert escape("a|b <img src=x> [x](javascript:y) `c`\n# d") == (
        "a\\|b &lt;img src=x&gt; \\[x\\]\\(javascript:y\\) \\`c\\` \\# d"
    )


def test_the_dashboard_shows_parameters_metrics_figures_and_model_cards(site: Site) -> None:
    status, _, body = site.ask(f"/api/studies/{site.studies()['colours']}")
    assert status == 200
    detail = json.loads(body)
    assert {space["name"] for space in detail["union_search_space"]} == {"red", "blue"}
    assert "dfmerge export" in detail["note"]["body"]
    assert any(graph["id"] == "dfmerge-trajectory" for graph in detail["plotly_graph_objects"])
    [card] = detail["artifacts"]
    assert card["filename"] == "README.md"
    _, _, content = site.ask(f"/artifacts/{site.studies()['colours']}/{card['artifact_id']}")
    assert b"library_name" in content


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_nothing_can_be_changed_by_default(site: Site, finished: Project, method: str) -> None:
    before = site.studies()
    for path in (f"/api/studies/{before['colours']}", "/api/studies", f"/api/studies/{before['colours']}/rename"):
        status, _, body = site.ask(path, method, {"study_name": "x", "directions": ["maximize"]})
        assert status == 405
        assert "--writable" in json.loads(body)["reason"]
    assert site.studies() == before


def test_writing_is_allowed_when_asked_for_but_not_to_pages_of_other_sites(tmp_path: Path) -> None:
    project = Project(tmp_path, "t5")
    optuna.create_study(storage=storage_of(project), study_name="old")
    new = {"study_name": "new", "directions": ["maximize"]}
    with served(project, writable=True) as site:
        assert site.ask("/api/studies", "POST", new, Origin="http://evil.example")[0] == 403
        assert site.ask("/api/studies", "POST", new, Sec_Fetch_Site="cross-site")[0] == 403
        assert list(site.studies()) == ["old"]
        assert site.ask("/api/studies", "POST", new, Origin=f"http://127.0.0.1:{site.port}")[0] == 201
        assert set(site.studies()) == {"old", "new"}


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "[", "localhost@x"])
def test_a_name_that_only_resolves_here_is_not_served(site: Site, host: str) -> None:
    assert site.ask("/api/studies", Host=host)[0] == 403


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:8080", "[::1]:9"])
def test_names_of_loopback_are_served(site: Site, host: str) -> None:
    assert site.ask("/api/studies", Host=host)[0] == 200


def test_every_answer_is_hardened_and_artifacts_have_no_powers(site: Site) -> None:
    stranger = site.studies()[HOSTILE]
    [page] = json.loads(site.ask(f"/api/studies/{stranger}")[2])["artifacts"]
    for prefix in ("", "/", "//"):
        status, headers, _ = site.ask(f"{prefix}/artifacts/{stranger}/{page['artifact_id']}")
        if status == 200:
            assert headers["content-security-policy"] == "sandbox"
            assert headers["content-disposition"].startswith("attachment")
            assert "access-control-allow-origin" not in headers
    for path in ("/dashboard", "/api/studies", f"/artifacts/{stranger}/{page['artifact_id']}"):
        assert site.ask(path)[1]["x-content-type-options"] == "nosniff"
    assert "script-src 'self'" in site.ask("/dashboard")[1]["content-security-policy"]


def test_artifacts_outside_the_folder_cannot_be_read(site: Site) -> None:
    for path in ("/artifacts/1/..%2f..%2fspec.yaml", "/static/../../colours.db", "/static/%2e%2e/%2e%2e/spec.yaml"):
        assert site.ask(path)[0] in (403, 404)


def test_a_port_that_is_taken_is_refused_with_a_way_out(site: Site, finished: Project) -> None:
    with pytest.raises(InputError, match="Choose another port"):
        dashboard_server(storage_of(finished), finished.folder, port=site.port)


def test_the_command_serves_until_it_is_interrupted(finished: Project) -> None:
    process = finished.start("dashboard", "spec.yaml", "--port", "0", "--json", PYTHONUNBUFFERED="1")
    text = ""
    while not text.rstrip().endswith("}"):
        line = process.stdout.readline()
        assert line, process.communicate()
        text += line
    told = json.loads(text)
    assert told["writable"] is False
    site = Site(urllib.parse.urlsplit(told["url"]).port or 0)
    assert "colours" in site.studies()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors


def test_a_storage_that_is_not_there_is_refused_and_not_made(project: Project) -> None:
    done = project.cli("dashboard", "spec.yaml", "--port", "0", check=2)
    assert "colours.db" in done.stderr
    assert not (project.folder / "colours.db").exists()


BROWSERS = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")]
BROWSER = next((found for found in BROWSERS if found), None)
DRIVER = shutil.which("chromedriver")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if BROWSER is None or DRIVER is None:
        pytest.skip("no Chromium with its driver is installed")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    options.page_load_strategy = "none"  # what must be there is waited for
    flags = ["--headless=new", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--window-size=1400,2400"]
    flags.append(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    if os.geteuid() == 0:
        flags.append("--no-sandbox")
    for flag in flags:
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def wait_for_text(browser: Any, *texts: str, seconds: float = 180) -> str:
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.common.by import By

    end, page = time.monotonic() + seconds, ""
    while time.monotonic() < end:
        try:
            page = browser.find_element(By.TAG_NAME, "body").text
        except StaleElementReferenceException:
            continue
        if all(text in page for text in texts):
            return page
        time.sleep(0.2)
    raise AssertionError(f"{texts} did not appear in {page[:2000]!r}; console: {browser.get_log('browser')}")


@pytest.mark.slow
def test_the_list_of_studies_shows_in_a_browser(site: Site, browser: Any) -> None:
    browser.get(f"http://127.0.0.1:{site.port}/dashboard")
    wait_for_text(browser, "colours")


@pytest.mark.slow
def test_note_and_trials_show_in_a_browser(site: Site, browser: Any) -> None:
    study = site.studies()["colours"]
    browser.get(f"http://127.0.0.1:{site.port}/dashboard/studies/{study}/note")
    wait_for_text(browser, "dfmerge export SPEC.yaml", "red", "blue")
    browser.get(f"http://127.0.0.1:{site.port}/dashboard/studies/{study}/trials?numbers=0")
    wait_for_text(browser, "Trial 0", "Complete", "Parameter", "red", "blue")


@pytest.mark.slow
def test_our_figures_show_in_a_browser(site: Site, browser: Any) -> None:
    browser.get(f"http://127.0.0.1:{site.port}/dashboard/studies/{site.studies()['colours']}")
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    ours = "[id='user-defined-plot:dfmerge-trajectory'] svg"
    WebDriverWait(browser, 180).until(lambda page: page.find_elements(By.CSS_SELECTOR, ours))


@pytest.mark.slow
def test_hostile_names_notes_and_artifacts_do_no_harm(site: Site, browser: Any) -> None:
    stranger = site.studies()[HOSTILE]
    [page] = json.loads(site.ask(f"/api/studies/{stranger}")[2])["artifacts"]
    root = f"http://127.0.0.1:{site.port}"
    for path in (f"/dashboard/studies/{stranger}", f"/dashboard/studies/{stranger}/note"):
        browser.get(root + path)
        wait_for_text(browser, "onerror")
        assert browser.title != "owned"
    browser.get(f"{root}/dashboard/studies/{stranger}/note")
    browser.get(f"{root}/artifacts/{stranger}/{page['artifact_id']}")  # is offered for download
    time.sleep(1)
    assert browser.title != "owned"
