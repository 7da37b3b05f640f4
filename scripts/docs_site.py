"""Hook of mkdocs: pages link to source files beside docs/, so the site gets a page of each that is linked to.

On the site `../rl/train.py` becomes `source/rl/train.py.html`, coloured, numbered; a folder is text.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = re.compile(r"\[([^\]]*)\]\(\.\./([^)#\s]+)\)")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json", ".toml": "toml"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """A page of every source file that some page of docs/ links to."""
    pages = [file.content_string for file in files.documentation_pages()]
    for name in sorted({link for page in pages for _, link in OUTSIDE.findall(page)}):
        path = ROOT / name
        if not path.exists():
            raise FileNotFoundError(f"docs/ links to ../{name}, and there is no such file")
        if path.is_file():
            files.append(File.generated(config, f"source/{name}.md", content=_page_of(path, name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    return OUTSIDE.sub(_link, markdown)


def _link(link: re.Match[str]) -> str:
    return f"[{link[1]}](source/{link[2]}.md)" if (ROOT / link[2]).is_file() else link[1]


def _page_of(path: Path, name: str) -> str:
    """Left out of the search: it would drown what the pages say."""
    text, language = path.read_text(), LANGUAGES.get(path.suffix, "text")
    return f"---\nsearch:\n  exclude: true\n---\n# {name}\n\n`````{{ .{language} linenums=1 }}\n{text}\n`````\n"
