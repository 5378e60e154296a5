"""What a check of values finds if all numbers are finite: the answer for tensors that have no values."""

from __future__ import annotations

from lightning_sg.batch.program import Operation, Value


def expected(value: Value) -> bool | None:
    """Whether a tensor of booleans is true where all numbers are finite; ``None`` if that does not decide it."""
    return _expected(value, {})


def _expected(value: Value, known: dict[int, bool | None]) -> bool | None:
    node = value.node
    if id(node) not in known:
        known[id(node)] = None  # a layer is reached on many ways
        known[id(node)] = _found(value, known)
    return known[id(node)]


def _found(value: Value, known: dict[int, bool | None]) -> bool | None:
    node = value.node
    if not isinstance(node, Operation) or not node.inputs:
        return None
    if node.name in ("isnan", "isinf", "isneginf", "isposinf", "isfinite"):
        return node.name == "isfinite"
    if node.name in ("ne", "eq") and len(node.args) == 2 and node.args[0] == node.args[1]:
        return node.name == "eq"
    found = [_expected(each, known) for each in node.inputs]
    if node.name in ("logical_not", "bitwise_not", "invert"):
        return None if found[0] is None else not found[0]
    if node.name in ("any", "all", "is_all_true", "is_any_true", "sum", "max", "min", "bool", "to", "detach", "item"):
        return found[0]
    if node.name in ("or", "logical_or", "bitwise_or"):
        return True if True in found else None if None in found else False
    if node.name in ("and", "logical_and", "bitwise_and"):
        return False if False in found else None if None in found else True
    return None


__all__ = ["expected"]
