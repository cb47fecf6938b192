"""A net in chunks whose blocks are sharded by FSDP2, against one process with the whole batch, in float64."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import fsdp_cases
import pytest
import torch
from fsdp_cases import BLOCKS, CASES, SIZE, WAYS, make_batch, make_net
from ranks import on_ranks, under_torchrun

from apinet_head import api_loss

TOLERANCE = {"rtol": 0, "atol": 1e-10}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_ranks(2, CASES, tmp_path_factory.mktemp("fsdp"))


@pytest.fixture(scope="module")
def alone():
    """Loss and gradients of one process with the whole batch, which has no chunks either."""
    net, (images, labels) = make_net(None, 1, gather=False), make_batch(2)
    loss = api_loss(net(images, labels))
    loss.backward()
    return {"loss": loss.detach(), "gradients": {name: p.grad for name, p in net.named_parameters()}}


def assert_as_alone(found, alone):
    for rank in found:
        assert not isinstance(rank, str), rank
        torch.testing.assert_close(rank["gradients"], alone["gradients"], **TOLERANCE)
    torch.testing.assert_close(sum(rank["loss"] for rank in found) / len(found), alone["loss"], **TOLERANCE)


@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize(("chunk_size", "keep"), WAYS)
def test_sharded_net_in_chunks_is_the_net_on_the_whole_batch(chunk_size, keep, reshard, ranks, alone):
    assert_as_alone([rank[f"{chunk_size} {keep} {reshard}"] for rank in ranks], alone)


@pytest.mark.skipif(torch.__version__ < "2.6", reason="counted as FSDP2 does it from PyTorch 2.6 on")
@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize(("chunk_size", "keep"), WAYS)
def test_all_gathers_of_weights_are_those_that_the_docs_tell(chunk_size, keep, reshard, ranks):
    chunks = SIZE // (chunk_size or SIZE)
    # Those of the net are gathered once. A block's are gathered for each chunk in forward, unless they stay; and in
    # backward, where the first block, of which the next chunk's recomputation begins, stays gathered.
    forward = BLOCKS * chunks if reshard else BLOCKS
    backward = (BLOCKS if reshard else 0) + (BLOCKS - 1) * (chunks - 1)
    assert ranks[0][f"{chunk_size} {keep} {reshard}"]["gathers"] == 1 + forward + backward


def test_buffers_may_be_distributed_tensors(ranks):
    for rank in ranks:
        found = rank["distributed tensors"]
        assert not isinstance(found, str), found
        assert all(torch.equal(one, other) for one, other in zip(*found.values(), strict=True))


@under_torchrun
def test_two_nodes_of_torchrun(tmp_path, alone):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    command += ["--master-addr=localhost", f"--master-port={port}"]
    paths = [str(Path(fsdp_cases.__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    nodes = [
        subprocess.Popen([*command, f"--node-rank={node}", fsdp_cases.__file__, str(tmp_path)], env=environment)
        for node in range(2)
    ]
    try:
        assert [node.wait(timeout=120) for node in nodes] == [0, 0]
    finally:
        for node in nodes:
            node.kill()
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert [rank["nodes"] for rank in found] == [2, 2]
    assert_as_alone(found, alone)
