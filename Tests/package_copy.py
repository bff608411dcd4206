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


def replace(target, folders, changed):
    """Makes the folders below `target` what they are here, with other text in the files `changed`;
    what is so already stays untouched, and is not built again."""
    wanted = {
        str(path.relative_to(PACKAGE)): path.read_bytes()
        for folder in folders
        for path in (PACKAGE / folder).rglob("*") if path.is_file()
    }
    wanted |= {path: text.encode() for path, text in changed.items()}
    for folder in folders:
        for path in (target / folder).rglob("*"):
            if path.is_file() and str(path.relative_to(target)) not in wanted:
                path.unlink()
    for name, content in wanted.items():
        path = target / name
        if path.is_file() and path.read_bytes() == content:
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        if (PACKAGE / name).is_file():
            shutil.copymode(PACKAGE / name, path)


def copy(target, changed={}):
    """Writes a copy to a folder, with other text in some files; what an earlier one left there is
    replaced."""
    replace(target, FOLDERS, changed)
    shutil.copy(PACKAGE / "Package.swift", target)


def copy_library(target, changed={}):
    """The same with the library and its tests alone."""
    replace(target, LIBRARY_FOLDERS, changed)
    manifest = only((PACKAGE / "Package.swift").read_text(), LIBRARY_TARGETS)
    manifest = re.sub(r"\n.*swift-argument-parser.*", "", manifest)
    (target / "Package.swift").write_text(manifest)
