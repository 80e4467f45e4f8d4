"""What the site needs beside its pages: recipes as files, notebooks as pages, links to them, formulas as MathML."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pypandoc
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
FORMULA = re.compile(r"^```math\n(?P<block>.*?)\n```$|\$`(?P<inline>.*?)`\$", re.M | re.S)


def on_files(files: Files, config: Any) -> Files:
    """Recipes become files of the site, and notebooks pages."""
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        files.append(File.generated(config, str(path.relative_to(ROOT)), abs_src_path=str(path)))
    for path in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=notebook_page(path)))
    return files


def notebook_page(path: Path) -> str:
    """A notebook as Markdown: its text, its code, and below each piece of code what it has printed."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(f"```python\n{source}\n```" if cell["cell_type"] == "code" else source)
        for output in cell.get("outputs", ()):
            text = "".join(output.get("text") or output["data"]["text/plain"]).rstrip()
            parts.append(f"```text\n{text}\n```")
    parts.insert(1, f"This page is a notebook: [{path.name}]({path.name}) runs in Jupyter.")
    return "\n\n".join(parts) + "\n"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Marks in the place of formulas. Links out of docs/ lead to copies in the site, where there are some."""
    depth = page.file.src_uri.count("/")
    out = r"\.\./" * (depth + 1)
    markdown = re.sub(rf"\]\({out}configs/", f"]({'../' * depth}configs/", markdown)
    markdown = re.sub(rf"\[([^\]]+)\]\({out}[^)]*\)", r"\1", markdown)
    markdown = re.sub(r"(notebooks/\w+)\.ipynb\)", r"\1.md)", markdown)
    found = list(FORMULA.finditer(markdown))
    page.meta["mathml"] = mathml([(m["block"] or m["inline"], m["block"] is not None) for m in found])
    numbers = iter(range(len(found)))
    return FORMULA.sub(lambda _: f"FORMULA{next(numbers)}ENDS", markdown)


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """The formulas in the place of their marks; those in a paragraph of their own may scroll."""
    html = re.sub(r"<p>(FORMULA\d+ENDS)</p>", r'<p class="formula">\1</p>', html)
    return re.sub(r"FORMULA(\d+)ENDS", lambda m: page.meta["mathml"][int(m[1])], html)


def mathml(formulas: Sequence[tuple[str, bool]]) -> list[str]:
    """LaTeX as MathML, all in one call of pandoc.

    Args:
      formulas: (LaTeX, whether it stands in a line of its own).

    Raises:
      PluginError: for a formula that cannot be rendered.
    """
    signs = {False: "$", True: "$$"}
    text = "\n\n".join(f"{signs[block]}{tex.strip()}{signs[block]}" for tex, block in formulas)
    made = pypandoc.convert_text(text, "html", format="markdown", extra_args=["--mathml"]) if formulas else ""
    found = re.findall(r"<p>(.*?)</p>", made, re.S)
    for (tex, _), one in zip(formulas, found, strict=True):
        if not one.startswith("<math"):
            raise PluginError(f"this formula cannot be rendered: {tex}")
    return [re.sub(r"<annotation.*?</annotation>", "", one, flags=re.S) for one in found]
