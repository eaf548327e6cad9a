"""Which tensors of a checkpoint make which tensor of a model, by their names and shapes alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from ...nn import Mxfp8Linear
from ..errors import CheckpointError, listed
from ..formats.comfyui import MARKER
from ..headers import TensorInfo
from ..layer import LayerSource
from ..names import OF_ACTIVATIONS
from ..reading import Checkpoint

Rename = Callable[[str], str | None]
Fused = Mapping[str, tuple[tuple[str, ...], ...]]

FUSED: Fused = {
    "qkv_proj": (("q_proj", "k_proj", "v_proj"),),
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("w2",),),
}
"""Modules that models have as one and checkpoints in parts: the parts in order, in every way they are called."""

_AUXILIARY = (*OF_ACTIVATIONS, MARKER)
"""Endings of tensors that no model here has a place for."""

Piece = LayerSource | TensorInfo
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Target:
    """A tensor of the model.

    Attributes:
        name: in the model.
        shape: that it has there.
        parts: what it is made of, one after the other along N.
        experts: the same for every expert, to be stacked along a new first dimension; None without experts.
    """

    name: str
    shape: Shape
    parts: tuple[Piece, ...] = ()
    experts: tuple[tuple[Piece, ...], ...] | None = None

    @property
    def pieces(self) -> tuple[Piece, ...]:
        return self.parts if self.experts is None else tuple(piece for parts in self.experts for piece in parts)

    @property
    def quantized(self) -> bool:
        return isinstance(self.pieces[0], LayerSource)

    def check(self) -> None:
        """Raises CheckpointError unless the pieces have its shape together, and are MXFP8 all or none."""
        kinds = {isinstance(piece, LayerSource) for piece in self.pieces}
        if len(kinds) == 2:
            raise CheckpointError(
                f"{self.name} is made of layers of which some are MXFP8 and some not: {self._made_of()}"
            )
        shapes = [_concatenated([piece.shape for piece in parts]) for parts in self.experts or (self.parts,)]
        whole = (len(shapes), *(shapes[0] or ())) if self.experts is not None else shapes[0]
        if len(set(shapes)) != 1 or None in shapes or whole != self.shape:
            raise CheckpointError(
                f"{self.name} is {list(self.shape)} in the model, the checkpoint has {self._made_of()}"
            )

    def _made_of(self) -> str:
        pieces = [piece.weight if isinstance(piece, LayerSource) else piece for piece in self.pieces]
        return listed(str(piece) for piece in pieces)


def _concatenated(shapes: list[Shape]) -> Shape | None:
    if len({shape[1:] for shape in shapes}) != 1:
        return None
    return (sum(shape[0] for shape in shapes), *shapes[0][1:]) if shapes[0] else ()


def place(model: nn.Module, checkpoint: Checkpoint, fuse: Fused = FUSED, rename: Rename | None = None) -> list[Target]:
    """The targets of ``model``, each tensor of the checkpoint in one of them.

    Args:
        fuse: see ``FUSED``.
        rename: from names in the checkpoint to names in the model; None for tensors to be left out.

    Raises:
        CheckpointError: a tensor of the model that the checkpoint does not have, one of the checkpoint that the model
        does not have, or shapes that differ.
    """
    pieces = _pieces(checkpoint, rename)
    wanted, optional = tensors_of(model)
    names = _Names(pieces, wanted, fuse)
    targets: dict[str, Target] = {}
    unused = []
    for name in pieces:
        target = names.target(name)
        if target is not None:
            targets.setdefault(target.name, target)
        elif name not in optional and not name.endswith(_AUXILIARY):
            unused.append(name)
    if unused:
        raise CheckpointError(f"{checkpoint.path}: the model has no place for {listed(unused)}")
    _check_missing(model, checkpoint, targets, wanted)
    for target in targets.values():
        target.check()
    return list(targets.values())


def tensors_of(model: nn.Module) -> tuple[dict[str, Shape], set[str]]:
    """Name and shape of every tensor that a checkpoint must have, and the names of those that it may have."""
    wanted: dict[str, Shape] = {}
    optional: set[str] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        if isinstance(module, Mxfp8Linear):
            wanted[f"{prefix}weight"] = (module.out_features, module.in_features)
            if module.bias is not None:
                wanted[f"{prefix}bias"] = tuple(module.bias.shape)
            continue
        wanted |= {
            f"{prefix}{name}": tuple(each.shape) for name, each in module._parameters.items() if each is not None
        }
        for name, buffer in module._buffers.items():
            if name in module._non_persistent_buffers_set:
                optional.add(f"{prefix}{name}")
            elif buffer is not None:
                wanted[f"{prefix}{name}"] = tuple(buffer.shape)
    return wanted, optional


def _pieces(checkpoint: Checkpoint, rename: Rename | None) -> dict[str, Piece]:
    """Every tensor of the checkpoint by its name in the model, scales with their weights."""
    pieces: dict[str, Piece] = {source.parameter: source for source in checkpoint.sources.values()}
    biases = {source.bias.name: source.bias for source in checkpoint.sources.values() if source.bias is not None}
    pieces |= biases
    pieces |= {name: checkpoint.files[name] for name in checkpoint.plain}
    if rename is None:
        return pieces
    renamed: dict[str, Piece] = {}
    for old, piece in pieces.items():
        new = rename(old)
        if new is not None and renamed.setdefault(new, piece) is not piece:
            raise ValueError(f"rename gives two tensors of the checkpoint the name {new}, one of them {old}")
    return renamed


@dataclass(frozen=True)
class _Names:
    pieces: dict[str, Piece]
    wanted: dict[str, Shape]
    fuse: Fused

    def target(self, name: str) -> Target | None:
        """The tensor of the model that the piece ``name`` is, or is part of."""
        if name in self.wanted:
            return Target(name, self.wanted[name], (self.pieces[name],))
        module, _, kind = name.rpartition(".")
        parent, _, leaf = module.rpartition(".")
        experts, _, number = parent.rpartition(".")
        for whole, parts in self._wholes(leaf):
            fused = f"{parent}.{whole}.{kind}" if parent else f"{whole}.{kind}"
            if fused in self.wanted:
                return Target(fused, self.wanted[fused], self._parts(fused, parent, parts, kind))
            stacked = f"{experts}.{whole}"
            if number.isdecimal() and kind == "weight" and len(self.wanted.get(stacked, ())) == 3:
                shape = self.wanted[stacked]
                each = (self._parts(stacked, f"{experts}.{i}", parts, kind) for i in range(shape[0]))
                return Target(stacked, shape, experts=tuple(each))
        return None

    def _wholes(self, leaf: str) -> Iterator[tuple[str, tuple[str, ...]]]:
        yield leaf, (leaf,)
        for whole, ways in self.fuse.items():
            yield from ((whole, parts) for parts in ways if leaf in parts)

    def _parts(self, target: str, parent: str, parts: tuple[str, ...], kind: str) -> tuple[Piece, ...]:
        names = [f"{parent}.{part}.{kind}".lstrip(".") for part in parts]
        missing = [name for name in names if name not in self.pieces]
        if missing:
            raise CheckpointError(f"{target} is made of {listed(names)}, but the checkpoint has no {listed(missing)}")
        return tuple(self.pieces[name] for name in names)


def _check_missing(
    model: nn.Module, checkpoint: Checkpoint, targets: dict[str, Target], wanted: dict[str, Shape]
) -> None:
    """A tied tensor need not be there under each of its names; one that is made with the model must not be empty."""
    there = {id(tensor) for name, tensor in named_tensors(model) if name in targets}
    missing = [
        name
        for name, tensor in named_tensors(model)
        if name in wanted and name not in targets and id(tensor) not in there
    ]
    if missing:
        raise CheckpointError(f"{checkpoint.path}: nothing in it for the model's {listed(missing)}")
    empty = [name for name, tensor in named_tensors(model) if name not in wanted and tensor.is_meta and tensor.numel()]
    empty = [name for name in empty if not name.endswith((".weight_packed", ".weight_scale"))]
    if empty:
        raise ValueError(
            f"{listed(empty)} are on the meta device and not part of checkpoints: make the model with its buffers on a "
            "real device, for instance under accelerate.init_empty_weights(include_buffers=False)"
        )


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, one that is shared under each of its names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def parent(model: nn.Module, name: str) -> nn.Module:
    """The module that has the tensor ``name``."""
    return model.get_submodule(name.rpartition(".")[0])
