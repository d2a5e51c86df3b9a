"""The overloads of ATen that a device runs, each functional one with its in-place and `out` forms."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache

import torch

DEVICES = ("cpu", "cuda")

# Made for torch's own tests, or for machines that are neither.
ELSEWHERE = ("_test_", "_foobar", "miopen", "_mps", "mps_", "_use_miopen")
# What a factory's `out` form does not take.
PLACEMENT = {"dtype", "layout", "device", "pin_memory", "memory_format", "generator", "names"}


@dataclass
class Operation:
    """An overload, its forms, and the devices that have a kernel for it."""

    name: str
    forms: list[str] = field(default_factory=list)
    devices: tuple[str, ...] = DEVICES

    @property
    def overload(self) -> torch._ops.OpOverload:
        """What torch calls it."""
        packet, _, which = self.name.partition(".")
        return getattr(getattr(torch.ops.aten, packet), which or "default")


@cache
def operations() -> dict[str, Operation]:
    """Every operation that has kernels of its own, by name, without those that are composed of others."""
    schemas = {_name(schema): schema for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("aten::")}
    names = sorted(name for name, schema in schemas.items() if _devices(name) and not schema.name.startswith(_elsewhere()))
    found = {name: Operation(name, devices=_devices(name)) for name in names if not _is_form(schemas[name])}
    by_signature = {(schemas[name].name, _signature(schemas[name])): name for name in found}
    for name in names:
        if _is_form(schemas[name]):
            functional = by_signature.get((_functional_name(schemas[name]), _signature(schemas[name])))
            if functional is None and not _calls_functional(name):
                found[name] = Operation(name, devices=_devices(name))
            elif functional is not None:
                found[functional].forms.append(name)
    return found


@cache
def functional_of() -> dict[str, str]:
    """The name of the operation that stands for an overload: its own, or that of which it is a form."""
    return {name: operation.name for operation in operations().values() for name in (operation.name, *operation.forms)}


def has_kernel(name: str, key: str) -> bool:
    """Whether a kernel is registered at this dispatch key itself."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", key)


def _devices(name: str) -> tuple[str, ...]:
    if not torch._C._dispatch_has_kernel(f"aten::{name}") or has_kernel(name, "CompositeImplicitAutograd"):
        return ()
    explicit = has_kernel(name, "CompositeExplicitAutograd") or has_kernel(name, "CompositeExplicitAutogradNonFunctional")
    return tuple(device for device in DEVICES if explicit or has_kernel(name, device.upper()))


def _calls_functional(name: str) -> bool:
    """Whether an `out` form runs the functional form and copies: it has no kernel for a device."""
    return not any(has_kernel(name, device.upper()) for device in DEVICES)


def _elsewhere() -> tuple[str, ...]:
    return tuple(f"aten::{word}" for word in ELSEWHERE)


def _name(schema: torch._C.FunctionSchema) -> str:
    name = schema.name.removeprefix("aten::")
    return f"{name}.{schema.overload_name}" if schema.overload_name else name


def _is_form(schema: torch._C.FunctionSchema) -> bool:
    return any(argument.is_out for argument in schema.arguments) or (schema.is_mutable and schema.name.endswith("_"))


def _functional_name(schema: torch._C.FunctionSchema) -> str:
    return schema.name if any(argument.is_out for argument in schema.arguments) else schema.name.removesuffix("_")


def _signature(schema: torch._C.FunctionSchema) -> tuple[tuple[str, str], ...]:
    return tuple(_parameters(schema))


def _parameters(schema: torch._C.FunctionSchema) -> Iterator[tuple[str, str]]:
    for argument in schema.arguments:
        if not argument.is_out and argument.name not in PLACEMENT:
            yield argument.name, str(argument.type)
