"""Shared by nodes with a file picker."""

import os

from ..files.places import path_of


class FileLoader:
    """A mixin for a node with an input `file`; its `check_file(path)` refuses a file from its header alone."""

    @classmethod
    def validate_inputs(cls, file):
        try:
            cls.check_file(path_of(file))
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, file):
        status = os.stat(path_of(file))
        return f"{status.st_mtime_ns} {status.st_size} {status.st_ino}"
