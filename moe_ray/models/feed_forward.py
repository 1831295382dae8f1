"""The dense feed-forward: of dense layers, and of shared experts.

Shapes: D model dim, F hidden dim, G = 2 * F where gated, else F.
"""

from torch import Tensor, nn

from moe_ray.config import ModelConfig
from moe_ray.models.activations import make_activation


class FeedForward(nn.Module):
    """Two linear maps with the activation of the experts between them, gate and up projection as one."""

    def __init__(self, config: ModelConfig, hidden: int) -> None:
        super().__init__()
        self.activation = make_activation(config)
        self.w_in = nn.Linear(config.dim, 2 * hidden if config.is_gated else hidden, bias=False)
        self.w_out = nn.Linear(hidden, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Rows of shape [..., D] to rows of the same shape."""
        return self.w_out(self.activation.forward(self.w_in(x)))
