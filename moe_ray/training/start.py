"""The weights of a run before its first step."""

from moe_ray.models.hf.upcycle import load_start
from moe_ray.parallel.layout import copy_weights
from moe_ray.parallel.shard import build_sharded_model
from moe_ray.training.step import Trainer


def start_weights(trainer: Trainer) -> None:
    """Give the initialised model of this rank the weights of `model.init_from` or `model.upcycle_from`, if set.

    Where FSDP2 shards the model, they are read into a second one with whole parameters, which takes 4 bytes a
    parameter for as long as this runs: a folder's tensors are cut otherwise than FSDP2 cuts ours.

    Raises:
        CheckpointError: a file is missing or damaged, or does not fit the model.
    """
    config, model, mesh = trainer.config, trainer.model, trainer.mesh
    is_sharded = config.parallel.shard_dense or config.parallel.shard_experts
    if not is_sharded:
        load_start(model, config.train.seed)
    elif config.model.init_from is not None or config.model.upcycle_from is not None:
        whole = build_sharded_model(config.model, config.train.seed, mesh, trainer.clock)
        load_start(whole, config.train.seed)
        copy_weights(whole, model, mesh)
