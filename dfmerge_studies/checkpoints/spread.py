"""A model whose layers stand on several devices: accelerate decides which is where, and moves what passes between them.

Accelerate wraps the `forward` of each module that it has placed, so that inputs come to the module's device and the
whole model's output goes back to that of its inputs.  What is called beside the whole model (an encoder, a hook) has
to do so itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dfmerge_studies.errors import InputError

Place = int | torch.device  # an int is the CUDA device of that number
_BALANCED = ("auto", "balanced", "balanced_low_0")  # in transformers' words, the first two are the same


def layer_map(model: nn.Module, way: str, budgets: Mapping[int, int], *, where: str) -> dict[str, int] | None:
    """Which module goes to which CUDA device; None where the devices' budgets do not hold the model.

    Args:
        model: on the host.
        way: `auto`, `balanced`, `balanced_low_0` or `sequential`, as transformers has them.
        budgets: bytes of weights that each device may be given, by its number.
        where: what asks for it, for the message.

    Raises:
        InputError: the model does not say which of its modules must stay whole.
    """
    from accelerate.utils import get_balanced_memory, infer_auto_device_map

    whole = sorted(getattr(model, "_no_split_modules", None) or ())
    if not whole:
        raise InputError(
            f"{type(model).__name__} does not say which of its modules must stay whole (_no_split_modules), "
            "so accelerate cannot spread it over devices",
            where=where,
            hint="Leave it out, or use an architecture that says so",
        )
    most: dict[Any, int] = {**budgets}
    if way in _BALANCED:
        most = get_balanced_memory(
            model, max_memory=most, no_split_module_classes=whole, low_zero=way == "balanced_low_0"
        )
    found: dict[str, Any] = infer_auto_device_map(model, max_memory=most, no_split_module_classes=whole)
    return dict(found) if all(isinstance(device, int) for device in found.values()) else None


def spread_(model: nn.Module, places: Mapping[str, Place]) -> None:
    """Put a model's modules where they belong, with accelerate's hooks on them.

    Args:
        model: on the host; on one device afterwards where all have the same place.
        places: by path of a module; tied parameters have one place.
    """
    from accelerate import dispatch_model

    first = next(name for name, _ in model.named_parameters())  # batches are put where it is
    main = next(place for path, place in places.items() if not path or f"{first}.".startswith(f"{path}."))
    skipped = getattr(model, "_skip_keys_device_placement", None)  # caches of keys and values, which move themselves
    dispatch_model(model, dict(places), main_device=main, skip_keys=skipped)


def devices_of(model: nn.Module) -> list[torch.device]:
    """The devices that a model's parameters are on, in the model's order."""
    return list(dict.fromkeys(parameter.device for parameter in model.parameters()))


def is_spread(model: nn.Module) -> bool:
    """Whether a model is on more than one device."""
    return len(devices_of(model)) > 1


def shares_of_devices(model: nn.Module) -> dict[torch.device, float]:
    """What part of a model's weights each of its devices has; adding up to 1."""
    sizes = dict.fromkeys(devices_of(model), 0)
    for parameter in model.parameters():
        sizes[parameter.device] += parameter.numel() * parameter.element_size()
    whole = sum(sizes.values())
    return {device: size / whole for device, size in sizes.items()}


def on_host(model: nn.Module) -> dict[str, Tensor]:
    """A model's state in the host's memory, by name; what is tied is one tensor there, too."""
    copies: dict[int, Tensor] = {}
    state = model.state_dict(keep_vars=True)
    return {name: copies.setdefault(id(tensor), tensor.detach().cpu()) for name, tensor in state.items()}


def place_of(model: nn.Module, name: str) -> torch.device:
    """The device of a parameter, and so of all that belongs to it.

    Args:
        model: any model.
        name: of a parameter; of a factor of its importance, which follows its name after a space; or of a module, as
            masks have it.
    """
    owner, _, leaf = name.partition(" ")[0].rpartition(".")
    found = getattr(model.get_submodule(owner), leaf)
    tensor = found if isinstance(found, Tensor) else next(found.parameters())
    device: torch.device = tensor.device
    return device
