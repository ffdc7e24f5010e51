"""Communication between the processes of a compression, except for checkpoints; the only place with collectives.

A `Team` is the group of processes that compress one model together. The part of a layer that each process holds
depends on the type of team:

|            | weights and factors | second moments, gradients    | batches            |
|------------|---------------------|------------------------------|--------------------|
| `Team`     | whole               | whole                        | all                |
| `Replicas` | whole, identical    | whole sums over its batches  | a different subset |
| `Shards`   | some rows           | the same rows of total sums  | a different subset |

Second moments of the output gradients are whole sums over the batches of one process, in `Replicas` and in `Shards`.

Every layer has an owner: the process that gathers its weight and statistics, decomposes the weight and sends out the
factors. All processes of the team must call the methods marked "Collective", in the same order.
"""

from zssvd_lightning.distributed.layer_set import LayerSet
from zssvd_lightning.distributed.replicas import Replicas
from zssvd_lightning.distributed.shards import Shards
from zssvd_lightning.distributed.team import Team

__all__ = ["LayerSet", "Replicas", "Shards", "Team"]
