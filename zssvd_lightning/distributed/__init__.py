"""All that the processes of a compression say to each other, but for checkpoints: the only place with collectives.

A `Team` is the processes that compress one model together. What a process holds of a layer depends on how it trains:

|            | weights and factors | second moments, gradients | batches          |
|------------|---------------------|---------------------------|------------------|
| `Team`     | whole               | whole                     | all              |
| `Replicas` | whole, all the same | sums over its own batches | its own          |
| `Shards`   | some rows           | the same rows of the sums | its own          |

Second moments of the gradients by outputs are whole sums over its own batches at every process of either.

Every layer has an owner, the process that brings its weight and statistics together, decomposes it and hands out the
factors. Methods marked as collective must be called by all processes of the team, in the same order.
"""

from zssvd_lightning.distributed.replicas import Replicas
from zssvd_lightning.distributed.shards import Shards
from zssvd_lightning.distributed.team import Team

__all__ = ["Replicas", "Shards", "Team"]
