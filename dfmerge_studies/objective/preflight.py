"""What can be refused at once, before torch is imported: models and data that are missing, cut short or unreadable."""

from __future__ import annotations

from collections.abc import Iterator

from dfmerge_studies.checkpoints.files import check_files
from dfmerge_studies.checkpoints.reference import resolve
from dfmerge_studies.errors import InputError
from dfmerge_studies.spec import StudySpec
from dfmerge_studies.tasks.data import check_data_files


def model_problems(spec: StudySpec) -> Iterator[InputError]:
    """What is wrong with the files of the base and the experts, as far as names, configs and headers tell.

    Args:
        spec: what to check; Hub models are downloaded.
    """
    named = {"base": spec.base, **{f"experts.{name}": expert.model for name, expert in spec.experts.items()}}
    for field, reference in named.items():
        try:
            check_files(resolve(reference, root=spec.root, where=spec.where(field)))
        except InputError as error:
            yield error


def check_inputs(spec: StudySpec) -> None:
    """Refuse a spec whose local files are not there or not whole, without loading any.

    Args:
        spec: what to check.

    Raises:
        InputError: the first problem.
    """
    for name, task in spec.tasks.items():
        check_data_files(name, task, root=spec.root, spec_file=str(spec.file))
    for problem in model_problems(spec):
        raise problem
