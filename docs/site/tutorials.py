"""Runs the tutorials and stores what they print and draw, for the site: ``python docs/site/tutorials.py``."""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "tutorials"

if __name__ == "__main__":
    for path in sorted(FOLDER.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        NotebookClient(notebook, resources={"metadata": {"path": FOLDER}}, record_timing=False).execute()
        notebook.metadata.pop("language_info", None)  # names the version of Python that happened to run it
        nbformat.write(notebook, path)
        print(f"written: {path.name}")
