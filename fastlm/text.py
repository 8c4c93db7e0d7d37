"""Text files and folders in, documents out, split into training and validation."""

from collections.abc import Iterable, Iterator
from pathlib import Path

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".text", ".py")
MAX_PIECE = 1 << 16  # characters; long enough that few sentences are cut
MIN_PIECE = 1 << 10


class TextError(ValueError):
    """Text that cannot be read or is too little; the message names the file."""


def find_files(paths: Iterable[str | Path]) -> list[Path]:
    """The files among `paths` and, in folders, those whose name ends in one of TEXT_SUFFIXES.

    Sorted within a folder. Raises FileNotFoundError for a path that is not there, TextError where
    nothing was found.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found += sorted(
                file for file in path.rglob("*") if file.suffix in TEXT_SUFFIXES and file.is_file()
            )
        elif path.is_file():
            found.append(path)
        else:
            raise FileNotFoundError(f"{path}: no such file or folder")
    if not found:
        raise TextError(
            f"no text in {', '.join(map(str, paths)) or 'nothing'}: accepted are files, "
            f"and folders with files in {', '.join(TEXT_SUFFIXES)}"
        )
    return found


def read_text(path: Path) -> str:
    """The text of a UTF-8 file; TextError names the first byte that is none."""
    data = path.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TextError(
            f"{path}: not UTF-8: got byte 0x{data[error.start]:02x} at offset "
            f"{error.start}; accepted is UTF-8 text (iconv -t utf-8 converts)"
        ) from error


def documents(files: list[Path]) -> Iterator[str]:
    """Each file's text; one longer than a hundredth of all the text is cut at line ends.

    The cuts let even a single file give both training and validation text.
    """
    total = sum(file.stat().st_size for file in files)
    piece = max(MIN_PIECE, min(MAX_PIECE, total // 100))
    for file in files:
        text = read_text(file)
        start = 0
        while len(text) - start > 2 * piece:
            cut = text.find("\n", start + piece) + 1
            if cut == 0:  # one endless line
                cut = start + piece
            yield text[start:cut]
            start = cut
        if start < len(text):
            yield text[start:]


def split(texts: Iterable[str], validation: float) -> Iterator[tuple[str, bool]]:
    """(text, is_validation), with the fraction `validation` of the characters held out.

    Spread evenly over the order of the texts, so that every part of a corpus is represented, and
    whole documents, so that no validation text continues a training text within a window.
    """
    seen = held_out = 0
    for text in texts:
        seen += len(text)
        is_validation = held_out + len(text) / 2 < validation * seen
        held_out += len(text) * is_validation
        yield text, is_validation
