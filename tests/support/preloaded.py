"""Imported once, in the process that the tests' worker processes are forked from."""

import os

os.environ.update(DS_ACCELERATOR="cpu", TORCHDYNAMO_DISABLE="1", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")

import deepspeed
import deepspeed.ops
import deepspeed.runtime.zero.muon.muon_optimizer  # torch.compile at import: 4 s without TORCHDYNAMO_DISABLE
import deepspeed.runtime.zero.stage3
import deepspeed.runtime.zero.stage_1_and_2
from transformers import LlamaForCausalLM

import callbacks
import recon.cli.fit
import recon.distributed.strategies

deepspeed.ops.__compatible_ops__  # noqa: B018 - runs probes of the compiler

PRELOADED = (callbacks, recon, LlamaForCausalLM)
