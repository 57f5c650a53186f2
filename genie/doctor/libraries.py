"""Python and the libraries: the versions that the package asks for, and that they can be imported."""

from __future__ import annotations

import importlib
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, metadata, requires, version

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from genie.doctor.findings import EXPECTED, Finding, Request, not_applicable, ok, problem

PACKAGE = "genie-bench"
#: import name, where it is not the package's with "_" for "-"
MODULES = {"pytest-xdist": "xdist", "nvidia-ml-py": "pynvml"}
#: these have lines of their own below; Ray is imported by its own check
ALONE = ("torch", "torchvision", "transformers", "ray")
INSTALL = "install the project's dependencies: pip install -c constraints.txt -e ."


def check_python(request: Request) -> Iterator[Finding]:
    found = f"{platform.python_implementation()} {platform.python_version()}, {sys.executable}"
    try:
        wanted = metadata(PACKAGE)["Requires-Python"] or ""
    except PackageNotFoundError:
        yield ok("python", found)
        yield problem(PACKAGE, "not installed, so pytest does not load its plugin", INSTALL)
        return
    if not SpecifierSet(wanted).contains(platform.python_version(), prereleases=True):
        yield problem("python", found, f"use a Python {wanted}")
    else:
        yield ok("python", f"{found} ({wanted} needed)")


def check_torch(request: Request) -> Iterator[Finding]:
    yield version_finding("torch")
    import torch

    if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
        yield problem(
            "torch", "this torch cannot register device genie from Python", "install torch 2.11 to 2.13"
        )


def check_torchvision(request: Request) -> Iterator[Finding]:
    yield version_finding("torchvision")
    from genie.torchvision_compat import declare_missing_operators

    declared = declare_missing_operators()
    import torchvision.models  # noqa: F401

    if declared:
        yield ok(
            "torchvision",
            "its C++ operators do not load beside this torch; their schemas are declared instead, "
            "which is all that the models of the suite need",
        )


def check_transformers(request: Request) -> Iterator[Finding]:
    yield version_finding("transformers")
    from genie.torchvision_compat import declare_missing_operators

    declare_missing_operators()
    # Its models are imported on first use: the package alone proves nothing.
    from transformers import CLIPModel, GPT2LMHeadModel  # noqa: F401


def check_others(request: Request) -> Iterator[Finding]:
    """One finding for all that are well, and one for each other."""
    if not _ranges():
        yield not_applicable("other libraries", f"{PACKAGE} is not installed, so nothing says which it needs")
        return
    well = []
    for name in _ranges():
        if name in ALONE:
            continue
        finding = version_finding(name)
        if finding.remedy:
            yield finding
            continue
        module = MODULES.get(name, name.replace("-", "_"))
        try:
            importlib.import_module(module)
        except EXPECTED as error:
            yield problem(name, f"version {version(name)} cannot be imported: {error}", INSTALL)
        else:
            well.append(f"{name} {version(name)}")
    yield ok("other libraries", ", ".join(well))


def version_finding(name: str) -> Finding:
    try:
        found = version(name)
    except PackageNotFoundError:
        return problem(name, "not installed", INSTALL)
    wanted = _ranges().get(name, "")
    if not SpecifierSet(wanted).contains(found, prereleases=True):
        return problem(name, f"version {found}, but {wanted} is needed", INSTALL)
    return ok(name, f"{found} ({wanted or 'any version'} needed)")


def _ranges() -> dict[str, str]:
    """Version ranges of pyproject.toml, from the metadata of the installed package, extras left out.

    Empty where it is not installed, which the check of Python reports.
    """
    try:
        parsed = [Requirement(text) for text in requires(PACKAGE) or ()]
    except PackageNotFoundError:
        return {}
    return {
        one.name: str(one.specifier)
        for one in parsed
        if one.marker is None or one.marker.evaluate({"extra": ""})
    }
