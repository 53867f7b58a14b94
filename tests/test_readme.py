"""What the documents say is so: examples run, commands and links exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SKIPPED = {".venv", "build", "dist", ".git", ".pytest_cache"}
DOCUMENTS = [path for path in sorted(ROOT.rglob("*.md")) if not SKIPPED & set(path.relative_to(ROOT).parts)]


def blocks(*languages):
    return [
        body for language, body in re.findall(r"^```(\w*)\n(.*?)^```$", README, re.M | re.S) if language in languages
    ]


@pytest.mark.parametrize("code", blocks("python"))
def test_example(code):
    from seqkern import compat

    try:
        exec(compile(code, "README.md", "exec"), {})
    finally:
        compat.uninstall()


def test_two_commands():
    (commands,) = blocks("bash", "sh", "shell", "console")
    assert commands.splitlines() == ["python3 examples/train_text.py", "python3 tests/run.py"]
    assert all((ROOT / line.split()[1]).is_file() for line in commands.splitlines())


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text())
    assert [target for target in targets if not (document.parent / target).exists()] == []


def test_files_to_touch_exist():
    """The checklist of CONTRIBUTING.md, with the present operators for OP."""
    checklist = re.findall(r"^- \[ \] (.*?): ", (ROOT / "CONTRIBUTING.md").read_text(), re.M)
    operators = [path.parent.name for path in (ROOT / "csrc").glob("*/op.cpp")]
    missing = []
    for paths in checklist:
        folder = ""
        for path in re.findall(r"`([^`]+)`", paths):
            folder = path.rpartition("/")[0] or folder
            full = path if "/" in path or (ROOT / path).exists() else f"{folder}/{path}"
            missing += [name for op in operators if not (ROOT / (name := full.replace("OP", op))).exists()]
    assert checklist and not missing
