"""What the model costs, beside dense ones, and how fast it should be."""

from moe_ray.analytics.analysis import Analysis
from moe_ray.analytics.cost_table import Cost, ModelCost
from moe_ray.analytics.report.parts import Figure, Part, Table
from moe_ray.analytics.report.spec import COLOURS, SHAPES, by_name, short

_NAMES = {"moe": "this model"}


def cost_parts(analysis: Analysis) -> list[Part]:
    """Figures of the section on cost."""
    cost = analysis.cost
    if cost is None:
        return []
    parts: list[Part] = [_against_dense(cost)]
    if any(model.speeds for model in cost.models):
        parts.append(_speeds(cost))
    parts.append(_communication(cost))
    return parts


def _quantities(model: ModelCost) -> dict[str, float]:
    return {
        "parameters": model.params,
        "active parameters": model.active_params,
        "training FLOPs a token": model.training_flops,
        "prefill FLOPs a token": model.prefill_flops,
        "decode FLOPs a token": model.decode_flops,
        "memory of the weights": model.memory.weights,
        "memory of the optimizer": model.memory.optimizer,
    }


def _against_dense(cost: Cost) -> Figure:
    ours = _quantities(cost.models[0])
    names = [_NAMES.get(model.name, model.name) for model in cost.models]
    values = [
        {"quantity": quantity, "model": name, "ratio": short(value / ours[quantity]), "value": short(value)}
        for name, model in zip(names, cost.models, strict=True)
        for quantity, value in _quantities(model).items()
        if ours[quantity]
    ]
    encoding = {
        "y": {"field": "quantity", "type": "nominal", "sort": None, "title": None, "axis": {"grid": True}},
        "x": {
            "field": "ratio",
            "type": "quantitative",
            "title": "times this model's",
            "scale": {"type": "log", "nice": False, "padding": 12},
        },
        "color": {
            "field": "model",
            "type": "nominal",
            "title": None,
            "scale": by_name(names, COLOURS),
            "legend": {"columns": {"expr": "width < 420 ? 1 : 3"}},
        },
        "shape": {"field": "model", "type": "nominal", "title": None, "scale": by_name(names, SHAPES)},
        "tooltip": [{"field": name, "type": "nominal"} for name in ("model", "quantity", "value", "ratio")],
    }
    mark = {"type": "point", "filled": True, "size": 90, "opacity": 0.85}
    spec = {
        "width": "container",
        "height": 24 * len(ours),
        "data": {"values": values},
        "mark": mark,
        "encoding": encoding,
    }
    text = (
        "Dense models of equal active and of equal total size over this one; the axis is logarithmic. Attention "
        f"is counted over {cost.context:,} tokens, numbers are in {cost.dtype}."
    )
    columns = [_quantities(model) for model in cost.models]
    rows = [(quantity, *(short(column[quantity]) for column in columns)) for quantity in ours]
    return Figure("cost", "Cost beside dense models", text, spec, Table(("", *names), rows))


def _speeds(cost: Cost) -> Figure:
    ours = cost.models[0].speeds
    values = [{"profile": speed.profile, "kind": "predicted", "value": short(speed.training)} for speed in ours]
    measured = cost.measured
    if measured is not None:
        values += [{"profile": "this run", "kind": "measured", "value": short(measured.training)}]
    scale = by_name(["predicted", "measured"], COLOURS)
    shape = by_name(["predicted", "measured"], SHAPES)
    encoding = {
        "y": {"field": "profile", "type": "nominal", "sort": None, "title": None, "axis": {"grid": True}},
        "x": {
            "field": "value",
            "type": "quantitative",
            "title": "tokens/s of training",
            "scale": {"type": "log", "nice": True},
            "axis": {"tickCount": 4},
        },
        "color": {"field": "kind", "type": "nominal", "title": None, "scale": scale},
        "shape": {"field": "kind", "type": "nominal", "title": None, "scale": shape},
        "tooltip": [{"field": name, "type": "nominal"} for name in ("profile", "kind", "value")],
    }
    spec = {
        "width": "container",
        "height": 26 * len(values),
        "data": {"values": values},
        "mark": {"type": "point", "filled": True, "size": 90},
        "encoding": encoding,
    }
    text = f"Training with {cost.world_size} ranks and ep={cost.ep}, as each hardware profile predicts it"
    ratios = measured.predicted_over_measured if measured is not None else {}
    text += ", beside the median of what this run reached." if measured is not None else "; nothing was measured."
    rows = [
        (
            speed.profile,
            *map(short, (speed.training, speed.prefill, speed.decode)),
            speed.training_bound,
            "yes" if speed.fits else "no",
            short(ratios[speed.profile]) if speed.profile in ratios else None,
        )
        for speed in ours
    ]
    columns = (
        "profile",
        "training",
        "prefill",
        "decode",
        "training is limited by",
        "fits",
        "predicted / measured",
    )
    note = "Tokens/s. " + " ".join(f"{each.name}: {each.source}." for each in cost.profiles)
    return Figure("speed-predicted", "Predicted and measured speed", text, spec, Table(columns, rows, note=note))


def _communication(cost: Cost) -> Table:
    sent = cost.models[0].communication
    rows = [(name.replace("_", " "), short(value)) for name, value in sent.model_dump().items()]
    note = (
        f"Bytes that leave a rank with {cost.world_size} ranks and ep={cost.ep}; of a token but for the last row."
    )
    return Table(("", "bytes"), rows, "Communication", note, "communication")
