"""GGUF files, by the converter of llama.cpp that the user names; nothing of it is bundled."""

import subprocess
import sys
from pathlib import Path

from pipeline.errors import ModelError
from pipeline.runfolder import writing

_LINES = 15  # of the converter's last words that an error repeats


def convert(model: Path, converter: Path, outtype: str, file: Path) -> None:
    """Write the plain transformers model in folder `model` as a GGUF file.

    The converter runs in this Python, and imports what it needs from it.

    Raises:
        ModelError: the converter failed or wrote nothing; says what it printed last.
    """
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(converter), str(model)]
    command += ["--outfile", str(file), "--outtype", outtype]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    if done.returncode or not file.exists():
        said = "\n".join(done.stdout.strip().splitlines()[-_LINES:])
        ended = f"ended with code {done.returncode}" if done.returncode else f"wrote no {file}"
        raise ModelError(
            f"export.gguf: {converter.name} {ended}. Its last lines:\n{said}\nWhat it needs and "
            "which models it knows is llama.cpp's; unset export.gguf to export without it."
        )


def check_converter(named: str) -> Path:
    """The converter's file. Raises ModelError: there is none."""
    converter = Path(named)
    if not converter.is_file():
        raise ModelError(
            f"export.gguf is {named!r}, which is no file: name convert_hf_to_gguf.py in a checkout "
            "of llama.cpp, or unset it"
        )
    return converter
