"""The package's version, the changelog's headings and git's tags agree."""

from __future__ import annotations

import importlib.metadata
import pathlib
import re
import subprocess

import pytest

import jax_ep

pytestmark = pytest.mark.one_process("reads files")

ROOT = pathlib.Path(__file__).parents[1]


def disagreement(version: str, changelog: str, tags: list[str], tags_here: list[str]) -> str | None:
    """What is wrong, or None.

    ``tags`` are all tags of versions in the repository, and ``tags_here`` those of this commit.
    """
    headings = re.findall(r"^## \[?([^\]\s]+)", changelog, re.MULTILINE)
    released = [heading for heading in headings if heading != "Unreleased"]
    if headings[:1] != ["Unreleased"] and headings[:1] != [version]:
        return f"the first heading is {headings[:1]}, not Unreleased or {version}"
    if "Unreleased" in headings[1:]:
        return "Unreleased is not the first heading"
    for tag in tags:
        if tag.removeprefix("v") not in released:
            return f"no heading for the tag {tag}"
    if tags_here and (tags_here != [f"v{version}"] or headings[0] != version):
        return f"this commit has the tags {tags_here}, and is {version} under {headings[0]}"
    return None


@pytest.mark.parametrize(
    ("changelog", "tags", "tags_here", "wrong"),
    [
        ("## Unreleased", [], [], None),
        ("## 1.1 - 2026-01-02\n## 1.0", ["v1.0", "v1.1"], ["v1.1"], None),
        ("## Unreleased\n## 1.0", ["v1.0"], [], None),
        ("## 1.0", [], [], "first heading"),
        ("## 1.1\n## Unreleased", [], [], "not the first heading"),
        ("## Unreleased", ["v1.0"], [], "no heading for the tag v1.0"),
        ("## Unreleased\n## 1.1", ["v1.1"], ["v1.1"], "is 1.1 under Unreleased"),
        ("## 1.1\n## 1.0", ["v1.0"], ["v1.0"], "has the tags"),
    ],
)
def test_disagreement(changelog, tags, tags_here, wrong):
    found = disagreement("1.1", changelog, tags, tags_here)
    assert found is None if wrong is None else wrong in found


def test_version_changelog_and_tags_agree():
    def git(*arguments: str) -> list[str]:
        command = ["git", "tag", "--list", "v*", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.split()

    # Bazel's sandbox is no clone, and so has no tags.
    tags = [git(), git("--points-at", "HEAD")] if (ROOT / ".git").exists() else [[], []]
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert disagreement(jax_ep.__version__, changelog, *tags) is None


def test_metadata_has_the_version():
    try:
        installed = importlib.metadata.version("jax_ep")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("jax_ep is a folder on the path, not installed")
    assert installed == jax_ep.__version__
