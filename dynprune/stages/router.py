"""The stage ``router``: trains a router by one method and keeps the checkpoint that ranks held-out pairs best."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from hydra.utils import get_class, instantiate
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import DictConfig

from dynprune.artifacts import Artifact
from dynprune.data.datamodule import StreamData
from dynprune.data.prompts import render_router_input
from dynprune.data.streams import PairStream, RolloutStream
from dynprune.data.tasks import Query
from dynprune.methods.base import RouterTraining
from dynprune.router.checkpoint import load_router, save_router
from dynprune.router.encoder import TextEncoder
from dynprune.router.inputs import RouterInputs
from dynprune.router.policies import Policy, build_policy
from dynprune.router.router import Router
from dynprune.stages.explore import explore
from dynprune.stages.pairs import pairs
from dynprune.stages.run import Run, plain

VERSION = 1
log = logging.getLogger(__name__)
