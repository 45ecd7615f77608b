"""Groups of parameters that have a coefficient of their own, by `search.granularity`.

    layers           `embeddings`, `block1` for the first layer, and so on, `final`
    blocks: K        `embeddings`, `block1` to `blockK`, `final`: K runs of consecutive layers, as equal as they can be;
                     of several stacks (encoder, decoder) one after the other
    groups: {...}    the parameters whose name each regular expression finds, and `rest`

A parameter's group follows from its name and from the module that it belongs to.  Parameters that no expert changed are
in no group: a coefficient of theirs would change nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import nn

from dfmerge_studies.errors import InputError
from dfmerge_studies.spec import StudySpec

FIELD = "search.granularity"
REST, EMBEDDINGS, FINAL = "rest", "embeddings", "final"
_SHOWN = 3  # names of parameters in a message

Groups = Mapping[str, tuple[str, ...]]  # names of parameters by group, both in the order of the model


def parameter_groups(spec: StudySpec, model: nn.Module, names: Sequence[str]) -> Groups:
    """The groups of a study's parameters; empty where every expert has one coefficient.

    Args:
        spec: whose `search.granularity` says how fine.
        model: the base.
        names: parameters on which some expert differs from it, in the model's order.

    Raises:
        InputError: a regular expression finds no parameter, two find the same one, or there are fewer layers than
            blocks.
    """
    settings = spec.search.granularity
    if settings is None:
        return {}
    where = spec.where(FIELD)
    if settings.each is not None:
        return layer_groups(model, names)
    if settings.groups is not None:
        group_of = _by_expression(settings.groups, names, [n for n, _ in model.named_parameters()], where)
        order = [*settings.groups, REST]
    else:
        assert settings.blocks is not None
        group_of = _by_depth(settings.blocks, names, model, where)
        order = [EMBEDDINGS, *(_block(i) for i in range(settings.blocks)), FINAL]
    found = {group: tuple(name for name in names if group_of[name] == group) for group in order}
    return {group: members for group, members in found.items() if members}


def layer_groups(model: nn.Module, names: Sequence[str]) -> Groups:
    """A group for each layer of a model, what comes before and what comes after; `rest` of one without layers.

    Args:
        model: the base.
        names: parameters on which some expert differs from it, in the model's order.
    """
    layers = {layer for name, _ in model.named_parameters() if (layer := _layer(name)) is not None}
    if not layers:
        return {REST: tuple(names)}
    group_of = _by_depth(len(layers), names, model, FIELD)
    order = [EMBEDDINGS, *map(_block, range(len(layers))), FINAL]
    found = {group: tuple(name for name in names if group_of[name] == group) for group in order}
    return {group: members for group, members in found.items() if members}


def _block(index: int) -> str:
    return f"block{index + 1}"


def _by_expression(
    expressions: Mapping[str, str], names: Sequence[str], everything: Sequence[str], where: str
) -> dict[str, str]:
    """The group of each parameter, by regular expressions."""
    found = {group: {name for name in names if re.search(text, name)} for group, text in expressions.items()}
    for group, members in found.items():
        if members:
            continue
        unchanged = [name for name in everything if re.search(expressions[group], name)]
        what = "only parameters that no expert changed" if unchanged else "no parameter"
        raise InputError(
            f"the expression of the group {group!r}, {expressions[group]!r}, finds {what}",
            where=f"{where}.groups.{group}",
            hint=f"Names are such as {_some(names)}",
        )
    for name in names:
        taken = [group for group, members in found.items() if name in members]
        if len(taken) > 1:
            raise InputError(
                f"the parameter {name} is found by {' and '.join(map(repr, taken))}",
                where=f"{where}.groups",
                hint="Write the expressions so that each parameter is found by one of them",
            )
    return {name: next((group for group, members in found.items() if name in members), REST) for name in names}


def _by_depth(blocks: int, names: Sequence[str], model: nn.Module, where: str) -> dict[str, str]:
    """The group of each parameter, by the layer that it belongs to."""
    layers = {name: _layer(name) for name, _ in model.named_parameters()}
    order = list(dict.fromkeys(layer for layer in layers.values() if layer is not None))
    if len(order) < blocks:
        raise InputError(
            f"{blocks} blocks of a model with {len(order)} layers",
            where=f"{where}.blocks",
            hint=f"Give {len(order)} at most" if order else "Name groups by regular expressions: {groups: {…}}",
        )
    block_of = {layer: _block(position * blocks // len(order)) for position, layer in enumerate(order)}
    tables = {f"{owner}." for owner, module in model.named_modules() if isinstance(module, nn.Embedding)}
    before = list(layers)[: next(i for i, layer in enumerate(layers.values()) if layer is not None)]

    def outside(name: str) -> str:
        embeds = any(name.startswith(table) for table in tables) or "embed" in name
        return EMBEDDINGS if embeds or (name in before and "final" not in name) else FINAL

    found = {name: layers[name] for name in names}
    return {name: outside(name) if layer is None else block_of[layer] for name, layer in found.items()}


def _layer(name: str) -> str | None:
    """The layer of a stack that a parameter belongs to: its name up to the first number that is a part of it."""
    found = re.match(r"(?:[^.]+\.)*?\d+(?=\.)", name)
    return found.group() if found is not None else None


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:: max(1, len(names) // _SHOWN)][:_SHOWN])
    return f"{shown}, …" if len(names) > _SHOWN else shown
