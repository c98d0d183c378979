"""Adapters: how an upstream model maps to Prisma's form of it, by upstream type."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from prisma_core.errors import PrismaError, UnsupportedArchitecture, qualified_name
from prisma_core.inputs import ImagePreprocess
from prisma_core.inputs.video import VideoPreprocess
from prisma_core.maps.places import HookMap
from prisma_core.maps.reader import Reader
from prisma_core.maps.weights import WeightMap
from prisma_core.spec import AnySpec


class Adapter(ABC):
    """Maps one kind of upstream model to the canonical transformer.

    Every fact is read from the built module, never from its name. What a spec cannot hold raises
    ``UnsupportedArchitecture``: ``Reader.expect`` and ``Reader.unsupported``.

    Attributes:
        types: qualified names of the upstream classes it takes, exactly: a subclass may compute something else.
        ignored: attributes of upstream modules that do not matter, as ``Class.attribute``, and classes of modules that
            compute nothing, by qualified name, each with the reason.
    """

    types: ClassVar[tuple[str, ...]]
    ignored: ClassVar[Mapping[str, str]] = {}

    @abstractmethod
    def spec(self, upstream: Reader) -> AnySpec:
        """The model's spec.

        Raises:
            UnsupportedArchitecture: a fact that a spec cannot hold.
        """

    @abstractmethod
    def weights(self, upstream: Reader, spec: AnySpec) -> WeightMap:
        """The upstream tensors that make each canonical one."""

    @abstractmethod
    def hooks(self, upstream: Reader, spec: AnySpec) -> HookMap:
        """The upstream place that each hook point equals."""

    def stem(self, upstream: Reader, spec: AnySpec) -> nn.Module | None:
        """Upstream's own stem, for a spec whose stem is opaque. It is copied before use."""
        return None

    def preprocess(self, upstream: Reader, processor: Any) -> ImagePreprocess | VideoPreprocess | None:
        """The preprocessing of images or videos by a processor of upstream's library, where the source cannot tell.

        Raises:
            LoadError: it does something that Prisma cannot repeat.
        """
        return None

    def parts(self, upstream: Reader) -> Sequence[Adapter]:
        """The adapters that this one leaves parts of upstream to: what they ignore is ignored there."""
        return ()

    def unfused_attention(self, upstream: nn.Module) -> AbstractContextManager[None]:
        """A scope in which upstream computes attention step by step, so that patterns can be seen."""
        return nullcontext()

    def call(self, upstream: nn.Module, *inputs: Tensor) -> Tensor:
        """Call upstream with the inputs of the hooked model, and return its main output."""
        return self.output(upstream(*inputs))

    def output(self, result: Any) -> Tensor:
        """Pick the main output from what upstream returns.

        Raises:
            PrismaError: it is no tensor, no tuple that begins with one, and has no logits or last hidden state;
                override this method.
        """
        value = cast("object", result)
        if isinstance(result, Mapping):
            outputs = cast("Mapping[str, object]", result)
            value = outputs.get("logits", outputs.get("last_hidden_state"))
        elif isinstance(result, tuple):
            value = cast("tuple[object, ...]", result)[0]
        if not isinstance(value, Tensor):
            kind = qualified_name(cast("object", result))
            raise PrismaError(f"Upstream returns {kind}: the adapter needs output(), or the case forward=, to read it.")
        return value


class MapAdapter(Adapter):
    """Hooks a kind of upstream model that the canonical transformer cannot express.

    ``adapt`` returns a ``HookedUpstream``: upstream's own module, copied, with hook points at the places of ``hooks``:
    a row for each in the order in which they fire, with its axes; rows with marks stand for all numbers of upstream's
    modules. There are no canonical weights::

        class Windows(MapAdapter):
            types = ("library.models.Windows",)

            def spec(self, upstream):
                return MapSpec(shape=(3, *upstream.img_size), n_classes=upstream.head.out_features)

            def hooks(self, upstream, spec):
                return HookMap.parse('''
                    embed                      ->  hook_embed : batch pos d_model = embed(input)
                    blocks.{l} : in            ->  blocks.{l}.hook_resid_pre : batch pos d_model
                    blocks.{l}.attn @ softmax  ->  blocks.{l}.attn.hook_pattern : batch head query_pos key_pos
                    blocks.{l}                 ->  blocks.{l}.hook_resid_post : batch pos d_model = mid + mlp_out
                ''')

    A change at a place must reach everything after it: a block's input (``blocks.0 : in``) is the stream, while its
    first norm's input is read by that norm alone. Axes folded into one are unfolded by einops, with sizes of ``parse``.
    """

    @abstractmethod
    def spec(self, upstream: Reader) -> Any:
        """The ``MapSpec``: what the model takes.

        Raises:
            UnsupportedArchitecture: something the table does not hold for.
        """

    def weights(self, upstream: Reader, spec: Any) -> WeightMap:
        raise UnsupportedArchitecture(qualified_name(upstream.module), "no weight map: it has no canonical form")

    def reference_places(self, upstream: Reader) -> HookMap:
        """Further places that hold the same activations, for the conformance kit alone.

        They are read from an untouched upstream inside ``unfused_attention``: where the table opens a fused kernel
        (``: scores``, ``: pattern``), this is the proof of what it shows.
        """
        return HookMap(())

    def equations(self, upstream: Reader, acts: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield equations between activations that hold in this kind of model: each in words, and its two sides.

        The conformance kit checks them, besides what holds in all models (``prisma_conformance.checks.maps``). They
        prove that a hook point holds what its name says: scores that are not made of q and k are another layer's.
        """
        yield from ()

    def exempt(self, upstream: Reader) -> dict[str, str]:
        """Return hook points that no equation proves, and equations that do not hold here, each with the reason.

        Names are those of the conformance kit's reports, or globs of them: ``blocks.*.hook_x`` is a hook point,
        ``*.hook_pattern = rows that sum to 1`` an equation.
        """
        return {}


@dataclass(frozen=True)
class Refusal:
    """An upstream type that no adapter takes, and the reason: better than "no installed plugin adapts this type".

    Attributes:
        types: qualified names of the upstream classes.
        feature: the unsupported feature, and what can be loaded instead.
        module: the name of the submodule that has it; empty for the model itself.
    """

    types: tuple[str, ...]
    feature: str
    module: str = ""

    def error(self, upstream: nn.Module) -> UnsupportedArchitecture:
        """The error that names the module and the feature."""
        return Reader(upstream.get_submodule(self.module), self.module).unsupported(self.feature)
