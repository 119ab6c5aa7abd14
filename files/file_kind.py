"""The pack's own kinds of files: a name and a version in the header, and errors as whole sentences."""

import contextlib
import os
import re
from dataclasses import dataclass

from .tensor_file import HEADER_LIMIT, TENSOR_LIMIT, TensorFile


class NewerVersion(ValueError):
    """A file of a later version of its format."""


@dataclass(frozen=True, kw_only=True)
class FileKind:
    """A kind of file: safetensors whose metadata begin with a format and its version.

    Attributes:
        format, version: of the files that are written; later versions are refused.
        suffix: of their names.
        what: "inversion", for sentences.
        other: what else a file may be.
        advice: what to do about one that cannot be loaded.
        header_limit, tensor_limit: see `TensorFile`.
    """

    format: str
    version: int
    suffix: str
    what: str
    other: str
    advice: str
    header_limit: int = HEADER_LIMIT
    tensor_limit: int = TENSOR_LIMIT

    @property
    def metadata(self) -> dict[str, str]:
        """The first entries of a new file's metadata."""
        return {"format": self.format, "version": str(self.version)}

    def open(self, path) -> TensorFile:
        return TensorFile(path, self.header_limit, self.tensor_limit)

    def matches(self, path) -> bool:
        """Whether a file seems to be of this kind, from its name or the beginning of it alone."""
        if path.endswith(self.suffix):
            return True
        try:
            with self.open(path) as file:
                return file.metadata.get("format") == self.format
        except (ValueError, OSError):
            return False

    def check_version(self, metadata: dict[str, str]):
        """Refuse the metadata of another kind of file or of a later version.

        Raises:
            ValueError: says which.
        """
        if metadata.get("format") != self.format:
            raise ValueError(f"it is another kind of file, such as {self.other}")
        if not re.fullmatch("[1-9][0-9]{0,8}", metadata.get("version", "")):
            raise ValueError("it does not say which version of the format it has")
        if int(metadata["version"]) > self.version:
            raise NewerVersion(
                f"This {self.what} was saved by a newer version of this pack (file format {metadata['version']}; this "
                f"version reads up to {self.version}): update the pack to load it."
            )

    @contextlib.contextmanager
    def refusals(self, path):
        """Turns what is wrong with a file into a whole sentence."""
        try:
            yield
        except NewerVersion as newer:
            raise ValueError(str(newer)) from None
        except (ValueError, OSError) as error:
            name = os.path.basename(path)
            why = str(error) if isinstance(error, ValueError) else f"it cannot be read ({error.strerror or error})"
            raise ValueError(f"'{name}' cannot be loaded as an {self.what}: {why.rstrip('.')}. {self.advice}") from None
