"""Texts to calibrate and evaluate on: two that every Python carries, files, and data sets.

    docs   the language reference in `pydoc_data.topics`: technical English
    code   sources of the standard library: Python

Both are the same on every machine with the same Python version, and need no download.
"""

import json
import logging
import sysconfig
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch
from torch import Tensor

from ptqc.conversations import COLUMNS, Conversation, is_conversation
from ptqc.errors import PtqcError, first_line

__all__ = [
    "EMBEDDED",
    "Document",
    "code",
    "docs",
    "pieces",
    "read_any_dataset",
    "read_any_documents",
    "read_dataset",
    "read_documents",
    "tokenize",
]

log = logging.getLogger("ptqc")

Document = str | Conversation
"""A text, or a list of messages."""

_CODE_FILES = (
    "argparse.py", "ast.py", "base64.py", "bisect.py", "calendar.py", "cmd.py", "codecs.py", "configparser.py",
    "contextlib.py", "copy.py", "csv.py", "dataclasses.py", "difflib.py", "dis.py", "enum.py", "fractions.py",
    "ftplib.py", "functools.py", "gettext.py", "gzip.py", "heapq.py", "inspect.py", "ipaddress.py", "mimetypes.py",
    "optparse.py", "pdb.py", "pickle.py", "platform.py", "pprint.py", "queue.py", "random.py", "shutil.py", "socket.py",
    "statistics.py", "subprocess.py", "tarfile.py", "tempfile.py", "textwrap.py", "threading.py", "traceback.py",
    "typing.py", "uuid.py", "warnings.py",
)  # fmt: skip
_PIECE = 1 << 18
"""Characters tokenized at a time, so that a limit on tokens also bounds the work on a long text."""


def docs() -> str:
    """The English language reference of the running Python, its topics in alphabetical order."""
    return "\n\n".join(topics.topics[name].strip() for name in sorted(topics.topics)) + "\n"


def code() -> str:
    """A fixed selection of the standard library's sources, in alphabetical order; what this Python lacks is left out.

    Raises: PtqcError if the Python was installed without sources.
    """
    library = Path(sysconfig.get_path("stdlib"))
    files = [library / name for name in _CODE_FILES if (library / name).is_file()]
    if not files:
        raise PtqcError(f"{library} holds no sources of the standard library; use the text 'docs' or a file")
    return "\n\n".join(file.read_text(encoding="utf-8").strip() for file in files) + "\n"


EMBEDDED: dict[str, Callable[[], str]] = {"docs": docs, "code": code}


def read_documents(source: str | Path, column: str = "text") -> list[str]:
    """The texts of an embedded text ("docs", "code"), or of a file.

    .jsonl holds an object a line and .parquet a table: the field `column` of each is a document. Any other file is
    one document of UTF-8 text.

    Raises: PtqcError naming the file and what is wrong with it.
    """
    return _texts(read_any_documents(source, column), str(source))


def read_any_documents(source: str | Path, column: str = "text") -> list[Document]:
    """Like `read_documents`, where documents may be conversations.

    Rows that lack `column` may have a list of messages in "messages" or "conversations".

    Raises: PtqcError naming the file and what is wrong with it.
    """
    if str(source) in EMBEDDED:
        return [EMBEDDED[str(source)]()]
    path = Path(source)
    if not _is_file(path):
        known, shown = ", ".join(EMBEDDED), str(source) if len(str(source)) < 80 else f"{str(source)[:77]}..."
        raise PtqcError(f"no text {shown!r}: neither a file nor one of the embedded texts ({known})")
    documents = _READERS.get(path.suffix.lower(), _read_plain)(path, column)
    if not any(not isinstance(document, str) or document.strip() for document in documents):
        raise PtqcError(f"{path} holds no text")
    return documents


def _texts(documents: list[Document], origin: str) -> list[str]:
    texts = [document for document in documents if isinstance(document, str)]
    if len(texts) < len(documents):
        raise PtqcError(f"{origin} holds conversations, and a text is needed; name a column of texts")
    return texts


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a whole text given as a path: the name is too long
        return False


def _read_plain(path: Path, column: str) -> list[Document]:
    return [_text_of(path)]


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PtqcError(f"{path} is no UTF-8 text: byte {error.start} ({error.reason})") from None


def _read_jsonl(path: Path, column: str) -> list[Document]:
    lines = _text_of(path).splitlines()
    return [_field(path, number, line, column) for number, line in enumerate(lines, 1) if line.strip()]


def _field(path: Path, number: int, line: str, column: str) -> Document:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise PtqcError(f"{path}, line {number} is no JSON: {error}") from None
    found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
    value = row.get(_column(row, column)) if isinstance(row, dict) else None
    if isinstance(value, str):
        return value
    if is_conversation(value):
        return list(value or ())
    raise PtqcError(f"{path}, line {number} has no text in {column!r} (found: {found})")


def _column(names: Collection[str], column: str) -> str:
    """The column that is read: the one asked for, or one of conversations where that is not there."""
    return column if column in names else next((name for name in COLUMNS if name in names), column)


def _read_parquet(path: Path, column: str) -> list[Document]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise PtqcError(f"reading {path} takes pyarrow: pip install 'ptqc[datasets]'") from None
    try:
        table = parquet.read_table(path)
    except (OSError, ValueError) as error:
        raise PtqcError(f"{path} is no parquet file: {str(error).splitlines()[0]}") from None
    name = _column(table.column_names, column)
    if name not in table.column_names:
        raise PtqcError(f"{path} has no column {column!r}; it has {', '.join(table.column_names) or 'none'}")
    return _documents(table.column(name).to_pylist(), str(path))


_READERS: dict[str, Callable[[Path, str], list[Document]]] = {".jsonl": _read_jsonl, ".parquet": _read_parquet}


def _documents(values: Iterable[Any], origin: str) -> list[Document]:
    found = list(values)
    kept: list[Document] = [
        list(value) if is_conversation(value) else str(value) for value in found if value is not None
    ]
    if len(kept) < len(found):
        log.info("%s: %d of %d documents are null", origin, len(found) - len(kept), len(found))
    return kept


def read_dataset(name: str, split: str = "test", column: str = "text") -> list[str]:
    """One column of texts of a data set that the `datasets` library knows; "name:config" picks a configuration.

    Raises: PtqcError if it is not installed, or cannot find or download the data.
    """
    return _texts(read_any_dataset(name, split, column), f"data set {name!r}")


def read_any_dataset(name: str, split: str = "test", column: str = "text") -> list[Document]:
    """Like `read_dataset`, where documents may be conversations ("messages" or "conversations" without `column`)."""
    try:
        import datasets
    except ImportError:
        raise PtqcError("reading data sets takes the datasets library: pip install 'ptqc[datasets]'") from None
    path, _, config = name.partition(":")
    try:
        data = datasets.load_dataset(path, config or None, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise PtqcError(f"cannot read split {split!r} of the data set {name!r}: {first_line(error)}") from None
    found = _column(data.column_names, column)
    if found not in data.column_names:
        raise PtqcError(f"data set {name!r} has no column {column!r}; it has {', '.join(data.column_names)}")
    return _documents(data[found], name)


def tokenize(text: str, tokenizer: Any, limit: int | None = None) -> Tensor:
    """Token ids [tokens] int64 of a text, without the special tokens that open or close a sequence.

    limit: stop once this many tokens are there. The text is tokenized in pieces of a few hundred thousand characters
    that end at line ends, so that ids do not depend on the limit.
    """
    ids: list[int] = []
    for piece in pieces(text):
        ids += tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        if limit is not None and len(ids) >= limit:
            break
    return torch.tensor(ids[:limit], dtype=torch.int64)


def pieces(text: str) -> Iterator[str]:
    """A text in pieces of a few hundred thousand characters that end at line ends."""
    held: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        held.append(line)
        size += len(line)
        if size >= _PIECE:
            yield "".join(held)
            held, size = [], 0
    if held:
        yield "".join(held)
