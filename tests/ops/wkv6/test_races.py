"""The emulation notices every race on shared memory, in whatever order the threads run."""

import ctypes
import itertools

import pytest
import torch
from helpers.emulation import ORDERS, compile_emulated

# Each thread copies 16 bytes, reads those of a thread of another warp, and copies others over its
# own, which it then shares with its neighbour.
KERNEL = """
#include <cuda_runtime.h>
#include "device.cuh"
#include "ptx.cuh"

enum Fault { NONE, NO_WAIT, LATE_WAIT, NO_BARRIER, EARLY_COPY, EARLY_READ, EARLY_WRITE,
             NO_WARP_BARRIER, EARLY_END };

struct Args { int fault; const float* in; float* out; };

__global__ void kernel(Args args) {
  float* const memory = &finchtune::shared_memory<float>();
  const int i = threadIdx.x, fault = args.fault;
  float* const own = memory + 4 * i;
  float* const across = memory + 4 * (i ^ 32);
  wkv6::async_copy_16(own, args.in + 4 * i, true);
  wkv6::async_commit();
  if (fault != NO_WAIT && fault != LATE_WAIT) wkv6::async_wait<0>();
  if (fault != NO_BARRIER) __syncthreads();
  if (fault == LATE_WAIT) wkv6::async_wait<0>();
  float sum = across[0];
  if (fault != EARLY_COPY) __syncthreads();
  wkv6::async_copy_16(own, args.in + 4 * i + 256, i != 0);
  wkv6::async_commit();
  if (fault == EARLY_READ) sum += own[1];
  if (fault == EARLY_WRITE) own[0] = 1.0f;
  if (fault != EARLY_END) wkv6::async_wait<0>();
  if (fault != NO_WARP_BARRIER) __syncwarp();
  if (fault != EARLY_END) sum += memory[4 * (i ^ 1) + 2];
  args.out[i] = sum;
}

extern "C" int run(int fault, const float* in, float* out) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(2), config.blockDim = dim3(64), config.dynamicSmemBytes = 1024;
  return cudaLaunchKernelEx(&config, kernel, Args{fault, in, out});
}

extern "C" const char* error_text() { return cudaGetErrorString(cudaErrorLaunchFailure); }
"""
FAULTS = {
    "nothing": "",
    "no wait": "touched while it is copied to",
    "a wait behind the barrier": "of shared memory",
    "no barrier": "a race with",
    "copied over while others read": "of shared memory",
    "read before the wait": "touched while it is copied to",
    "written before the wait": "touched while it is copied to",
    "no barrier in the warp": "of shared memory",
    "an end without a wait": "a thread ends before it has waited",
}


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("races")
    (folder / "kernel.cu").write_text(KERNEL)
    library = compile_emulated(str(folder / "kernel.cu"), folder / "libraces.so")
    library.error_text.restype = ctypes.c_char_p
    return library


@pytest.mark.parametrize("fault", FAULTS)
def test_a_race_is_noticed_in_every_order(library, fault):
    given, got = torch.rand(512), torch.empty(64)
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in (given, got)]
    for order, eager in itertools.product(range(len(ORDERS)), (False, True)):
        library.emulation_configure(order, eager, 1, 8)
        error = library.run(list(FAULTS).index(fault), *pointers)
        text = library.error_text().decode() if error else ""
        assert FAULTS[fault] in text, (order, eager, text)
        assert bool(text) == bool(FAULTS[fault]), text
    if fault == "nothing":
        threads = torch.arange(64)
        neighbours = given[258 + 4 * (threads ^ 1)].where(threads != 1, 0.0)
        torch.testing.assert_close(got, given[4 * (threads ^ 32)] + neighbours)
