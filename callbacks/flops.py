"""Floating-point operations of a training step, counted from the module tree, for the model FLOP utilisation (MFU).

The convention is that of PaLM (arXiv 2204.02311, appendix B), one multiply-add being two operations:

- a linear map of N weights takes 2N per token forward, 2N backward for the gradient of its input and 2N for
  that of its weights. The head counts, tied to the embeddings or not; looking up an embedding is free;
- the two products of attention, queries with keys and scores with values, take 4 L H Q T per token forward for
  L layers, H heads of size Q and sequences of T tokens, and twice that backward. Causality does not halve it,
  nor does a sliding window reduce it;
- norms, activations, softmax, positions, biases, loss and optimizer are left out;
- fused experts count with the rows that the router sends to them;
- repeated computation counts once: gradient checkpointing does not raise the number (this is model, not hardware,
  FLOP utilisation);
- a pruned weight counts like any other: dense products compute with the zeros.

PaLM's factor of 3 from forward to forward and backward holds if every weight learns. A frozen weight needs no
gradient of its own and counts 4N here, unless it has adapters (`recon.scopes.lora`), whose gradients are made from it.
The adapters' own products take operations per step, not per token, and are left out.
"""

import math

from torch import nn
from transformers import PreTrainedModel

from recon.distributed.parameters import whole_shape
from recon.models.anatomy import Anatomy
from recon.models.matrices import Matrix, by_parameter, is_matrix
from recon.scopes.lora import is_adapted


def flops_per_token(model: PreTrainedModel, seq_len: int, backward: bool = True) -> int:
    """Count the FLOPs per token of one forward and backward pass, or of the forward pass alone.

    Architectures are not told apart: every linear map of the decoder is taken to run once per token, fused experts as
    often as the router chooses, and every layer to attend with as many dimensions for values as for keys. Parameters
    that ZeRO-3 has partitioned or FSDP2 has sharded count whole; a strategy that splits modules or flattens parameters
    must come after.

    Args:
        model: A decoder-only model; weights with `requires_grad` learn.
        seq_len: Tokens per sequence.
        backward: Count the backward pass too.

    Raises:
        ValueError: If the decoder holds fused experts that cannot be found, or its config lacks the sizes of attention.
    """
    attention = 4 * _attention_width(model) * seq_len
    flops = attention * (3 if backward else 1)
    for matrix in _matrices(model):
        weight = matrix.get_parameter("weight")
        products = 1 + backward * (2 if weight.requires_grad or is_adapted(matrix) else 1)
        flops += 2 * products * whole_shape(weight).numel()
    for experts in by_parameter({one.name: one for one in _slices(model)}):
        weight = next(iter(experts.values())).parameter
        rows = sum(one.rows_per_token * math.prod(one.shape) for one in experts.values())
        flops += 2 * (1 + backward * (2 if weight.requires_grad else 1)) * round(rows)
    return flops


def _slices(model: PreTrainedModel) -> list[Matrix]:
    """List the matrices of fused experts in the decoder; none without parameters of three dimensions."""
    if not any(len(whole_shape(one)) == 3 for one in model.get_decoder().parameters()):
        return []
    return [one for block in Anatomy.of(model).blocks for one in block.matrices.values() if one.index is not None]


def _matrices(model: PreTrainedModel) -> list[nn.Module]:
    """List the linear maps that a token passes: those of the decoder and the head, not those of a vision tower."""
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    inside = [module for module in decoder.modules() if is_matrix(module)]
    return [*inside, head] if head is not None and all(head is not one for one in inside) else inside


def _attention_width(model: PreTrainedModel) -> int:
    """Compute heads times head size, summed over the layers: L H Q."""
    config = model.config.get_text_config()
    layers, heads = (getattr(config, name, None) for name in ("num_hidden_layers", "num_attention_heads"))
    if not (isinstance(layers, int) and isinstance(heads, int)):
        raise ValueError(
            f"FLOPs of attention need integers num_hidden_layers and num_attention_heads, got {layers} and {heads} in "
            f"{type(config).__name__}; leave out what needs the FLOPs, such as callbacks.Throughput"
        )
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return layers * heads * size
