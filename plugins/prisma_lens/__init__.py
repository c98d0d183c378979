"""Reading: lenses, attribution, CLIP's decomposition, heads, saliency and probes, as functions of a model and images.

```python
logit_lens(model, image)                                       # [layer batch pos class]
attribute(model, image, "cat", against="dog", by="head")       # [layer head batch class]
segment(clip, image, ["a photo of a cat", "a photo of a dog"]) # [batch row column class]
```
"""

from prisma_lens.attribute import attribute, names_for
from prisma_lens.bridge import captum_inputs
from prisma_lens.composition import composition
from prisma_lens.decomposition import head_outputs, mean_ablation, segment
from prisma_lens.flow import attention_flow
from prisma_lens.gradients import grad_cam, gradient_x_activation, integrated_gradients
from prisma_lens.heads import head_scores, rollout
from prisma_lens.induction import induction
from prisma_lens.lens import LENS_NAMES, Lens, logit_lens, token_logits
from prisma_lens.metrics import Metric, as_metric, logit, logit_difference
from prisma_lens.probes import probe, probe_harvest
from prisma_lens.readouts import Readout, readout
from prisma_lens.relevance import relevance
from prisma_lens.second_order import neuron_outputs, second_order, second_order_names
from prisma_lens.textspan import name_heads, textspan
from prisma_lens.tuned import TunedLens, fit_tuned_lens, lens_kl, unembed_hash

__all__ = [
    "logit_lens",
    "token_logits",
    "Lens",
    "LENS_NAMES",
    "readout",
    "Readout",
    "TunedLens",
    "fit_tuned_lens",
    "lens_kl",
    "unembed_hash",
    "attribute",
    "names_for",
    "head_outputs",
    "mean_ablation",
    "segment",
    "textspan",
    "name_heads",
    "second_order",
    "second_order_names",
    "neuron_outputs",
    "head_scores",
    "rollout",
    "attention_flow",
    "relevance",
    "composition",
    "induction",
    "captum_inputs",
    "gradient_x_activation",
    "integrated_gradients",
    "grad_cam",
    "probe",
    "probe_harvest",
    "as_metric",
    "logit",
    "logit_difference",
    "Metric",
]
