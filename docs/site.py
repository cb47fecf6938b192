"""Hook of MkDocs: the site has the repository's own layout, so that a link works there as it does among the files.

MkDocs knows one folder of pages; READMEs lie beside what they describe. So all that pages link to comes along as well.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

FOLDERS = ("docs", "examples", "benchmarks")
LINK = re.compile(r"\]\(([^)#:\s]+)[^)]*\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    root = Path(config.config_file_path).parent
    theme = [file for file in files if file.src_dir != config.docs_dir]
    pages = [*root.glob("*.md"), *(page for folder in FOLDERS for page in (root / folder).rglob("*.md"))]
    linked = {(page.parent / link).resolve() for page in pages for link in LINK.findall(page.read_text())}
    # A folder that a page names has no page of its own here.
    ours = sorted({*pages, *(path for path in linked if path.is_file() and path.is_relative_to(root))})
    return Files([*theme, *(_file(path, root, config) for path in ours)])


def _file(path: Path, root: Path, config: MkDocsConfig) -> File:
    return File.generated(config, path.relative_to(root).as_posix(), abs_src_path=str(path))
