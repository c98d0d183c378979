"""Right answers along a training, at its checkpoints."""

from prisma_patch import over_checkpoints
from prisma_toy import draw_motions, normalise, series

motions = draw_motions(64, seed=1)
checkpoints = {step: f"toy:motion@{step}" for step in series("motion")}
right = over_checkpoints(
    checkpoints, lambda model: (model(normalise(motions.video)).argmax(-1) == motions.direction).float().mean()
)
figure = right.plot()
