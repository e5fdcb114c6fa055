"""Files that are what they say: published whole or not at all, hashed, and checked."""

from finchtune.files.content import (
    check_sums,
    json_text,
    read_json,
    read_object,
    sha256,
    sums_text,
    write_json,
    write_text,
)
from finchtune.files.places import (
    check_target,
    is_disk_full,
    missing_parents,
    remove_empty,
    require_space,
)
from finchtune.files.private import cache_folder, make_private, require_private
from finchtune.files.publish import FileSet, atomic_folder, atomic_path
from finchtune.files.temporary import discard, finish_interrupted, remove, remove_leftovers
from finchtune.files.yaml_files import read_yaml

__all__ = [
    "FileSet",
    "atomic_folder",
    "atomic_path",
    "cache_folder",
    "check_sums",
    "check_target",
    "discard",
    "finish_interrupted",
    "is_disk_full",
    "json_text",
    "make_private",
    "missing_parents",
    "read_json",
    "read_object",
    "read_yaml",
    "remove",
    "remove_empty",
    "remove_leftovers",
    "require_private",
    "require_space",
    "sha256",
    "sums_text",
    "write_json",
    "write_text",
]
