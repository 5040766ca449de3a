"""Files for those who take part: they parse, and the commands that they run are there."""

from __future__ import annotations

import re

import pytest
import yaml

from tests.docs.pages import ROOT, names

TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
TEMPLATES = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def test_every_target_that_is_declared_is_there():
    declared = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    assert set(declared.split()) <= TARGETS


def test_the_workflow_runs_what_the_makefile_has():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
    assert workflow["permissions"] == {"contents": "read"}
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    commands = [step["run"] for step in steps if "run" in step]
    assert {"make lint", "make test", "make docs"} <= set(commands)
    assert {command.removeprefix("make ") for command in commands} <= TARGETS
    allowed = re.search(r'requires-python = ">=(\d\.\d+),<(\d)\.(\d+)"', (ROOT / "pyproject.toml").read_text())
    versions = workflow["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert versions == [allowed[1], f"{allowed[2]}.{int(allowed[3]) - 1}"]


def test_hooks_run_what_is_installed():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert [repo["repo"] for repo in config["repos"]] == ["local"]
    for hook in config["repos"][0]["hooks"]:
        assert hook["language"] == "system"
        program = hook["entry"].split()[0]
        assert program == ".venv/bin/python" or (ROOT / program).is_file()


@pytest.mark.parametrize("path", TEMPLATES, ids=names(TEMPLATES))
def test_issue_templates_have_what_is_needed(path):
    template = yaml.safe_load(path.read_text())
    if path.name == "config.yml":
        return
    assert template["name"] and template["description"]
    ids = [part["id"] for part in template["body"] if part["type"] != "markdown"]
    assert ids and len(set(ids)) == len(ids)


def test_pages_name_targets_that_exist():
    for name in ("README.md", "CONTRIBUTING.md", "docs/install.md", "docs/index.md"):
        for targets in re.findall(r"(?:^    |`)make ([a-z][a-z -]*)", (ROOT / name).read_text(), re.MULTILINE):
            assert set(targets.split()) - {"or"} <= TARGETS, f"{name}: make {targets}"


def test_the_newest_changes_are_those_of_no_earlier_version():
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    listed = re.findall(r"^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert version in listed and listed == sorted(listed, reverse=True)
