"""What a plugin writes to bring an architecture in: facts, a weight map and a hook map, for upstream types by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, cast

from pydantic import ValidationError
from torch import Tensor, nn

from prisma_core.errors import PluginError, PrismaError, T, UnsupportedArchitecture, ask, fields_told
from prisma_core.inputs import PicturePreprocess
from prisma_core.inputs.video import VideoPreprocess
from prisma_core.maps.places import HookMap
from prisma_core.maps.reader import Reader, qualified_name
from prisma_core.maps.weights import WeightMap
from prisma_core.spec import AnySpec, MapSpec


class Adapter(ABC):
    """Maps one kind of upstream model to the canonical transformer.

    Facts are read from the built module, never from its name. What cannot be represented raises
    ``UnsupportedArchitecture``.

    Attributes:
        types: qualified names of the upstream classes it takes, exactly: a subclass may compute something else.
        ignored: attributes of upstream modules that do not matter, as ``Class.attribute``, each with the reason.
    """

    types: ClassVar[tuple[str, ...]]
    ignored: ClassVar[Mapping[str, str]] = {}

    @abstractmethod
    def spec(self, upstream: Reader) -> AnySpec:
        """Return the facts.

        Raises:
            UnsupportedArchitecture: a fact that a spec cannot hold.
        """

    @abstractmethod
    def weights(self, upstream: Reader, spec: AnySpec) -> WeightMap:
        """Return which upstream tensors make each canonical one."""

    @abstractmethod
    def hooks(self, upstream: Reader, spec: AnySpec) -> HookMap:
        """Return which upstream place each hook point equals."""

    def stem(self, upstream: Reader, spec: AnySpec) -> nn.Module | None:
        """Return upstream's own stem, for a spec whose stem is opaque. It is copied before use."""
        return None

    def preprocess(self, upstream: Reader, processor: Any) -> PicturePreprocess | VideoPreprocess | None:
        """Return what a processor of upstream's library does to pictures or videos, where the source cannot tell.

        Raises:
            LoadError: it does something we cannot repeat.
        """
        return None

    def parts(self, upstream: Reader) -> Sequence[Adapter]:
        """Return the other adapters that this one leaves parts of upstream to: what they ignore is ignored there."""
        return ()

    def explicit(self, upstream: nn.Module) -> AbstractContextManager[None]:
        """Return a scope in which upstream computes attention step by step, so that patterns can be seen."""
        return nullcontext()

    def call(self, upstream: nn.Module, *inputs: Tensor) -> Tensor:
        """Call upstream with what the hooked model takes, and return its main output."""
        return self.output(upstream(*inputs))

    def output(self, result: Any) -> Tensor:
        """Return the main output, given what upstream returns.

        Raises:
            PrismaError: it is no tensor, no tuple that begins with one, and has no logits or last hidden state;
                override this method.
        """
        value = cast("object", result)
        if isinstance(result, Mapping):
            named = cast("Mapping[str, object]", result)
            value = named.get("logits", named.get("last_hidden_state"))
        elif isinstance(result, tuple):
            value = cast("tuple[object, ...]", result)[0]
        if not isinstance(value, Tensor):
            kind = qualified_name(cast("object", result))
            raise PrismaError(f"Upstream returns {kind}: the adapter needs output(), or the case forward=, to read it.")
        return value


def read_spec(adapter: Adapter, upstream: Reader, kinds: type[T] | tuple[type[T], ...]) -> T:
    """Return an adapter's facts.

    Raises:
        UnsupportedArchitecture: facts that no spec can hold.
        PluginError: the adapter failed, or a spec lacks a field or has one that there is not.
    """
    try:
        return ask(adapter, "spec", upstream, gives=kinds)
    except PluginError as error:
        problem = error.__cause__
        if not isinstance(problem, ValidationError):
            raise
        if any(one["type"] in ("missing", "extra_forbidden") for one in problem.errors()):
            raise  # no model is to blame
        kind = qualified_name(upstream.module)
        raise UnsupportedArchitecture(kind, f"facts that no spec can hold ({fields_told(problem)})") from problem


class Refusal(Adapter):
    """Says what stands in the way of a kind of upstream model, where "no plugin adapts this type" would not help."""

    @abstractmethod
    def reason(self, upstream: Reader) -> UnsupportedArchitecture:
        """Return the error: which module, which feature, and what can be loaded instead (``Reader.unsupported``)."""

    def spec(self, upstream: Reader) -> Any:
        raise self.reason(upstream)

    def weights(self, upstream: Reader, spec: Any) -> WeightMap:
        raise self.reason(upstream)

    def hooks(self, upstream: Reader, spec: Any) -> HookMap:
        raise self.reason(upstream)


class MapAdapter(Adapter):
    """Hooks a kind of upstream model that the canonical transformer cannot express, where it stands.

    ``adapt`` returns a ``HookedUpstream``: upstream's own module, copied, with hook points at the places of ``table``.
    There are no canonical weights. A whole adapter::

        class Windows(MapAdapter):
            types = ("library.models.Windows",)

            def facts(self, upstream):
                return MapSpec(shape=(3, *upstream.img_size), n_classes=upstream.head.out_features)

            def table(self, upstream):
                rows = "embed -> hook_embed : batch pos d_model = patches times weights"
                for l, block in enumerate(upstream.blocks):
                    rows += f'''
                        blocks.{l} : in           ->  blocks.{l}.hook_resid_pre  : batch pos d_model
                        blocks.{l}.attn @ unbind  ->  blocks.{l}.attn.hook_q : batch head pos d -> batch pos head d
                        blocks.{l}.attn @ softmax : in
                                                  ->  blocks.{l}.attn.hook_attn_scores : batch head query_pos key_pos
                        blocks.{l}.attn @ softmax ->  blocks.{l}.attn.hook_pattern : batch head query_pos key_pos
                        blocks.{l}.attn.proj : in ->  blocks.{l}.attn.hook_z : batch pos (head d) -> batch pos head d
                        blocks.{l}.attn           ->  blocks.{l}.hook_attn_out   : batch pos d_model
                        blocks.{l} @ add          ->  blocks.{l}.hook_resid_mid  : batch pos d_model
                        blocks.{l}                ->  blocks.{l}.hook_resid_post : batch pos d_model
                    '''
                return HookMap.parse(rows, head=upstream.blocks[0].attn.num_heads)

    A place must be one where a change reaches everything after it: a block's input (``blocks.0 : in``) is the stream,
    while its first norm's input is read by that norm alone. What is added to the stream inside a block is the sum
    ``blocks.0 @ add``. Axes folded into one are unfolded by einops, with the sizes given to ``parse``; ``batch`` is
    known without being given: ``(batch window) head query_pos key_pos -> batch window head query_pos key_pos``.
    """

    @abstractmethod
    def facts(self, upstream: Reader) -> MapSpec:
        """Return what the model takes.

        Raises:
            UnsupportedArchitecture: something the table does not hold for.
        """

    @abstractmethod
    def table(self, upstream: Reader) -> HookMap:
        """Return a row for each hook point, in the order in which they fire, with its axes; no marks.

        How the rows are written: ``prisma_core.maps.places``.
        """

    def elsewhere(self, upstream: Reader) -> HookMap:
        """Return further places that hold the same activations, for the conformance kit alone.

        They are read from an untouched upstream inside ``explicit``: where the table opens a fused kernel
        (``: scores``, ``: pattern``), this is what proves what it shows.
        """
        return HookMap((), {})

    def equations(self, upstream: Reader, acts: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield equations between activations that hold in this kind of model: what is said, and its two sides.

        The conformance kit checks them, besides what holds in all models (``prisma_conformance.checks.maps``). They
        prove that a hook point holds what it is called: scores that are not made of q and k are another layer's.
        """
        yield from ()

    def spec(self, upstream: Reader) -> Any:
        return self.facts(upstream)

    def hooks(self, upstream: Reader, spec: Any) -> HookMap:
        return self.table(upstream)

    def weights(self, upstream: Reader, spec: Any) -> WeightMap:
        raise UnsupportedArchitecture(qualified_name(upstream.module), "no weight map: it has no canonical form")
