"""Tells whether a sequence that crosses a boundary has its channels or its positions second."""

from __future__ import annotations

from lightning_sg.batch.program import Operation, Value

_CHANNELS_SECOND = frozenset(
    [
        *("conv1d", "conv_transpose1d", "batch_norm", "instance_norm", "group_norm", "interpolate", "upsample"),
        *("max_pool1d", "max_pool1d_with_indices", "avg_pool1d", "lp_pool1d"),
        *("adaptive_avg_pool1d", "adaptive_max_pool1d", "adaptive_max_pool1d_with_indices"),
    ]
)
_POSITIONS_SECOND = frozenset(
    [
        *("linear", "layer_norm", "rms_norm", "embedding", "lstm", "gru", "rnn_tanh", "rnn_relu", "matmul", "bmm"),
        *("baddbmm", "einsum", "scaled_dot_product_attention", "multi_head_attention_forward"),
        *("transformer_encoder_layer_fwd", "native_multi_head_attention"),
    ]
)
_SWAPS = frozenset(["transpose", "swapaxes", "swapdims"])


def has_channels_second(value: Value) -> bool:
    """Whether a tensor is ``(N, C, T)``, as one-dimensional convolutions have it, and not ``(N, T, C)``.

    Layers of either kind decide, then operations that swap the two dimensions; others are looked through.

    Args:
        value: A tensor of a traced step.
    """
    swapped, seen = False, set[Value]()
    while len(value.shape) == 3 and isinstance(value.node, Operation) and value not in seen:
        seen.add(value)
        node = value.node
        if node.name in _CHANNELS_SECOND:
            return not swapped
        if node.name in _POSITIONS_SECOND:
            return swapped
        inputs = [each for each in node.inputs if each.node.network and len(each.shape) == 3]
        if not inputs:
            return False
        if node.name in _SWAPS or node.name == "permute":
            swapped ^= _swaps(node)
        value = inputs[0]
    return False


def _swaps(node: Operation) -> bool:
    """Whether an operation that moves dimensions moves the last two of three."""
    given = [*node.args[1:], *node.kwargs.values()]
    if len(given) == 1 and isinstance(given[0], (tuple, list)):
        given = [*given[0]]
    places = [each % 3 for each in given if isinstance(each, int)]
    return sorted(places) == [1, 2] if node.name in _SWAPS else places == [0, 2, 1]


__all__ = ["has_channels_second"]
