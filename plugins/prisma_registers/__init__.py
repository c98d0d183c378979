"""Register tokens: which tokens hold outlier norms, who attends to registers, and models with more or fewer of them.

```python
norms = token_norms(model, images)                       # [layer batch pos]
norms.outliers().any(-1)                                 # which images have outlier tokens, layer by layer
attention_to(model, images, "registers")                 # [layer head]

with without_registers(model) as bare: ...               # the same weights, no registers
with extra_registers(model, 4) as wider: ...             # the same weights, four tokens more
neurons = register_neurons(model, images)
with registers_at_test_time(model, neurons) as cleaned: ... # outliers move into an added token
```
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prisma_core import hookimpl
from prisma_registers.norms import LayerNorms, TokenNorms, attention_to, token_norms
from prisma_registers.scopes import extra_registers, registers_at_test_time, without_registers
from prisma_registers.sinks import Neuron, register_neurons

if TYPE_CHECKING:
    from typer import Typer


@hookimpl
def prisma_commands(app: Typer) -> None:
    from prisma_registers.command import registers

    app.command()(registers)


__all__ = [
    "token_norms",
    "TokenNorms",
    "LayerNorms",
    "attention_to",
    "without_registers",
    "extra_registers",
    "registers_at_test_time",
    "register_neurons",
    "Neuron",
]
