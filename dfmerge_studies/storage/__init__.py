"""From a URL to an Optuna storage that several processes can share.

    sqlite:///study.db                          one machine; the default
    postgresql+psycopg://user:pw@host/name      several machines (postgresql:// and postgres:// mean the same)
    journal:///study.log                        a file on a network file system
    grpc://host:port                            Optuna's storage proxy, in a private network

SQLite is used with a write-ahead log, a long wait for locks and BEGIN IMMEDIATE: its row locks do nothing, so with
plain transactions two workers can take the same waiting trial.  No password ever appears in a message.
"""

from dfmerge_studies.storage.copies import Known, write_study
from dfmerge_studies.storage.drawing import DrawnStorage, drawn_from
from dfmerge_studies.storage.engines import check_url, open_storage
from dfmerge_studies.storage.failures import (
    DATABASE_ERRORS,
    STORAGE_FAILURES,
    is_damaged,
    may_pass,
    root_text,
    storage_errors,
)
from dfmerge_studies.storage.files import network_file_system
from dfmerge_studies.storage.handles import id_of, storage_of, study_id_of
from dfmerge_studies.storage.heartbeats import heartbeat_after_beginning, last_heartbeat, record_heartbeat, stale_ids
from dfmerge_studies.storage.read_only import is_read_only
from dfmerge_studies.storage.studies import (
    check_name,
    create_study,
    join_study,
    load_study,
    load_study_if_any,
    read_study,
    study_names,
)
from dfmerge_studies.storage.urls import check_constraints, resolve_url, safe_url, storage_file, storage_identity
from dfmerge_studies.storage.watch import SQLiteWatch, watch_of
from dfmerge_studies.storage.writes import TrialWrite, begin_trial, take_trial, write_trial

__all__ = [
    "DATABASE_ERRORS",
    "STORAGE_FAILURES",
    "DrawnStorage",
    "Known",
    "SQLiteWatch",
    "TrialWrite",
    "begin_trial",
    "check_constraints",
    "check_name",
    "check_url",
    "create_study",
    "drawn_from",
    "heartbeat_after_beginning",
    "id_of",
    "is_damaged",
    "is_read_only",
    "join_study",
    "last_heartbeat",
    "load_study",
    "load_study_if_any",
    "may_pass",
    "network_file_system",
    "open_storage",
    "read_study",
    "record_heartbeat",
    "resolve_url",
    "root_text",
    "safe_url",
    "stale_ids",
    "storage_errors",
    "storage_file",
    "storage_identity",
    "storage_of",
    "study_id_of",
    "study_names",
    "take_trial",
    "watch_of",
    "write_study",
    "write_trial",
]
