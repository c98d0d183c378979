"""Changes of single facts of a spec: every field that has a few values, or that may be a number of upstream's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import UnionType
from typing import Any, Literal, NamedTuple, Union, cast, get_args, get_origin

from pydantic import BaseModel

from prisma_conformance.doctor.change import Change
from prisma_conformance.doctor.families import families
from prisma_conformance.doctor.numbers import Number
from prisma_core.plugin import AnySpec, AttentionSpec, DualSpec, NormSpec, layer_of

EPS = (1e-12, 1e-8, 1e-6, 1e-5)  # what libraries take where nobody says another
Path = tuple[str | int, ...]


class Field(NamedTuple):
    """A field somewhere in a spec."""

    path: Path
    value: Any
    kind: Any

    @property
    def layer(self) -> int | None:
        return next((part for part in self.path if isinstance(part, int)), None)

    @property
    def family(self) -> str:
        """The path with ``{l}`` for the layer."""
        return ".".join("{l}" if isinstance(part, int) else part for part in self.path)


def facts(spec: AnySpec, first: str, numbers: Sequence[Number], spare: Collection[str] = ()) -> Iterator[Change]:
    """Yield changes of one fact, in all layers and in one.

    Args:
        first: the hook point that differs: facts of its tower, in its layer and in those behind, are changed.
        numbers: of upstream's.
        spare: upstream's tensors that no row takes: a norm that is left out has some.
    """
    layer = layer_of(first)
    tower = first.split(".", 1)[0] if isinstance(spec, DualSpec) else ""
    by_family: dict[str, list[Field]] = {}
    for one in fields(spec):
        if tower not in ("vision", "text") or one.path[0] == tower:
            by_family.setdefault(one.family, []).append(one)
    near = first.removeprefix(f"{tower}.").removeprefix("hook_").partition(".")[0]
    for members in sorted(by_family.values(), key=lambda members: near not in members[0].path[:2]):
        kept = [one for one in members if one.layer is None or layer is None or one.layer >= layer]
        for some in [kept] if len(kept) < 2 or kept[0].layer is None else [kept, kept[:1]]:
            yield from _of_field(spec, some, len(some) == len(members), numbers)
            yield from _left_out(some, len(some) == len(members), numbers, spare)
    yield from _one_eps(spec, numbers)
    yield from _one_kind(spec)
    yield from _heads(spec)


def fields(facts: BaseModel, path: Path = ()) -> Iterator[Field]:
    """Every field of a spec and of the specs in it."""
    for name, info in type(facts).model_fields.items():
        value = getattr(facts, name)
        yield Field((*path, name), value, info.annotation)
        several = cast("tuple[Any, ...]", value if isinstance(value, tuple) else ())
        for index, each in enumerate(several):
            if isinstance(each, BaseModel):
                yield from fields(each, (*path, name, index))
        if isinstance(value, BaseModel):
            yield from fields(value, (*path, name))


def replaced(facts: Any, values: Mapping[Path, Any]) -> Any:
    """Copy a spec with other values at paths, and validate it with all of them.

    Raises:
        ValueError: the facts contradict each other.
    """
    below: dict[str | int, dict[Path, Any]] = {}
    for (name, *rest), value in values.items():
        below.setdefault(name, {})[tuple(rest)] = value

    def new(old: Any, inner: dict[Path, Any]) -> Any:
        return inner[()] if () in inner else replaced(old, inner)

    if isinstance(facts, tuple):
        several = cast("tuple[Any, ...]", facts)
        return tuple(new(old, below[index]) if index in below else old for index, old in enumerate(several))
    kind = cast("type[BaseModel]", type(facts))
    update = {str(name): new(getattr(facts, str(name)), inner) for name, inner in below.items()}
    return kind.model_validate({**dict(facts), **update})


def _of_field(spec: AnySpec, members: list[Field], everywhere: bool, numbers: Sequence[Number]) -> Iterator[Change]:
    one = members[0]
    name = one.family if everywhere else ".".join(map(str, one.path))
    for value in choices(one.kind, one.value):
        yield Change(f"{name}={value!r} (it is {one.value!r})", _setting(members, lambda field, v=value: v))
    if isinstance(one.value, float):
        several, tried = (*numbers, *_usual(spec, one)), [{field.path: field.value for field in members}]
        for number in (each for one in several for each in one.powers()) if one.path[-1] == "scale" else several:
            values = {field.path: number.at(field.layer) for field in members}
            if None in values.values() or any(not _differ(values, others) for others in tried):
                continue
            tried.append(values)
            if one.path[-1] == "eps" and not all(value is not None and 0 < value < 0.1 for value in values.values()):
                continue
            shown = f"{values[one.path]:g}" if len(set(values.values())) == 1 else "that of each layer"
            change = f"{name}={shown} (it is {one.value:g}){number}"
            yield Change(change, _setting(members, lambda field, values=values: values[field.path]))


def _left_out(
    members: list[Field], everywhere: bool, numbers: Sequence[Number], spare: Collection[str]
) -> Iterator[Change]:
    """Norms in the place of none, with the eps of a module whose tensors no row takes."""
    one = members[0]
    if not members or one.value is not None or NormSpec not in get_args(one.kind):
        return
    name = one.family if everywhere else ".".join(map(str, one.path))
    holders = {family.rpartition(".")[0] for family in families(spare)}
    for number in (number for number in numbers if number.name.rpartition(".")[0] in holders):
        values = {field.path: number.at(field.layer) for field in members}
        if not all(value is not None and 0 < value < 0.1 for value in values.values()):
            continue
        for kind in ("rms", "ln"):
            change = f"{name}=NormSpec(kind={kind!r}, eps=...) (it is None){number}"
            norms = {path: NormSpec(kind=kind, eps=value or 1.0) for path, value in values.items()}
            yield Change(change, _setting(members, lambda field, norms=norms: norms[field.path]))
            if one.path[-1] == "ln2":  # blocks whose branches are side by side have none
                in_turn: dict[Path, Any] = {(*path[:-1], "kind"): "pre" for path in norms}
                says = f"{name.removesuffix('ln2')}kind='pre', and {change}"
                yield Change(says, lambda spec, values={**norms, **in_turn}: replaced(spec, values))


def _setting(members: list[Field], value: Callable[[Field], Any]) -> Callable[[AnySpec], AnySpec]:
    return lambda spec: replaced(spec, {field.path: value(field) for field in members})


def choices(kind: Any, value: Any) -> Iterator[Any]:
    """The other values of a field that has a few, and None where it may be."""
    if get_origin(kind) in (Union, UnionType):
        for each in get_args(kind):
            if each is type(None) and isinstance(value, NormSpec):
                yield None
            elif each is not type(None):
                yield from choices(each, value)
    elif get_origin(kind) is Literal:
        yield from (each for each in get_args(kind) if each != value)
    elif kind is bool:
        yield not value


def _usual(spec: AnySpec, field: Field) -> Iterator[Number]:
    """Numbers that libraries take unless told otherwise."""
    holder: Any = spec
    for part in field.path[:-1]:
        holder = holder[part] if isinstance(part, int) else getattr(holder, part)
    if isinstance(holder, NormSpec):
        yield from (Number("", {-1: eps}) for eps in EPS)
    elif isinstance(holder, AttentionSpec):
        widths = {"d_head": holder.d_head, "d_model": holder.d_head * holder.n_heads}
        yield Number("", {-1: 1.0})
        yield from (Number(f"{name}**-0.5", {-1: width**-0.5}, None) for name, width in widths.items())


def _differ(one: Mapping[Path, float | None], other: Mapping[Path, float | None]) -> bool:
    return any(abs((one[path] or 0) - (value or 0)) > 1e-9 * abs(value or 0) for path, value in other.items())


# -------------------------------------------------------------------- several facts at once


def _one_eps(spec: AnySpec, numbers: Sequence[Number]) -> Iterator[Change]:
    """One eps, taken for all norms, that is another."""
    norms = [one for one in fields(spec) if one.path[-1] == "eps"]
    values = sorted({*EPS, *(value for number in numbers for value in number.values.values() if 0 < value < 0.1)})
    for old, count in Counter(one.value for one in norms).items():
        for eps in values if count > 1 else ():
            if eps != old:
                members = [one for one in norms if one.value == old]
                change = f"eps={eps:g} in all {count} norms that have {old:g}"
                yield Change(change, _setting(members, lambda field, eps=eps: eps))


def _one_kind(spec: AnySpec) -> Iterator[Change]:
    """One kind of norm, taken for all, that is the other."""
    norms = [one for one in fields(spec) if isinstance(one.value, NormSpec)]
    for old, kind in (("ln", "rms"), ("rms", "ln")):
        members = [one for one in norms if one.value.kind == old]
        if len(members) > 1:
            change = f"kind={kind!r} in all {len(members)} norms that are {old!r}"
            yield Change(change, _setting(members, lambda field, k=kind: field.value.model_copy(update={"kind": k})))


def _heads(spec: AnySpec) -> Iterator[Change]:
    """Other numbers of heads: of keys and values; of all, as wide together, with the scale as it is and the usual."""
    attns = [one for one in fields(spec) if isinstance(one.value, AttentionSpec) and one.layer is not None]
    if not attns:
        return
    first = attns[0].value
    for n in (n for n in range(first.n_heads, 0, -1) if first.n_heads % n == 0 and n != first.n_kv_heads):
        says = f"{attns[0].family}.n_kv_heads={n} (it is {first.n_kv_heads})"
        yield Change(says, _setting(attns, lambda field, n=n: field.value.model_copy(update={"n_kv_heads": n})))
    if first.n_heads != first.n_kv_heads:
        return
    width, old = first.n_heads * first.d_head, first.n_heads
    for n in (n for n in range(1, width + 1) if width % n == 0 and n != old):
        for scale in (None, (width // n) ** -0.5):
            heads = {"n_heads": n, "n_kv_heads": n, "d_head": width // n}
            update = heads if scale is None else {**heads, "scale": scale}
            change = f"{attns[0].family}.n_heads={n} (it is {old})" + (", and the scale d_head**-0.5" if scale else "")
            yield Change(change, _setting(attns, lambda field, u=update: field.value.model_copy(update=u)))


__all__ = ["Field", "choices", "facts", "fields", "replaced"]
