"""Copies of the package for builds of another kind."""

import pathlib
import re
import shutil

PACKAGE = pathlib.Path(__file__).resolve().parents[1]
FOLDERS = ("Sources", "Modules", "Tests", "examples")
LIBRARY_FOLDERS = (
    "Sources/QCOW2", "Modules", "Tests/Support", "Tests/Turns", "Tests/QCOW2Tests")
LIBRARY_TARGETS = {"QCOW2", "TestSupport", "CTurns", "QCOW2Tests"}
TARGET = re.compile(
    r"\.(library|executable|target|executableTarget|testTarget)\(\s*name: \"([^\"]+)\"")


def only(manifest, names):
    """The manifest without the products and targets of other names; doors to C stay."""
    for match in reversed(list(TARGET.finditer(manifest))):
        if match.group(2) in names:
            continue
        depth, end = 0, match.start()
        while True:
            depth += {"(": 1, ")": -1}.get(manifest[end], 0)
            end += 1
            if depth == 0 and manifest[end - 1] == ")":
                break
        manifest = manifest[:match.start()] + manifest[end:].lstrip(",")
    return manifest


def replace(target, folders):
    target.mkdir(parents=True, exist_ok=True)
    for folder in folders:
        shutil.rmtree(target / folder, ignore_errors=True)
        shutil.copytree(PACKAGE / folder, target / folder)


def copy(target):
    """Writes a copy to a folder; what an earlier one left there is replaced."""
    replace(target, FOLDERS)
    shutil.copy(PACKAGE / "Package.swift", target)


def copy_library(target):
    """The same with the library and its tests alone."""
    replace(target, LIBRARY_FOLDERS)
    manifest = only((PACKAGE / "Package.swift").read_text(), LIBRARY_TARGETS)
    manifest = re.sub(r"\n.*swift-argument-parser.*", "", manifest)
    (target / "Package.swift").write_text(manifest)
