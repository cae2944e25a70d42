"""Pages of the site that are no Markdown files of docs/: README.md and its like, notebooks, stored pictures.

Links between files hold in a checkout; here they are rewritten to where the site has them.
"""

from __future__ import annotations

import base64
import json
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))
from formulas import picture

ROOT = Path(__file__).parents[2]
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
LINK = re.compile(r"(\]\()([^)#:\s]+)(#[^)\s]*)?\)")
SHOWN = ("image/png", "text/plain")


def on_files(files: Files, config: Any) -> Files:
    """Adds what lies outside docs/, and a page for every notebook."""
    for source, page in PAGES.items():
        text = LINK.sub(lambda match: f"{match[1]}{_of_root(match[2])}{match[3] or ''})", (ROOT / source).read_text())
        files.append(File.generated(config, page, content=text))
    for path in sorted((ROOT / "benchmarks" / "results").rglob("*")):
        if path.suffix in (".png", ".csv", ".md"):
            name = path.relative_to(ROOT).as_posix()
            uri = name if path.suffix != ".md" else f"{name}.txt"
            files.append(File.generated(config, uri, content=path.read_bytes()))
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        page = file.src_uri.removesuffix(".ipynb")
        text, images = _of_notebook(json.loads(file.content_string), Path(page).name)
        files.append(File.generated(config, f"{page}.md", content=text))
        for name, data in images.items():
            files.append(File.generated(config, (Path(page).parent / name).as_posix(), content=data))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links of a checkout to those of the site, and formulas to pictures."""
    if page.file.src_uri not in PAGES.values():
        markdown = LINK.sub(lambda match: f"{match[1]}{_of_docs(match[2])}{match[3] or ''})", markdown)
    return re.sub(r"^\$\$\n?(.+?)\n?\$\$$", lambda match: picture(match[1]), markdown, flags=re.DOTALL | re.MULTILINE)


def _of_root(target: str) -> str:
    return _page(target.removeprefix("docs/"))


def _of_docs(target: str) -> str:
    up, _, rest = target.rpartition("../")
    is_outside = rest.startswith("benchmarks/") or rest in PAGES
    return _page(up + rest if is_outside else target)


def _page(target: str) -> str:
    if re.match(r"(\.\./)*benchmarks/.*\.md$", target):
        return f"{target}.txt"
    return PAGES.get(target, target.replace(".ipynb", ".md"))


def _of_notebook(notebook: dict[str, Any], name: str) -> tuple[str, dict[str, bytes]]:
    """A notebook's cells and stored outputs as Markdown, and the images it shows."""
    parts, images = [], {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            data = output.get("data", {"text/plain": output.get("text", "")})
            kind = next((kind for kind in SHOWN if kind in data), "")
            text = "".join(data.get(kind, ""))
            if kind == "image/png":
                image = f"{name}-{len(images)}.png"
                images[image] = base64.b64decode(text)
                parts.append(f"![output of the cell above]({image})")
            elif text.strip():
                parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts) + "\n", images
