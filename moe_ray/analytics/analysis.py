"""What is known about the routing of a run, as one JSON-ready object: `Analysis.model_dump_json` and back.

Shares are in [0, 1], entropies and information in bits unless they are normalised. Experts are numbered within
their layer, layers are blocks of the model from 0, and only those with experts occur. p-values are corrected for
all that stand beside them, as their class says. Shapes: E experts, M labels.
"""

from typing import Literal

from moe_ray.analytics.cost_table import Cost
from moe_ray.analytics.part import Part, Real

FORMAT = 1
SIGNIFICANT = 0.05
LabelKind = Literal["domain", "token_class", "position"]
Question = Literal[
    "layers",
    "co_activation",
    "flow",
    "domain",
    "token_class",
    "position",
    "top_tokens",
    "drift",
    "probes",
    "speed",
]


class Link(Part):
    """Tokens that chose expert `source` and expert `target`."""

    source: int
    target: int
    tokens: int


class Links(Part):
    """The largest cells of an E x E table of tokens, largest first.

    Attributes:
        share: of the sum of all cells, that of those which are listed; 1 if all are.
    """

    links: tuple[Link, ...]
    share: Real


class Token(Part):
    """A token that an expert gets more often than others do.

    Attributes:
        text: as the tokenizer decodes it.
        count: how often the expert was chosen for it.
        lift: its share of the expert's tokens over its share of all.
    """

    token_id: int
    text: str
    count: int
    lift: Real


class LayerStatistics(Part):
    """How one layer routed the held-out text.

    Attributes:
        tokens_per_expert: tokens that chose each expert, dropped ones included.
        load: the same as shares of their sum.
        load_variance: of `load` over experts.
        load_cv: standard deviation over mean of the load; 0 is balanced.
        load_max_over_mean: load of the busiest expert over the mean.
        marginal_entropy_bits: of the mean over tokens of the router's distribution: is every expert used?
        marginal_entropy: the same over log2 E, 1 is even.
        token_entropy_bits: mean over tokens of the entropy of the router's distribution: is the router undecided?
        token_entropy: the same over log2 E; `routing_entropy` of metrics.jsonl.
        dead_experts: that no token chose.
        overloaded_experts: with more than twice the mean load.
        dropped_fraction: as in metrics.jsonl.
        confidence: mean of the largest probability of a token.
        margin: mean of the largest less the second largest, which is 0 with one expert.
        choice_overlap: 1 less the total variation distance between the distributions of first and second
            choices over experts: 1 if each expert is second as often as first; None if no token has two.
        choice_dependence: mutual information of first and second choice over the entropy of the second: 1 if the
            first determines the second; None if no token has two, or all have the same second.
        co_activation: tokens that chose both, `source` < `target`; None if it was left out.
        top_tokens: by expert, those that tell most about it.
    """

    layer: int
    tokens_per_expert: tuple[int, ...]
    load: tuple[Real, ...]
    load_variance: Real
    load_cv: Real
    load_max_over_mean: Real
    marginal_entropy_bits: Real
    marginal_entropy: Real
    token_entropy_bits: Real
    token_entropy: Real
    dead_experts: tuple[int, ...]
    overloaded_experts: tuple[int, ...]
    dropped_fraction: Real
    confidence: Real
    margin: Real
    choice_overlap: Real | None
    choice_dependence: Real | None
    co_activation: Links | None
    top_tokens: tuple[tuple[Token, ...], ...]


class Flow(Part):
    """Where the tokens of an expert go in the next layer with experts.

    Attributes:
        links: `source` in `layer`, `target` in `next_layer`.
        dependence: mutual information between the experts of both layers, each token's choices weighted alike,
            in bits.
    """

    layer: int
    next_layer: int
    links: Links
    dependence_bits: Real


class ExpertPreference(Part):
    """The label that stands out most in an expert.

    Attributes:
        label: the one with the largest z; None for an expert without tokens.
        share: of the expert's routing weight, that of tokens with this label.
        lift: `share` over the share among all experts of the layer.
        z: excess over the permuted labels in their standard deviations.
        p_value: corrected over all experts, labels and layers of its kind (Westfall and Young 1993, max-T).
    """

    expert: int
    label: str | None
    share: Real
    lift: Real
    z: Real
    p_value: Real

    @property
    def is_significant(self) -> bool:
        """Whether chance makes such an excess in less than 5% of all analyses."""
        return self.p_value <= SIGNIFICANT


class LayerSpecialisation(Part):
    """How much of a token's label the experts of a layer know.

    Attributes:
        bits: mutual information between expert, weighted by routing, and label.
        baseline_bits: its mean over permuted labels.
        excess_bits: `bits` less `baseline_bits`.
        p_value: corrected over the layers of its kind, as above.
        shares: share of each label in each expert's routing weight, E x M; empty if it was too large.
        experts: one for each.
    """

    layer: int
    bits: Real
    baseline_bits: Real
    excess_bits: Real
    p_value: Real
    shares: tuple[tuple[Real, ...], ...]
    experts: tuple[ExpertPreference, ...]

    @property
    def is_significant(self) -> bool:
        """Whether chance makes so much information in less than 5% of all analyses."""
        return self.p_value <= SIGNIFICANT


class Specialisation(Part):
    """Specialisation of all layers by one kind of label.

    Attributes:
        labels: M names.
        label_shares: share of each among the tokens.
        label_bits: entropy of the labels, which `bits` of a layer cannot exceed.
        permutations: how many made the baseline.
        units: how many documents, or parts of them, the permutations kept together.
        permuted: in words, what was permuted.
    """

    kind: LabelKind
    labels: tuple[str, ...]
    label_shares: tuple[Real, ...]
    label_bits: Real
    permutations: int
    units: int
    permuted: str
    layers: tuple[LayerSpecialisation, ...]


class LayerDrift(Part):
    """How differently two checkpoints route the same tokens in one layer.

    Attributes:
        changed: share of tokens whose set of experts is another.
        jaccard: mean over tokens of common over all experts of both sets.
        first_changed: share of tokens whose first choice is another.
        swapped: share of tokens whose first and second choice have changed places; None if no token has two.
    """

    layer: int
    changed: Real
    jaccard: Real
    first_changed: Real
    swapped: Real | None


class Drift(Part):
    """From one analysed checkpoint to the next one, on `tokens` held-out tokens."""

    from_step: int
    to_step: int
    tokens: int
    layers: tuple[LayerDrift, ...]


class ExpertEffect(Part):
    """An expert's part in a pattern.

    Attributes:
        share, control_share: of the routing weight of the measured tokens, with the pattern and without.
        effect: `share` less `control_share`.
        z: sum over root of the sum of squares of the differences of the pairs.
        p_value: by flipping the signs of pairs, corrected over all experts and layers (max-T, two-sided).
    """

    layer: int
    expert: int
    share: Real
    control_share: Real
    effect: Real
    z: Real
    p_value: Real

    @property
    def is_significant(self) -> bool:
        """Whether chance makes such an effect in less than 5% of all probes."""
        return self.p_value <= SIGNIFICANT


class PatternProbe(Part):
    """Which experts serve a pattern: prompts that have it against prompts of the same length that do not.

    Attributes:
        description: what the prompts are, and what differs in their controls.
        pairs: of a prompt and its control.
        tokens: measured in each of both.
        experts: all that are significant, and the strongest of each layer; largest effect first.
    """

    pattern: str
    description: str
    pairs: int
    tokens: int
    experts: tuple[ExpertEffect, ...]


class Missing(Part):
    """A question that could not be answered, or not in full, and why."""

    question: Question
    reason: str


class Analysis(Part):
    """All of it, of the newest checkpoint analysed.

    Attributes:
        run: name of the run.
        steps: of the analysed checkpoints, oldest first; statistics are those of the last.
        tokens: held-out tokens in `sequences` windows of `sequence_length`.
        layers: one for each layer with experts; empty without text.
        flows: one for each pair of adjacent ones.
        missing: everything that is not here, with the reason.
    """

    format: Literal[1] = FORMAT
    run: str
    steps: tuple[int, ...]
    router: str
    num_experts: int
    top_k: int
    vocab_size: int
    tokens: int
    sequences: int
    sequence_length: int
    layers: tuple[LayerStatistics, ...]
    flows: tuple[Flow, ...]
    specialisations: tuple[Specialisation, ...]
    drifts: tuple[Drift, ...]
    probes: tuple[PatternProbe, ...]
    cost: Cost | None
    missing: tuple[Missing, ...]
