"""Decoder-only transformer whose feed-forward layers are dense or Mixture-of-Experts; written for one device.

Shapes: B batch, S sequence, T tokens (B*S), D model dim, E experts, V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_ray.config import ModelConfig
from moe_ray.errors import ConfigError
from moe_ray.models.attention import Attention, LatentAttention, LayerCache
from moe_ray.models.experts import GroupedExperts
from moe_ray.models.feed_forward import FeedForward
from moe_ray.models.moe import MoE
from moe_ray.models.rope import Rope, rope_cos_sin
from moe_ray.models.router import Router, Routing
from moe_ray.models.seeding import seeded_generator


@dataclass(frozen=True)
class Output:
    """Result of a forward pass.

    Attributes:
        hidden_BSD: normalised final hidden states; `Transformer.logits` maps them to the vocabulary.
        routings: one for each MoE layer, in order.
    """

    hidden_BSD: Tensor
    routings: tuple[Routing, ...]


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = (LatentAttention if config.attention == "mla" else Attention)(config, layer)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.ffn = MoE(config) if layer in config.moe_layers else FeedForward(config, config.dense_dim)

    def forward(
        self, x_BSD: Tensor, tokens_BS: Tensor, rope: Rope, cache: LayerCache | None
    ) -> tuple[Tensor, Routing | None]:
        """Returns the residual stream and, of a MoE block, the routing."""
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), rope, cache)
        normed_BSD = self.ffn_norm(x_BSD)
        if isinstance(self.ffn, MoE):
            y_BSD, routing = self.ffn(normed_BSD, tokens_BS, dropless=cache is not None)
            return x_BSD + y_BSD, routing
        return x_BSD + self.ffn(normed_BSD), None


class Transformer(nn.Module):
    """The language model. Build it with `build_model`, which also initialises it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        # Given its weight, Embedding skips an initialisation that on the meta device costs seconds of imports.
        self.embed = nn.Embedding(
            config.vocab_size, config.dim, _weight=torch.empty(config.vocab_size, config.dim)
        )
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.head = None if config.tie_embeddings else nn.Linear(config.dim, config.vocab_size, bias=False)

    def forward(
        self,
        tokens_BS: Tensor,
        positions_BS: Tensor | None = None,
        caches: Sequence[LayerCache] | None = None,
    ) -> Output:
        """Hidden states of `tokens_BS` (int64).

        Args:
            tokens_BS: token ids; B may be 0.
            positions_BS: position of each token in its sequence; default 0 to S - 1.
            caches: one a layer, for generation; without them attention is causal over the S tokens.
        """
        if positions_BS is None:
            positions_BS = torch.arange(tokens_BS.shape[1], device=tokens_BS.device).unsqueeze(0)
        rope = rope_cos_sin(positions_BS, self.config)
        x_BSD = self.embed(tokens_BS)
        routings = []
        for index, layer in enumerate(self.layers):
            x_BSD, routing = layer(x_BSD, tokens_BS, rope, caches[index] if caches else None)
            if routing is not None:
                routings.append(routing)
        return Output(self.norm(x_BSD), tuple(routings))

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits of hidden states of shape [..., D]: [..., V]."""
        return F.linear(hidden, self.embed.weight if self.head is None else self.head.weight)

    def moe_modules(self) -> Iterator[MoE]:
        """The MoE layers, in the order of `Output.routings`."""
        for layer in self.layers:
            if isinstance(layer, Block) and isinstance(layer.ffn, MoE):
                yield layer.ffn


def build_model(config: ModelConfig, seed: int, device: torch.device | str = "cpu") -> Transformer:
    """A model with initial weights, in float32."""
    with torch.device("meta"):
        model = Transformer(config)
    materialize(model, device)
    init_weights(model, config, seed)
    return model


def materialize(part: nn.Module, device: torch.device | str) -> None:
    """Give a module built on the meta device memory, in place; `Module.to_empty` would import torch.compile."""
    for module in part.modules():
        for name, parameter in module.named_parameters(recurse=False):
            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            setattr(module, name, nn.Parameter(empty))
        for name, buffer in module.named_buffers(recurse=False):
            # Values that nobody sets show, those of floating point at least.
            fill = math.nan if buffer.is_floating_point() else 0
            setattr(module, name, torch.full(buffer.shape, fill, dtype=buffer.dtype, device=device))


@torch.no_grad()
def init_weights(part: nn.Module, config: ModelConfig, seed: int, prefix: str = "") -> None:
    """Initialise each tensor from the seed, its name and, for experts, their global index.

    So the same seed gives the same model however the experts are sharded, as a whole or part by part. Matrices
    are normal with `init_std`; those that write to the residual stream are scaled by 1 / sqrt(2 * num_layers)
    (GPT-2). Norms are ones; biases and attention sinks zeros.

    Args:
        part: the model, or the module of it that is named `prefix`.
    """
    std = config.init_std
    residual_std = std / math.sqrt(2 * config.num_layers)
    named_modules = list(part.named_modules(prefix=prefix))
    for module_name, module in named_modules:
        for name, parameter in module.named_parameters(recurse=False):
            full_name = f"{module_name}.{name}"
            scale = residual_std if module_name.endswith(("wo", "w_out")) or name == "w_out_eDF" else std
            if isinstance(module, nn.RMSNorm | nn.LayerNorm) and name == "weight":
                parameter.fill_(1.0)
            elif parameter.ndim <= 1 or name.startswith("b_"):
                parameter.zero_()
            elif isinstance(module, GroupedExperts):
                for local, weight in enumerate(parameter):
                    _normal_(weight, scale, f"{seed}/{full_name}/{module.first_expert + local}")
            else:
                _normal_(parameter, scale, f"{seed}/{full_name}")
    for module_name, module in named_modules:
        if isinstance(module, Router):
            module.init_state(f"{seed}/{module_name}")
            _check_buffers(module, config.router)


def _check_buffers(router: Router, name: str) -> None:
    for buffer_name, buffer in router.named_buffers():
        if buffer.is_floating_point() and buffer.isnan().any():
            raise ConfigError(
                f"model.router={name!r} leaves its buffer {buffer_name} without values.",
                "set it in the method init_state, which begins with super().init_state(key): values given in "
                "the constructor do not last.",
            )


def _normal_(tensor: Tensor, std: float, key: str) -> None:
    tensor.copy_(torch.empty(tensor.shape).normal_(0.0, std, generator=seeded_generator(key)))
