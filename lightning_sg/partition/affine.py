"""Kinds of torch operations, by name: layers with weights, affine operations, and operations that only reshape."""

from __future__ import annotations

from lightning_sg.batch.program import Operation

# With weights among their arguments, their results can have any value.
_LAYERS = frozenset(
    [
        "linear",
        "conv1d",
        "conv2d",
        "conv3d",
        "conv_transpose1d",
        "conv_transpose2d",
        "conv_transpose3d",
        "matmul",
        "rmatmul",
        "mm",
        "bmm",
        "addmm",
        "baddbmm",
        "addbmm",
        "addmv",
        "mv",
        "dot",
        "einsum",
        "tensordot",
        "bilinear",
        "embedding",
        "embedding_bag",
        "rnn_tanh",
        "rnn_relu",
        "lstm",
        "gru",
        "lstm_cell",
        "gru_cell",
        "rnn_tanh_cell",
        "rnn_relu_cell",
        "layer_norm",
        "batch_norm",
        "group_norm",
        "instance_norm",
        "rms_norm",
        "multi_head_attention_forward",
        "scaled_dot_product_attention",
        "prelu",
        "rrelu",
        "checkpoint",
        "transformer_encoder_layer_fwd",
        "native_multi_head_attention",
    ]
)
_RESHAPES = frozenset(
    [
        "view",
        "reshape",
        "flatten",
        "unflatten",
        "squeeze",
        "unsqueeze",
        "contiguous",
        "to",
        "float",
        "double",
        "long",
        "int",
        "half",
        "bfloat16",
        "type",
        "type_as",
        "transpose",
        "permute",
        "t",
        "swapaxes",
        "swapdims",
        "movedim",
        "ravel",
        "clone",
        "view_as",
        "reshape_as",
        "detach",
        "cpu",
        "cuda",
        "get",
    ]
)
_AFFINE = _RESHAPES | frozenset(
    [
        "add",
        "radd",
        "iadd",
        "sub",
        "rsub",
        "neg",
        "mul",
        "rmul",
        "div",
        "truediv",
        "sum",
        "mean",
        "cat",
        "concat",
        "stack",
        "hstack",
        "vstack",
        "getitem",
        "select",
        "narrow",
        "split",
        "chunk",
        "unbind",
        "tensor_split",
        "interpolate",
        "upsample",
        "pad",
        "expand",
        "expand_as",
        "repeat",
        "repeat_interleave",
        "avg_pool1d",
        "avg_pool2d",
        "cumsum",
        "flip",
        "roll",
        "index_select",
        "adaptive_avg_pool1d",
        "adaptive_avg_pool2d",
        "fold",
        "unfold",
        "broadcast_to",
    ]
)
_PRODUCTS = frozenset(["mul", "rmul", "div", "truediv"])


def is_layer(operation: Operation) -> bool:
    """Whether it is a layer of a network if a weight is among its inputs."""
    return operation.name in _LAYERS


def is_affine(operation: Operation) -> bool:
    """Whether the results can have any value if the inputs from the network can."""
    if operation.name in _PRODUCTS:
        return sum(each.node.network for each in operation.inputs) == 1
    return operation.name in _AFFINE


def only_reshapes(operation: Operation) -> bool:
    """Whether it only changes the shape, the order, the dtype or the device."""
    return operation.name in _RESHAPES


__all__ = ["is_affine", "is_layer", "only_reshapes"]
