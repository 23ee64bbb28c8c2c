"""timm's pre-norm transformer blocks, run in ways that timm does not offer.

Three of them, each the same function of the weights: the class token alone out of a block, crops of several sizes
packed into one batch of rows, and stochastic depth that leaves out the work. What happens to one token (norms,
projections, MLP) runs once over the rows of all images; only attention sees which rows are of one image.

Blocks of another build (`unknown` says why) are run by timm.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from timm.layers.attention import Attention, AttentionRope
from timm.layers.layer_scale import LayerScale
from timm.layers.mlp import GluMlp, Mlp, SwiGLU
from timm.layers.norm import RmsNorm, RmsNormFp32
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.eva import EvaAttention, EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from dino_value.models.linear import OneDNNLinear, function_of

_NORMS = (nn.LayerNorm, nn.RMSNorm, RmsNorm, RmsNormFp32, nn.Identity)
# Below this rate DINOv2 keeps the plain mask: gathering costs more than it saves, and B·rate is a poor count.
SUBSET_FROM = 0.1


class Crops(NamedTuple):
    """Images of one size among packed rows: `number` with `length` tokens each, and their rotary table if any."""

    number: int
    length: int
    rope: Tensor | None


Queries = tuple[Tensor, Tensor, Tensor]
"""q [B h M d], k and v [B h T d] of the crops of one size."""

Attend = Callable[[Sequence[Queries], float], Sequence[Tensor]]
"""(one triple a crop size, dropout) -> softmax(q·kᵀ/√d)·v, [B h M d] each."""


def unknown(block: nn.Module) -> str | None:
    """What keeps `run_block` from running a block as timm would; None if nothing does."""
    if kind(block) not in (Block, EvaBlock):
        return f"its blocks are {kind(block).__name__}"
    attention: Any = block.attn
    if type(attention) not in (Attention, AttentionRope, EvaAttention):
        return f"its attention is {type(attention).__name__}"
    if getattr(attention, "qkv", None) is not None and type(attention.qkv) not in (nn.Linear, OneDNNLinear):
        return f"its qkv projection is {type(attention.qkv).__name__}"
    if type(block.mlp) not in (Mlp, GluMlp, SwiGLU):
        return f"its MLP is {type(block.mlp).__name__}"
    norms = [block.norm1, block.norm2, attention.q_norm, attention.k_norm, attention.norm, block.mlp.norm]
    for part in norms:
        if not isinstance(part, _NORMS):
            return f"its norm is {type(part).__name__}"
    for part in (getattr(block, "ls1", None), getattr(block, "ls2", None)):
        if part is not None and type(part) not in (LayerScale, nn.Identity):
            return f"its scale is {type(part).__name__}"
    # Of modules that are not called as modules here.
    hooked = [None if is_unit(block) else block, attention, attention.qkv, block.drop_path1, block.drop_path2]
    if any(part is not None and _has_hooks(part) for part in hooked):
        return "it has hooks"
    return None


def as_unit(block: Any) -> None:
    """Give a module that is to be sharded (distributed/fsdp.py) the method by which `run_in` runs it: FSDP's hooks,
    which gather its parameters, go around that. FSDP changes its class, too."""
    block.kind = type(block)
    block.through = lambda function, *arguments: function(*arguments)


def is_unit(block: nn.Module) -> bool:
    """Whether `as_unit` has seen it."""
    return "through" in block.__dict__


def kind(block: nn.Module) -> type:
    """A block's class, whatever sharding has made of it."""
    found: type = block.__dict__.get("kind", type(block))
    return found


def run_in(block: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments), which reads the block's parameters."""
    return block.through(function, *arguments) if is_unit(block) else function(*arguments)


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def apply_block(
    block: Any,
    tokens: list[Tensor],
    ropes: list[Tensor | None],
    attend: Attend | None = None,
    first: bool = False,
    subset: bool = False,
) -> list[Tensor]:
    """One block on tokens [B T D] of each crop size; by timm where `attend` is None, else by `run_block`."""
    if attend is None:
        return [
            block(part) if rope is None else block(part, rope=rope) for part, rope in zip(tokens, ropes, strict=True)
        ]
    crops = [Crops(part.shape[0], part.shape[1], rope) for part, rope in zip(tokens, ropes, strict=True)]
    rows = run_block(block, _cat([part.flatten(0, 1) for part in tokens]), crops, attend, first, subset)
    return unpack(rows, [part._replace(length=1) for part in crops] if first else crops)


@functools.cache
def compiled_block() -> Callable[..., list[Tensor]]:
    """`apply_block` compiled, one graph for all blocks of a build and for any batch size, but one a crop size.

    Student and teacher, training and evaluation, float32 and autocast each are graphs of their own, hence the limit.
    """
    limits: Any = torch._dynamo.config
    limits.cache_size_limit = max(64, limits.cache_size_limit)
    compiled = torch.compile(apply_block, dynamic=False)

    def run(block: Any, tokens: list[Tensor], *rest: Any) -> list[Tensor]:
        for part in tokens:
            if len(part) > 1:  # a batch of one is a graph of its own
                torch._dynamo.maybe_mark_dynamic(part, 0)
        result: list[Tensor] = compiled(block, tokens, *rest)
        return result

    return run


def run_block(
    block: Any, rows: Tensor, crops: Sequence[Crops], attend: Attend, first: bool = False, subset: bool = False
) -> Tensor:
    """One block on rows [Σ number·length, D], the crops of each size one after the other.

    Args:
        first: only the first token of each image leaves the block, rows [Σ number, D]: every token still gives its key
            and value, but one query, one row of attention and one row of the MLP are left. The same values and
            gradients as the whole block's. Dropout, if there is any, draws other masks.
        subset: in training, a branch is run on floor(B·(1 − rate)) images of each size, drawn without replacement,
            and added with the weight B over their number (DINOv2, arXiv 2304.07193, section 5). The branch's mean is
            that of stochastic depth with a mask; below a rate of 0.1 the mask is kept, as published.
    """

    def attention(part: Tensor, among: Sequence[Crops]) -> Tensor:
        return _scaled(block, 1, _attention(block.attn, block.norm1(part), among, attend, first))

    def mlp(part: Tensor, among: Sequence[Crops]) -> Tensor:
        return _scaled(block, 2, block.mlp(block.norm2(part)))

    into = first_rows(rows, crops) if first else rows
    rows = _residual(rows, into, crops, attention, block.drop_path1, subset)
    if first:
        crops = [Crops(part.number, 1, None) for part in crops]
    return _residual(rows, rows, crops, mlp, block.drop_path2, subset)


def first_rows(rows: Tensor, crops: Sequence[Crops]) -> Tensor:
    """The first token of each image, [Σ number, D]."""
    return _cat([part[:, 0] for part in unpack(rows, crops)])


def unpack(rows: Tensor, crops: Sequence[Crops]) -> list[Tensor]:
    """Rows to tokens [number length …], one a size."""
    parts = rows.split([part.number * part.length for part in crops])
    return [part.unflatten(0, (size.number, size.length)) for part, size in zip(parts, crops, strict=True)]


def _residual(
    rows: Tensor,
    into: Tensor,
    crops: Sequence[Crops],
    branch: Callable[[Tensor, Sequence[Crops]], Tensor],
    drop: nn.Module,
    subset: bool,
) -> Tensor:
    """`into` + branch(`rows`), with stochastic depth; `into` has the branch's rows: all, or one an image."""
    rate = float(getattr(drop, "drop_prob", 0.0)) if drop.training else 0.0
    if rate == 0:
        return into + branch(rows, crops)
    lengths = [len(into) // sum(part.number for part in crops) if into is not rows else part.length for part in crops]
    if not subset or rate <= SUBSET_FROM:
        output = branch(rows, crops)
        # As timm draws it: one number an image, in the branch's precision.
        masks = [output.new_empty(part.number).bernoulli_(1 - rate).div_(1 - rate or 1) for part in crops]
        return into + output * _cat([_spread(*pair) for pair in zip(masks, lengths, strict=True)])[:, None]
    seen, given, weights, left = [], [], [], []
    start = offset = 0
    for part, length in zip(crops, lengths, strict=True):
        count = max(1, int(part.number * (1 - rate)))
        chosen = torch.randperm(part.number, device=rows.device)[:count]
        seen.append(_rows_of(chosen, part.length) + start)
        given.append(_rows_of(chosen, length) + offset)
        weights.append(part.number / count)
        left.append(part._replace(number=count))
        start, offset = start + part.number * part.length, offset + part.number * length
    output = branch(rows.index_select(0, _cat(seen)), left)
    scaled = [part * weight for part, weight in zip(output.split([len(g) for g in given]), weights, strict=True)]
    return into.index_add(0, _cat(given), _cat(scaled).to(into.dtype))


def _rows_of(images: Tensor, length: int) -> Tensor:
    return (images[:, None] * length + torch.arange(length, device=images.device)).flatten()


def _spread(values: Tensor, length: int) -> Tensor:
    """One value an image to one a row."""
    return values[:, None].expand(-1, length).flatten()


def class_attention(block: Any, tokens: Tensor, rope: Tensor | None) -> Tensor:
    """What the first token pays each token in a block that `unknown` knows: tokens [B T D] to [B T], mean of heads."""
    crops = [Crops(tokens.shape[0], tokens.shape[1], rope)]
    rows = block.norm1(tokens.flatten(0, 1))
    q, k, v = (
        part.unflatten(0, (len(tokens), -1)) for part in _project(block.attn, rows, first_rows(rows, crops), True)
    )
    queries, keys, _ = _heads(block.attn, q, k, v, None if rope is None else (rope, True))
    logits = queries * queries.shape[-1] ** -0.5 @ keys.transpose(-2, -1)
    return logits.softmax(-1).mean(1)[:, 0]


def _scaled(block: Any, branch: int, values: Tensor) -> Tensor:
    if kind(block) is Block:
        return getattr(block, f"ls{branch}")(values)
    gamma = getattr(block, f"gamma_{branch}")
    return values if gamma is None else gamma * values


def _attention(attention: Any, rows: Tensor, crops: Sequence[Crops], attend: Attend, first: bool) -> Tensor:
    asking = first_rows(rows, crops) if first else rows
    q, k, v = _project(attention, rows, asking, first)
    queries = [Crops(part.number, 1, None) for part in crops] if first else crops
    triples = [
        _heads(attention, *qkv, None if size.rope is None else (size.rope, first))
        for qkv, size in zip(
            zip(unpack(q, queries), unpack(k, crops), unpack(v, crops), strict=True), crops, strict=True
        )
    ]
    outputs = attend(triples, attention.attn_drop.p if attention.training else 0.0)
    mixed = attention.norm(_cat([part.transpose(1, 2).flatten(2).flatten(0, 1) for part in outputs]))
    if attention.gate is not None:
        mixed = mixed * attention.gate(asking).sigmoid()
    return attention.proj_drop(attention.proj(mixed))


def _project(attention: Any, rows: Tensor, asking: Tensor, first: bool) -> list[Tensor]:
    """q of `asking`, k and v of `rows`, each [R h·d]."""
    if attention.qkv is None:
        return [attention.q_proj(asking), attention.k_proj(rows), attention.v_proj(rows)]
    multiply, weight, bias = function_of(attention.qkv), attention.qkv.weight, attention.qkv.bias
    if getattr(attention, "q_bias", None) is not None:  # EVA: keys have none
        bias = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
    width = len(weight) // 3
    if not first:
        return list(multiply(rows, weight, bias).split(width, dim=-1))
    (w_q, w_kv), (b_q, b_kv) = weight.split((width, 2 * width)), (None, None)
    if bias is not None:
        b_q, b_kv = bias.split((width, 2 * width))
    return [multiply(asking, w_q, b_q), *multiply(rows, w_kv, b_kv).split(width, dim=-1)]


def _heads(attention: Any, q: Tensor, k: Tensor, v: Tensor, rope: tuple[Tensor, bool] | None) -> Queries:
    """Tokens [B T h·d] to normalised, rotated heads [B h T d]; `rope`: the table, and whether q is the first alone."""
    q, k, v = (part.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for part in (q, k, v))
    q, k = attention.q_norm(q), attention.k_norm(k)
    if rope is not None:
        table, first = rope
        q = q.type_as(v) if first else _rotate(attention, q, table).type_as(v)  # a class token has no position
        k = _rotate(attention, k, table).type_as(v)
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return q, k, v


def _rotate(attention: Any, heads: Tensor, table: Tensor) -> Tensor:
    prefix = attention.num_prefix_tokens
    turned = apply_rot_embed_cat(heads[:, :, prefix:], table, half=getattr(attention, "rotate_half", False))
    return torch.cat([heads[:, :, :prefix], turned], dim=2)


def _cat(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
