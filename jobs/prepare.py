"""Prepare text for training: train or load the tokenizer and write token shards.

    python jobs/prepare.py CONFIG.yaml [section.field=value ...]

Prints a table of what the data holds and, last, the folder. The same command again reuses that folder.
"""

from jobs.cli import run_job
from moe_ray.config import Config
from moe_ray.data.prepare import prepare
from moe_ray.data.shards import SPLITS, Index, read_index
from moe_ray.models.hf.resolve import resolve_model
from moe_ray.submission import with_absolute_storage
from moe_ray.telemetry.logs import setup_logging


def main(config: Config) -> None:
    """Prepare `config.data` and print what it holds."""
    setup_logging(config.telemetry)
    folder = prepare(resolve_model(with_absolute_storage(config)), progress=True)
    print(table(read_index(folder)))
    print(folder)


def table(index: Index) -> str:
    """One line a domain and one for all: documents, tokens and bytes a token of each split."""
    header = f"{'domain':<24}" + "".join(f"{split:>30}" for split in SPLITS)
    header += f"\n{'':<24}" + f"{'documents':>10}{'tokens':>12}{'B/token':>8}" * len(SPLITS)
    rows = [_row(index, domain, domain) for domain in index.domains]
    return "\n".join([header, *rows, _row(index, "all", None)])


def _row(index: Index, label: str, domain: str | None) -> str:
    cells = ""
    for split in SPLITS:
        totals = index.totals(split, domain)
        # The end-of-text ids stand for no bytes.
        tokens = max(1, totals.num_tokens - totals.num_documents)
        cells += f"{totals.num_documents:>10,}{totals.num_tokens:>12,}{totals.text_bytes / tokens:>8.2f}"
    return f"{label:<24}{cells}"


if __name__ == "__main__":
    run_job(__doc__, main)
