// Runs CUDA kernels on one CPU thread. Each CUDA thread of a block is a fiber that runs until it
// waits: at __syncthreads, or in a warp collective (shuffle, ldmatrix, mma, ...) for the other
// lanes. Blocks run one after another. The order in which ready fibers are resumed is a setting: a
// kernel whose barriers are right gives the same bits in every order.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "races.h"

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// What a CUDA thread sees; the scheduler sets threadIdx whenever it resumes one.
inline dim3 threadIdx, blockIdx, blockDim;

namespace emulation {

enum class Order { forward, reverse, random, warp_by_warp, warp_by_warp_reverse };
enum class State { ready, at_barrier, at_collective, done };

// What a lane brings to a collective; `kind` tells whether all lanes are in the same one.
struct Contribution {
  int kind = 0;
  uint32_t words[6] = {};
  const void* pointer = nullptr;
};

constexpr size_t STACK_BYTES = 256 * 1024;

struct Fiber {
  std::unique_ptr<char[]> stack{new char[STACK_BYTES]};
  ucontext_t start;
  jmp_buf resume_point;
  bool started = false;
  State state = State::ready;
  const char* barrier = nullptr;  // "file:line"
  unsigned index = 0;             // thread of the block
  unsigned collectives = 0;       // counted, to alternate between two buffers
  unsigned warp_barriers = 0;     // that it has passed
  std::vector<Copy> open_copies;
  std::vector<std::vector<Copy>> copy_groups;
};

struct Warp {
  Contribution lanes[2][32];
  int arrived = 0;
};

// Settings.
inline Order order = Order::forward;
inline bool eager_copies = false;  // cp.async copies at once, and again when it is waited for
inline int multiprocessors = 1;
inline int capability = 8;  // its major number
inline std::string last_error;

// The block that runs.
inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline Fiber* current = nullptr;
inline unsigned blocks = 0;          // so far
inline unsigned block_barriers = 0;  // of all of them, their starts too
inline std::function<void()> kernel_body;
inline jmp_buf scheduler;

// Leaves the running fiber until the scheduler resumes it. Like resume, not to be inlined: a caller
// of setjmp is compiled without its optimisations.
[[gnu::noinline]] inline void pause() {
  if (_setjmp(current->resume_point) == 0) _longjmp(scheduler, 1);
}

inline void fiber_main() {
  kernel_body();
  for (const std::vector<Copy>& group : current->copy_groups)
    if (!group.empty()) last_error = "a thread ends before it has waited for its copies";
  current->state = State::done;
  pause();
}

[[gnu::noinline]] inline void resume(Fiber& fiber) {
  current = &fiber;
  threadIdx.x = fiber.index;
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.resume_point, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

inline unsigned lane() { return current->index % 32; }

inline void barrier(const char* place) {
  current->state = State::at_barrier;
  current->barrier = place;
  pause();
}

// Waits for the 32 lanes of the warp and returns what they brought.
inline const Contribution* collect(const Contribution& mine) {
  Warp& warp = warps[current->index / 32];
  Contribution* const lanes = warp.lanes[current->collectives++ % 2];
  lanes[lane()] = mine;
  if (++warp.arrived < 32) {
    current->state = State::at_collective;
    pause();
    return lanes;
  }
  warp.arrived = 0;
  for (unsigned i = 0; i < 32; i++) {
    Fiber& other = fibers[current->index / 32 * 32 + i];
    if (other.state == State::at_collective) other.state = State::ready;
    if (lanes[i].kind != mine.kind) last_error = "the lanes of a warp are in different collectives";
  }
  return lanes;
}

inline void warp_barrier(int place) {
  collect({place});
  current->warp_barriers++;
}

inline void prepare(Fiber& fiber, unsigned index) {
  fiber.index = index;
  fiber.started = false;
  fiber.state = State::ready;
  fiber.collectives = fiber.warp_barriers = 0;
  fiber.barrier = nullptr;
  fiber.open_copies.clear();
  fiber.copy_groups.clear();
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.get();
  fiber.start.uc_stack.ss_size = STACK_BYTES;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, fiber_main, 0);
}

// Resumes the threads first .. first + count - 1 that are ready, in order or reversed.
inline bool resume_range(unsigned first, unsigned count, bool reversed) {
  bool any = false;
  for (unsigned i = 0; i < count; i++) {
    Fiber& fiber = fibers[first + (reversed ? count - 1 - i : i)];
    if (fiber.state == State::ready) resume(fiber), any = true;
  }
  return any;
}

// One round over the block in the chosen order; false if nothing was ready.
inline bool run_round(unsigned threads) {
  static uint32_t seed = 1;
  if (order == Order::forward) return resume_range(0, threads, false);
  if (order == Order::reverse) return resume_range(0, threads, true);
  bool any = false;
  if (order == Order::random) {
    seed = seed * 1664525u + 1013904223u;
    for (unsigned i = 0; i < threads; i++)
      any |= resume_range((i * 40503u + seed) % threads, 1, false);
    return any || resume_range(0, threads, false);
  }
  // Each warp goes on as far as it can before the next one runs.
  const bool reversed = order == Order::warp_by_warp_reverse;
  for (unsigned i = 0; i < threads / 32; i++) {
    const unsigned first = (reversed ? threads / 32 - 1 - i : i) * 32;
    while (resume_range(first, 32, reversed)) any = true;
  }
  return any;
}

// Lets the threads go on if all of them wait at the same barrier.
inline bool release_barrier(unsigned threads) {
  for (unsigned i = 0; i < threads; i++) {
    if (fibers[i].state != State::at_barrier) return false;
    if (fibers[i].barrier != fibers[0].barrier) last_error = "threads wait at different barriers";
  }
  for (unsigned i = 0; i < threads; i++) fibers[i].state = State::ready;
  block_barriers++;
  return true;
}

inline void run_block() {
  const unsigned threads = blockDim.x;
  if (threads % 32 != 0) throw std::runtime_error("a block must be whole warps");
  if (fibers.size() < threads) fibers.resize(threads);
  warps.assign(threads / 32, Warp());
  for (unsigned i = 0; i < threads; i++) prepare(fibers[i], i);
  blocks++, block_barriers++;
  while (last_error.empty()) {
    const bool any = run_round(threads);
    unsigned done = 0;
    for (unsigned i = 0; i < threads; i++) done += fibers[i].state == State::done;
    if (done == threads) return;
    if (!release_barrier(threads) && !any) {
      last_error = "no thread can go on: a barrier or a collective that not all of them reach";
    }
  }
  throw std::runtime_error(last_error);
}

}  // namespace emulation
