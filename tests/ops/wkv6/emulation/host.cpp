// The launchers of a file of cuda/gpu, SOURCE, as a plain shared library: the file itself, compiled by
// a C++ compiler.
#include <cuda_runtime.h>

#include SOURCE

// schedule: an emulation::Order; eager_copies: when cp.async copies; multiprocessors, capability: of
// the GPU that the launchers see.
extern "C" void emulation_configure(int schedule, int eager_copies, int multiprocessors,
                                    int capability) {
  emulation::order = static_cast<emulation::Order>(schedule);
  emulation::eager_copies = eager_copies != 0;
  emulation::multiprocessors = multiprocessors;
  emulation::capability = capability;
}
