"""A name that comes from outside leads to no file but those it is meant for."""

import json
from pathlib import Path

import httpx
import pytest

from moe_ray.checkpoint.manifest import MANIFEST
from moe_ray.checkpoint.catalog import read_manifest
from moe_ray.config import build_config
from moe_ray.data.shards import INDEX_NAME, read_index
from moe_ray.errors import CheckpointError, ConfigError, DataError
from moe_ray.serve_config import ServeConfig
from moe_ray.serving.access import open_access
from moe_ray.serving.api_keys import make_key
from tests.chat_model import NAME, load_chat_model, served, write_chat_folder
from tests.tiny import copy_corpus, train_here
