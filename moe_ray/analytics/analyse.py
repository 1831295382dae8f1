"""From a run, a checkpoint or a Hugging Face folder to its `Analysis`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from moe_ray.analytics.analysis import Analysis, Drift, Missing, PatternProbe, Question, Token
from moe_ray.analytics.collect import collect, collect_drift
from moe_ray.analytics.cost import run_cost
from moe_ray.analytics.counts import MAX_CELLS, DriftChoices, TokenCounts
from moe_ray.analytics.drift import drift
from moe_ray.analytics.held_out import HeldOut, open_held_out, read_held_out
from moe_ray.analytics.labels import Labels, class_labels, domain_labels, position_labels
from moe_ray.analytics.layers import flows, layer_statistics, top_token_ids
from moe_ray.analytics.probes import MIN_LENGTH, probe_patterns
from moe_ray.analytics.specialise import specialisation
from moe_ray.analytics.token_classes import token_texts
from moe_ray.checkpoint.catalog import checkpoint_name, list_steps
from moe_ray.checkpoint.inference import InferenceModel, load_for_inference
from moe_ray.data.tokenizer import Tokenizer
from moe_ray.errors import CheckpointError, MoeRayError
from moe_ray.model_config import ModelConfig
from moe_ray.section import Dtype
from moe_ray.storage import Storage, open_storage
from moe_ray.telemetry.run_log import read_metrics

Progress = Callable[[str, int, int], None]
_OF_TEXT: tuple[Question, ...] = (
    *("layers", "co_activation", "flow", "domain", "token_class", "position", "top_tokens", "drift"),
)
# With fewer permutations no p-value is below 5%.
_MIN_PERMUTATIONS = 20


@dataclass(frozen=True)
class Options:
    """How much is analysed.

    Attributes:
        max_tokens: of held-out text, spread evenly over it.
        earlier: checkpoints before the newest one that tell drift, spread evenly over those that are kept.
        permutations: of labels, at least 20; fewer are made where their tables get too large.
        pairs: prompts of each pattern.
        seed: of all that is random.
        dtype: of the weights, apart from routers.
        data_dir: prepared data to use instead of the run's own.
    """

    max_tokens: int = 1 << 16
    earlier: int = 3
    permutations: int = 200
    pairs: int = 48
    seed: int = 0
    dtype: Dtype = "float32"
    device: str = "cpu"
    data_dir: Path | None = None


def analyse(
    source: str | Path, options: Options | None = None, progress: Progress = lambda what, done, total: None
) -> Analysis:
    """Analyse the newest good checkpoint of a run and its drift since earlier ones, or one checkpoint or folder.

    What cannot be answered, such as drift of a single checkpoint or anything about text that is gone, stands in
    `Analysis.missing` with the reason.

    Args:
        source: as `load_for_inference` takes it.
        progress: called with what is being done, and how much of how much of it is.

    Raises:
        CheckpointError: there is no good checkpoint.
        StorageError: the storage cannot be read now.
    """
    options = options or Options()
    assert options.permutations >= _MIN_PERMUTATIONS
    missing: list[Missing] = []
    newest = load_for_inference(source, options.dtype, options.device)
    config, step, path = newest.config, newest.step, newest.path
    text = _read_text(newest, options, missing)
    found, choices = _look_at(newest, text, options, missing, progress)
    # The memory is for the next model.
    del newest
    run = open_storage(source)
    drifts: tuple[Drift, ...] = ()
    if text is not None and choices is not None:
        older = _older_steps(run, step, options.earlier, missing)
        drifts = _drifts(run, older, text.held_out, (step, choices), config.model, options, missing, progress)
    metrics = read_metrics(run)
    if not metrics:
        missing.append(Missing(question="speed", reason=f"{path.name} has no metrics.jsonl beside it."))
    return Analysis(
        run=config.train.name,
        steps=(*(each.from_step for each in drifts), step),
        router=config.model.router,
        num_experts=config.model.num_experts,
        top_k=config.model.top_k,
        vocab_size=config.model.vocab_size,
        tokens=0 if text is None else text.held_out.tokens_NS.size,
        sequences=0 if text is None else len(text.held_out.tokens_NS),
        sequence_length=config.data.sequence_length,
        drifts=drifts,
        cost=run_cost(config, metrics),
        missing=tuple(missing),
        **found,
    )


@dataclass(frozen=True, eq=False)
class _Text:
    """What is read, and how often each id occurs in the training text."""

    held_out: HeldOut
    counts_V: np.ndarray


def _read_text(checkpoint: InferenceModel, options: Options, missing: list[Missing]) -> _Text | None:
    try:
        data = open_held_out(checkpoint, options.data_dir)
    except MoeRayError as error:
        missing += [Missing(question=question, reason=str(error)) for question in _OF_TEXT]
        return None
    return _Text(read_held_out(data, options.max_tokens), data.token_counts("train"))


def _look_at(
    checkpoint: InferenceModel, text: _Text | None, options: Options, missing: list[Missing], progress: Progress
) -> tuple[dict[str, Any], DriftChoices | None]:
    """The fields of an `Analysis` that one model gives, and its choices."""
    probes: tuple[PatternProbe, ...] = ()
    if checkpoint.config.model.max_sequence_length < MIN_LENGTH:
        reason = f"the model's context has fewer than {MIN_LENGTH} tokens."
        missing.append(Missing(question="probes", reason=reason))
    else:
        probes = probe_patterns(checkpoint.model, checkpoint.tokenizer, options.pairs, options.seed)
    if text is None:
        return {"layers": (), "flows": (), "specialisations": (), "probes": probes}, None
    layers = checkpoint.config.model.moe_layers
    labels = _labels(text, checkpoint, options, missing)
    collected = collect(checkpoint.model, text.held_out.tokens_NS, labels, partial(progress, "routing"))
    if collected.pairs is None:
        reason = f"tables of {checkpoint.config.model.num_experts} experts squared are too large."
        missing += [Missing(question=question, reason=reason) for question in ("co_activation", "flow")]
    top_tokens = _top_tokens(collected.tokens, checkpoint.tokenizer)
    num_tokens, sums, pairs = collected.num_tokens, collected.sums, collected.pairs
    found = {
        "layers": layer_statistics(layers, sums, num_tokens, pairs, top_tokens),
        "flows": () if pairs is None else flows(layers, pairs),
        "specialisations": tuple(specialisation(counts, layers) for counts in collected.labels),
        "probes": probes,
    }
    return found, collected.drift


def _labels(text: _Text, checkpoint: InferenceModel, options: Options, missing: list[Missing]) -> list[Labels]:
    """All kinds of labels that the text has, with as many permutations as there is room for."""
    held_out, model, number, seed = text.held_out, checkpoint.config.model, options.permutations, options.seed
    labels = []
    if len(np.unique(held_out.domains_N)) > 1:
        labels.append(domain_labels(held_out, number, seed))
    else:
        missing.append(Missing(question="domain", reason="the held-out text has one domain."))
    labels.append(class_labels(held_out, checkpoint.tokenizer, text.counts_V, number, seed))
    labels.append(position_labels(held_out, number, seed))
    fitting = []
    for of_kind in labels:
        room = MAX_CELLS // (len(model.moe_layers) * model.num_experts * len(of_kind.names))
        if room >= _MIN_PERMUTATIONS:
            fitting.append(of_kind.first(room))
        else:
            reason = (
                f"{model.num_experts} experts in {len(model.moe_layers)} layers leave no room for permutations."
            )
            missing.append(Missing(question=of_kind.kind, reason=reason))
    return fitting


def _top_tokens(counts: TokenCounts, tokenizer: Tokenizer) -> list[list[list[Token]]]:
    by_layer = top_token_ids(counts)
    ids = sorted({token_id for layer in by_layer for expert in layer for token_id, _, _ in expert})
    texts = dict(zip(ids, token_texts(tokenizer, ids), strict=True))
    return [
        [
            [Token(token_id=i, text=texts[i], count=count, lift=lift) for i, count, lift in expert]
            for expert in layer
        ]
        for layer in by_layer
    ]


def _older_steps(run: Storage, newest: int, wanted: int, missing: list[Missing]) -> list[int]:
    """Steps of earlier checkpoints, spread evenly, newest first."""
    steps = [step for step in list_steps(run) if step < newest]
    if not steps and wanted:
        missing.append(Missing(question="drift", reason="there is no earlier checkpoint."))
    count = min(wanted, len(steps))
    return [steps[i * len(steps) // count] for i in reversed(range(count))]


def _drifts(
    run: Storage,
    older: Sequence[int],
    text: HeldOut,
    newest: tuple[int, DriftChoices],
    model: ModelConfig,
    options: Options,
    missing: list[Missing],
    progress: Progress,
) -> tuple[Drift, ...]:
    """Drift between neighbours, oldest first; a checkpoint that is damaged or differs is left out, and said."""
    drifts = []
    step, after = newest
    for earlier in older:
        try:
            checkpoint = load_for_inference(run.child(checkpoint_name(earlier)).uri, options.dtype, options.device)
        except CheckpointError as error:
            missing.append(Missing(question="drift", reason=str(error)))
            continue
        what = f"routing of step {earlier}"
        before = collect_drift(checkpoint.model, text.tokens_NS, partial(progress, what))
        drifts.append(drift(before, after, (earlier, step), model.moe_layers, model.num_experts))
        step, after = earlier, before
    return tuple(reversed(drifts))
