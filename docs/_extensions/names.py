"""Code between backticks is a link where it is a public name: in docstrings any name, on pages `lro.something`."""

import re

import flax.nnx
from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.domains.python import PyObject
from sphinx.util.nodes import make_refnode

import lowrank_optax
from lowrank_optax.guard import MOST_SKIPS

PACKAGE = "lowrank_optax"
# Names that are arguments more often than functions.
ARGUMENTS = {"budget", "power", "rank", "scale"}
NAMES = set(lowrank_optax.__all__) - ARGUMENTS - {"checkpoint", "einsum", "ranks", "resize", "subspace", "summary"}


def role(name, rawtext, text, lineno, inliner, options=None, content=()):
    text = rawtext.strip("`").replace("\\\\", "\\") if rawtext.startswith("`") else text
    literal = nodes.literal(text, text, classes=["py"])
    env = inliner.document.settings.env
    dotted = re.match(r"[A-Za-z_][\w.]*\w", text)
    if not dotted:
        return [literal], []
    module = env.ref_context.get("py:module") or PACKAGE
    ref = pending_xref("", literal, refdomain="py", reftype="name", reftarget=dotted[0], refmodule=module)
    ref["refdoc"], ref["refwarn"] = env.docname, False
    return [ref], []


def resolve(app, env, node, contnode):
    """Links `fixed_rank`, `lro.fixed_rank`, `linen.apply`, and names of the module that a page is about."""
    if node.get("reftype") != "name":
        return None
    known = env.domaindata["py"]["objects"]
    # Only a whole name is one: `init` and `x @ W` are not.
    text = contnode.astext()
    target = re.sub(rf"^(lro|{PACKAGE})\.", "", node["reftarget"])
    of_flax = target.startswith("nnx.") and hasattr(flax.nnx, target.removeprefix("nnx.").split(".")[0])
    bare = target == node["reftarget"]
    if re.fullmatch(r"[\w.]+(\(.*\))?", text) and text not in ARGUMENTS and not (bare and of_flax):
        for full in (f"{node['refmodule']}.{target}", f"{PACKAGE}.{target}"):
            # A bare `carry` is an argument, `lro.carry` is a module.
            if full in known and (known[full].objtype != "module" or not bare):
                entry = known[full]
                return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, contnode, full)
    return contnode


def link_pages(app, doctree):
    """Pages: `lro.fixed_rank`, and `fixed_rank` where it is a function or a class and no ordinary word."""
    env = app.env
    if not env.docname.startswith("docs/"):
        return
    for literal in list(doctree.findall(nodes.literal)):
        text = literal.astext()
        inside = (literal.parent, getattr(literal.parent, "parent", None))
        if any(isinstance(node, nodes.reference | pending_xref | nodes.title) for node in inside):
            continue
        dotted = re.match(r"[A-Za-z_][\w.]*\w", text)
        anything = env.docname.startswith("docs/reference/")
        if dotted and (anything or dotted[0].startswith("lro.") or dotted[0] in NAMES):
            ref = pending_xref("", refdomain="py", reftype="name", reftarget=dotted[0], refmodule=PACKAGE)
            ref["refdoc"], ref["refwarn"] = env.docname, False
            literal.replace_self(ref)
            ref += literal


def signature(app, what, name, obj, options, arguments, annotation):
    """Constants of the package as their values."""
    if arguments:
        arguments = re.sub(r"\bBALANCED\b", "Balanced()", arguments)
        arguments = re.sub(r"\bMOST_SKIPS\b", str(MOST_SKIPS), arguments)
    return arguments, annotation


def setup(app):
    app.connect("autodoc-process-signature", signature)
    for field in PyObject.doc_field_types:
        if field.name == "variable":
            field.label = "Attributes"
    app.add_role("name", role)
    app.connect("doctree-read", link_pages)
    app.connect("missing-reference", resolve)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
