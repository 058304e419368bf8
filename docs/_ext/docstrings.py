"""How docstrings are written here, told to Sphinx: sections, links of public names, and that none is missing."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util import logging
from sphinx.util.nodes import make_refnode

import pyrx

MODULES = (pyrx, pyrx.nn, pyrx.optim, pyrx.search)
SECTION = re.compile(r"(Returns|Raises|Cost|Source|Shapes|Gradients):(?: |$)")
ERROR = re.compile(r"\b([A-Z]\w*Error): ")


def public_names() -> Iterator[str]:
    """Every name that the packages export, and the methods of pyrx's own classes."""
    for module in MODULES:
        for name in module.__all__:
            found = getattr(module, name)
            if inspect.ismodule(found) or name.startswith("__"):
                continue
            yield f"{module.__name__}.{name}"
            if inspect.isclass(found):
                for member, value in vars(found).items():
                    if not member.startswith("_") and member not in ("forward", "extra_repr") and documented(value):
                        yield f"{module.__name__}.{name}.{member}"


def documented(member: Any) -> bool:
    function = member.__func__ if isinstance(member, (staticmethod, classmethod)) else member
    return bool(getattr(function, "__doc__", None)) and (inspect.isfunction(function) or isinstance(member, property))


def field(name: str, text: list[str]) -> list[str]:
    """`text` as a field of reStructuredText; of Raises one for each exception."""
    if name != "Raises" or not ERROR.search(" ".join(text)):
        return [f":{name}: {text[0]}", *(f"    {line}" if line else "" for line in text[1:])]
    parts = ERROR.split("\n".join(text))
    fields = [f":raises {error}: {told}" for error, told in zip(parts[1::2], parts[2::2], strict=True)]
    if parts[0].strip(" ;,"):
        fields.insert(0, f":raises: {parts[0]}")
    return [line if line.startswith(":raises") else f"    {line}" for each in fields for line in each.split("\n")]


def sections(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Sections other than Args become fields, before napoleon sees them."""
    made: list[str] = []
    i = 0
    while i < len(lines):
        found = SECTION.match(lines[i])
        if not found:
            made.append(lines[i])
            i += 1
            continue
        text = [lines[i][found.end() :]]
        i += 1
        # an indented block may hold blank lines; a section on its own line ends at the first
        while i < len(lines) and (lines[i].startswith(" ") or (lines[i] and text[0])):
            text.append(lines[i])
            i += 1
        made += [*field(found[1], inspect.cleandoc("\n".join(text)).strip("\n").split("\n")), ""]
    lines[:] = made


class LinkNames(SphinxPostTransform):
    """`pyrx.cutmix` in any page leads to its reference."""

    default_priority = 5

    def run(self, **options: Any) -> None:
        objects = self.env.domains["py"].objects
        for literal in list(self.document.findall(nodes.literal)):
            text = re.sub(r"\(.*", "", literal.astext())
            # one word may be an argument's name
            names = [text, *(f"{module.__name__}.{text}" for module in MODULES if re.search("[A-Z_]", text))]
            name = next((each for each in names if each in objects), None)
            if name is None or isinstance(literal.parent, (nodes.reference, nodes.title)):
                continue
            found = objects[name]
            reference = make_refnode(
                self.app.builder, self.env.docname, found.docname, found.node_id, literal.deepcopy()
            )
            literal.replace_self(reference)


def check(app: Sphinx, env: BuildEnvironment) -> None:
    for name in public_names():
        if name not in env.domains["py"].objects:
            logging.getLogger(__name__).warning("%s is public and missing from the reference", name)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", sections, priority=400)
    app.connect("env-check-consistency", check)
    app.add_post_transform(LinkNames)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
